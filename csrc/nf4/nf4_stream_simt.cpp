#include "nf4/nf4_stream_cuda.cu"
