// Enough of CUDA to run gpu_kernels.cuh on a CPU: every thread of a block is a fiber, __syncthreads and the warp-wide
// mma.sync are where fibers wait for each other, and global and shared memory end at a page that may not be touched.
//
// What it shows: indices, guards, barriers, fragment layouts and sums. What it cannot show: speed, and races between
// threads that a real GPU runs at the same time (fibers run one at a time, though each barrier is checked to be
// reached by all).
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define HDSCALE_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulator::shared_memory)

namespace emulator {

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "emulator: %s\n", why);
  exit(3);
}

// Memory whose end is the end of a page, followed by a page without access; filled with NaNs.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("out of memory");
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + mapped_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + mapped_ - page - bytes);
    memset(static_cast<void*>(data_), 0xff, bytes);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  T* data() { return data_; }

 private:
  char* base_;
  size_t mapped_;
  T* data_;
};

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class State { runnable, at_barrier, at_multiply, done };

struct Fiber {
  ucontext_t context;
  State state;
  float (*d)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

inline unsigned char* shared_memory = nullptr;
inline Index thread_index, block_index;
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> body;

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void fiber_main() {
  body();
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline float brain(uint32_t bits) {
  bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 by its documented fragment layout, written independently of
// gpu_tiles.h: groups of four lanes hold rows of A and D, and columns of B.
inline void multiply_warp(Fiber* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, member = lane & 3;
    for (int reg = 0; reg < 4; ++reg)
      for (int low = 0; low < 2; ++low) {
        const int row = group + (reg == 1 || reg == 3 ? 8 : 0), column = member * 2 + low + (reg >= 2 ? 8 : 0);
        a[row][column] = brain((*lanes[lane].a)[reg] >> (16 * low) & 0xffff);
      }
    for (int reg = 0; reg < 2; ++reg)
      for (int low = 0; low < 2; ++low)
        b[member * 2 + low + 8 * reg][group] = brain(lanes[lane].b[reg] >> (16 * low) & 0xffff);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int reg = 0; reg < 4; ++reg) {
      const int row = (lane >> 2) + (reg >= 2 ? 8 : 0), column = (lane & 3) * 2 + (reg & 1);
      float sum = (*lanes[lane].d)[reg];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      (*lanes[lane].d)[reg] = sum;
    }
}

inline void run_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[thread].get();
    fiber.context.uc_stack.ss_size = 1 << 16;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.state = State::runnable;
  }
  for (;;) {
    unsigned finished = 0, waiting = 0;
    for (unsigned warp = 0; warp < threads / 32; ++warp) {
      for (;;) {
        unsigned multiplying = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
          current = warp * 32 + lane;
          if (fibers[current].state == State::runnable) {
            thread_index.x = current;
            swapcontext(&scheduler, &fibers[current].context);
          }
          multiplying += fibers[current].state == State::at_multiply;
        }
        if (multiplying == 0) break;
        if (multiplying != 32) fail("a warp-wide multiplication was not reached by all lanes");
        multiply_warp(&fibers[warp * 32]);
        for (unsigned lane = 0; lane < 32; ++lane) fibers[warp * 32 + lane].state = State::runnable;
      }
      for (unsigned lane = 0; lane < 32; ++lane) {
        finished += fibers[warp * 32 + lane].state == State::done;
        waiting += fibers[warp * 32 + lane].state == State::at_barrier;
      }
    }
    if (finished == threads) return;
    if (waiting != threads) fail("a barrier was not reached by all threads");
    for (Fiber& fiber : fibers) fiber.state = State::runnable;
  }
}

template <class Grid, class Arguments>
void launch(void (*kernel)(Arguments), Grid grid, unsigned threads, int bytes, const Arguments& arguments) {
  while (fibers.size() < threads) {
    fibers.emplace_back();
    stacks.emplace_back(new char[1 << 16]);
  }
  Guarded<unsigned char> shared(size_t(bytes > 0 ? bytes : 16));
  shared_memory = shared.data();
  body = [&] { kernel(arguments); };
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
        memset(shared_memory, 0xff, size_t(bytes));  // what a kernel did not write is a NaN
        run_block(threads);
      }
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index

inline void __syncthreads() { emulator::wait(emulator::State::at_barrier); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t out = 0;
  for (int index = 0; index < 4; ++index)
    out |= uint32_t(bytes >> (8 * (selector >> (4 * index) & 7)) & 0xff) << (8 * index);
  return out;
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Fiber& fiber = emulator::fibers[emulator::current];
  fiber.d = &d;
  fiber.a = &a;
  fiber.b[0] = b0;
  fiber.b[1] = b1;
  emulator::wait(emulator::State::at_multiply);
}
