#include "optim8/optim8_sums_cuda.cu"
