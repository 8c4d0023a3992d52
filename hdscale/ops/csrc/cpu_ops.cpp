// The CPU kernels as operators: checks, allocation, the choice of instruction set, and threads through ATen's pool.
// Written against torch's stable ABI; the schemas are defined in hdscale/ops/operator.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"
#include "operator_checks.h"

namespace hdscale {
namespace {

Pool aten_pool() {
  return {int64_t(torch::stable::get_num_threads()),
          [](int64_t count, void (*task)(int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
              for (int64_t index = begin; index < end; ++index) task(index, context);
            });
          }};
}

// The best instruction set of this processor, at most the one that HDSCALE_CPU_KERNELS names.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    const char* wanted = std::getenv("HDSCALE_CPU_KERNELS");
    const std::string name = wanted == nullptr ? "" : wanted;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (avx512_bf16 && (name.empty() || name == "avx512_bf16")) return kernels_avx512_bf16;
    if (avx512 && name != "avx2" && name != "generic") return kernels_avx512;
    if (avx2 && name != "generic") return kernels_avx2;
#endif
    return kernels_generic;
  }();
  return chosen;
}

Element element_of(const Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float ? Element::float32 : Element::bfloat16;
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor code, Tensor down_weight, Tensor down_bias, Tensor up_weight,
                                   Tensor up_bias, Tensor hidden_bias, Tensor out_bias) {
  const Sizes sizes = check_forward(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias);
  make_contiguous(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias);
  Tensor y = torch::stable::new_empty(x, {sizes.B, sizes.T, sizes.D});
  Tensor hidden = torch::stable::new_empty(x, {sizes.B, sizes.T, sizes.A});
  if (x.numel() != 0) {
    kernels().forward({sizes, element_of(x), x.data_ptr(), code.data_ptr(), down_weight.data_ptr(),
                       down_bias.data_ptr(), up_weight.data_ptr(), up_bias.data_ptr(), static_cast<const float*>(hidden_bias.data_ptr()),
                       static_cast<const float*>(out_bias.data_ptr()), y.data_ptr(), hidden.data_ptr()},
                      aten_pool());
  }
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor hidden, Tensor code, Tensor down_weight, Tensor down_bias,
                                    Tensor up_weight, Tensor up_bias) {
  const Sizes sizes = check_backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias);
  make_contiguous(dy, hidden, code, down_weight, down_bias, up_weight, up_bias);
  Tensor dx = torch::stable::new_empty(dy, {sizes.B, sizes.T, sizes.D});
  Tensor dz = torch::stable::new_empty(dy, {sizes.B, sizes.T, sizes.A});
  Tensor dhidden_bias = dy.numel() != 0 ? empty_floats(dy, {sizes.B, sizes.A}) : zero_floats(dy, {sizes.B, sizes.A});
  if (dy.numel() != 0) {
    kernels().backward({sizes, element_of(dy), dy.data_ptr(), hidden.data_ptr(), code.data_ptr(),
                        down_weight.data_ptr(), down_bias.data_ptr(), up_weight.data_ptr(), up_bias.data_ptr(),
                        dx.data_ptr(), dz.data_ptr(), static_cast<float*>(dhidden_bias.data_ptr())},
                       aten_pool());
  }
  return {dx, dz, dhidden_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> heads_backward(std::vector<Tensor> x, std::vector<Tensor> dz,
                                                                  std::vector<Tensor> hidden, std::vector<Tensor> dy,
                                                                  Tensor code, Tensor down_weight, Tensor up_weight) {
  const Sizes sizes = check_heads_backward(x, dz, hidden, dy, code, down_weight, up_weight);
  make_contiguous(code, down_weight, up_weight);
  std::vector<const void*> pointers[4];
  std::vector<Tensor>* lists[4] = {&x, &dz, &hidden, &dy};
  for (int which = 0; which < 4; ++which)
    for (Tensor& tensor : *lists[which]) {
      make_contiguous(tensor);
      pointers[which].push_back(tensor.data_ptr());
    }
  const int64_t N = int64_t(x.size());
  const bool any = N * sizes.B * sizes.T != 0;
  const auto fresh = [&](std::initializer_list<int64_t> shape) {
    const torch::headeronly::IntHeaderOnlyArrayRef sizes_ref(shape.begin(), shape.size());
    return any ? torch::stable::new_empty(code, sizes_ref) : torch::stable::new_zeros(code, sizes_ref);
  };
  const int64_t entries = sizes.D * sizes.A;
  Tensor dcode = fresh({N, sizes.B, sizes.K});
  Tensor ddown_weight = fresh({entries, sizes.K}), ddown_bias = fresh({entries});
  Tensor dup_weight = fresh({entries, sizes.K}), dup_bias = fresh({entries});
  if (any) {
    kernels().heads_backward({sizes, N, element_of(code), pointers[0].data(), pointers[1].data(), pointers[2].data(),
                              pointers[3].data(), code.data_ptr(), down_weight.data_ptr(), up_weight.data_ptr(),
                              dcode.data_ptr(), ddown_weight.data_ptr(), ddown_bias.data_ptr(), dup_weight.data_ptr(),
                              dup_bias.data_ptr()},
                             aten_pool());
  }
  return {dcode, ddown_weight, ddown_bias, dup_weight, dup_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hdscale, CPU, library) {
  library.impl("generated_adapter", TORCH_BOX(&forward));
  library.impl("generated_adapter_backward", TORCH_BOX(&backward));
  library.impl("generated_adapter_heads_backward", TORCH_BOX(&heads_backward));
}

}  // namespace hdscale

// Which kernels this processor runs, for `hdscale doctor` (called through ctypes).
extern "C" __attribute__((visibility("default"))) const char* hdscale_cpu_kernels() {
  return hdscale::kernels().name;
}
