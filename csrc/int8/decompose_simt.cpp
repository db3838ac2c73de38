#include "int8/decompose_cuda.cu"
