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
constexpr int kGroup = 6;          // rows of a that one kernel multiplies
constexpr int64_t kBlockK = 2048;  // 6 x 2048 of a and 4 x 2048 of b stay in L1 while the 64 rows of b pass by from L2

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

// acc[kRows][4] += the products over [0, k) of a (packed) and b; with kSums also b_sums[4] += the sums of b, as one
// more row of ones. At kRows = 6: 24 accumulators, 4 b, 1 a of the 32 registers, and 24 multiplications for 10 loads.
template <int kRows, bool kSums>
void kernel(const int8_t* a, const int8_t* const* b, int64_t k, int32_t* acc, int32_t* b_sums) {
  constexpr int kAll = kRows + kSums;
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[kAll][4];
#pragma GCC unroll 6
  for (int i = 0; i < kAll; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_si512();
  const int8_t *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
  // One body with a mask for all steps, so that the unrolled code stands here once.
  for (int64_t l = 0; l < k; l += kStep, a += kGroup * kStep) {
    const __mmask64 some = first_lanes(k - l);
    const __m512i bv[4] = {_mm512_maskz_loadu_epi8(some, b0 + l), _mm512_maskz_loadu_epi8(some, b1 + l),
                           _mm512_maskz_loadu_epi8(some, b2 + l), _mm512_maskz_loadu_epi8(some, b3 + l)};
#pragma GCC unroll 6
    for (int i = 0; i < kAll; ++i) {
      const __m512i av = i < kRows ? _mm512_load_si512(a + i * kStep) : ones;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) multiply_add(sum[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kAll; ++i) {
    __m128i* to = reinterpret_cast<__m128i*>(i < kRows ? acc + i * kTileN : b_sums);
    *to = _mm_add_epi32(*to, reduce(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
  }
}

using Kernel = void (*)(const int8_t*, const int8_t* const*, int64_t, int32_t*, int32_t*);
// By the number of rows: 0 to 5 leave registers for the sums of b.
constexpr Kernel kWithSums[kGroup] = {kernel<0, true>, kernel<1, true>, kernel<2, true>,
                                      kernel<3, true>, kernel<4, true>, kernel<5, true>};

void multiply(const GemmTile& t) {
  const int64_t k = t.p->k, group_bytes = kGroup * ceil_div(k, kStep) * kStep;
  // With one group there is nothing to keep in L1: b streams past once.
  const int64_t block = t.rows <= kGroup ? k : kBlockK;
  const int64_t full = t.rows / kGroup * kGroup;
  alignas(64) int32_t b_sums[kTileN] = {};
  __builtin_memset(t.acc, 0, t.rows * kTileN * sizeof(int32_t));
  for (int64_t l = 0; l < k; l += block) {
    const int64_t width = k - l < block ? k - l : block;
    const auto pass = [&](int64_t i, Kernel multiply_rows) {
      for (int64_t j = 0; j < t.cols; j += 4) {
        const int8_t* b[4];  // beyond the edge the last row is repeated; its sums are not used
        for (int64_t q = 0; q < 4; ++q) b[q] = t.p->b + (t.j0 + (j + q < t.cols ? j + q : t.cols - 1)) * k + l;
        const int8_t* a = t.a + (t.i0 + i) / kGroup * group_bytes + l * kGroup;
        multiply_rows(a, b, width, t.acc + i * kTileN + j, b_sums + j);
      }
    };
    pass(full, kWithSums[t.rows - full]);  // the rows that fill no group first: they bring the sums of b with them
    for (int64_t i = 0; i < full; i += kGroup) pass(i, kernel<kGroup, false>);
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
