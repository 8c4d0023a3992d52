// The project's CUDA kernels, launched by its real library, run in the emulator of the tests.
#include "warp_emulator.h"

#include "gpu_launch.h"

#include <cstring>

using namespace hdscale;

namespace {
struct Size {
  unsigned x, y, z;
};

template <class Arguments>
bool run(void (*kernel)(Arguments), Size blocks, Size threads, void** arguments, size_t shared) {
  emulator::launch(kernel, gpu::Grid{blocks.x, blocks.y, blocks.z}, threads.x, int(shared),
                   *static_cast<Arguments*>(arguments[0]));
  return true;
}
}  // namespace

// Whether a kernel was computed. Its name is the compiler's, with the arguments of templates in it.
extern "C" __attribute__((visibility("default"))) bool simulated_gpu_project_kernel(const char* name, Size blocks,
                                                                                    Size threads, void** arguments,
                                                                                    size_t shared) {
  const auto is = [name](const char* part) { return strstr(name, part) != nullptr; };
  if (!is("hdscale")) return false;
  if (is("contract_kernelILi64ELi8E")) return run(gpu::contract_kernel<64, 8>, blocks, threads, arguments, shared);
  if (is("contract_kernelILi16ELi32E")) return run(gpu::contract_kernel<16, 32>, blocks, threads, arguments, shared);
  if (is("contract_kernelILi8ELi64E")) return run(gpu::contract_kernel<8, 64>, blocks, threads, arguments, shared);
  if (is("finish_kernel")) return run(gpu::finish_kernel, blocks, threads, arguments, shared);
  if (is("token_sum_kernel")) return run(gpu::token_sum_kernel, blocks, threads, arguments, shared);
  if (is("weight_gradient_kernel")) return run(gpu::weight_gradient_kernel, blocks, threads, arguments, shared);
  if (is("code_gradient_kernel")) return run(gpu::code_gradient_kernel, blocks, threads, arguments, shared);
  return false;
}
