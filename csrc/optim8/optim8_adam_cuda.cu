#include "optim8/step_gpu.h"

namespace octavo::GPU_NS {

template void launch_step<AdamRule>(const OptimStep&, Stream);
template void launch_step<LambRule>(const OptimStep&, Stream);

}  // namespace octavo::GPU_NS
