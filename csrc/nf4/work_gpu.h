#pragma once
// The parts of the low-bit product on a GPU: which kernel takes it, and what is in the workspace.
#include "common/launch.h"
#include "nf4/nf4.h"

namespace octavo::GPU_NS {

enum class Nf4Kernel {
  stream,  // few rows of x, or fp32: tensor cores, absmax in fp32
  tiles,   // 16-bit x: tensor cores, the weight rounded to x's dtype
  fma      // anything: fp32
};

struct Nf4Plan {
  Nf4Kernel kernel;
  bool transposed;
  bool whole_rows;       // four bits, rows that are whole blocks and aligned: no code is cut off anywhere
  int64_t inner, outer;  // x is [m, inner], out [m, outer]
  int tile_m, tile_n;    // outputs of a block
  int64_t tiles;         // of out
  int splits;            // parts of `inner` that blocks of their own take; their sums are added afterwards
  int steps_per_split;   // of kNf4Step
  int64_t bytes;         // workspace: sums [splits, m, outer] in fp32; streaming fp32: x as bf16 [3, m, k]
};

constexpr int64_t kNf4StreamMost = 16;  // rows of 16-bit x, streaming
constexpr int kNf4Step = 32;            // of `inner`; the tiles of 64 x 64 take two at a time

Nf4Plan nf4_plan(const Nf4Matmul& p, bool transposed);
void nf4_stream(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream);
void nf4_tiles(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream);
void nf4_fma(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream);

}  // namespace octavo::GPU_NS
