#include "optim8/sums_gpu.h"

namespace octavo::GPU_NS {

template void launch_sums<LambRule>(const OptimStep&, Stream);
template void launch_sums<LarsRule>(const OptimStep&, Stream);
template void launch_sums<StableAdamwRule>(const OptimStep&, Stream);

}  // namespace octavo::GPU_NS
