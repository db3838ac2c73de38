#include "optim8/optim8_rmsprop_cuda.cu"
