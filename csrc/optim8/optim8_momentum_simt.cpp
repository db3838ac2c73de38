#include "optim8/optim8_momentum_cuda.cu"
