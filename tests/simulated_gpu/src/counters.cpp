// Counters, and what a test may ask of them.
#include "simulator.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace sim {
namespace {
std::map<std::string, long>& counters() {
  static auto* all = new std::map<std::string, long>;
  return *all;
}
void (*listener)(const char*) = nullptr;
}  // namespace

std::recursive_mutex& mutex() {
  static auto* one = new std::recursive_mutex;
  return *one;
}

void count(const std::string& name, long times) {
  Lock lock(mutex());
  counters()[name] += times;
}

void fault(const std::string& what) {
  count("fault " + what);
  fprintf(stderr, "simulated GPU, process %d: %s\n", getpid(), what.c_str());
}

void waited(const std::string& call) {
  count("wait " + call);
  if (listener) listener(call.c_str());
}

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

bool computes() {
  static const bool yes = getenv("SIMULATED_GPU_MODE") && !strcmp(getenv("SIMULATED_GPU_MODE"), "compute");
  return yes;
}

}  // namespace sim

// All counters as lines "count<TAB>name"; the text lives until the next call.
API const char* simulated_gpu_counters() {
  static std::string text;
  sim::Lock lock(sim::mutex());
  text.clear();
  for (const auto& [name, times] : sim::counters()) text += std::to_string(times) + "\t" + name + "\n";
  return text.c_str();
}

API void simulated_gpu_reset() {
  sim::Lock lock(sim::mutex());
  sim::counters().clear();
}

// Called with the name of each call that waits for the device.
API void simulated_gpu_on_wait(void (*call)(const char*)) { sim::listener = call; }

// A function of CUDA, NCCL or cuBLAS that torch wants and nothing here stands in for: see build.py.
API int simulated_gpu_missing(const char* name) {
  sim::fault(std::string("no stand-in for ") + name);
  return 801;
}
