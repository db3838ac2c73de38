#include "nf4/nf4_tiles_cuda.cu"
