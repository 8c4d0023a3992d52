// Streams, events, and every call in which the host waits for the device.
#include "simulator.h"

#include <chrono>
#include <cstring>
#include <map>
#include <set>

namespace sim {
namespace {
std::set<Stream*>& made() {
  static auto* all = new std::set<Stream*>;
  return *all;
}
std::map<int, Stream>& defaults() {
  static auto* all = new std::map<int, Stream>;
  return *all;
}
struct Event {
  int device;
  Stream* stream = nullptr;
  long order = 0;
  std::chrono::steady_clock::time_point time;
};
Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }
}  // namespace

Stream* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
    return &defaults().try_emplace(current(), Stream{current()}).first->second;
  }
  return reinterpret_cast<Stream*>(handle);
}

void arrive(Stream* stream, long until) {
  auto& queue = stream->arriving;
  for (; !queue.empty() && queue.front().order <= until; queue.pop_front())
    memcpy(queue.front().to, queue.front().data.data(), queue.front().data.size());
}

void arrive_everywhere() {
  for (auto& [device, stream] : defaults()) arrive(&stream, kAll);
  for (Stream* stream : made()) arrive(stream, kAll);
}

}  // namespace sim

using namespace sim;

API cudaError_t cudaDeviceSynchronize() {
  {
    Lock lock(mutex());
    arrive_everywhere();
  }
  waited(__func__);
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
  Lock lock(mutex());
  auto* stream = new Stream{current(), priority};
  made().insert(stream);
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(mutex());
  Stream* stream = stream_of(handle);
  arrive(stream, kAll);
  made().erase(stream);  // never freed: an event may still name it
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  {
    Lock lock(mutex());
    arrive(stream_of(handle), kAll);
  }
  waited(__func__);
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(mutex());
  arrive(stream_of(handle), kAll);
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* out) {
  Lock lock(mutex());
  *out = stream_of(handle)->priority;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* out) {
  *out = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* out, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *out = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data) {
  call(data);
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new Event{current()});
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Lock lock(mutex());
  delete event_of(handle);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  Lock lock(mutex());
  Event* event = event_of(handle);
  event->stream = stream_of(on);
  if (event->stream->device != event->device) {
    fault("an event is recorded on another device's stream");
    return failed(cudaErrorInvalidResourceHandle);
  }
  event->order = event->stream->issued;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(mutex());
  if (Event* event = event_of(handle); event->stream) arrive(event->stream, event->order);
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  cudaEventQuery(handle);
  waited(__func__);
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(event_of(to)->time - event_of(from)->time).count();
  return cudaSuccess;
}
