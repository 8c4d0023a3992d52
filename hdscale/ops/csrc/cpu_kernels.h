// What the CPU kernels of every instruction set offer, and the arguments they take. Plain data: no tensor library here.
//
// Shape legend: N layers, B instances, T tokens, D model size, A adapter size, K hypernetwork bottleneck.
#pragma once
#include <cstdint>

namespace hdscale {

enum class Element { float32, bfloat16 };

// Runs task(0..count-1), each exactly once, on however many threads there are.
struct Pool {
  int64_t workers;
  void (*run)(int64_t count, void (*task)(int64_t index, void* context), void* context);
};

struct Sizes {
  int64_t B, T, D, A, K;
};

// y = ReLU(x down + hidden_bias) up + out_bias, with down = W_down code + b_down and up = W_up code + b_up. The generated
// biases are float32 whatever the element: their gradients are sums over few numbers, where rounding would show.
struct ForwardArguments {
  Sizes sizes;
  Element element;
  const void *x, *code, *down_weight, *down_bias, *up_weight, *up_bias;
  const float *hidden_bias, *out_bias;  // [B, A], [B, D]
  void *y, *hidden;  // [B, T, D], [B, T, A]
};

// dz = (dy up^T) where hidden > 0, dx = dz down^T, and dz's sum over the tokens, taken before dz is rounded.
struct BackwardArguments {
  Sizes sizes;
  Element element;
  const void *dy, *hidden, *code, *down_weight, *down_bias, *up_weight, *up_bias;
  void *dx, *dz;  // [B, T, D], [B, T, A]
  float* dhidden_bias;  // [B, A]
};

// The heads' gradient and the codes', for N layers at once: the pointers x, dz, hidden and dy are one per layer.
struct HeadsBackwardArguments {
  Sizes sizes;
  int64_t N;
  Element element;
  const void *const *x, *const *dz, *const *hidden, *const *dy;
  const void *code, *down_weight, *up_weight;  // code [N, B, K]
  void *dcode, *ddown_weight, *ddown_bias, *dup_weight, *dup_bias;
};

struct Kernels {
  const char* name;
  void (*forward)(const ForwardArguments&, const Pool&);
  void (*backward)(const BackwardArguments&, const Pool&);
  void (*heads_backward)(const HeadsBackwardArguments&, const Pool&);
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace hdscale
