#include "sparse/sparse_cuda.cu"
