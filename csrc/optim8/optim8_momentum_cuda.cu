#include "optim8/step_gpu.h"

namespace octavo::GPU_NS {

template void launch_step<SgdRule>(const OptimStep&, Stream);
template void launch_step<MomentumRule>(const OptimStep&, Stream);
template void launch_step<LarsRule>(const OptimStep&, Stream);
template void launch_step<LionRule>(const OptimStep&, Stream);

}  // namespace octavo::GPU_NS
