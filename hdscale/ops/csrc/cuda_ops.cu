// The CUDA kernels as operators: checks, allocation, launches on the current stream. No synchronisation, no allocation
// outside torch's allocator: the operators can be captured into CUDA graphs.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#define HDSCALE_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char hdscale_shared[]; \
  type* const name = reinterpret_cast<type*>(hdscale_shared)

#include "gpu_launch.h"
#include "operator_checks.h"

namespace hdscale {
namespace {

struct StreamLaunch {
  cudaStream_t stream;

  explicit StreamLaunch(const Tensor& like) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), gpu::Grid grid, int bytes, const Arguments& arguments) {
    if (bytes > 48 * 1024)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<dim3(grid.x, grid.y, grid.z), gpu::kThreads, bytes, stream>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

void expect_supported(const Sizes& sizes, int64_t layers, const Tensor& like) {
  STD_TORCH_CHECK(like.scalar_type() == torch::headeronly::ScalarType::BFloat16 && gpu::takes(sizes, layers),
                  "hdscale: the CUDA kernels do not take this dtype or shape");
}

Tensor workspace(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {floats}, torch::headeronly::ScalarType::Float);
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor code, Tensor down_weight, Tensor down_bias, Tensor up_weight,
                                   Tensor up_bias, Tensor hidden_bias, Tensor out_bias) {
  const Sizes sizes = check_forward(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias);
  expect_supported(sizes, 1, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  make_contiguous(x, code, down_weight, down_bias, up_weight, up_bias, hidden_bias, out_bias);
  Tensor y = torch::stable::new_empty(x, {sizes.B, sizes.T, sizes.D});
  Tensor hidden = torch::stable::new_empty(x, {sizes.B, sizes.T, sizes.A});
  if (x.numel() != 0) {
    Tensor scratch = workspace(x, gpu::contract_workspace(sizes));
    StreamLaunch launch(x);
    gpu::forward(launch,
                 ForwardArguments{sizes, Element::bfloat16, x.data_ptr(), code.data_ptr(), down_weight.data_ptr(),
                                  down_bias.data_ptr(), up_weight.data_ptr(), up_bias.data_ptr(),
                                  static_cast<const float*>(hidden_bias.data_ptr()), static_cast<const float*>(out_bias.data_ptr()), y.data_ptr(), hidden.data_ptr()},
                 static_cast<float*>(scratch.data_ptr()));
  }
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dy, Tensor hidden, Tensor code, Tensor down_weight, Tensor down_bias,
                                    Tensor up_weight, Tensor up_bias) {
  const Sizes sizes = check_backward(dy, hidden, code, down_weight, down_bias, up_weight, up_bias);
  expect_supported(sizes, 1, dy);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  make_contiguous(dy, hidden, code, down_weight, down_bias, up_weight, up_bias);
  Tensor dx = torch::stable::new_empty(dy, {sizes.B, sizes.T, sizes.D});
  Tensor dz = torch::stable::new_empty(dy, {sizes.B, sizes.T, sizes.A});
  Tensor dhidden_bias = dy.numel() != 0 ? empty_floats(dy, {sizes.B, sizes.A}) : zero_floats(dy, {sizes.B, sizes.A});
  if (dy.numel() != 0) {
    Tensor scratch = workspace(dy, gpu::contract_workspace(sizes));
    StreamLaunch launch(dy);
    gpu::backward(launch,
                  BackwardArguments{sizes, Element::bfloat16, dy.data_ptr(), hidden.data_ptr(), code.data_ptr(),
                                    down_weight.data_ptr(), down_bias.data_ptr(), up_weight.data_ptr(),
                                    up_bias.data_ptr(), dx.data_ptr(), dz.data_ptr(), static_cast<float*>(dhidden_bias.data_ptr())},
                  static_cast<float*>(scratch.data_ptr()));
  }
  return {dx, dz, dhidden_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> heads_backward(std::vector<Tensor> x, std::vector<Tensor> dz,
                                                                  std::vector<Tensor> hidden, std::vector<Tensor> dy,
                                                                  Tensor code, Tensor down_weight, Tensor up_weight) {
  const Sizes sizes = check_heads_backward(x, dz, hidden, dy, code, down_weight, up_weight);
  const int64_t N = int64_t(x.size()), entries = sizes.D * sizes.A;
  expect_supported(sizes, N, code);
  const torch::stable::accelerator::DeviceGuard guard(code.get_device_index());
  make_contiguous(code, down_weight, up_weight);
  std::vector<const void*> pointers[4];
  std::vector<Tensor>* lists[4] = {&x, &dz, &hidden, &dy};
  for (int which = 0; which < 4; ++which)
    for (Tensor& tensor : *lists[which]) {
      make_contiguous(tensor);
      pointers[which].push_back(tensor.data_ptr());
    }
  const bool any = N * sizes.B * sizes.T != 0;
  const auto fresh = [&](std::initializer_list<int64_t> shape) {
    const torch::headeronly::IntHeaderOnlyArrayRef sizes_ref(shape.begin(), shape.size());
    return any ? torch::stable::new_empty(code, sizes_ref) : torch::stable::new_zeros(code, sizes_ref);
  };
  Tensor dcode = fresh({N, sizes.B, sizes.K});
  Tensor ddown_weight = fresh({entries, sizes.K}), ddown_bias = fresh({entries});
  Tensor dup_weight = fresh({entries, sizes.K}), dup_bias = fresh({entries});
  if (any) {
    Tensor scratch = workspace(code, gpu::heads_workspace(sizes, N));
    StreamLaunch launch(code);
    gpu::heads_backward(
        launch,
        HeadsBackwardArguments{sizes, N, Element::bfloat16, pointers[0].data(), pointers[1].data(), pointers[2].data(),
                               pointers[3].data(), code.data_ptr(), down_weight.data_ptr(), up_weight.data_ptr(),
                               dcode.data_ptr(), ddown_weight.data_ptr(), ddown_bias.data_ptr(),
                               dup_weight.data_ptr(), dup_bias.data_ptr()},
        static_cast<float*>(scratch.data_ptr()));
  }
  return {dcode, ddown_weight, ddown_bias, dup_weight, dup_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hdscale, CUDA, library) {
  library.impl("generated_adapter", TORCH_BOX(&forward));
  library.impl("generated_adapter_backward", TORCH_BOX(&backward));
  library.impl("generated_adapter_heads_backward", TORCH_BOX(&heads_backward));
}

}  // namespace hdscale
