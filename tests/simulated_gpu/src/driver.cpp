// The driver's functions that torch and Triton call: contexts, modules, and memory in segments that can grow.
#include "simulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstring>

using namespace sim;

namespace {
char contexts[64];  // the address stands for the device
struct Segment {
  size_t bytes;
  int device;
};
CUresult unsupported() {
  fault("a function of the driver without a stand-in was called");
  return CUDA_ERROR_NOT_SUPPORTED;
}
}  // namespace

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *out = dlsym(RTLD_DEFAULT, name);
  if (!*out) *out = reinterpret_cast<void*>(&unsupported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle*) { return CUDA_SUCCESS; }
API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* out) { return *out = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** out) { return *out = "error of the simulated GPU", CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult code, const char** out) { return cuGetErrorString(code, out); }
API CUresult cuDeviceGet(CUdevice* out, int device) { return *out = device, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* out) { return *out = devices(), CUDA_SUCCESS; }
API CUresult cuDeviceTotalMem_v2(size_t* out, CUdevice) { return *out = capacity(), CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* out, CUdevice_attribute attribute, CUdevice device) {
  // the driver and the runtime number attributes alike
  return CUresult(cudaDeviceGetAttribute(out, cudaDeviceAttr(int(attribute)), device));
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = touched(device);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
  *out = reinterpret_cast<CUcontext>(contexts + device);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* out) { return cuDevicePrimaryCtxRetain(out, current()); }
API CUresult cuCtxSetCurrent(CUcontext context) {
  set_current(int(reinterpret_cast<char*>(context) - contexts));
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* out) { return *out = current(), CUDA_SUCCESS; }
API CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  Lock lock(mutex());
  const Block* block = block_of(reinterpret_cast<void*>(pointer));
  if (!block) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
    *static_cast<CUdeviceptr*>(out) = pointer;
  } else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
    *static_cast<unsigned*>(out) = block->type == cudaMemoryTypeDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  } else {
    *static_cast<int*>(out) = block->device;
  }
  return CUDA_SUCCESS;
}

// Kernels that are compiled while the program runs (Triton): counted under their names.
API CUresult cuModuleLoadData(CUmodule* out, const void*) {
  *out = reinterpret_cast<CUmodule>(contexts);
  return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* out, CUmodule, const char* name) {
  *out = reinterpret_cast<CUfunction>(strdup(name));
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* out, CUfunction_attribute attribute, CUfunction) {
  *out = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig*, CUfunction function, void**, void**) {
  count_launch(reinterpret_cast<const char*>(function));
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream, void** arguments, void** extra) {
  return cuLaunchKernelEx(nullptr, function, arguments, extra);
}

// Memory in two halves: a range of addresses, and segments that are mapped into it.
API CUresult cuMemGetAllocationGranularity(size_t* out, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *out = 2 << 20;
  return CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr* out, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  Lock lock(mutex());
  add_block(start, {bytes, current(), cudaMemoryTypeDevice});
  *out = CUdeviceptr(start);
  return CUDA_SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
  Lock lock(mutex());
  remove_block(reinterpret_cast<void*>(start));
  munmap(reinterpret_cast<void*>(start), bytes);
  return CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t bytes, const CUmemAllocationProp*,
                         unsigned long long) {
  count("cuMemCreate");
  if (!reserve(current(), bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = CUmemGenericAllocationHandle(new Segment{bytes, current()});
  return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const auto* segment = reinterpret_cast<Segment*>(handle);
  release(segment->device, segment->bytes);
  delete segment;
  return CUDA_SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
  madvise(reinterpret_cast<void*>(start), bytes, MADV_DONTNEED);
  return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
