// The CPU kernels for whatever the compiler targets by default (SSE2 on x86, NEON on Arm).
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu_kernels.h"

#define VECTOR_BYTES 16
#define BRAIN_DOT 0
#define REGISTER_ROWS 4
namespace hdscale {
namespace generic {
namespace {
#include "cpu_kernels.inc"
}  // namespace
}  // namespace generic

const Kernels kernels_generic = {"generic", generic::forward_any, generic::backward_any, generic::heads_backward_any};

}  // namespace hdscale
