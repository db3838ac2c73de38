#include "int8/quantize_cuda.cu"
