#pragma once
// How the memory-bound kernels touch memory: packs of elements (one 16-byte access where alignment allows), and a
// matrix cut into tiles.
#include "common/launch.h"
#include "common/numeric.h"

namespace octavo::GPU_NS {

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Pack number i from base. Counting in packs, not elements, is what lets the compiler see the alignment: of a pointer
// to an element, it splits the access.
template <int N, class T>
__device__ inline Pack<T, N> load_pack(const T* base, int64_t i) {
  return reinterpret_cast<const Pack<T, N>*>(base)[i];
}

template <int N, class T>
__device__ inline void store_pack(T* base, int64_t i, const Pack<T, N>& pack) {
  reinterpret_cast<Pack<T, N>*>(base)[i] = pack;
}

// p, known to point to global memory. The compiler sees that of a kernel's parameters, not of pointers that it reads
// from memory: for those it would take accesses that could be shared memory, too.
template <class T>
__device__ __forceinline__ T* in_global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Elements of one 16-byte access.
template <class T>
constexpr int kVectorWidth = 16 / sizeof(T);

// Whether rows of `cols` elements, all from one base address, can be accessed in packs of `width`.
template <class T>
inline bool packable(const T* base, int64_t cols, int width) {
  return cols % width == 0 && reinterpret_cast<uintptr_t>(base) % (sizeof(T) * width) == 0;
}

// The integer that orders like the largest |element|; NaN above Inf above the rest (numeric.h).
template <class T, int N>
__device__ inline uint32_t absmax_bits(const Pack<T, N>& pack) {
  uint32_t absmax = 0;
  UNROLL for (int e = 0; e < N; ++e) {
    const uint32_t bits = abs_bits(to_float(pack.at[e]));
    absmax = bits > absmax ? bits : absmax;
  }
  return absmax;
}

// abs_bits at or above which an element may be an outlier; NaN lies above it too, so is_outlier decides then.
// Without a threshold nothing reaches it.
HD uint32_t outlier_bits(float threshold) {
  return threshold > 0 ? float_bits(threshold) : 0xffffffffu;
}

// ---- tiles: a block of 32 x 8 threads takes 32 packs of columns and 64 rows; a warp reads 32 consecutive packs of a
// row, and a thread stays in its columns for 8 rows, so that what it computes per column is computed once in 8. The
// grid is one-dimensional: grid.y ends at 65535. Its 2^31 blocks are more than any matrix that fits a GPU needs.

constexpr int kTileLanes = 32, kTileWarps = 8, kTileRows = 64;

template <int kWidth>
struct Tile {
  int64_t packs;     // per row
  int64_t pack;      // this thread's; may lie outside the matrix
  int64_t row, end;  // its rows: row, row + kTileWarps, ... < end
  bool first;        // whether the tile holds row 0

  __device__ Tile(int64_t rows, int64_t cols) {
    packs = cols / kWidth;
    const unsigned across = static_cast<unsigned>(ceil_div(packs, kTileLanes)), tile_row = blockIdx.x / across;
    pack = static_cast<int64_t>(blockIdx.x % across) * kTileLanes + threadIdx.x;
    row = static_cast<int64_t>(tile_row) * kTileRows + threadIdx.y;
    end = static_cast<int64_t>(tile_row) * kTileRows + kTileRows;
    if (end > rows) end = rows;
    first = tile_row == 0;
  }

  static dim3 block() { return dim3(kTileLanes, kTileWarps); }

  // At least one row of tiles when there are columns, for what is written once per column.
  static dim3 grid(int64_t rows, int64_t cols) {
    const int64_t down = rows > 0 ? ceil_div(rows, kTileRows) : 1;
    return dim3(static_cast<unsigned>(ceil_div(cols / kWidth, kTileLanes) * down));
  }
};

}  // namespace octavo::GPU_NS
