// Which GPUs there are, and what they are like: H100s, unless SIMULATED_GPU_* say otherwise.
#include "simulator.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

namespace sim {
namespace {
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

struct Use {
  bool touched = false;
  size_t bytes = 0;
};
Use& use(int device) {
  static auto* all = new std::map<int, Use>;
  return (*all)[device];
}

const std::vector<int>& visible() {
  static const auto* list = [] {
    const int installed = int(setting("SIMULATED_GPU_COUNT", 1));
    auto* found = new std::vector<int>;
    const char* chosen = getenv("CUDA_VISIBLE_DEVICES");
    for (int device = 0; !chosen && device < installed; ++device) found->push_back(device);
    // as the driver reads it: up to the first entry that is no device
    for (const char* at = chosen; at && *at >= '0' && *at <= '9';) {
      char* end;
      const long device = strtol(at, &end, 10);
      if (device >= installed) break;
      found->push_back(int(device));
      at = *end == ',' ? end + 1 : nullptr;
    }
    return found;
  }();
  return *list;
}
}  // namespace

int devices() { return int(visible().size()); }
int physical(int device) { return visible()[size_t(device)]; }
int current() { return current_device; }
void set_current(int device) {
  Lock lock(mutex());
  use(device).touched = true;
  current_device = device;
}
bool touched(int device) {
  Lock lock(mutex());
  return use(device).touched;
}

int capability() {
  static const int value = [] {
    int major = 9, minor = 0;
    if (const char* text = getenv("SIMULATED_GPU_CAPABILITY")) sscanf(text, "%d.%d", &major, &minor);
    return 10 * major + minor;
  }();
  return value;
}

size_t shared_memory_limit() {
  switch (capability()) {
    case 70: return 96 << 10;
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: return 99 << 10;
    default: return 227 << 10;
  }
}

size_t capacity() { return size_t(setting("SIMULATED_GPU_MEMORY_GB", 80)) << 30; }

bool reserve(int device, size_t bytes) {
  Lock lock(mutex());
  Use& here = use(device);
  here.touched = true;
  if (here.bytes + bytes > capacity()) return false;
  here.bytes += bytes;
  return true;
}

void release(int device, size_t bytes) {
  Lock lock(mutex());
  use(device).bytes -= bytes;
}

size_t reserved(int device) {
  Lock lock(mutex());
  return use(device).bytes;
}

cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace sim

using namespace sim;

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current();
  return devices() ? cudaSuccess : failed(cudaErrorNoDevice);
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return failed(cudaErrorInvalidDevice);
  set_current(device);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxBlockDimX, 1024},
      {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64},
      {cudaDevAttrMaxGridDimX, 2147483647},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, int(shared_memory_limit())},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, int(shared_memory_limit() + 1024)},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrComputeCapabilityMajor, capability() / 10},
      {cudaDevAttrComputeCapabilityMinor, capability() % 10},
      {cudaDevAttrUnifiedAddressing, 1},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
  };
  const auto found = known.find(int(attribute));
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  if (device < 0 || device >= devices()) return failed(cudaErrorInvalidDevice);
  const auto attribute = [device](cudaDeviceAttr which) {
    int value;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  cudaDeviceProp p{};
  snprintf(p.name, sizeof p.name, "Simulated GPU %d.%d", capability() / 10, capability() % 10);
  for (int i = 0; i < 16; ++i) p.uuid.bytes[i] = char(16 * physical(device) + i);
  p.major = capability() / 10, p.minor = capability() % 10;
  p.totalGlobalMem = capacity();
  p.multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p.maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p.maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p.maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p.warpSize = attribute(cudaDevAttrWarpSize);
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX), p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.regsPerBlock = p.regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  p.sharedMemPerBlock = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlock));
  p.sharedMemPerBlockOptin = shared_memory_limit();
  p.sharedMemPerMultiprocessor = shared_memory_limit() + 1024;
  p.reservedSharedMemPerBlock = 1024;
  p.l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p.memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  p.memPitch = 2147483647, p.totalConstMem = 65536, p.textureAlignment = 512, p.texturePitchAlignment = 32;
  p.pciBusID = physical(device) + 1;
  p.concurrentKernels = p.unifiedAddressing = p.canMapHostMemory = p.managedMemory = p.cooperativeLaunch = 1;
  p.streamPrioritiesSupported = p.memoryPoolsSupported = p.hostRegisterSupported = p.ECCEnabled = 1;
  p.asyncEngineCount = 3;
  p.clusterLaunch = capability() >= 90;
  *out = p;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int one, int other) {
  *can = one != other;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size_t(size), "0000:%02x:00.0", physical(device) + 1);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

API cudaError_t cudaPeekAtLastError() { return last_error; }
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    default: return "error of the simulated GPU";
  }
}
API const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return cudaGetErrorName(error);
  }
}
