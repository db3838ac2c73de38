#include "nf4/nf4_cuda.cu"
