// cuBLAS as far as torch calls it: every product is one launch.
#include "simulator.h"

#include <cublasLt.h>
#include <cublas_v2.h>

#include <cstdlib>

namespace {
template <class Handle>
cublasStatus_t make(Handle* out) {
  *out = static_cast<Handle>(calloc(1, 512));
  return CUBLAS_STATUS_SUCCESS;
}
}  // namespace

#define MAKES(name, Handle, ...) \
  API cublasStatus_t name(Handle* out __VA_ARGS__) { return make(out); }

MAKES(cublasCreate_v2, cublasHandle_t)
MAKES(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreference_t)
MAKES(cublasLtMatmulDescCreate, cublasLtMatmulDesc_t, , cublasComputeType_t, cudaDataType_t)
MAKES(cublasLtMatrixLayoutCreate, cublasLtMatrixLayout_t, , cudaDataType, uint64_t, uint64_t, int64_t)

API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* out) {
  *out = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* out) {
  *out = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* out, int* found) {
  *out = {};
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
