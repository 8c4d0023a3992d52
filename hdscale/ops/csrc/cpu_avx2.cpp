// The CPU kernels for avx2: chosen at run time, so nothing outside this namespace may be compiled for that target.
#if defined(__x86_64__)
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define VECTOR_BYTES 32
#define BRAIN_DOT 0
#define REGISTER_ROWS 4
namespace hdscale {
namespace avx2 {
namespace {
#include "cpu_kernels.inc"
}  // namespace
}  // namespace avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels kernels_avx2 = {"avx2", avx2::forward_any, avx2::backward_any, avx2::heads_backward_any};

}  // namespace hdscale
#endif  // __x86_64__
