// One step of an optimizer over many tensors, states in 8 bits or fp32. Bound by memory: every byte is read and written
// once, in accesses of up to 16 bytes that neighbouring lanes make side by side.
//
// One launch for all tensors with fp32 parameters and one for those with 16 bits. A thread block goes through chunks, a
// warp of it through blocks of 256 elements, 8 per lane, that stay in registers from the gradient to the new codes:
// what is shared by a block of states (two maxima) is shared by a warp, and no barrier is met but where another tensor
// brings other factors.
#include "optim8/work_gpu.h"

namespace octavo::GPU_NS {

// Of each tensor, by one warp: lanes take chunks in turn, so that the sum depends on nothing but their number.
__global__ void __launch_bounds__(kStepThreads) tensor_sums_kernel(OptimStep s) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepWarps + threadIdx.x / 32;
  if (index >= s.tensor_count) return;
  const int64_t begin = s.tensors[index].first_chunk;
  const int64_t end = index + 1 < s.tensor_count ? s.tensors[index + 1].first_chunk : s.chunk_count;
  double sums[2] = {0.0, 0.0};
  for (int64_t chunk = nothing_to_do(s) ? end : begin + lane_id(); chunk < end; chunk += 32)
    for (int i = 0; i < 2; ++i) sums[i] += s.chunk_sums[2 * chunk + i];
  for (int i = 0; i < 2; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane_id() == 0) s.new_sums[2 * s.tensors[index].position + i] = sums[i];
  }
}

void optim_sums(const OptimStep& s, Stream stream) {
  dispatch_rule(s.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kSums != Sums::none) launch_sums<Rule>(s, stream);
  });
  const dim3 grid(static_cast<unsigned>(ceil_div(s.tensor_count, kStepWarps)));
  LAUNCH(tensor_sums_kernel, grid, dim3(kStepThreads), 0, stream, s);
}

void optim_step(const OptimStep& s, Stream stream) {
  if (s.block_count == 0) return;
  dispatch_rule(s.rule, [&](auto rule) { launch_step<decltype(rule)>(s, stream); });
}

}  // namespace octavo::GPU_NS
