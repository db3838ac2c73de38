#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 2
#include <immintrin.h>

#include "common/numeric.h"
#include "int8/gemm.h"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")  // last include of shared code above
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_avx512.h"
#include "int8/gemm_tile.h"

namespace octavo::cpu::avx512 {
namespace {

// vpdpbusd multiplies unsigned by signed bytes: a + 128 (the sign bit flipped) stands for a, and 128 * sum(b) is taken
// off at the end. Both operands are read along k, so that b needs no packing: 64 products of one output a step.
constexpr int kStep = kPackK;
constexpr int kGroup = 6;               // rows of a that one kernel multiplies
constexpr int64_t kBlockK = 4096;       // the sums are merged once a block; 4 rows of b of that length stay in L1
constexpr int64_t kAheadBytes = 16384;  // prefetched at least that far ahead: a few hundred ns at full bandwidth

// 64 codes, or the last few of a row. A masked load where none is needed would cost a second instruction.
[[gnu::always_inline]] inline __m512i codes(const int8_t* p, __mmask64 some) {
  return some == ~0ull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(some, p);
}

__mmask64 first_lanes(int64_t n) {
  return n >= kStep ? ~0ull : (1ull << n) - 1;
}

// packed[group][step][row][64] = a[group * 6 + row][step * 64 ...] + 128: one stream for the kernel, which spreads over
// all sets of the L1 cache where rows of 4096 codes would fall on the same ones.
void pack(const Int8Gemm& p, int8_t* packed, int64_t begin, int64_t end) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i* to = reinterpret_cast<__m512i*>(packed) + begin * ceil_div(p.k, kStep) * kGroup;
  for (int64_t group = begin; group < end; ++group)
    for (int64_t l = 0; l < p.k; l += kStep)
      for (int64_t i = group * kGroup; i < (group + 1) * kGroup; ++i) {
        const __mmask64 some = i < p.m ? first_lanes(p.k - l) : 0;
        _mm512_store_si512(to++, _mm512_xor_si512(codes(p.a + i * p.k + l, some), flip));
      }
}

// The sums of four accumulators' lanes.
__m128i reduce(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// sum += a (unsigned) * b (signed), as asm because g++ 12 gives the intrinsic's result a register of its own, and with
// 24 accumulators that means copies and spills in the innermost loop.
[[gnu::always_inline]] inline void multiply_add(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Rows of b, `stride` bytes apart, that a kernel brings into L2 while it multiplies others. The hardware's prefetcher
// stops at the end of each page, and a row of 4096 codes is just one. Into L1 they would push out what is in use.
struct Ahead {
  const int8_t* from;
  int64_t stride, rows;
};

// sum[kAll][kCols] += the products of one step; the row after the kRows of a, where there is one, is of ones.
template <int kRows, int kAll, int kCols>
[[gnu::always_inline]] inline void step(__m512i (&sum)[kAll][kCols], const int8_t* a, const __m512i (&bv)[kCols]) {
#pragma GCC unroll 6
  for (int i = 0; i < kAll; ++i) {
    const __m512i av = i < kRows ? _mm512_load_si512(a + i * kStep) : _mm512_set1_epi8(1);
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) multiply_add(sum[i][j], av, bv[j]);
  }
}

// acc[kRows][kCols] += the products over [0, width) of a (packed) and b; with kSums also b_sums[kCols] += the sums of
// b, as one more row of ones. At 6 x 4: 24 accumulators, 4 b, 1 a of the 32 registers, and 24 multiplications for 10
// loads.
template <int kRows, bool kSums, int kCols>
void kernel(const int8_t* a, const int8_t* const* b, int64_t width, const Ahead& ahead, int32_t* acc, int32_t* b_sums) {
  constexpr int kAll = kRows + kSums;
  // The first pass over rows of b takes them from L2. With this much to multiply it gains a tenth when they are asked
  // for some steps ahead; with one or two rows of a, it loses.
  constexpr bool kAsksAhead = kSums && kRows >= 3;
  __m512i sum[kAll][kCols];
#pragma GCC unroll 6
  for (int i = 0; i < kAll; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) sum[i][j] = _mm512_setzero_si512();
  const int8_t* row[kCols];
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) row[j] = b[j];
  const Ahead next = ahead;  // a copy, for the compiler to see that no store changes it
  __m512i bv[kCols];
  int64_t l = 0;
  for (; l + kStep <= width; l += kStep, a += kGroup * kStep) {
    for (int64_t q = 0; q < next.rows; ++q) _mm_prefetch(next.from + q * next.stride + l, _MM_HINT_T1);
    if constexpr (kAsksAhead)
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) _mm_prefetch(row[j] + l + 8 * kStep, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) bv[j] = _mm512_loadu_si512(row[j] + l);
    step<kRows>(sum, a, bv);
  }
  if (l < width) {  // apart from the loop, where the masks would cost 7 % of the time
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) bv[j] = _mm512_maskz_loadu_epi8(first_lanes(width - l), row[j] + l);
    step<kRows>(sum, a, bv);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kAll; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kCols; j += 4) {
      __m128i* to = reinterpret_cast<__m128i*>((i < kRows ? acc + i * kTileN : b_sums) + j);
      *to = _mm_add_epi32(*to, reduce(sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]));
    }
}

using Kernel = void (*)(const int8_t*, const int8_t* const*, int64_t, const Ahead&, int32_t*, int32_t*);
// By the number of rows: 0 to 5 leave registers for the sums of b.
constexpr Kernel kWithSums[kGroup] = {kernel<0, true, 4>, kernel<1, true, 4>, kernel<2, true, 4>,
                                      kernel<3, true, 4>, kernel<4, true, 4>, kernel<5, true, 4>};
// One or two rows of a leave registers for 8 rows of b: more of memory is under way at once.
constexpr int kMaxCols = 8;
constexpr Kernel kWide[] = {nullptr, kernel<1, true, kMaxCols>, kernel<2, true, kMaxCols>};

// A few rows of b at a time stay in L1 while all of a passes by from L2. Meanwhile the next ones come from memory, in
// every pass as many as its share of the work: the reading hides behind the multiplying, or the other way round.
void multiply(const GemmTile& t) {
  const int64_t k = t.p->k, n = t.p->n, group_bytes = kGroup * ceil_div(k, kStep) * kStep;
  const int64_t full = t.rows / kGroup * kGroup;
  const bool is_wide = t.rows <= 2;
  const int64_t cols = is_wide ? kMaxCols : 4;
  const int64_t block = k < kBlockK ? k : kBlockK;
  const int64_t distance = ceil_div(kAheadBytes, cols * block + 1) * cols;  // in rows of b
  alignas(64) int32_t b_sums[kTileN] = {};
  __builtin_memset(t.acc, 0, t.rows * kTileN * sizeof(int32_t));
  for (int64_t l = 0; l < k; l += block) {
    const int64_t width = k - l < block ? k - l : block;
    for (int64_t j = 0; j < t.cols; j += cols) {
      const int8_t* b[kMaxCols];  // beyond the edge the last row is repeated; its sums are not used
      for (int64_t q = 0; q < cols; ++q) b[q] = t.p->b + (t.j0 + (j + q < t.cols ? j + q : t.cols - 1)) * k + l;
      // After the tile's last rows come its first in the next block, after the last block the next tile's.
      int64_t next_row = t.j0 + j + distance, next_l = l;
      if (block < k && j + distance >= t.cols) {
        next_l = l + block < k ? l + block : 0;
        if (next_l > 0) next_row -= t.cols;
      }
      const int64_t wanted = next_row + cols <= n ? cols : next_row < n ? n - next_row : 0;
      int64_t done = 0, fetched = 0;
      const auto pass = [&](int64_t i, int64_t work, Kernel multiply_rows) {
        done += work;
        const int64_t share = wanted * done / (t.rows + 1) - fetched;
        const Ahead ahead{t.p->b + (next_row + fetched) * k + next_l, k, share};
        fetched += share;
        const int8_t* a = t.a + (t.i0 + i) / kGroup * group_bytes + l * kGroup;
        multiply_rows(a, b, width, ahead, t.acc + i * kTileN + j, b_sums + j);
      };
      // The rows that fill no group first: they bring the sums of b with them.
      pass(full, t.rows - full + 1, is_wide ? kWide[t.rows] : kWithSums[t.rows - full]);
      for (int64_t i = 0; i < full; i += kGroup) pass(i, kGroup, kernel<kGroup, false, 4>);
    }
  }
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < kTileN; j += 16) {
      __m512i* to = reinterpret_cast<__m512i*>(t.acc + i * kTileN + j);
      *to = _mm512_sub_epi32(*to, _mm512_slli_epi32(_mm512_load_si512(b_sums + j), 7));
    }
}

}  // namespace

constexpr GemmLoops gemm_loops = GemmEpilogue<Vec>::with(pack, kGroup, multiply);

}  // namespace octavo::cpu::avx512
#endif
