#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include <new>

#include "common/numeric.h"
#include "spqr/tile.h"
// For CPUs that have AVX512-BF16, which the level does not promise: spqr_cpu.cpp asks.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
#include "spqr/spqr_loops.h"
#include "spqr/vec_spqr_avx512.h"
// After the vector type:
#include "spqr/panel_bf16.h"

namespace octavo::cpu::avx512 {
namespace {

__attribute__((always_inline)) inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// The two columns of a pair of x, for all lanes.
__attribute__((always_inline)) inline __m512i pair_of(const uint32_t* x) {
  return _mm512_set1_epi32(static_cast<int>(*x));
}

// ---- few rows of x: codes become bf16 by a permutation, exactly, and meet bf16 pairs of x ----

// bf16 of the code in the low bits of each 16-bit index; what is above them does not matter.
template <int kBits>
__m512i code_table() {
  alignas(64) uint16_t table[32];
  for (uint32_t i = 0; i < 32; ++i) table[i] = float_bits(static_cast<float>(i & ((1u << kBits) - 1))) >> 16;
  return _mm512_load_si512(table);
}

template <int kBits, int kPair>
__attribute__((always_inline)) inline __m512i pair_index(const __m512i (&planes)[kBits]) {
  if constexpr (spqr_pair_is_split(kBits, kPair)) {
    const __m512i third = _mm512_srli_epi32(planes[2], 13), second = _mm512_srli_epi32(planes[1], 14);
    const __m512i upper = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00040004), third, second, 0xca);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00060006), upper, _mm512_srli_epi16(planes[0], 15), 0xca);
  } else {
    constexpr PairPlace place = spqr_pair_place(kBits, kPair);
    return _mm512_srli_epi16(planes[place.plane], place.shift);
  }
}

template <int kBits, int kTiles, int kPair, int kEnd, class Each>
__attribute__((always_inline)) inline void each_pair(const __m512i (&planes)[kTiles][kBits], const Each& each) {
  __m512i index[kTiles];
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) index[t] = pair_index<kBits, kPair>(planes[t]);
  each(kPair, index);
  if constexpr (kPair + 1 < kEnd) each_pair<kBits, kTiles, kPair + 1, kEnd>(planes, each);
}

// 0 ... 15 as the numbers that fields of `bits` bits mean, whatever is above them.
inline __m512 field_table(int bits) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(Vec::lane_ids(), _mm512_set1_epi32((1 << bits) - 1)));
}

// With bilevel statistics s = ss * q + (-zs * ss) and z = sz * q' + (-zz * sz), q and q' being codes: a group's
//   s * (dot - z * sum of x) = s * ((dot + zz * sz * sum) - q' * (sz * sum))
// costs four instructions on top of looking up q and q', because the sum of products starts at zz * sz * sum.
struct SecondOrder {
  float ss, shift, sz, zz;  // shift: -zs * ss; zz: zz * sz
};
inline void load_second_order(const SpqrWeight& w, int64_t tile, int64_t group, int64_t count, SecondOrder* out) {
  const Half* from = w.second_order + (tile * kTileRows16 / w.stats_group_size * spqr_groups(w) + group) * 4;
  float* to = &out->ss;
  for (int64_t i = 0; i < 4 * count; i += 16) {
    const int left = static_cast<int>(4 * count - i < 16 ? 4 * count - i : 16);
    const __m512 v = Vec::load(from + i, left);
    const __m512 scales = _mm512_permute_ps(v, 0xa0);  // ss ss sz sz
    const __m512 products = _mm512_mul_ps(v, scales);  // . zs*ss . zz*sz
    const __m512 signs = _mm512_castsi512_ps(
        _mm512_set_epi32(0, 0, static_cast<int>(0x80000000u), 0, 0, 0, static_cast<int>(0x80000000u), 0, 0, 0,
                         static_cast<int>(0x80000000u), 0, 0, 0, static_cast<int>(0x80000000u), 0));
    Vec::store(to + i, _mm512_mask_xor_ps(v, 0xaaaa, products, signs), left);
  }
}

// Rows first ... first + kCount - 1 of x, which has kBlock rows, times kTiles tiles.
template <int kBits, int kBlock, int kCount, int kTiles, int kPlanes, bool kBilevel>
void stream_rows(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t first, float* sums) {
  const SpqrWeight& w = p.w;
  const int64_t groups = spqr_groups(w);
  const int halves = w.group_size / 16, width = w.scale_bits + w.zero_bits;
  const __m512i table = code_table<kBits>();
  const __m512 scale_table = field_table(w.scale_bits), zero_table = field_table(w.zero_bits);
  const __m128i scale_shift = _mm_cvtsi32_si128(w.scale_bits);
  // Few rows of x make few chains of dependent products: then two take turns.
  constexpr int kChains = kCount * kPlanes * kTiles < 4 ? 2 : 1;
  // Beyond eight sums over groups, registers do not suffice for them.
  constexpr bool kInMemory = kCount * kTiles > 8;
  __m512 acc[kTiles][kCount], dot[kTiles][kCount][kChains];
  sums += first * kTileRows16;
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kInMemory)
        _mm512_store_ps(sums + t * Plain::kTileSums + i * kTileRows16, _mm512_setzero_ps());
      else
        acc[t][i] = _mm512_setzero_ps();
    }
  constexpr int64_t kSome = 64;  // groups at a time
  alignas(64) SecondOrder second[kTiles][kSome];
  alignas(64) float of_x[kTiles][2][16];  // of one group and all rows of x: sz * sum, zz * sz * sum
  const int64_t tile_words = spqr_chunks(w) * (kBits * kTileRows16), tile_records = groups * (2 * width);
  const uint8_t* record = w.statistics + tile * tile_records;
  const uint32_t* words = spqr_codes(w, tile, 0);
  const uint32_t* pairs = in.parts + first * kPlanes;
  const float* x_sums = in.sums + first;
  int64_t half = 0;
  for (int64_t group = 0; group < groups; ++group, record += 2 * width, x_sums += kBlock) {
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      if constexpr (kBilevel) {
        if (group % kSome == 0)
          load_second_order(w, tile + t, group, groups - group < kSome ? groups - group : kSome, second[t]);
        const SecondOrder& of_group = second[t][group % kSome];
        const __m512 x = Vec::load(x_sums, kCount);
        _mm512_store_ps(of_x[t][0], _mm512_mul_ps(x, _mm512_set1_ps(of_group.sz)));
        _mm512_store_ps(of_x[t][1], _mm512_mul_ps(x, _mm512_set1_ps(of_group.zz)));
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        dot[t][i][0] = kBilevel ? _mm512_set1_ps(of_x[t][1][i]) : _mm512_setzero_ps();
        if constexpr (kChains == 2) dot[t][i][1] = _mm512_setzero_ps();
      }
    }
    for (int h = 0; h < halves; ++h, ++half, pairs += 8 * kBlock * kPlanes) {
      __m512i planes[kTiles][kBits];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
        for (int plane = 0; plane < kBits; ++plane) {
          const uint32_t* from = words + t * tile_words + plane * kTileRows16;
          planes[t][plane] = _mm512_loadu_si512(from);
          _mm_prefetch(reinterpret_cast<const char*>(from) + 4096, _MM_HINT_T0);
        }
      const auto each = [&](int e, const __m512i(&index)[kTiles]) __attribute__((always_inline)) {
        __m512i codes[kTiles];
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) codes[t] = _mm512_permutexvar_epi16(index[t], table);
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
          for (int part = 0; part < kPlanes; ++part) {
            const __m512i x = pair_of(pairs + (e % 8 * kBlock + i) * kPlanes + part);
#pragma GCC unroll 2
            for (int t = 0; t < kTiles; ++t) dot[t][i][e % kChains] = dot_pairs(dot[t][i][e % kChains], codes[t], x);
          }
      };
      if (half % 2 == 0) {
        each_pair<kBits, kTiles, 0, 8>(planes, each);
      } else {
        each_pair<kBits, kTiles, 8, 16>(planes, each);
        words += kBits * kTileRows16;
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      __m512 scale, zero;
      if constexpr (kBilevel) {
        const SecondOrder& of_group = second[t][group % kSome];
        const __m512i fields = SpqrVec::bit_fields(record + t * tile_records, width, 0);
        scale = _mm512_fmadd_ps(_mm512_permutexvar_ps(fields, scale_table), _mm512_set1_ps(of_group.ss),
                                _mm512_set1_ps(of_group.shift));
        zero = _mm512_permutexvar_ps(_mm512_srl_epi32(fields, scale_shift), zero_table);
      } else {
        const Plain::Statistics s = Plain::statistics(w, tile + t, group, 0);
        scale = s.scale.v[0], zero = s.zero.v[0];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        __m512 sum = dot[t][i][0];
        if constexpr (kChains == 2) sum = _mm512_add_ps(sum, dot[t][i][1]);
        sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(kBilevel ? of_x[t][0][i] : x_sums[i]), sum);
        if constexpr (kInMemory) {
          float* to = sums + t * Plain::kTileSums + i * kTileRows16;
          _mm512_store_ps(to, _mm512_fmadd_ps(scale, sum, _mm512_load_ps(to)));
        } else {
          acc[t][i] = _mm512_fmadd_ps(scale, sum, acc[t][i]);
        }
      }
    }
  }
  if constexpr (!kInMemory)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) _mm512_store_ps(sums + t * Plain::kTileSums + i * kTileRows16, acc[t][i]);
}

// Eight rows of x at a time, times two tiles: each pair of x, broadcast once, then serves twice.
template <int kBits, int kBlock, int kPlanes, bool kBilevel>
void stream_block(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t tiles, float* sums) {
  constexpr int kCount = kBlock < 8 ? kBlock : 8;
  for (int64_t i = 0; i < p.m; i += kCount) {
    if (kCount == 8 && tiles == 2) {
      stream_rows<kBits, kBlock, kCount, 2, kPlanes, kBilevel>(p, in, tile, i, sums);
    } else {
      for (int64_t t = 0; t < tiles; ++t)
        stream_rows<kBits, kBlock, kCount, 1, kPlanes, kBilevel>(p, in, tile + t, i, sums + t * Plain::kTileSums);
    }
  }
}

template <int kBits, int kPlanes, bool kBilevel>
void stream_planes(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t tiles, float* sums) {
  switch (in.block) {
    case 1: return stream_block<kBits, 1, kPlanes, kBilevel>(p, in, tile, tiles, sums);
    case 2: return stream_block<kBits, 2, kPlanes, kBilevel>(p, in, tile, tiles, sums);
    case 4: return stream_block<kBits, 4, kPlanes, kBilevel>(p, in, tile, tiles, sums);
    case 8: return stream_block<kBits, 8, kPlanes, kBilevel>(p, in, tile, tiles, sums);
    default: return stream_block<kBits, 16, kPlanes, kBilevel>(p, in, tile, tiles, sums);
  }
}

template <int kBits>
void stream_tiles(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t tiles, float* sums) {
  if (in.planes == 0)
    Plain::stream_tiles<kBits>(p, in, tile, tiles, sums);
  else if (in.planes == 1)
    (p.w.second_order ? stream_planes<kBits, 1, true> : stream_planes<kBits, 1, false>)(p, in, tile, tiles, sums);
  else
    (p.w.second_order ? stream_planes<kBits, 2, true> : stream_planes<kBits, 2, false>)(p, in, tile, tiles, sums);
}

// The outliers of one row times rows of bf16 x: the 16 rows of a pair of columns are one line of its parts.
void add_outliers(const SpqrMatmul& p, const SpqrInput& in, int64_t row, float* sums) {
  const SpqrWeight& w = p.w;
  if (in.planes != 1 || in.block == 1 || w.wide) return Plain::add_outliers(p, in, row, sums);
  const int lanes = static_cast<int>(in.block);
  __m512 acc[4];
  for (__m512& sum : acc) sum = _mm512_setzero_ps();
  for (int64_t e0 = w.row_offsets[row], end = w.row_offsets[row + 1]; e0 < end; e0 += 16) {
    const int count = static_cast<int>(end - e0 < 16 ? end - e0 : 16);
    alignas(64) float values[16];
    _mm512_store_ps(values, SpqrVec::high_halves(Vec::load_bits(w.outliers + e0, count)));
    for (int e = 0; e < count; ++e) {
      const uint32_t column = w.outliers[e0 + e] & 0xffffu;
      const __m512i line = Vec::load_bits(in.parts + column / 2 * in.block, lanes);
      const __m512i shifted = _mm512_sll_epi32(line, _mm_cvtsi32_si128(column % 2 ? 0 : 16));
      const __m512 x = _mm512_castsi512_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
      acc[e % 4] = _mm512_fmadd_ps(_mm512_set1_ps(values[e]), x, acc[e % 4]);
    }
  }
  alignas(64) float of_row[16];
  _mm512_store_ps(of_row, _mm512_add_ps(_mm512_add_ps(acc[0], acc[2]), _mm512_add_ps(acc[1], acc[3])));
  for (int64_t i = 0; i < p.m; ++i) sums[i * kTileRows16] += of_row[i];
}

// ---- many rows of bf16 x ----

constexpr int kRows = 12;

template <int kCount, int kTiles>
void multiply_rows(const uint32_t* x, const uint32_t* panel, int64_t pairs, float* sums) {
  __m512 acc[kCount][kTiles];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) acc[i][t] = _mm512_load_ps(sums + i * kStride + t * kTileRows16);
  for (int64_t e = 0; e < pairs; ++e) {
    __m512i b[kTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) b[t] = _mm512_load_si512(panel + t * kPanelWords + e * kTileRows16);
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const __m512i a = pair_of(x + e * kRows + i);
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) acc[i][t] = dot_pairs(acc[i][t], b[t], a);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) _mm512_store_ps(sums + i * kStride + t * kTileRows16, acc[i][t]);
}

template <int kTiles>
void multiply_panel(const uint32_t* x, int64_t rows, const uint32_t* panel, int64_t pairs, float* sums) {
  (rows > 8   ? multiply_rows<12, kTiles>
   : rows > 4 ? multiply_rows<8, kTiles>
              : multiply_rows<4, kTiles>)(x, panel, pairs, sums);
}

void multiply_bf16(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  const SpqrWeight& w = p.w;
  PanelScratch& s = *static_cast<PanelScratch*>(::operator new(sizeof(PanelScratch), std::align_val_t(64)));
  const int64_t left = spqr_row_tiles(w) - tile, tiles = left < kPanelTiles ? left : kPanelTiles;
  __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kStride * sizeof(float));
  for (int64_t t = 0; t < tiles; ++t) Plain::first_outliers(w, tile + t, s.next[t]);
  for (int64_t column = 0; column < w.k; column += kPanelColumns) {
    const int64_t count = w.k - column < kPanelColumns ? w.k - column : kPanelColumns;
    fill_panels(w, tile, tiles, column, count, s);
    // A block of rows of x, in L1, passes all tiles of the panel before the next one.
    for (int64_t i = 0; i < rows; i += kRows) {
      const uint32_t* x = in.parts + ((row + i) / kRows * in.columns + column) / 2 * kRows;
      float* sums = s.sums + i * kStride;
      int64_t t = 0;
      for (; t + 2 <= tiles; t += 2)
        multiply_panel<2>(x, rows - i, s.panel + t * kPanelWords, count / 2, sums + t * kTileRows16);
      for (; t < tiles; ++t)
        multiply_panel<1>(x, rows - i, s.panel + t * kPanelWords, count / 2, sums + t * kTileRows16);
    }
  }
  Plain::write_all(p, s.sums, kStride, tile, tiles, row, rows);
  ::operator delete(&s, std::align_val_t(64));
}

void multiply(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  if (in.parts) return multiply_bf16(p, in, tile, row, rows);
  for (int64_t t = tile; t < tile + kPanelTiles && t < spqr_row_tiles(p.w); t += Plain::kPanelTiles)
    Plain::multiply(p, in, t, row, rows);
}

}  // namespace

constexpr SpqrLoops spqr_bf16_loops{
    .parts_of_half = 2,
    .parts_of_bfloat16 = 1,
    .bfloat16_panels = true,
    .tiled = false,
    .panel_tiles = kPanelTiles,
    .panel_rows = kRows,
    .prepare = Plain::prepare,
    .stream = Plain::stream_by<stream_tiles<2>, stream_tiles<3>, stream_tiles<4>, add_outliers>,
    .multiply = multiply,
    .dequantize = Plain::dequantize};
static_assert(kRows == Plain::kRows);  // one form of x for both kinds of panels

}  // namespace octavo::cpu::avx512
#endif
