#include "optim8/step_gpu.h"

namespace octavo::GPU_NS {

template void launch_step<RmspropRule>(const OptimStep&, Stream);
template void launch_step<RmspropMomentumRule>(const OptimStep&, Stream);
template void launch_step<AdagradRule>(const OptimStep&, Stream);

}  // namespace octavo::GPU_NS
