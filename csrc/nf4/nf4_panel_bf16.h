#pragma once
// Panels (cpu/panel_bf16.h) of a 4-bit weight whose rows are whole blocks. After the target pragma of an AVX512-BF16
// file and vec_avx512.h.
#include "cpu/panel_bf16.h"
#include "nf4/nf4_loops.h"

namespace octavo::cpu::avx512 {
namespace {

using Plain = Nf4<Vec>;

constexpr int64_t kPanelOutputs = kPanelTiles * kPanelLanes;
constexpr int64_t kChunk = 128;  // weights of 64 bytes

struct Nf4PanelScratch {
  alignas(64) uint32_t panel[kPanelTiles * kPanelWords];
  alignas(64) float sums[kNf4RowBlock * kStride];
  alignas(64) float absmax[kPanelColumns / kMinLowBitBlock][kPanelLanes];  // of 16 rows of the weight, for forward
};

inline __mmask64 bytes_there(int64_t weights) {
  return weights >= kChunk ? ~__mmask64{0} : (__mmask64{1} << (weights / 2)) - 1;
}

// Sixteen rows of 16 words become 16 columns.
__attribute__((always_inline)) inline void transpose_words(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Outputs are 16 rows of the weight, a pair of steps two of its columns: the words of the rows are transposed first.
inline void fill_tile(const Nf4Matmul& p, int64_t row, int64_t column, int64_t count, Nf4PanelScratch& s,
                      uint32_t* panel) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(p.w.blocksize));
  const int64_t rows = p.n - row < kPanelLanes ? p.n - row : kPanelLanes;
  const int64_t first = column >> shift, blocks = ((column + count - 1) >> shift) - first + 1;
  for (int64_t r = 0; r < kPanelLanes; ++r) {  // rows that are not there have absmax 0
    float of_row[kPanelColumns / kMinLowBitBlock] = {};
    if (r < rows) Plain::load_absmax(p.w, (((row + r) * p.k) >> shift) + first, blocks, of_row);
    for (int64_t b = 0; b < blocks; ++b) s.absmax[b][r] = of_row[b];
  }
  const __m512 table = _mm512_loadu_ps(small_book(p.w.type).value);
  for (int64_t c = 0; c < count; c += kChunk) {
    const __mmask64 there = bytes_there(count - c);
    __m512i words[16];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kPanelLanes; ++r)
      words[r] = r < rows ? _mm512_maskz_loadu_epi8(there, p.w.packed + ((row + r) * p.k + column + c) / 2)
                          : _mm512_setzero_si512();
    transpose_words(words);
#pragma GCC unroll 16
    for (int64_t w = 0; w < 16; ++w) {  // eight columns
      if (c + 8 * w >= count) break;
      const __m512 absmax = _mm512_load_ps(s.absmax[((column + c + 8 * w) >> shift) - first]);
      uint32_t* to = panel + (c / 2 + 4 * w) * kPanelLanes;
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(words[w], 8 * b + 4), table);
        const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(words[w], 8 * b), table);
        _mm512_store_si512(to + b * kPanelLanes, to_pairs(_mm512_mul_ps(even, absmax), _mm512_mul_ps(odd, absmax)));
      }
    }
  }
}

// Outputs are 128 columns of the weight, a pair of steps two of its rows. A row's words lie as they are: lane l of
// tile t is column 8 l + t.
inline void fill_transposed(const Nf4Matmul& p, int64_t column, int64_t outputs, int64_t row, int64_t count,
                            Nf4PanelScratch& s) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(p.w.blocksize));
  const int64_t first = column >> shift, blocks = ((column + outputs - 1) >> shift) - first + 1;
  const __m512 table = _mm512_loadu_ps(small_book(p.w.type).value);
  const __m512i block_of_lane = _mm512_sub_epi32(
      _mm512_srl_epi32(_mm512_add_epi32(_mm512_slli_epi32(Vec::lane_ids(), 3),
                                        _mm512_set1_epi32(static_cast<int>(column & (kMaxLowBitBlock - 1)))),
                       _mm_cvtsi32_si128(shift)),
      _mm512_set1_epi32(static_cast<int>((column & (kMaxLowBitBlock - 1)) >> shift)));
  const __mmask64 there = bytes_there(outputs);
  const int64_t whole = ceil_div(count, 2 * kPairsOfTile) * 2 * kPairsOfTile;  // tiles of AMX take 16 pairs
  for (int64_t j = 0; j < whole; j += 2) {
    __m512i words[2];
    __m512 absmax[2];
    for (int e = 0; e < 2; ++e) {
      words[e] = _mm512_setzero_si512();
      absmax[e] = _mm512_setzero_ps();
      if (j + e >= count) continue;
      const int64_t at = (row + j + e) * p.k + column;
      words[e] = _mm512_maskz_loadu_epi8(there, p.w.packed + at / 2);
      alignas(64) float of_row[16] = {};
      Plain::load_absmax(p.w, at >> shift, blocks, of_row);
      absmax[e] = _mm512_permutexvar_ps(block_of_lane, _mm512_load_ps(of_row));
    }
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
      const unsigned bit = t % 2 ? 4 * t - 4 : 4 * t + 4;
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(words[0], bit), table);
      const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(words[1], bit), table);
      _mm512_store_si512(s.panel + t * kPanelWords + j / 2 * kPanelLanes,
                         to_pairs(_mm512_mul_ps(even, absmax[0]), _mm512_mul_ps(odd, absmax[1])));
    }
  }
}

// The sums of a row of x in the order of fill_transposed, to their own.
inline void reorder_transposed(float* sums) {
  alignas(64) float out[kPanelOutputs];
  const __m512i lane = Vec::lane_ids();
  const __m512i place =
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 4), _mm512_srli_epi32(lane, 3));
  for (int i = 0; i < 8; ++i)
    _mm512_store_ps(out + 16 * i, _mm512_i32gather_ps(_mm512_add_epi32(place, _mm512_set1_epi32(2 * i)), sums, 4));
  __builtin_memcpy(sums, out, sizeof out);
}

// A task of the product: all panels of up to 128 outputs, one after the other, times blocks of kRows rows of x.
// multiply(x, rows, panel, two, pairs, sums) takes two tiles of the panel, or one.
template <int64_t kRows, class Multiply>
__attribute__((always_inline)) inline void multiply_panels(const Nf4Matmul& p, const Nf4Input& in, int64_t output,
                                                           int64_t row, int64_t rows, const Multiply& multiply) {
  Nf4PanelScratch& s = *static_cast<Nf4PanelScratch*>(::operator new(sizeof(Nf4PanelScratch), std::align_val_t(64)));
  const int64_t outputs = in.outer - output < kPanelOutputs ? in.outer - output : kPanelOutputs;
  const int64_t tiles = in.transposed ? kPanelTiles : ceil_div(outputs, kPanelLanes);
  __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kStride * sizeof(float));
  for (int64_t column = 0; column < in.inner; column += kPanelColumns) {
    const int64_t count = in.inner - column < kPanelColumns ? in.inner - column : kPanelColumns;
    if (in.transposed)
      fill_transposed(p, output, outputs, column, count, s);
    else
      for (int64_t t = 0; t < tiles; ++t)
        fill_tile(p, output + t * kPanelLanes, column, count, s, s.panel + t * kPanelWords);
    // A block of rows of x, in L1, passes all tiles of the panel before the next one.
    for (int64_t i = 0; i < rows; i += kRows) {
      const uint32_t* x = in.parts + ((row + i) / kRows * in.columns + column) / 2 * kRows;
      for (int64_t t = 0; t < tiles; t += 2)
        multiply(x, rows - i, s.panel + t * kPanelWords, t + 1 < tiles, ceil_div(count, 2),
                 s.sums + i * kStride + t * kPanelLanes);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (in.transposed) reorder_transposed(s.sums + i * kStride);
    Plain::write_row(p, in, s.sums + i * kStride, row + i, output, outputs);
  }
  ::operator delete(&s, std::align_val_t(64));
}

}  // namespace
}  // namespace octavo::cpu::avx512
