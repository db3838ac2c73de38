#include "int8/transpose_cuda.cu"
