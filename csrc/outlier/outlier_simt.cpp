#include "outlier/outlier_cuda.cu"
