// What the parts of the simulated GPUs share. Device memory is host memory; a stream is a list of copies that have not
// arrived yet; a kernel is a name that is counted, and may be computed by a hook.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace sim {

// One lock for everything: calls are short, and order matters more than speed.
std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;

// Counters, by name: "launch", "launch <kernel>", "wait <call>", "copy <direction>", "collective <name>", and what a
// real device would not forgive: "fault <what>". Tests read them through simulated_gpu_counters.
void count(const std::string& name, long times = 1);
void fault(const std::string& what);   // counted, and said on stderr
void waited(const std::string& call);  // the host waits for the device: counted, and told to the listener

long setting(const char* name, long otherwise);
bool computes();  // SIMULATED_GPU_MODE=compute: torch's operators run on the host; else kernels do nothing

// Devices, by the number that the process sees; `physical` is the one behind CUDA_VISIBLE_DEVICES.
int devices();
int physical(int device);
int current();
void set_current(int device);
bool touched(int device);  // whether this process has made a context on it
int capability();          // 90 for 9.0
size_t shared_memory_limit();
size_t capacity();
bool reserve(int device, size_t bytes);  // false: out of memory
void release(int device, size_t bytes);
size_t reserved(int device);

cudaError_t failed(cudaError_t error);  // remembered for cudaGetLastError

struct Block {
  size_t bytes;
  int device;
  cudaMemoryType type;
};
const Block* block_of(const void* address);
void add_block(void* start, const Block& block);
void remove_block(void* start);

// A copy to pinned memory that nobody has waited for: until then the memory holds rubbish.
struct Arriving {
  void* to;
  std::vector<char> data;
  long order;
};
struct Stream {
  int device;
  int priority = 0;
  long issued = 0;
  std::deque<Arriving> arriving;
};
Stream* stream_of(cudaStream_t handle);
void arrive(Stream* stream, long until);
void arrive_everywhere();
constexpr long kAll = 1L << 62;

// Counts a launch and checks its limits. `blocks` and `threads` are those of the grid and of a block.
cudaError_t launch(const std::string& kernel, const void* function, dim3 blocks, dim3 threads, size_t shared,
                   cudaStream_t stream, void** arguments);
void count_launch(const std::string& kernel);

}  // namespace sim
