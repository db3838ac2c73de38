#include "int8/gemm_cuda.cu"
