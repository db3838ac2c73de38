#include "optim8/optim8_ademamix_cuda.cu"
