#pragma once
// The parts of the SpQR product on a GPU, and what they leave each other in the workspace.
#include "common/launch.h"
#include "spqr/spqr.h"

namespace octavo::GPU_NS {

// Byte offsets in the workspace; x is in the order of the quantizer, padded with zeros.
struct SpqrStaged {
  bool tiles;                  // whether the kernel of tiles takes it; else the one that streams the weight
  int rows;                    // streaming: of x that a pass takes, 1, 4 or 8 (fp32: 1 or 4); tiles: 1
  int planes;                  // 16-bit numbers whose sum is an element of x: 3 for fp32
  int64_t passes;              // ceil(m / rows)
  int64_t chunks;              // of a row of x, padded to what a block takes at a time
  unsigned blocks_per_second;  // streaming: blocks, passes of a tile included, that share a second-order record
  int64_t x;        // streaming: [passes, chunks], each spqr_chunk_of_x bytes: [planes, rows, 32] numbers, then fp32
                    // [2, rows], the sums of 16 columns; and before it such a chunk of zeros. Tiles: [m, chunks, 32]
  int64_t columns;  // streaming, with outliers: x again, [passes, k, rows], so that a column is one access
  int64_t bytes;
};

HD constexpr int spqr_chunk_of_x(int planes, int rows) {
  return planes * rows * 64 + (rows == 1 ? 16 : rows * 8);  // a multiple of 16
}

// The streaming kernel: chunks that a warp takes at a time, warps of a block, chunks that they take together.
constexpr int kStreamStepChunks = 8, kStreamWarps = 4, kStreamChunks = kStreamStepChunks * kStreamWarps;

SpqrStaged spqr_staged(const SpqrMatmul& p);
void spqr_stream(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream);
void spqr_tiles(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream);

}  // namespace octavo::GPU_NS
