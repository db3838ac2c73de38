#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 3
#include <immintrin.h>

#include "common/numeric.h"
#include "int8/gemm.h"
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // amx.h writes its instructions as asm
#define OCTAVO_ISA_LOOPS
#include "cpu/amx.h"
#include "cpu/vec_avx512.h"
#include "int8/gemm_tile.h"

namespace octavo::cpu::amx {
namespace {

// Tiles compute (b a^T): 16 rows of b, 64 bytes of k each, are a left operand as they lie in memory, so the weight
// needs no packing; the right operand, 16 rows of a with k in quads, is what pack() makes of the codes.
//   packed[group][step][quad][row][4] = a[group * 16 + row][step * 64 + quad * 4 ...], zeros outside
constexpr int kTileBytes = 16 * 64;

void pack(const Int8Gemm& p, int8_t* packed, int64_t begin, int64_t end) {
  const int64_t steps = ceil_div(p.k, kPackK);
  for (int64_t group = begin; group < end; ++group)
    for (int64_t step = 0; step < steps; ++step) {
      int8_t* tile = packed + (group * steps + step) * kTileBytes;
      const int64_t width = p.k - step * 64 < 64 ? p.k - step * 64 : 64;
      for (int64_t row = 0; row < 16; ++row) {
        alignas(64) int8_t line[64] = {};
        if (group * 16 + row < p.m) __builtin_memcpy(line, p.a + (group * 16 + row) * p.k + step * 64, width);
        for (int64_t quad = 0; quad < 16; ++quad) __builtin_memcpy(tile + quad * 64 + row * 4, line + quad * 4, 4);
      }
    }
}

// 16 rows of b from row j, 64 bytes from step * 64. At the edges they go through a zeroed copy: nothing outside b is
// read, and padding contributes nothing.
struct BTile {
  const int8_t* data;
  int64_t stride;
};
BTile b_tile(const Int8Gemm& p, int64_t j, int64_t step, int8_t* copy) {
  const int64_t rows = p.n - j < 16 ? p.n - j : 16, width = p.k - step * 64 < 64 ? p.k - step * 64 : 64;
  const int8_t* from = p.b + j * p.k + step * 64;
  if (rows == 16 && width == 64) return {from, p.k};
  __builtin_memset(copy, 0, kTileBytes);
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(copy + r * 64, from + r * p.k, width);
  return {copy, 64};
}

// acc[i][j] = or += a tile of sums held transposed, [j][i].
template <bool kAdd>
void write(const GemmTile& t, int64_t i, int64_t j, const int32_t* sums) {
  __m512i pair[16], quad[16], column[16];
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    const __m512i even = _mm512_load_si512(sums + r * 16), odd = _mm512_load_si512(sums + (r + 1) * 16);
    pair[r] = _mm512_unpacklo_epi32(even, odd);
    pair[r + 1] = _mm512_unpackhi_epi32(even, odd);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {  // 128-bit lane L of quad[r + c]: rows r to r + 3 of column 4 L + c
    quad[r] = _mm512_unpacklo_epi64(pair[r], pair[r + 2]);
    quad[r + 1] = _mm512_unpackhi_epi64(pair[r], pair[r + 2]);
    quad[r + 2] = _mm512_unpacklo_epi64(pair[r + 1], pair[r + 3]);
    quad[r + 3] = _mm512_unpackhi_epi64(pair[r + 1], pair[r + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xdd);
    column[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    column[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    column[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    column[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
  const int64_t rows = t.rows - i < 16 ? t.rows - i : 16;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r >= rows) break;
    int32_t* to = t.acc + (i + r) * kTileN + j;
    _mm512_storeu_si512(to, kAdd ? _mm512_add_epi32(_mm512_loadu_si512(to), column[r]) : column[r]);
  }
}

// k in blocks, so that a tile's part of a (384 KiB) and of b (256 KiB) stay in L2 while each is read several times.
constexpr int64_t kBlockSteps = 4096 / kPackK;

// 32 rows of a x 32 rows of b: 4 accumulators, 4 multiplications for 4 loads; at the edges, what there is of them.
// Steps [begin, end). Meanwhile `ahead_rows` rows of b, from `ahead`, come from memory into L2.
template <bool kAdd>
void multiply_block(const GemmTile& t, int64_t group, int64_t j, int64_t begin, int64_t end, const int8_t* ahead,
                    int64_t ahead_rows) {
  const Int8Gemm& p = *t.p;
  const int64_t steps = ceil_div(p.k, kPackK);
  const bool two_a = (group + 1) * 16 < t.rows, two_b = j + 16 < t.cols;
  const int8_t* a0 = t.a + (t.i0 / 16 + group) * steps * kTileBytes;
  const int8_t* a1 = two_a ? a0 + steps * kTileBytes : a0;
  alignas(64) int8_t copy[2][kTileBytes];
  alignas(64) int32_t sums[256];
  amx_zero<0>();
  amx_zero<1>();
  amx_zero<2>();
  amx_zero<3>();
  for (int64_t step = begin; step < end; ++step) {
    for (int64_t r = 0; r < ahead_rows; ++r) _mm_prefetch(ahead + r * p.k + step * kPackK, _MM_HINT_T1);
    const BTile b0 = b_tile(p, t.j0 + j, step, copy[0]);
    amx_load<4>(b0.data, b0.stride);
    amx_load<6>(a0 + step * kTileBytes, 64);
    amx_multiply<0, 4, 6>();
    if (two_a) {
      amx_load<7>(a1 + step * kTileBytes, 64);
      amx_multiply<1, 4, 7>();
    }
    if (two_b) {
      const BTile b1 = b_tile(p, t.j0 + j + 16, step, copy[1]);
      amx_load<5>(b1.data, b1.stride);
      amx_multiply<2, 5, 6>();
      if (two_a) amx_multiply<3, 5, 7>();
    }
  }
  amx_store<0>(sums, 64);
  write<kAdd>(t, group * 16, j, sums);
  if (two_a) {
    amx_store<1>(sums, 64);
    write<kAdd>(t, group * 16 + 16, j, sums);
  }
  if (two_b) {
    amx_store<2>(sums, 64);
    write<kAdd>(t, group * 16, j + 16, sums);
  }
  if (two_a && two_b) {
    amx_store<3>(sums, 64);
    write<kAdd>(t, group * 16 + 16, j + 16, sums);
  }
}

void multiply(const GemmTile& t) {
  const Int8Gemm& p = *t.p;
  const int64_t steps = ceil_div(p.k, kPackK);
  // The rows of b after this tile's are read next, once all rows of a have passed: each pass over a part of this tile
  // prefetches its share of them, so that reading and multiplying go on side by side.
  const int64_t after = p.n - t.j0 - t.cols, next_rows = after < kTileN ? after : kTileN;
  const int8_t* next = p.b + (t.j0 + t.cols) * p.k;
  const int64_t passes_a_tile = ceil_div(p.m < kTileM ? p.m : kTileM, 32) * ceil_div(t.cols, 32);
  const int64_t passes = ceil_div(p.m, kTileM) * passes_a_tile;
  if (steps == 0) __builtin_memset(t.acc, 0, t.rows * kTileN * sizeof(int32_t));
  amx_begin();
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    const int64_t end = steps - begin < kBlockSteps ? steps : begin + kBlockSteps;
    int64_t pass = t.i0 / kTileM * passes_a_tile;
    for (int64_t j = 0; j < t.cols; j += 32)
      for (int64_t group = 0; group * 16 < t.rows; group += 2, ++pass) {
        const int64_t first = next_rows * pass / passes, rows = next_rows * (pass + 1) / passes - first;
        (begin == 0 ? multiply_block<false> : multiply_block<true>)(t, group, j, begin, end, next + first * p.k, rows);
      }
  }
  amx_end();
}

}  // namespace

constexpr GemmLoops gemm_loops = GemmEpilogue<avx512::Vec>::with(pack, 16, multiply);

}  // namespace octavo::cpu::amx
#endif
