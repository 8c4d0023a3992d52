// cuBLAS's calls of which only the fact matters: in a file of their own, without its header and prototypes.
#include <string>

namespace sim {
void count_launch(const std::string& kernel);
}

#define IS_FINE(name) \
  extern "C" __attribute__((visibility("default"))) int name(...) { return 0; }
#define IS_A_LAUNCH(name) \
  extern "C" __attribute__((visibility("default"))) int name(...) { return sim::count_launch(#name), 0; }

IS_FINE(cublasDestroy_v2)
IS_FINE(cublasSetStream_v2)
IS_FINE(cublasSetWorkspace_v2)
IS_FINE(cublasSetMathMode)
IS_FINE(cublasSetPointerMode_v2)
IS_FINE(cublasSetSmCountTarget)
IS_FINE(cublasLtMatmulDescDestroy)
IS_FINE(cublasLtMatmulDescSetAttribute)
IS_FINE(cublasLtMatmulPreferenceDestroy)
IS_FINE(cublasLtMatmulPreferenceSetAttribute)
IS_FINE(cublasLtMatrixLayoutDestroy)
IS_FINE(cublasLtMatrixLayoutSetAttribute)

IS_A_LAUNCH(cublasGemmEx)
IS_A_LAUNCH(cublasGemmStridedBatchedEx)
IS_A_LAUNCH(cublasSgemmEx)
IS_A_LAUNCH(cublasSgemm_v2)
IS_A_LAUNCH(cublasSgemmStridedBatched)
IS_A_LAUNCH(cublasDgemm_v2)
IS_A_LAUNCH(cublasDgemmStridedBatched)
IS_A_LAUNCH(cublasSgemv_v2)
IS_A_LAUNCH(cublasDgemv_v2)
IS_A_LAUNCH(cublasDotEx)
IS_A_LAUNCH(cublasSdot_v2)
IS_A_LAUNCH(cublasDdot_v2)
IS_A_LAUNCH(cublasLtMatmul)
