// The CPU kernels for avx512 with bfloat16 products (avx512_bf16): chosen at run time, so nothing outside this namespace may be compiled for that target.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define VECTOR_BYTES 64
#define BRAIN_DOT 1
#define REGISTER_ROWS 8
namespace hdscale {
namespace avx512_bf16 {
namespace {
#include "cpu_kernels.inc"
}  // namespace
}  // namespace avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels kernels_avx512_bf16 = {"avx512_bf16", avx512_bf16::forward_any, avx512_bf16::backward_any, avx512_bf16::heads_backward_any};

}  // namespace hdscale
#endif  // __x86_64__
