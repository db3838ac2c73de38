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

// Bytes of codes to prefetch ahead: with one row of x, memory is what it waits for.
template <int kBlock>
constexpr int64_t kAhead = kBlock == 1 ? 4096 : 1024;

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

// What some groups need beside their words: made ahead, because a broadcast cannot read what the same store has just
// written. Rows of x begin at `start` and meet the zero points' codes times `factor`.
template <int kBlock>
struct StreamGroups {
  static constexpr int64_t kSome = 32;
  alignas(64) SecondOrder second[kSome + 1];  // with one row of x, its factor and start in the place of sz and zz
  alignas(64) float start[kSome + 1][kBlock], factor[kSome + 1][kBlock];
  alignas(64) float scale[kSome][kTileRows16], zero[kSome][kTileRows16];  // where rows of x come in two passes
};

// The statistics of a tile. What does not change from group to group is here: not even k / group_size is free.
template <bool kBilevel>
struct StreamStatistics {
  const SpqrWeight& w;
  int64_t tile, record_bytes;
  const uint8_t* records;
  SpqrVec::BitFields fields;
  __m512 scale_table, zero_table;
  __m128i scale_shift;
  StreamStatistics(const SpqrWeight& weight, int64_t of_tile)
      : w(weight),
        tile(of_tile),
        record_bytes(spqr_record_bytes(weight)),
        records(kBilevel ? weight.statistics + of_tile * spqr_groups(weight) * record_bytes : nullptr),
        fields(weight.scale_bits + weight.zero_bits),
        scale_table(field_table(weight.scale_bits)),
        zero_table(field_table(weight.zero_bits)),
        scale_shift(_mm_cvtsi32_si128(weight.scale_bits)) {}
  // zero: the code alone with bilevel statistics.
  __attribute__((always_inline)) void operator()(int64_t group, const SecondOrder& second, __m512& scale,
                                                 __m512& zero) const {
    if constexpr (kBilevel) {
      const __m512i codes = fields(records + group * record_bytes);
      scale = _mm512_fmadd_ps(_mm512_permutexvar_ps(codes, scale_table), _mm512_set1_ps(second.ss),
                              _mm512_set1_ps(second.shift));
      zero = _mm512_permutexvar_ps(_mm512_srl_epi32(codes, scale_shift), zero_table);
    } else {
      const Plain::Statistics s = Plain::statistics(w, tile, group, 0);
      scale = s.scale.v[0], zero = s.zero.v[0];
    }
  }
};

template <int kBlock, bool kBilevel>
__attribute__((always_inline)) inline void prepare_groups(const SpqrInput& in, int64_t group, int64_t count,
                                                          const StreamStatistics<kBilevel>& statistics,
                                                          StreamGroups<kBlock>& of) {
  const float* sums = in.sums + group * kBlock;
  if constexpr (kBilevel) load_second_order(statistics.w, statistics.tile, group, count, of.second);
  if constexpr (kBlock == 1 && kBilevel) multiply_by_sums(sums, count, of.second);
  for (int64_t g = 0; g < count && !(kBlock == 1 && kBilevel); ++g) {
    const __m512 x = Vec::load(sums + g * kBlock, kBlock);
    const float sz = kBilevel ? of.second[g].sz : 1.0f, zz = kBilevel ? of.second[g].zz : 0.0f;
    Vec::store(of.factor[g], _mm512_mul_ps(x, _mm512_set1_ps(sz)), kBlock);
    Vec::store(of.start[g], _mm512_mul_ps(x, _mm512_set1_ps(zz)), kBlock);
  }
  if constexpr (kBlock == 16)
    for (int64_t g = 0; g < count; ++g) {
      __m512 scale, zero;
      statistics(group + g, of.second[g], scale, zero);
      _mm512_store_ps(of.scale[g], scale);
      _mm512_store_ps(of.zero[g], zero);
    }
}

// Groups [first, first + count) of a tile, prepared, times rows row ... row + kCount - 1 of x: added to sums.
template <int kBits, int kBlock, int kCount, int kPlanes, bool kBilevel>
__attribute__((always_inline)) inline void stream_some(const SpqrInput& in, int64_t first, int64_t count, int64_t row,
                                                       const StreamStatistics<kBilevel>& statistics,
                                                       const StreamGroups<kBlock>& of, float* sums) {
  const SpqrWeight& w = statistics.w;
  // Few rows of x make few chains of dependent products: then two take turns.
  constexpr int kChains = kCount * kPlanes < 4 ? 2 : 1;
  const int64_t halves_of_group = w.group_size / 16, halves = count * halves_of_group;
  __m512 acc[kCount], dot[kCount][kChains];
  sums += row * kTileRows16;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) acc[i] = _mm512_load_ps(sums + i * kTileRows16);
  const uint32_t* words = spqr_codes(w, statistics.tile, first * w.group_size / kChunk);
  const uint32_t* pairs = in.parts + first * w.group_size / 2 * (kBlock * kPlanes) + row * kPlanes;
  int64_t at = 0, left = halves_of_group;
  const auto begin_group = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      dot[i][0] = _mm512_set1_ps(kBlock == 1 && kBilevel ? of.second[at].zz : of.start[at][row + i]);
      if constexpr (kChains == 2) dot[i][1] = _mm512_setzero_ps();
    }
  };
  const auto end_half = [&]() __attribute__((always_inline)) {
    pairs += 8 * kBlock * kPlanes;
    if (--left > 0) return;
    left = halves_of_group;
    __m512 scale, zero;
    if constexpr (kBlock == 16)
      scale = _mm512_load_ps(of.scale[at]), zero = _mm512_load_ps(of.zero[at]);
    else
      statistics(first + at, of.second[at], scale, zero);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      __m512 sum = dot[i][0];
      if constexpr (kChains == 2) sum = _mm512_add_ps(sum, dot[i][1]);
      const float factor = kBlock == 1 && kBilevel ? of.second[at].sz : of.factor[at][row + i];
      acc[i] = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, _mm512_set1_ps(factor), sum), acc[i]);
    }
    ++at;
    begin_group();  // one more than there are: what it reads is not used
  };
  const __m512i table = code_table<kBits>();
  const auto each = [&](int e, __m512i index) __attribute__((always_inline)) {
    const __m512i codes = _mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int part = 0; part < kPlanes; ++part)
        dot[i][e % kChains] =
            dot_pairs(dot[i][e % kChains], codes, pair_of(pairs + (e % 8 * kBlock + i) * kPlanes + part));
  };
  begin_group();
  for (int64_t half = 0; half < halves; half += 2, words += kBits * kTileRows16) {
    __m512i planes[kBits];
#pragma GCC unroll 4
    for (int plane = 0; plane < kBits; ++plane) {
      planes[plane] = _mm512_loadu_si512(words + plane * kTileRows16);
      _mm_prefetch(reinterpret_cast<const char*>(words + plane * kTileRows16) + kAhead<kBlock>, _MM_HINT_T0);
    }
    each_pair<kBits, 0, 8>(planes, each);
    end_half();
    if (half + 1 == halves) break;
    each_pair<kBits, 8, 16>(planes, each);
    end_half();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) _mm512_store_ps(sums + i * kTileRows16, acc[i]);
}

// Groups [first, end) of a tile times the kBlock rows of x: added to sums.
template <int kBits, int kBlock, int kPlanes, bool kBilevel>
void stream_rows(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t first, int64_t end, float* sums) {
  constexpr int kCount = kBlock < 8 ? kBlock : 8;
  const StreamStatistics<kBilevel> statistics(p.w, tile);
  StreamGroups<kBlock> of;
  for (int64_t group = first; group < end; group += of.kSome) {
    const int64_t count = end - group < of.kSome ? end - group : of.kSome;
    prepare_groups<kBlock, kBilevel>(in, group, count, statistics, of);
    asm("" : "+m"(of));  // in memory, not in registers to shuffle
#pragma GCC unroll 1
    for (int64_t row = 0; row < kBlock; row += kCount)
      stream_some<kBits, kBlock, kCount, kPlanes, kBilevel>(in, group, count, row, statistics, of, sums);
  }
}

using StreamRows = void (*)(const SpqrMatmul&, const SpqrInput&, int64_t, int64_t, int64_t, float*);

template <int kBits, int kPlanes, bool kBilevel>
StreamRows stream_rows_for(int64_t block) {
  switch (block) {
    case 1: return stream_rows<kBits, 1, kPlanes, kBilevel>;
    case 2: return stream_rows<kBits, 2, kPlanes, kBilevel>;
    case 4: return stream_rows<kBits, 4, kPlanes, kBilevel>;
    case 8: return stream_rows<kBits, 8, kPlanes, kBilevel>;
    default: return stream_rows<kBits, 16, kPlanes, kBilevel>;
  }
}
template <int kBits>
StreamRows stream_rows_for(const SpqrMatmul& p, const SpqrInput& in) {
  if (in.planes == 1)
    return p.w.second_order ? stream_rows_for<kBits, 1, true>(in.block) : stream_rows_for<kBits, 1, false>(in.block);
  return p.w.second_order ? stream_rows_for<kBits, 2, true>(in.block) : stream_rows_for<kBits, 2, false>(in.block);
}

// Outliers as what their lines of parts are multiplied by: the 11 bits of an fp16 number are two bf16 numbers, each
// beside a zero for the other column of its pair.
struct OutlierPairs {
  static constexpr int64_t kSome = 256;  // made ahead, as above
  alignas(64) uint32_t first[kSome], rest[kSome];
};
__attribute__((always_inline)) inline __m512i bf16_bits(__m512 v) {
  return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
void make_outlier_pairs(const SpqrWeight& w, int64_t begin, int64_t count, OutlierPairs& to) {
  for (int64_t e = 0; e < count; e += 16) {
    const __m512i words = Vec::load_bits(w.outliers + begin + e, static_cast<int>(count - e < 16 ? count - e : 16));
    const __m512 value = SpqrVec::high_halves(words);
    const __m512i first = bf16_bits(value);
    const __m512i rest = bf16_bits(_mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16))));
    const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(words, _mm512_set1_epi32(1)), 4);
    _mm512_store_si512(to.first + e, _mm512_sllv_epi32(first, shift));
    _mm512_store_si512(to.rest + e, _mm512_sllv_epi32(rest, shift));
  }
}

// The outliers of a tile times rows of x: the rows of a pair of columns are one line of its parts, or less.
template <int kBlock>
void add_outlier_pairs(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
  const SpqrWeight& w = p.w;
  const int32_t* offsets = w.row_offsets + tile * kTileRows16;
  const int64_t rows = w.n - tile * kTileRows16 < kTileRows16 ? w.n - tile * kTileRows16 : kTileRows16;
  OutlierPairs pairs;
  int64_t row = 0;
  for (int64_t begin = offsets[0]; begin < offsets[rows]; begin += pairs.kSome) {
    const int64_t end = offsets[rows] - begin < pairs.kSome ? offsets[rows] : begin + pairs.kSome;
    make_outlier_pairs(w, begin, end - begin, pairs);
    for (int64_t e = begin; e < end;) {
      while (offsets[row + 1] <= e) ++row;
      const int64_t stop = offsets[row + 1] < end ? offsets[row + 1] : end;
      constexpr int kChains = 4;
      __m512 first[kChains], rest[kChains];
      for (int c = 0; c < kChains; ++c) first[c] = rest[c] = _mm512_setzero_ps();
      const auto add = [&](int64_t at, int c) __attribute__((always_inline)) {
        const __m512i line = Vec::load_bits(in.parts + (w.outliers[at] & 0xffffu) / 2 * kBlock, kBlock);
        first[c] = dot_pairs(first[c], line, pair_of(pairs.first + (at - begin)));
        rest[c] = dot_pairs(rest[c], line, pair_of(pairs.rest + (at - begin)));
      };
      for (; e + kChains <= stop; e += kChains)
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) add(e + c, c);
      for (; e < stop; ++e) add(e, 0);
      for (int c = 0; c < kChains; ++c) first[c] = _mm512_add_ps(first[c], rest[c]);
      alignas(64) float of_row[16];
      _mm512_store_ps(of_row, _mm512_add_ps(_mm512_add_ps(first[0], first[2]), _mm512_add_ps(first[1], first[3])));
      for (int64_t i = 0; i < p.m; ++i) sums[i * kTileRows16 + row] += of_row[i];
    }
  }
}

void add_outliers(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, float* sums) {
  if (in.planes == 1 && !p.w.wide) switch (in.block) {
      case 2: return add_outlier_pairs<2>(p, in, tile, sums);
      case 4: return add_outlier_pairs<4>(p, in, tile, sums);
      case 8: return add_outlier_pairs<8>(p, in, tile, sums);
      case 16: return add_outlier_pairs<16>(p, in, tile, sums);
    }
  const int64_t first = tile * kTileRows16;
  for (int64_t r = 0; r < kTileRows16 && first + r < p.w.n; ++r) Plain::add_outliers(p, in, first + r, sums + r);
}

// bf16 x for streaming: parts by moving 16-bit numbers, and the sums of all rows of a block at once, out of parts.
void prepare_row(const SpqrMatmul& p, const SpqrInput& in, int64_t i) {
  const SpqrWeight& w = p.w;
  constexpr int64_t kSome = 512;  // columns at a time
  alignas(64) uint16_t some[kSome];
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + i * w.k;
  const uint16_t* ids = static_cast<const uint16_t*>(w.perm);
  for (int64_t j0 = 0; j0 < in.columns; j0 += kSome) {
    const int64_t count = in.columns - j0 < kSome ? in.columns - j0 : kSome;
    const int64_t inside = i >= p.m ? 0 : w.k - j0 < count ? w.k - j0 : count;
    if (ids && !w.wide)
      for (int64_t j = 0; j < inside; ++j) some[j] = x[ids[j0 + j]];
    else
      for (int64_t j = 0; j < inside; ++j) some[j] = x[spqr_source_column(w, j0 + j)];
    for (int64_t j = inside; j < count; ++j) some[j] = 0;
    if (in.x)
      for (int64_t j = 0; j < count; ++j) in.x[(j0 + j) * in.block + i] = bits_float(uint32_t{some[j]} << 16);
    uint32_t* to = in.parts + j0 / 2 * in.block + i;
    for (int64_t e = 0; e < count / 2; ++e) __builtin_memcpy(to + e * in.block, some + 2 * e, 4);
  }
}
void prepare_sums(const SpqrMatmul& p, const SpqrInput& in) {
  const __m512i one = _mm512_set1_epi32(0x3f803f80);
  const int lanes = static_cast<int>(in.block);
  const int64_t pairs_of_group = p.w.group_size / 2;
  for (int64_t g = 0; g < spqr_groups(p.w); ++g) {
    __m512 sum[2] = {};
    for (int64_t e = g * pairs_of_group; e < (g + 1) * pairs_of_group; ++e)
      sum[e % 2] = dot_pairs(sum[e % 2], Vec::load_bits(in.parts + e * in.block, lanes), one);
    Vec::store(in.sums + g * in.block, _mm512_add_ps(sum[0], sum[1]), lanes);
  }
}
void prepare(const SpqrMatmul& p, const SpqrInput& in, int64_t begin, int64_t end) {
  if (!in.sums || in.planes != 1) return Plain::prepare(p, in, begin, end);
  for (int64_t i = 0; i < in.block; ++i) prepare_row(p, in, i);  // streaming has one block
  prepare_sums(p, in);
}

// A tile after the other, so that the weight comes from memory in one stream; x comes from L2. Only where it does not
// fit there, some tiles pass a block of columns before the next block.
void stream(const SpqrMatmul& p, const SpqrInput& in, int64_t begin, int64_t end) {
  if (in.planes == 0) return Plain::stream(p, in, begin, end);
  const SpqrWeight& w = p.w;
  const StreamRows rows = w.bits == 2   ? stream_rows_for<2>(p, in)
                          : w.bits == 3 ? stream_rows_for<3>(p, in)
                                        : stream_rows_for<4>(p, in);
  constexpr int64_t kTiles = 16, kBytes = 1 << 18;
  const int64_t groups = spqr_groups(w), columns = kBytes / (2 * in.block * in.planes) / 64 * 64;
  const int64_t some = columns / w.group_size;
  alignas(64) float sums[kTiles][Plain::kTileSums];
  for (int64_t tile = begin; tile < end; tile += kTiles) {
    const int64_t tiles = end - tile < kTiles ? end - tile : kTiles;
    __builtin_memset(sums, 0, tiles * sizeof(sums[0]));
    for (int64_t group = 0; group < groups; group += some)
      for (int64_t t = 0; t < tiles; ++t)
        rows(p, in, tile + t, group, group + some < groups ? group + some : groups, sums[t]);
    for (int64_t t = 0; t < tiles; ++t) {
      if (w.row_offsets) add_outliers(p, in, tile + t, sums[t]);
      Plain::finish(p, tile + t, sums[t]);
    }
  }
}

// ---- many rows of bf16 x ----

void multiply(const SpqrMatmul& p, const SpqrInput& in, int64_t tile, int64_t row, int64_t rows) {
  if (in.parts) return multiply_panels<Bf16Panel::kRows>(p, in, tile, row, rows, Bf16Panel::multiply_two);
  for (int64_t t = tile; t < tile + kPanelTiles && t < spqr_row_tiles(p.w); t += Plain::kPanelTiles)
    Plain::multiply(p, in, t, row, rows);
}

}  // namespace

constexpr SpqrLoops spqr_bf16_loops{.parts_of_half = 2,
                                    .parts_of_bfloat16 = 1,
                                    .bfloat16_panels = true,
                                    .tiled = false,
                                    .panel_tiles = kPanelTiles,
                                    .panel_rows = Bf16Panel::kRows,
                                    .prepare = prepare,
                                    .stream = stream,
                                    .multiply = multiply,
                                    .dequantize = Plain::dequantize};
}  // namespace octavo::cpu::avx512
#endif
