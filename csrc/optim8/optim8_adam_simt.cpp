#include "optim8/optim8_adam_cuda.cu"
