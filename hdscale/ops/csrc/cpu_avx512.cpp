// The CPU kernels for avx512: chosen at run time, so nothing outside this namespace may be compiled for that target.
#if defined(__x86_64__)
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define VECTOR_BYTES 64
#define BRAIN_DOT 0
#define REGISTER_ROWS 8
namespace hdscale {
namespace avx512 {
namespace {
#include "cpu_kernels.inc"
}  // namespace
}  // namespace avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels kernels_avx512 = {"avx512", avx512::forward_any, avx512::backward_any, avx512::heads_backward_any};

}  // namespace hdscale
#endif  // __x86_64__
