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

template <int kBits, int kPair, int kEnd, class Each>
__attribute__((always_inline)) inline void each_pair(const __m512i (&planes)[kBits], const Each& each) {
  each(kPair, pair_index<kBits, kPair>(planes));
  if constexpr (kPair + 1 < kEnd) each_pair<kBits, kPair + 1, kEnd>(planes, each);
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

// With one row of x: sz and zz times its sums.
inline void multiply_by_sums(const float* sums, int64_t count, SecondOrder* second) {
  float* to = &second->ss;
  for (int64_t g = 0; g < count; g += 4) {
    const int left = static_cast<int>(count - g < 4 ? count - g : 4);
    const __m512i order = _mm512_srli_epi32(Vec::lane_ids(), 2);
    const __m512 x = _mm512_permutexvar_ps(order, Vec::load(sums + g, left)), v = _mm512_load_ps(to + 4 * g);
    _mm512_store_ps(to + 4 * g, _mm512_mask_mul_ps(v, 0xcccc, v, x));
  }
}

// Groups [first, end) of a tile times rows row ... row + kCount - 1 of x, which has kBlock: added to sums.
template <int kBits, int kBlock, int kCount, int kPlanes, bool kBilevel>
void stream_rows(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t first, int64_t end, int64_t row,
                 float* sums) {
  const SpqrWeight& w = p.w;
  const int64_t groups = spqr_groups(w);
  const int halves = w.group_size / 16, width = w.scale_bits + w.zero_bits;
  const __m512i table = code_table<kBits>();
  const __m512 scale_table = field_table(w.scale_bits), zero_table = field_table(w.zero_bits);
  const __m128i scale_shift = _mm_cvtsi32_si128(w.scale_bits);
  // Few rows of x make few chains of dependent products: then two take turns.
  constexpr int kChains = kCount * kPlanes < 4 ? 2 : 1;
  __m512 acc[kCount], dot[kCount][kChains];
  sums += row * kTileRows16;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) acc[i] = _mm512_load_ps(sums + i * kTileRows16);
  // What a group needs of x, made some groups ahead: a broadcast cannot read what the same store has just written.
  constexpr int64_t kSome = 32;
  alignas(64) SecondOrder second[kSome];
  alignas(
      64) float of_x[kSome][2][kCount];  // sz * sum, zz * sz * sum, for each row of x; a single row has it in second
  const uint8_t* record = w.statistics + (tile * groups + first) * (2 * width);
  const uint32_t* words = spqr_codes(w, tile, first * w.group_size / kChunk);
  const uint32_t* pairs = in.parts + first * w.group_size / 2 * (kBlock * kPlanes) + row * kPlanes;
  const float* x_sums = in.sums + first * kBlock + row;
  int64_t half = 0;
  for (int64_t group = first; group < end; ++group, record += 2 * width, x_sums += kBlock) {
    const int64_t at = (group - first) % kSome;
    const SecondOrder& of_group = second[at];
    if constexpr (kBilevel) {
      if (at == 0) {
        const int64_t count = end - group < kSome ? end - group : kSome;
        load_second_order(w, tile, group, count, second);
        if constexpr (kBlock == 1)
          multiply_by_sums(x_sums, count, second);
        else
          for (int64_t g = 0; g < count; ++g) {
            const __m512 x = Vec::load(x_sums + g * kBlock, kCount);
            Vec::store(of_x[g][0], _mm512_mul_ps(x, _mm512_set1_ps(second[g].sz)), kCount);
            Vec::store(of_x[g][1], _mm512_mul_ps(x, _mm512_set1_ps(second[g].zz)), kCount);
          }
        asm("" : "+m"(of_x), "+m"(second));  // they are in memory, not in registers to shuffle
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      dot[i][0] = kBilevel ? _mm512_set1_ps(kBlock == 1 ? of_group.zz : of_x[at][1][i]) : _mm512_setzero_ps();
      if constexpr (kChains == 2) dot[i][1] = _mm512_setzero_ps();
    }
    for (int h = 0; h < halves; ++h, ++half, pairs += 8 * kBlock * kPlanes) {
      __m512i planes[kBits];
#pragma GCC unroll 4
      for (int plane = 0; plane < kBits; ++plane) {
        planes[plane] = _mm512_loadu_si512(words + plane * kTileRows16);
        _mm_prefetch(reinterpret_cast<const char*>(words + plane * kTileRows16) + 4096, _MM_HINT_T0);
      }
      const auto each = [&](int e, __m512i index) __attribute__((always_inline)) {
        const __m512i codes = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
          for (int part = 0; part < kPlanes; ++part)
            dot[i][e % kChains] =
                dot_pairs(dot[i][e % kChains], codes, pair_of(pairs + (e % 8 * kBlock + i) * kPlanes + part));
      };
      if (half % 2 == 0) {
        each_pair<kBits, 0, 8>(planes, each);
      } else {
        each_pair<kBits, 8, 16>(planes, each);
        words += kBits * kTileRows16;
      }
    }
    __m512 scale, zero;
    if constexpr (kBilevel) {
      const __m512i fields = SpqrVec::bit_fields(record, width, 0);
      scale = _mm512_fmadd_ps(_mm512_permutexvar_ps(fields, scale_table), _mm512_set1_ps(of_group.ss),
                              _mm512_set1_ps(of_group.shift));
      zero = _mm512_permutexvar_ps(_mm512_srl_epi32(fields, scale_shift), zero_table);
    } else {
      const Plain::Statistics s = Plain::statistics(w, tile, group, 0);
      scale = s.scale.v[0], zero = s.zero.v[0];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      __m512 sum = dot[i][0];
      if constexpr (kChains == 2) sum = _mm512_add_ps(sum, dot[i][1]);
      sum = _mm512_fnmadd_ps(zero,
                             _mm512_set1_ps(!kBilevel     ? x_sums[i]
                                            : kBlock == 1 ? of_group.sz
                                                          : of_x[at][0][i]),
                             sum);
      acc[i] = _mm512_fmadd_ps(scale, sum, acc[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) _mm512_store_ps(sums + i * kTileRows16, acc[i]);
}

using StreamRows = void (*)(const SpqrMatmul&, const SpqrInput&, int64_t, int64_t, int64_t, int64_t, float*);

template <int kBits, int kPlanes, bool kBilevel>
StreamRows stream_rows_for(int64_t block) {
  switch (block) {
    case 1: return stream_rows<kBits, 1, 1, kPlanes, kBilevel>;
    case 2: return stream_rows<kBits, 2, 2, kPlanes, kBilevel>;
    case 4: return stream_rows<kBits, 4, 4, kPlanes, kBilevel>;
    case 8: return stream_rows<kBits, 8, 8, kPlanes, kBilevel>;
    default: return stream_rows<kBits, 16, 8, kPlanes, kBilevel>;
  }
}
template <int kBits>
StreamRows stream_rows_for(const SpqrMatmul& p, const SpqrInput& in) {
  if (in.planes == 1)
    return p.w.second_order ? stream_rows_for<kBits, 1, true>(in.block) : stream_rows_for<kBits, 1, false>(in.block);
  return p.w.second_order ? stream_rows_for<kBits, 2, true>(in.block) : stream_rows_for<kBits, 2, false>(in.block);
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

// Some tiles pass a block of columns, whose x is in L1, before the next block.
void stream(const SpqrMatmul& p, const SpqrInput& in, int64_t begin, int64_t end) {
  if (in.planes == 0) return Plain::stream(p, in, begin, end);
  const SpqrWeight& w = p.w;
  const StreamRows rows = w.bits == 2   ? stream_rows_for<2>(p, in)
                          : w.bits == 3 ? stream_rows_for<3>(p, in)
                                        : stream_rows_for<4>(p, in);
  constexpr int64_t kTiles = 16, kBytes = 12288;
  const int64_t groups = spqr_groups(w), columns = kBytes / (2 * in.block * in.planes) / 64 * 64;
  const int64_t some = columns / w.group_size;
  alignas(64) float sums[kTiles][Plain::kTileSums];
  for (int64_t tile = begin; tile < end; tile += kTiles) {
    const int64_t tiles = end - tile < kTiles ? end - tile : kTiles;
    __builtin_memset(sums, 0, tiles * sizeof(sums[0]));
    for (int64_t group = 0; group < groups; group += some)
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t row = 0; row < in.block; row += 8)
          rows(p, in, tile + t, group, group + some < groups ? group + some : groups, row, sums[t]);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = (tile + t) * kTileRows16;
      if (w.row_offsets)
        for (int64_t r = 0; r < kTileRows16 && first + r < w.n; ++r) add_outliers(p, in, first + r, sums[t] + r);
      Plain::finish(p, tile + t, sums[t]);
    }
  }
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

void multiply(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  if (in.parts)
    return multiply_panels<kRows>(p, in, tile, row, rows,
                                  [](auto* x, int64_t left, auto* panel, bool two, int64_t pairs, float* sums) {
                                    (two ? multiply_panel<2> : multiply_panel<1>)(x, left, panel, pairs, sums);
                                  });
  for (int64_t t = tile; t < tile + kPanelTiles && t < spqr_row_tiles(p.w); t += Plain::kPanelTiles)
    Plain::multiply(p, in, t, row, rows);
}

}  // namespace

constexpr SpqrLoops spqr_bf16_loops{.parts_of_half = 2,
                                    .parts_of_bfloat16 = 1,
                                    .bfloat16_panels = true,
                                    .tiled = false,
                                    .panel_tiles = kPanelTiles,
                                    .panel_rows = kRows,
                                    .prepare = Plain::prepare,
                                    .stream = stream,
                                    .multiply = multiply,
                                    .dequantize = Plain::dequantize};
static_assert(kRows == Plain::kRows);  // one form of x for both kinds of panels

}  // namespace octavo::cpu::avx512
#endif
