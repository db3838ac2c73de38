#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "nf4/nf4_loops.h"

namespace octavo::cpu {
namespace {

#if OCTAVO_MAX_ISA >= 2
bool has_bf16() {
  static const bool value = __builtin_cpu_supports("avx512bf16") != 0;
  return value;
}
#endif

const Nf4Loops& loops() {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::nf4_loops;
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::nf4_loops;
#endif
    default: return portable::nf4_loops;
  }
}

const Nf4Loops& loops_for([[maybe_unused]] const Nf4Matmul& p, [[maybe_unused]] bool transposed) {
#if OCTAVO_MAX_ISA >= 2
  if (p.dtype == DType::bf16 && nf4_aligned(p)) {
#if OCTAVO_MAX_ISA >= 3
    if (isa() == Isa::amx && (transposed || p.m > kNf4StreamRows)) return amx::nf4_loops;
#endif
    if (isa() >= Isa::avx512 && has_bf16()) return avx512::nf4_bf16_loops;
  }
#endif
  return loops();
}

// The input's arrays within the workspace, from `base`; with 0, only their total size comes of it.
int64_t lay_out(const Nf4Matmul& p, const Nf4Loops& l, bool transposed, uintptr_t base, Nf4Input& in) {
  const bool streaming = !transposed && p.m <= kNf4StreamRows;
  in.transposed = transposed;
  in.inner = transposed ? p.n : p.k;
  in.outer = transposed ? p.k : p.n;
  in.columns = ceil_div(in.inner, 128) * 128;
  in.block = l.panel_rows;
  if (streaming) {  // as many rows as a loop in bf16 is made for
    in.block = 1;
    for (const int64_t rows : {1, 2, 3, 4, 6, 8, 12, 16})
      if (in.block < p.m) in.block = rows;
  }
  in.rows = ceil_div(p.m, in.block) * in.block;
  const bool parts = streaming ? l.parts_streaming : l.parts_panels;
  in.tiled = parts && l.tiled;
  const int64_t bytes = in.rows * in.columns * (parts ? 2 : 4);
  if (parts)
    in.parts = reinterpret_cast<uint32_t*>(base);
  else
    in.x = reinterpret_cast<float*>(base);
  if (!streaming || !parts) return bytes;
  in.scale = reinterpret_cast<float*>(base + bytes);
  return bytes + in.rows * static_cast<int64_t>(sizeof(float));
}

int64_t workspace(const Nf4Matmul& p, bool transposed) {
  Nf4Input in{};
  return lay_out(p, loops_for(p, transposed), transposed, 0, in) + 64;
}

void multiply(const Nf4Matmul& p, bool transposed) {
  const Nf4Loops& l = loops_for(p, transposed);
  Nf4Input in{};
  lay_out(p, l, transposed, (reinterpret_cast<uintptr_t>(p.workspace) + 63) / 64 * 64, in);
  parallel_for(in.rows / in.block, row_grain(in.block * in.columns),
               [&](int64_t begin, int64_t end) { l.prepare(p, in, begin, end); });
  if (!transposed && p.m <= kNf4StreamRows) {
    parallel_for(ceil_div(p.n, 16), ceil_div(1 << 18, 16 * p.k + 1),
                 [&](int64_t begin, int64_t end) { l.stream(p, in, begin * 16, end * 16 < p.n ? end * 16 : p.n); });
    return;
  }
  const int64_t across = ceil_div(in.outer, l.panel_outputs), down = ceil_div(p.m, kNf4RowBlock);
  parallel_for(across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task % down * kNf4RowBlock, left = p.m - row;
      l.multiply(p, in, task / down * l.panel_outputs, row, left < kNf4RowBlock ? left : kNf4RowBlock);
    }
  });
}

}  // namespace

void quantize_low_bit(const QuantizeLowBit& p, Stream) {
  parallel_for(ceil_div(p.count, p.blocksize), row_grain(p.blocksize),
               [&](int64_t begin, int64_t end) { loops().quantize(p, begin, end); });
}

void dequantize_low_bit(const DequantizeLowBit& p, Stream) {
  parallel_for(ceil_div(p.from.count, p.from.blocksize), row_grain(p.from.blocksize),
               [&](int64_t begin, int64_t end) { loops().dequantize(p, begin, end); });
}

int64_t nf4_workspace(const Nf4Matmul& p) {
  return workspace(p, false);
}
void nf4_matmul(const Nf4Matmul& p, Stream) {
  multiply(p, false);
}
int64_t nf4_workspace_transposed(const Nf4Matmul& p) {
  return workspace(p, true);
}
void nf4_matmul_transposed(const Nf4Matmul& p, Stream) {
  multiply(p, true);
}

}  // namespace octavo::cpu
