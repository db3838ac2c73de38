#include "optim8/step_gpu.h"

namespace octavo::GPU_NS {

template void launch_step<AdemamixRule>(const OptimStep&, Stream);
template void launch_step<StableAdamwRule>(const OptimStep&, Stream);

}  // namespace octavo::GPU_NS
