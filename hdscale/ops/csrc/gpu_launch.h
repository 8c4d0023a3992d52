// The sequence of kernels behind each operator, with grids and workspaces. The launcher is a parameter: CUDA's launch in
// cuda_ops.cu, an emulation on the CPU in the tests.
//
// launch(kernel, Grid, bytes of shared memory, arguments) must run kernels in the order in which they are launched.
#pragma once
#include "cpu_kernels.h"
#include "gpu_kernels.cuh"

namespace hdscale {
namespace gpu {

struct Grid {
  unsigned x, y, z;
};

constexpr int kTargetBlocks = 264;  // two for each multiprocessor of a large GPU
constexpr int64_t kMaxGridZ = 65535;
constexpr int64_t kMaxGridX = 2147483647;

// Whether the kernels take this shape; the caller falls back to PyTorch where they do not (`cuda_takes` in
// hdscale/ops/backend.py says the same before anything is launched; a test holds the two together).
inline bool takes(const Sizes& s, int64_t layers) {
  const int64_t most = int64_t(1) << 30;
  const ContractBlock block = contract_block(int(s.T < most ? s.T : most));
  const int64_t groups = (s.B + block.instances - 1) / block.instances, parts = (s.T + block.tokens - 1) / block.tokens;
  return s.K <= kMaxCode && layers <= kMaxLayers && s.D * s.A < most && layers * s.B < most && s.B * s.T < most &&
         groups * parts <= kMaxGridZ && s.B * s.T * (s.D > s.A ? s.D : s.A) / kThreads < kMaxGridX &&
         layers * s.B * s.K / kThreads < kMaxGridX;
}

inline bool aligned(const void* p, unsigned bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int contract_splits(int B, int T, int columns, int steps) {
  const ContractBlock block = contract_block(T);
  const int others = ceil_div(columns, kTile) * ceil_div(B, block.instances) * ceil_div(T, block.tokens);
  return splits(ceil_div(steps, kTile), others, kTargetBlocks);
}

inline int code_splits(const Sizes& s, int samples) {
  const int tiles = ceil_div(int(s.D), kTile) * ceil_div(int(s.A), kTile);
  return splits(tiles, ceil_div(samples, kSamples) * ceil_div(int(s.K), kCodeColumns), kTargetBlocks);
}

// Floats of workspace that the operators need.
inline int64_t contract_workspace(const Sizes& s) {
  const int64_t hidden = int64_t(contract_splits(int(s.B), int(s.T), int(s.A), int(s.D))) * s.B * s.T * s.A;
  const int64_t out = int64_t(contract_splits(int(s.B), int(s.T), int(s.D), int(s.A))) * s.B * s.T * s.D;
  return hidden > out ? hidden : out;
}
inline int64_t heads_workspace(const Sizes& s, int64_t layers) {
  return int64_t(2) * code_splits(s, int(layers * s.B)) * layers * s.B * s.K;
}

template <class Launch>
void contract(Launch& launch, const Sizes& s, const void* weight, const void* bias, const void* code, const void* in,
              int O, int I, bool over_outer, float* workspace, FinishArguments finish) {
  const int B = int(s.B), T = int(s.T), K = int(s.K);
  const int columns = over_outer ? I : O, steps = over_outer ? O : I;
  ContractArguments a;
  a.weight = static_cast<const Brain*>(weight);
  a.bias = static_cast<const Brain*>(bias);
  a.code = static_cast<const Brain*>(code);
  a.in = static_cast<const Brain*>(in);
  a.partial = workspace;
  a.B = B, a.T = T, a.O = O, a.I = I, a.K = K;
  a.splits = contract_splits(B, T, columns, steps);
  a.over_outer = over_outer;
  a.wide = K % 8 == 0 && aligned(weight, 16);
  const ContractBlock block = contract_block(T);
  const Grid grid = {unsigned(ceil_div(columns, kTile)), unsigned(a.splits),
                     unsigned(ceil_div(B, block.instances) * ceil_div(T, block.tokens))};
  const int bytes = contract_shared(block.instances, K) * int(sizeof(Brain));
  if (block.instances == 64) {
    launch(contract_kernel<64, 8>, grid, bytes, a);
  } else if (block.instances == 16) {
    launch(contract_kernel<16, 32>, grid, bytes, a);
  } else {
    launch(contract_kernel<8, 64>, grid, bytes, a);
  }
  finish.partial = workspace;
  finish.parts = a.splits;
  finish.count = s.B * s.T * columns;
  finish.T = T, finish.C = columns;
  launch(finish_kernel, Grid{unsigned((finish.count + kThreads - 1) / kThreads), 1, 1}, 0, finish);
}

template <class Launch>
void forward(Launch& launch, const ForwardArguments& f, float* workspace) {
  const int D = int(f.sizes.D), A = int(f.sizes.A);
  FinishArguments finish{};
  finish.bias = f.hidden_bias;
  finish.out = static_cast<Brain*>(f.hidden);
  finish.relu = true;
  contract(launch, f.sizes, f.down_weight, f.down_bias, f.code, f.x, D, A, true, workspace, finish);
  finish = {};
  finish.bias = f.out_bias;
  finish.out = static_cast<Brain*>(f.y);
  contract(launch, f.sizes, f.up_weight, f.up_bias, f.code, f.hidden, A, D, true, workspace, finish);
}

template <class Launch>
void backward(Launch& launch, const BackwardArguments& b, float* workspace) {
  const int D = int(b.sizes.D), A = int(b.sizes.A);
  FinishArguments finish{};
  finish.mask = static_cast<const Brain*>(b.hidden);
  finish.out = static_cast<Brain*>(b.dz);
  contract(launch, b.sizes, b.up_weight, b.up_bias, b.code, b.dy, A, D, false, workspace, finish);
  TokenSumArguments sums{};
  sums.partial = workspace;
  sums.mask = finish.mask;
  sums.out = b.dhidden_bias;
  sums.count = b.sizes.B * b.sizes.T * b.sizes.A;
  sums.parts = contract_splits(int(b.sizes.B), int(b.sizes.T), A, D);
  sums.T = int(b.sizes.T), sums.C = A;
  launch(token_sum_kernel, Grid{unsigned((b.sizes.B * A + kThreads - 1) / kThreads), 1, 1}, 0, sums);
  finish = {};
  finish.out = static_cast<Brain*>(b.dx);
  contract(launch, b.sizes, b.down_weight, b.down_bias, b.code, b.dz, D, A, false, workspace, finish);
}

template <class Launch>
void heads_backward(Launch& launch, const HeadsBackwardArguments& h, float* workspace) {
  const Sizes& s = h.sizes;
  const int samples = int(h.N * s.B), K = int(s.K);
  const int parts = code_splits(s, samples);
  const int tiles = ceil_div(int(s.D), kTile) * ceil_div(int(s.A), kTile);
  const unsigned code_blocks = unsigned(ceil_div(K, kCodeColumns));
  for (int head = 0; head < 2; ++head) {
    const bool down = head == 0;
    HeadGradientArguments a{};
    for (int layer = 0; layer < int(h.N); ++layer) {
      a.in[layer] = static_cast<const Brain*>(down ? h.x[layer] : h.hidden[layer]);
      a.grad[layer] = static_cast<const Brain*>(down ? h.dz[layer] : h.dy[layer]);
    }
    a.code = static_cast<const Brain*>(h.code);
    a.weight = static_cast<const Brain*>(down ? h.down_weight : h.up_weight);
    a.dweight = static_cast<Brain*>(down ? h.ddown_weight : h.dup_weight);
    a.dbias = static_cast<Brain*>(down ? h.ddown_bias : h.dup_bias);
    a.partial = workspace + int64_t(head) * parts * samples * K;
    a.N = int(h.N), a.B = int(s.B), a.T = int(s.T), a.K = K;
    a.O = int(down ? s.D : s.A), a.I = int(down ? s.A : s.D);
    a.splits = parts;
    a.wide = K % 2 == 0 && aligned(a.weight, 4);
    launch(weight_gradient_kernel, Grid{unsigned(tiles), code_blocks, 1}, weight_gradient_shared() * int(sizeof(Brain)),
           a);
    launch(code_gradient_kernel, Grid{unsigned(ceil_div(samples, kSamples)), unsigned(parts), code_blocks},
           code_gradient_shared() * int(sizeof(Brain)), a);
  }
  FinishArguments finish{};
  finish.partial = workspace;
  finish.parts = 2 * parts;
  finish.out = static_cast<Brain*>(h.dcode);
  finish.count = int64_t(samples) * K;
  finish.T = 1, finish.C = K;
  launch(finish_kernel, Grid{unsigned((finish.count + kThreads - 1) / kThreads), 1, 1}, 0, finish);
}

}  // namespace gpu
}  // namespace hdscale
