// Device memory, pinned memory and copies. Pages that nobody touches cost nothing, so that a model of any size fits.
#include "simulator.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>

namespace sim {
namespace {
std::map<uintptr_t, Block>& blocks() {
  static auto* all = new std::map<uintptr_t, Block>;
  return *all;
}
constexpr int kRubbish = 0xA5;

const char* place(const Block* block) {
  return !block ? "pageable" : block->type == cudaMemoryTypeDevice ? "device" : "pinned";
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle, bool async) {
  if (!bytes) return cudaSuccess;
  const char *source, *target;
  {
    Lock lock(mutex());
    source = place(block_of(from)), target = place(block_of(to));
    const bool from_device = *source == 'd', to_device = *target == 'd';
    const bool as_said = kind == cudaMemcpyDefault ||
                         (from_device == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) &&
                          to_device == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice));
    if (!as_said) {
      fault(std::string("a copy's direction is not that of its pointers: ") + source + " to " + target);
      return failed(cudaErrorInvalidValue);
    }
    count(std::string("copy ") + source + " to " + target);
    Stream* stream = stream_of(handle);
    ++stream->issued;
    if (!computes()) {
      // contents mean nothing where no kernel computes: what the host reads is zero, and pages need not exist
      if (!to_device) memset(to, 0, bytes);
    } else if (async && from_device && block_of(to) && !to_device) {
      const char* data = static_cast<const char*>(from);
      stream->arriving.push_back({to, std::vector<char>(data, data + bytes), stream->issued});
      memset(to, kRubbish, bytes);
      return cudaSuccess;
    } else {
      if (!async) arrive(stream, kAll);
      memmove(to, from, bytes);
    }
  }
  // between devices nothing waits; pageable memory goes through the driver's own buffer, which waits for the stream
  const bool pageable = !strcmp(source, "pageable") || !strcmp(target, "pageable");
  if (pageable || (!async && strcmp(source, target))) waited(std::string("copy ") + source + " to " + target);
  return cudaSuccess;
}
}  // namespace

const Block* block_of(const void* address) {
  auto after = blocks().upper_bound(uintptr_t(address));
  if (after == blocks().begin()) return nullptr;
  const auto& [start, block] = *--after;
  return uintptr_t(address) < start + block.bytes ? &block : nullptr;
}
void add_block(void* start, const Block& block) { blocks()[uintptr_t(start)] = block; }
void remove_block(void* start) { blocks().erase(uintptr_t(start)); }

}  // namespace sim

using namespace sim;

API cudaError_t cudaMalloc(void** out, size_t bytes) {
  Lock lock(mutex());
  *out = nullptr;
  count("cudaMalloc");
  if (!reserve(current(), bytes)) return failed(cudaErrorMemoryAllocation);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (start == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  add_block(start, {bytes, current(), cudaMemoryTypeDevice});
  *out = start;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* start) {
  if (!start) return cudaSuccess;
  Lock lock(mutex());
  const Block* block = block_of(start);
  if (!block) {
    fault("cudaFree of memory that is not the device's");
    return failed(cudaErrorInvalidValue);
  }
  arrive_everywhere();
  release(block->device, block->bytes);
  munmap(start, block->bytes ? block->bytes : 1);
  remove_block(start);
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) { return cudaMalloc(out, bytes); }
API cudaError_t cudaFreeAsync(void* start, cudaStream_t) { return cudaFree(start); }

API cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  Lock lock(mutex());
  if (posix_memalign(out, 4096, bytes ? bytes : 1)) return failed(cudaErrorMemoryAllocation);
  add_block(*out, {bytes ? bytes : 1, current(), cudaMemoryTypeHost});
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* start) {
  Lock lock(mutex());
  arrive_everywhere();
  remove_block(start);
  free(start);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned) {
  Lock lock(mutex());
  add_block(start, {bytes, current(), cudaMemoryTypeHost});
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* start) {
  Lock lock(mutex());
  remove_block(start);
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(mutex());
  *total = capacity();
  *free = capacity() - reserved(current());
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
  Lock lock(mutex());
  void* pointer = const_cast<void*>(address);
  const Block* block = block_of(address);
  *out = {};
  out->type = block ? block->type : cudaMemoryTypeUnregistered;
  out->device = block ? block->device : -1;
  out->devicePointer = block ? pointer : nullptr;
  out->hostPointer = block && block->type == cudaMemoryTypeDevice ? nullptr : pointer;
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind, nullptr, false);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream, true);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream, true);
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t) {
  count("memset");
  if (computes()) memset(start, value, bytes);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* start, int value, size_t bytes) {
  return cudaMemsetAsync(start, value, bytes, nullptr);
}
API cudaError_t cudaGetSymbolAddress(void** out, const void*) {
  static char symbols[64 << 10];
  *out = symbols;
  return cudaSuccess;
}
