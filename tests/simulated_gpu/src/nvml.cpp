// NVML, a library of its own that torch opens by name: how many GPUs there are, and that they have no NVLink.
#include <cstdio>
#include <cstdlib>

#define API extern "C" __attribute__((visibility("default")))

namespace {
constexpr int kSuccess = 0, kNotSupported = 3;
int installed() {
  const char* count = getenv("SIMULATED_GPU_COUNT");
  return count ? atoi(count) : 1;
}
void* handle(unsigned long index) { return reinterpret_cast<void*>(index + 1); }
}  // namespace

API int nvmlInit() { return kSuccess; }
API int nvmlInit_v2() { return kSuccess; }
API int nvmlShutdown() { return kSuccess; }
API const char* nvmlErrorString(int) { return "error of the simulated GPU"; }
API int nvmlSystemGetCudaDriverVersion_v2(int* out) { return *out = 13000, kSuccess; }
API int nvmlDeviceGetCount_v2(unsigned* out) { return *out = unsigned(installed()), kSuccess; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** out) { return *out = handle(index), kSuccess; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** out) {
  unsigned domain, number;
  if (sscanf(bus, "%x:%x", &domain, &number) != 2) return kNotSupported;
  *out = handle(number - 1);  // as devices.cpp numbers them
  return kSuccess;
}
API int nvmlDeviceGetUUID(void* device, char* out, unsigned size) {
  snprintf(out, size, "GPU-00000000-0000-0000-0000-%012lu", reinterpret_cast<unsigned long>(device));
  return kSuccess;
}
API int nvmlDeviceGetComputeRunningProcesses(void*, unsigned* count, void*) { return *count = 0, kSuccess; }
API int nvmlDeviceGetGpuFabricInfoV(void*, void*) { return kSuccess; }  // all zero: there is none
API int nvmlDeviceGetNvLinkRemoteDeviceType(void*, unsigned, int*) { return kNotSupported; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void*, unsigned, void*) { return kNotSupported; }
