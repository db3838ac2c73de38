#include "spqr/spqr_tiles_cuda.cu"
