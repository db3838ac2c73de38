#include "optim8/optim8_cuda.cu"
