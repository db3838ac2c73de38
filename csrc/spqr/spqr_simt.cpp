#include "spqr/spqr_cuda.cu"
