#include "blockwise/blockwise_cuda.cu"
