#include <memory>

#include "common/numeric.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "int8/gemm_tile.h"

namespace octavo::cpu {
namespace {

const GemmLoops& loops_for([[maybe_unused]] const Int8Gemm& p) {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 3
    case Isa::amx:
      // A tile multiplies 16 rows of a at once; with fewer, memory is the limit and VNNI streams it as fast.
      if (p.m >= 16) return amx::gemm_loops;
      [[fallthrough]];
#endif
#if OCTAVO_MAX_ISA >= 2
    case Isa::avx512: return avx512::gemm_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::gemm_loops;
#endif
    default: return portable::gemm_loops;
  }
}

// What one thread needs besides inputs and output: bounded, whatever m, n and k are.
struct Scratch {
  alignas(64) int32_t acc[kTileM * kTileN];
  alignas(64) float sum[kTileM * kTileN];
  alignas(64) float weights[kOutlierChunk * kTileN];
  alignas(64) float bias[kTileN];
  int32_t columns[kOutlierChunk];
};

// The outlier columns of this tile whose weights were kept in 16 bits, or those whose were not, a chunk at a time: the
// weights are gathered once for all rows.
void add_outliers(const GemmLoops& loops, const GemmTile& t, Scratch& s, bool kept) {
  const Int8Gemm& p = *t.p;
  int64_t count = 0;
  for (int64_t c = 0, total = *p.count; c < total; ++c) {
    const int64_t column = p.columns[c], slot = p.outlier_slot ? p.outlier_slot[column] : -1;
    if ((slot >= 0 && slot < p.outlier_slots) == kept) {
      float* w = s.weights + count * kTileN;
      for (int64_t j = 0; j < kTileN; ++j) {
        if (j >= t.cols)
          w[j] = 0.0f;
        else if (kept)
          w[j] = load_float(p.outlier_weight, p.outlier_weight_dtype, slot * p.n + t.j0 + j);
        else
          w[j] = static_cast<float>(p.b[(t.j0 + j) * p.k + column]);
      }
      s.columns[count++] = p.columns[c];
    }
    if (count == kOutlierChunk || (c + 1 == total && count > 0)) {
      loops.add_outliers(t, s.columns, count, s.weights);
      count = 0;
    }
  }
}

}  // namespace

// Tasks are tiles of the output, those of one column block in a row: its rows of b stay in cache while a passes by.
void int8_gemm(const Int8Gemm& p, Stream) {
  const GemmLoops& loops = loops_for(p);
  std::unique_ptr<int8_t[], void (*)(int8_t*)> packed(
      nullptr, [](int8_t* data) { ::operator delete[](data, std::align_val_t(64)); });
  if (loops.pack) {
    const int64_t groups = ceil_div(p.m, loops.pack_rows);
    const int64_t bytes = groups * loops.pack_rows * ceil_div(p.k, kPackK) * kPackK;
    packed.reset(static_cast<int8_t*>(::operator new[](bytes, std::align_val_t(64))));
    parallel_for(groups, row_grain(loops.pack_rows * p.k),
                 [&](int64_t begin, int64_t end) { loops.pack(p, packed.get(), begin, end); });
  }
  const int64_t tiles_m = ceil_div(p.m, kTileM), tiles_n = ceil_div(p.n, kTileN);
  const int64_t rows_per_tile = p.m < kTileM ? p.m : kTileM;
  const int64_t grain = ceil_div(1 << 18, rows_per_tile * kTileN * p.k + 1);  // products per range, at least
  parallel_for(tiles_m * tiles_n, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Scratch> s(new Scratch);
    for (int64_t task = begin; task < end; ++task) {
      GemmTile t{.p = &p, .a = loops.pack ? packed.get() : p.a};
      t.i0 = task % tiles_m * kTileM;
      t.j0 = task / tiles_m * kTileN;
      t.rows = p.m - t.i0 < kTileM ? p.m - t.i0 : kTileM;
      t.cols = p.n - t.j0 < kTileN ? p.n - t.j0 : kTileN;
      t.acc = s->acc;
      t.sum = s->sum;
      loops.multiply(t);
      if (p.out_dtype != DType::i32) {
        loops.scale_rows(t);
        if (p.x) add_outliers(loops, t, *s, false);
        if (p.bias)
          for (int64_t j = 0; j < kTileN; ++j)
            s->bias[j] = j < t.cols ? load_float(p.bias, p.bias_dtype, t.j0 + j) : 0.0f;
        loops.scale_columns(t, p.bias ? s->bias : nullptr);
        if (p.x && p.outlier_slot) add_outliers(loops, t, *s, true);
      }
      loops.store(t);
    }
  });
}

}  // namespace octavo::cpu
