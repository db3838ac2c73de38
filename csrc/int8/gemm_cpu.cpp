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
  alignas(64) float sum8[kTileM * kTileN], sum16[kTileM * kTileN];
  alignas(64) float weights[kOutlierChunk * kTileN];
  alignas(64) float bias[kTileN];
  uint8_t is_kept[kOutlierChunk];
};

// The outlier columns of this tile, a chunk at a time: their weights are gathered once for all its rows.
void add_outliers(const GemmLoops& loops, const GemmTile& t, Scratch& s) {
  const Int8Gemm& p = *t.p;
  for (int64_t i = 0; i < t.rows * kTileN; ++i) s.sum8[i] = s.sum16[i] = 0.0f;
  for (int64_t first = 0, total = *p.count; first < total; first += kOutlierChunk) {
    const int64_t count = total - first < kOutlierChunk ? total - first : kOutlierChunk;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t column = p.columns[first + c], slot = p.outlier_slot ? p.outlier_slot[column] : -1;
      s.is_kept[c] = slot >= 0 && slot < p.outlier_slots;
      float* w = s.weights + c * kTileN;
      for (int64_t j = 0; j < kTileN; ++j) {
        if (j >= t.cols)
          w[j] = 0.0f;
        else if (s.is_kept[c])
          w[j] = load_float(p.outlier_weight, p.outlier_weight_dtype, slot * p.n + t.j0 + j);
        else
          w[j] = static_cast<float>(p.b[(t.j0 + j) * p.k + column]);
      }
    }
    loops.add_outliers(t, p.columns + first, count, s.weights, s.is_kept);
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
      loops.multiply(t);
      if (p.x && *p.count > 0) {
        t.sum8 = s->sum8;
        t.sum16 = s->sum16;
        add_outliers(loops, t, *s);
      }
      if (p.bias)
        for (int64_t j = 0; j < kTileN; ++j)
          s->bias[j] = j < t.cols ? load_float(p.bias, p.bias_dtype, t.j0 + j) : 0.0f;
      loops.epilogue(t, p.bias ? s->bias : nullptr);
    }
  });
}

}  // namespace octavo::cpu
