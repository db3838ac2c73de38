#include "spqr/spqr_stream_cuda.cu"
