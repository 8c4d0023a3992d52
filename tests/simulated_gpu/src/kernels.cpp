// Launches: every kernel of torch and of the project registers its name when its library is loaded. A launch is
// counted under that name, held against a device's limits, and computed if a hook knows the kernel.
#include "simulator.h"

#include <map>
#include <unordered_map>

namespace sim {
namespace {
using Hook = bool (*)(const char* kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared);
Hook hook = nullptr;

// the libraries that register their kernels may be initialised before this one
std::unordered_map<const void*, std::string>& names() {
  static auto* all = new std::unordered_map<const void*, std::string>;
  return *all;
}
std::map<const void*, size_t>& shared_allowed() {
  static auto* all = new std::map<const void*, size_t>;
  return *all;
}

struct Configuration {
  dim3 blocks, threads;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> pending;

std::string name_of(const void* function) {
  Lock lock(mutex());
  const auto found = names().find(function);
  return found == names().end() ? "unknown kernel" : found->second;
}
}  // namespace

void count_launch(const std::string& kernel) {
  count("launch");
  count("launch " + kernel);
}

cudaError_t launch(const std::string& kernel, const void* function, dim3 blocks, dim3 threads, size_t shared,
                   cudaStream_t stream, void** arguments) {
  Lock lock(mutex());
  count_launch(kernel);
  if (stream_of(stream)->device != current()) {
    fault(kernel + " is launched on another device's stream");
    return failed(cudaErrorInvalidResourceHandle);
  }
  const bool some = blocks.x && blocks.y && blocks.z && threads.x && threads.y && threads.z;
  const bool few = blocks.x <= 2147483647u && blocks.y <= 65535 && blocks.z <= 65535;
  if (!some || !few || threads.x * threads.y * threads.z > 1024) {
    fault(kernel + " is launched with a grid or a block of a size that is not allowed");
    return failed(cudaErrorInvalidConfiguration);
  }
  if (shared > (48 << 10) && shared > shared_allowed()[function]) {
    fault(kernel + " is launched with more shared memory than it has asked for");
    return failed(cudaErrorInvalidValue);
  }
  if (hook && !hook(kernel.c_str(), blocks, threads, arguments, shared)) fault("nothing computes " + kernel);
  return cudaSuccess;
}

}  // namespace sim

using namespace sim;

// Called at each launch of a kernel that torch's operators on the host do not replace: the project's own.
API void simulated_gpu_compute_with(Hook compute) { hook = compute; }

// What nvcc's code calls: when a library is loaded, and around <<<...>>>.
API void** __cudaRegisterFatBinary(void*) {
  static void* none;
  return &none;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                dim3*, int*) {
  Lock lock(mutex());
  names()[function] = name;
}
API unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared, struct CUstream_st* stream) {
  pending.push_back({blocks, threads, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* blocks, dim3* threads, size_t* shared, void* stream) {
  const Configuration last = pending.back();
  pending.pop_back();
  *blocks = last.blocks, *threads = last.threads, *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                                 cudaStream_t stream) {
  return launch(name_of(function), function, blocks, threads, shared, stream, arguments);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared,
                                   cudaStream_t stream) {
  return cudaLaunchKernel(kernel, blocks, threads, arguments, shared, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** arguments) {
  return cudaLaunchKernel(function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}

API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > shared_memory_limit()) {
    fault(name_of(function) + " asks for more shared memory than this GPU has");
    return failed(cudaErrorInvalidValue);
  }
  Lock lock(mutex());
  shared_allowed()[function] = size_t(value);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = {};
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 64;
  out->binaryVersion = out->ptxVersion = capability();
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
