// Quantizing is done on the CPU only. Here it is for the test build to have every operator.
#define OCTAVO_ISA_LOOPS
#include <vector>

#include "cpu/vec_portable.h"
#include "spqr/columns_loops.h"

namespace octavo::simt {

void spqr_columns(const SpqrColumns& p, Stream) {
  std::vector<float> factor(p.k * p.k);
  for (int64_t j = 0; j < p.k; ++j)
    for (int64_t l = 0; l < p.k; ++l) factor[l * p.k + j] = p.factor[j * p.k + l];
  const size_t tile = p.k * p.stats_rows;
  std::vector<float> floats(2 * tile + 2 * p.stats_rows);
  std::vector<Half> halves(tile);
  std::vector<uint8_t> bytes(tile);
  float* end = floats.data() + 2 * tile;
  const cpu::ColumnScratch scratch{floats.data(), floats.data() + tile, halves.data(), bytes.data(),
                                   end,           end + p.stats_rows};
  cpu::TileLoops<cpu::portable::Vec>::quantize(p, factor.data(), scratch, 0, ceil_div(p.n, p.stats_rows));
}

}  // namespace octavo::simt
