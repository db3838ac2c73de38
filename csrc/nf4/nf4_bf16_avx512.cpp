#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include <new>

#include "nf4/nf4.h"
// For CPUs that have AVX512-BF16, which the level does not promise: nf4_cpu.cpp asks.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
// After the vector type:
#include "nf4/nf4_panel_bf16.h"

namespace octavo::cpu::avx512 {
namespace {

// ---- few rows of x: codes become bf16 by a permutation and meet x where they lie ----
//
// Eight weights of a row are two 16-bit words of four codes. Shifted right by 4 s, both words have one of their codes
// in the lowest bits, which a permutation replaces by its value (the bits above do not matter: the table repeats): a
// pair of weights four columns apart. The pairs of x are put into that order once.

// Element of a word that lies 4 s bits up: the upper half of the first byte is the first.
constexpr int kPlace[4] = {1, 0, 3, 2};

// Up to four rows of x, lanes are columns; with more, rows of the weight. See below.
constexpr int64_t kFewRows = 4;

// Codes, up to 1, are added up before absmax, which may be small, multiplies them: very large x would overflow on the
// way, and vdpbf16ps takes denormals for 0. Rows of such x are multiplied by a power of two, their sums by its inverse.
int row_exponent(const uint16_t* x, int64_t k) {
  uint16_t most = 0;
  for (int64_t j = 0; j < k; ++j) {
    const uint16_t magnitude = x[j] & 0x7fffu, finite = magnitude < 0x7f80u ? magnitude : uint16_t{0};
    most = finite > most ? finite : most;
  }
  const int exponent = (most >> 7) - 127;
  return most == 0 || (exponent <= 80 && exponent >= -60) ? 0 : exponent;
}

void prepare(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end) {
  if (in.transposed || p.m > kNf4StreamRows) return Plain::prepare(p, in, begin, end);
  const bool few = in.block <= kFewRows;
  for (int64_t row = begin * in.block; row < end * in.block; ++row) {
    const uint16_t* from = static_cast<const uint16_t*>(p.x) + row * p.k;
    const int exponent = row < p.m ? row_exponent(from, p.k) : 0;
    in.scale[row] = __builtin_ldexpf(1.0f, exponent);
    uint16_t scaled[8];
    // few: [row][columns / 128][s][16 eights], else [columns / 8][s][row]
    uint32_t* to = in.parts + (few ? row * in.columns / 2 : row);
    for (int64_t j = 0; j < in.columns; j += 8) {
      uint32_t* line = to + (few ? j / kChunk * (kChunk / 2) + j % kChunk / 8 : j / 2 * in.block);
      const bool inside = row < p.m && j < p.k;  // k is a multiple of 32
      const uint16_t* eight = from + j;
      if (inside && exponent) {
        for (int i = 0; i < 8; ++i)
          scaled[i] = from_float<BFloat16>(__builtin_ldexpf(to_float(BFloat16{eight[i]}), -exponent)).bits;
        eight = scaled;
      }
      for (int s = 0; s < 4; ++s)
        line[s * (few ? 16 : in.block)] = inside ? eight[kPlace[s]] | uint32_t{eight[4 + kPlace[s]]} << 16 : 0;
    }
  }
}

__m512i value_table(QuantType type) {
  alignas(64) uint16_t values[32];
  for (uint32_t i = 0; i < 32; ++i) values[i] = product_value<BFloat16>(type, small_book(type), i).bits;
  return _mm512_load_si512(values);
}

template <int kPair>
__attribute__((always_inline)) inline __m512i pair_values(__m512i codes, __m512i table) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * kPair), table);
}

// ---- up to four rows of x: 64 bytes of a row of the weight at a time ----
//
// The sums of a lane are of eight neighbouring weights, so that lanes are multiplied by absmax.

struct StreamScratch {
  alignas(64) float sums[kNf4StreamRows][16];  // of 16 rows of the weight
  alignas(64) __m512i words[kChunk / 8];       // of 128 columns of them, eight columns each
  float* absmax;                               // few rows: [rows of the weight][stride]; else [k / blocksize][16]
  int64_t stride;
};

void write_sums(const Nf4Matmul& p, const Nf4Input& in, float* sums, int64_t i, int64_t row, int64_t count) {
  _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(in.scale[i])));
  Plain::write_row(p, in, sums, i, row, count);
}

// Rows row ... row + kWeights - 1 of the weight times the kCount rows of x, to sums[i][place ...].
template <int kCount, int kWeights>
void stream_rows(const Nf4Matmul& p, const Nf4Input& in, int64_t row, int64_t place, StreamScratch& s) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(p.w.blocksize));
  const int64_t blocks = p.k >> shift, row_bytes = p.k / 2;
  for (int r = 0; r < kWeights; ++r) Plain::load_absmax(p.w, (row + r) * blocks, blocks, s.absmax + r * s.stride);
  const __m512i table = value_table(p.w.type);
  // Which of four neighbouring blocks a lane's weights are in.
  const __m512i block_of_lane = _mm512_srl_epi32(_mm512_slli_epi32(Vec::lane_ids(), 3), _mm_cvtsi32_si128(shift));
  const uint8_t* bytes = p.w.packed + row * row_bytes;
  const int64_t ahead = kWeights == 1 ? 4096 : kWeights * row_bytes;

  __m512 acc[kWeights][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kWeights; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) acc[r][i] = _mm512_setzero_ps();
  const auto step = [&](int64_t column, __mmask64 there) __attribute__((always_inline)) {
    __m512i weights[kWeights][4];
    __m512 absmax[kWeights];
#pragma GCC unroll 4
    for (int r = 0; r < kWeights; ++r) {
      const uint8_t* from = bytes + r * row_bytes + column / 2;
      const __m512i codes = _mm512_maskz_loadu_epi8(there, from);
      _mm_prefetch(reinterpret_cast<const char*>(from) + ahead, _MM_HINT_T0);
      weights[r][0] = pair_values<0>(codes, table);
      weights[r][1] = pair_values<1>(codes, table);
      weights[r][2] = pair_values<2>(codes, table);
      weights[r][3] = pair_values<3>(codes, table);
      absmax[r] = _mm512_permutevar_ps(
          _mm512_broadcast_f32x4(_mm_loadu_ps(s.absmax + r * s.stride + (column >> shift))), block_of_lane);
    }
    const uint32_t* x = in.parts + column / 2;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      __m512 dot[kWeights];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m512i line = _mm512_load_si512(x + i * (in.columns / 2) + 16 * q);
#pragma GCC unroll 4
        for (int r = 0; r < kWeights; ++r)
          dot[r] = dot_pairs(q == 0 ? _mm512_setzero_ps() : dot[r], weights[r][q], line);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kWeights; ++r) acc[r][i] = _mm512_fmadd_ps(dot[r], absmax[r], acc[r][i]);
    }
  };
  int64_t column = 0;
  for (; column + kChunk <= p.k; column += kChunk) step(column, ~__mmask64{0});
  if (column < p.k) step(column, bytes_there(p.k - column));

  for (int r = 0; r < kWeights; ++r)
    for (int i = 0; i < kCount; ++i) s.sums[i][place + r] = _mm512_reduce_add_ps(acc[r][i]);
}

template <int kCount>
void stream_few(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end, StreamScratch& s) {
  constexpr int kWeights = kCount == 1 ? 1 : kCount == 2 ? 4 : 2;  // with one row, memory is what it waits for
  for (int64_t row = begin; row < end; row += 16) {
    const int64_t count = end - row < 16 ? end - row : 16;
    int64_t r = 0;
    for (; r + kWeights <= count; r += kWeights) stream_rows<kCount, kWeights>(p, in, row + r, r, s);
    for (; r < count; ++r) stream_rows<kCount, 1>(p, in, row + r, r, s);
    for (int64_t i = 0; i < p.m; ++i) write_sums(p, in, s.sums[i], i, row, count);
  }
}

// ---- up to sixteen rows of x: 16 rows of the weight at a time ----
//
// Their words are transposed, so that a lane is a row, a pair of x is for all lanes, and only each block's sums are
// multiplied by absmax: x is read once for 16 rows of the weight.

constexpr int64_t kAhead = 1024;  // bytes of a row

// s.words: 128 columns, or what is left of them, of rows row ... row + 15.
void load_words(const Nf4Matmul& p, int64_t row, int64_t rows, int64_t column, StreamScratch& s) {
  const __mmask64 there = bytes_there(p.k - column);
  const uint8_t* bytes = p.w.packed + (row * p.k + column) / 2;
  const int64_t row_bytes = p.k / 2;
  // Towards the end of these rows, the next ones. Sixteen rows a power of two apart would not stay in L1.
  const uint8_t* ahead = bytes + kAhead;
  if (column / 2 + kAhead >= row_bytes) ahead += 15 * row_bytes;
  __m512i words[16];
  if (rows == kPanelLanes) {
#pragma GCC unroll 16
    for (int64_t r = 0; r < kPanelLanes; ++r) {
      words[r] = _mm512_maskz_loadu_epi8(there, bytes + r * row_bytes);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + r * row_bytes), _MM_HINT_T1);
    }
  } else {
    for (int64_t r = 0; r < kPanelLanes; ++r)
      words[r] = r < rows ? _mm512_maskz_loadu_epi8(there, bytes + r * row_bytes) : _mm512_setzero_si512();
  }
  transpose_words(words);
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) s.words[w] = words[w];
}

// s.words times kBlock rows of x, which lie side by side, by blocks of `some` words: added to s.sums.
template <int kBlock>
void add_products(const uint32_t* x, int64_t some, int64_t words, const float* absmax, __m512i table,
                  StreamScratch& s) {
  for (int64_t first = 0; first < words; first += some, absmax += 16) {
    __m512 dot[kBlock];
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) dot[i] = _mm512_setzero_ps();
    for (int64_t w = first; w < first + some; ++w, x += 4 * kBlock) {
      const __m512i codes = _mm512_load_si512(s.words + w);
      const auto add = [&](__m512i values, const uint32_t* pair) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int i = 0; i < kBlock; ++i) dot[i] = dot_pairs(dot[i], values, pair_of(pair + i));
      };
      add(pair_values<0>(codes, table), x);
      add(pair_values<1>(codes, table), x + kBlock);
      add(pair_values<2>(codes, table), x + 2 * kBlock);
      add(pair_values<3>(codes, table), x + 3 * kBlock);
    }
    const __m512 of_block = _mm512_load_ps(absmax);
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i)
      _mm512_store_ps(s.sums[i], _mm512_fmadd_ps(dot[i], of_block, _mm512_load_ps(s.sums[i])));
  }
}

template <int kBlock>
void stream_tiles(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end, StreamScratch& s) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(p.w.blocksize));
  const int64_t blocks = p.k >> shift, some = (p.w.blocksize < kChunk ? p.w.blocksize : kChunk) / 8;
  const __m512i table = value_table(p.w.type);
  alignas(64) float of_row[64];
  for (int64_t row = begin; row < end; row += kPanelLanes) {
    const int64_t rows = end - row < kPanelLanes ? end - row : kPanelLanes;
    for (int64_t r = 0; r < kPanelLanes; ++r)
      for (int64_t b0 = 0; b0 < blocks; b0 += 64) {
        const int64_t count = blocks - b0 < 64 ? blocks - b0 : 64;
        if (r < rows) Plain::load_absmax(p.w, (row + r) * blocks + b0, count, of_row);
        for (int64_t b = 0; b < count; ++b) s.absmax[(b0 + b) * 16 + r] = r < rows ? of_row[b] : 0.0f;
      }
    __builtin_memset(s.sums, 0, sizeof s.sums);
    for (int64_t column = 0; column < p.k; column += kChunk) {
      load_words(p, row, rows, column, s);
      const int64_t words = (p.k - column < kChunk ? p.k - column : kChunk) / 8;
      add_products<kBlock>(in.parts + column / 2 * kBlock, some, words, s.absmax + (column >> shift) * 16, table, s);
    }
    for (int64_t i = 0; i < p.m; ++i) write_sums(p, in, s.sums[i], i, row, rows);
  }
}

void stream(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end) {
  StreamScratch s;
  s.stride = p.k / p.w.blocksize + 4;  // four are read at once
  const size_t bytes = 16 * s.stride * sizeof(float);
  s.absmax = static_cast<float*>(::operator new(bytes, std::align_val_t(64)));
  __builtin_memset(s.absmax, 0, bytes);
  switch (in.block) {
    case 1: stream_few<1>(p, in, begin, end, s); break;
    case 2: stream_few<2>(p, in, begin, end, s); break;
    case 3: stream_few<3>(p, in, begin, end, s); break;
    case 4: stream_few<4>(p, in, begin, end, s); break;
    case 6: stream_tiles<6>(p, in, begin, end, s); break;
    case 8: stream_tiles<8>(p, in, begin, end, s); break;
    case 12: stream_tiles<12>(p, in, begin, end, s); break;
    default: stream_tiles<16>(p, in, begin, end, s); break;
  }
  ::operator delete(s.absmax, std::align_val_t(64));
}

void multiply(const Nf4Matmul& p, const Nf4Input& in, int64_t output, int64_t row, int64_t rows) {
  multiply_panels<Bf16Panel::kRows>(p, in, output, row, rows, Bf16Panel::multiply_two);
}

}  // namespace

constexpr Nf4Loops nf4_bf16_loops{.parts_streaming = true,
                                  .parts_panels = true,
                                  .tiled = false,
                                  .panel_outputs = kPanelOutputs,
                                  .panel_rows = Bf16Panel::kRows,
                                  .quantize = nullptr,
                                  .dequantize = nullptr,
                                  .prepare = prepare,
                                  .stream = stream,
                                  .multiply = multiply};

}  // namespace octavo::cpu::avx512
#endif
