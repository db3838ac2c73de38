#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "spqr/spqr_loops.h"

namespace octavo::cpu {
namespace {

#if OCTAVO_MAX_ISA >= 2
bool has_bf16() {
  static const bool value = __builtin_cpu_supports("avx512bf16") != 0;
  return value;
}
#endif

const SpqrLoops& loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return has_bf16() ? avx512::spqr_bf16_loops : avx512::spqr_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::spqr_loops;
#endif
    default: return portable::spqr_loops;
  }
}

const SpqrLoops& loops_for([[maybe_unused]] const SpqrMatmul& p) {
#if OCTAVO_MAX_ISA >= 3
  if (isa() == Isa::amx && p.dtype == DType::bf16 && p.m > kSpqrStreamRows) return amx::spqr_loops;
#endif
  return loops();
}

// The input's arrays within the workspace, from `base`; with 0, only their total size comes of it.
int64_t lay_out(const SpqrMatmul& p, const SpqrLoops& l, uintptr_t base, SpqrInput& in) {
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const uintptr_t at = base + bytes;
    bytes += ceil_div(size, 64) * 64;
    return at;
  };
  const bool streaming = p.m <= kSpqrStreamRows, half = p.dtype == DType::f16, bf16 = p.dtype == DType::bf16;
  in.columns = spqr_chunks(p.w) * kChunk;
  in.planes = streaming ? (half ? l.parts_of_half : bf16 ? l.parts_of_bfloat16 : 0) : bf16 && l.bfloat16_panels;
  in.tiled = l.tiled && in.planes;
  in.block = streaming ? 1 : l.panel_rows;
  if (streaming)
    while (in.block < p.m) in.block *= 2;
  in.rows = ceil_div(p.m, in.block) * in.block;
  const int64_t elements = in.rows * in.columns;
  if (in.planes) in.parts = reinterpret_cast<uint32_t*>(take(elements / 2 * in.planes * sizeof(uint32_t)));
  // Outliers read x in fp32, or, where one plane is all of it and they meet several rows, that.
  const bool outliers_need_x = streaming && p.w.row_offsets && (in.planes != 1 || p.m == 1 || p.w.wide);
  if (!in.planes || outliers_need_x) in.x = reinterpret_cast<float*>(take(elements * sizeof(float)));
  if (streaming) in.sums = reinterpret_cast<float*>(take(in.rows * spqr_groups(p.w) * sizeof(float)));
  return bytes;
}

}  // namespace

int64_t spqr_workspace(const SpqrMatmul& p) {
  SpqrInput in{};
  return lay_out(p, loops_for(p), 0, in) + 64;
}

void spqr_matmul(const SpqrMatmul& p, Stream) {
  const SpqrLoops& l = loops_for(p);
  SpqrInput in{};
  const uintptr_t start = reinterpret_cast<uintptr_t>(p.workspace);
  lay_out(p, l, (start + 63) / 64 * 64, in);
  parallel_for(in.rows / in.block, row_grain(in.block * p.w.k),
               [&](int64_t begin, int64_t end) { l.prepare(p, in, begin, end); });
  const int64_t tiles = spqr_row_tiles(p.w), products = kTileRows16 * p.w.k + 1;
  if (p.m <= kSpqrStreamRows) {
    parallel_for(tiles, ceil_div(1 << 18, products), [&](int64_t begin, int64_t end) { l.stream(p, in, begin, end); });
    return;
  }
  const int64_t across = ceil_div(tiles, l.panel_tiles), down = ceil_div(p.m, kSpqrRowBlock);
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % down * kSpqrRowBlock, left = p.m - row;
      l.multiply(p, in, task / down * l.panel_tiles, row, left < kSpqrRowBlock ? left : kSpqrRowBlock);
    }
  });
}

void spqr_dequantize(const SpqrDequantize& p, Stream) {
  parallel_for(spqr_row_tiles(p.w), row_grain(kTileRows16 * p.w.k),
               [&](int64_t begin, int64_t end) { loops().dequantize(p, begin, end); });
}

}  // namespace octavo::cpu
