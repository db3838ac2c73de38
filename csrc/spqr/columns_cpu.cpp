#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "spqr/columns_loops.h"

namespace octavo::cpu {
namespace {

const ColumnLoops& column_loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::column_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::column_loops;
#endif
    default: return portable::column_loops;
  }
}

}  // namespace

void spqr_columns(const SpqrColumns& p, Stream) {
  const ColumnLoops& loops = column_loops();
  std::vector<float> factor(p.k * p.k);  // transposed: what a column receives lies side by side
  for (int64_t j = 0; j < p.k; ++j)
    for (int64_t l = 0; l < p.k; ++l) factor[l * p.k + j] = p.factor[j * p.k + l];
  // A weight costs about k operations: some 2^20 of them are worth a thread.
  const int64_t grain = ceil_div(1 << 20, p.stats_rows * p.k * p.k);
  parallel_for(ceil_div(p.n, p.stats_rows), grain, [&](int64_t begin, int64_t end) {
    const size_t tile = p.k * p.stats_rows;
    std::vector<float> floats(2 * tile + 2 * p.stats_rows);
    std::vector<Half> residual(tile);
    std::vector<uint8_t> codes(tile);
    float* rows = floats.data() + 2 * tile;
    const ColumnScratch scratch{floats.data(), floats.data() + tile, residual.data(), codes.data(),
                                rows,          rows + p.stats_rows};
    loops.quantize(p, factor.data(), scratch, begin, end);
  });
}

}  // namespace octavo::cpu
