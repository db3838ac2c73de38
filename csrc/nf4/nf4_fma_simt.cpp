#include "nf4/nf4_fma_cuda.cu"
