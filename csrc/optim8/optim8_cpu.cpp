#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "optim8/optim8_loops.h"
#include "optim8/rules.h"

namespace octavo::cpu {
namespace {

const OptimLoops& optim_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::optim_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::optim_loops;
#endif
    default: return portable::optim_loops;
  }
}

bool nothing_to_do(const OptimStep& s) {
  return s.found_inf && *s.found_inf != 0;
}

// sums: of all tensors, or null.
Factors factors_of(const OptimStep& s, const OptimTensor& t, const double* sums) {
  return octavo::factors_of(s.rule, s.hyper, s.lr ? *s.lr : s.hyper.lr, *t.step, grad_factor(s),
                            sums ? sums + 2 * t.position : nullptr);
}

}  // namespace

// Per chunk, then per tensor in order: the sums do not depend on the threads.
void optim_sums(const OptimStep& s, Stream) {
  std::fill_n(s.new_sums, 2 * s.tensor_count, 0.0);
  if (nothing_to_do(s)) return;
  const OptimLoops& loops = optim_loops();
  parallel_for(s.chunk_count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t index = s.chunks[chunk];
      const OptimTensor& t = s.tensors[index];
      const int64_t first = (chunk - t.first_chunk) * kChunkBlocks;
      const int64_t blocks = t.count / std::max<int64_t>(t.row, 1) * t.row_blocks;
      double* sums = s.chunk_sums + 2 * chunk;
      sums[0] = sums[1] = 0;
      loops.sums(s, t, factors_of(s, t, nullptr), first, std::min(first + kChunkBlocks, blocks), sums);
    }
  });
  for (int64_t chunk = 0; chunk < s.chunk_count; ++chunk)
    for (int i = 0; i < 2; ++i) s.new_sums[2 * s.tensors[s.chunks[chunk]].position + i] += s.chunk_sums[2 * chunk + i];
}

void optim_step(const OptimStep& s, Stream) {
  if (s.block_count == 0 || nothing_to_do(s)) return;
  const OptimLoops& loops = optim_loops();
  // One region over the blocks of all tensors: a thread's share may be a part of one, or many.
  parallel_for(s.block_count, row_grain(kOptimBlock), [&](int64_t begin, int64_t end) {
    const OptimTensor* last = s.tensors + s.tensor_count;
    const OptimTensor* t =
        std::upper_bound(s.tensors, last, begin,
                         [](int64_t block, const OptimTensor& tensor) { return block < tensor.first_block; }) -
        1;
    int64_t left_alone = 0;
    for (; begin < end; ++t) {
      const int64_t stop = t + 1 < last ? std::min(t[1].first_block, end) : end;
      if (stop <= begin) continue;
      const Factors f = factors_of(s, *t, s.sums);
      left_alone += loops.step(s, *t, f, begin - t->first_block, stop - t->first_block);
      begin = stop;
    }
    if (left_alone) __atomic_fetch_add(s.nonfinite, left_alone, __ATOMIC_RELAXED);
  });
}

}  // namespace octavo::cpu
