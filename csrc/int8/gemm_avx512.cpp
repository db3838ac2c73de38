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
constexpr int kStep = 64;

int64_t padded(int64_t k) {
  return ceil_div(k, kStep) * kStep;
}

// a + 128, rows padded to whole steps (the padding meets zeros of b).
void pack(const Int8Gemm& p, int8_t* packed, int64_t begin, int64_t end) {
  const int64_t stride = padded(p.k), last = end * kPackM < p.m ? end * kPackM : p.m;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t i = begin * kPackM; i < last; ++i)
    for (int64_t l = 0; l < p.k; l += kStep) {
      const __mmask64 some = p.k - l >= kStep ? ~0ull : (1ull << (p.k - l)) - 1;
      const __m512i v = _mm512_maskz_loadu_epi8(some, p.a + i * p.k + l);
      _mm512_store_si512(packed + i * stride + l, _mm512_xor_si512(v, flip));
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

// kRows x 4 outputs over all of k. At kRows = 6: 24 accumulators, 4 b, 1 a of the 32 registers, and 24 multiplications
// for 10 loads.
template <int kRows>
void kernel(const int8_t* a, int64_t a_stride, const int8_t* const* b, int64_t k, __m128i correction, int32_t* acc) {
  __m512i sum[kRows][4];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_si512();
  const auto step = [&](int64_t l, __mmask64 some) {
    __m512i bv[4];
    for (int j = 0; j < 4; ++j) bv[j] = _mm512_maskz_loadu_epi8(some, b[j] + l);
    for (int i = 0; i < kRows; ++i) {
      const __m512i av = _mm512_load_si512(a + i * a_stride + l);
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], av, bv[j]);
    }
  };
  int64_t l = 0;
  for (; l + kStep <= k; l += kStep) step(l, ~0ull);
  if (l < k) step(l, (1ull << (k - l)) - 1);
  for (int i = 0; i < kRows; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + i * kTileN),
                     _mm_sub_epi32(reduce(sum[i][0], sum[i][1], sum[i][2], sum[i][3]), correction));
}

// 128 * sum(b) of four rows, which this also brings into L1.
__m128i corrections(const int8_t* const* b, int64_t k) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t l = 0; l < k; l += kStep) {
    const __mmask64 some = k - l >= kStep ? ~0ull : (1ull << (k - l)) - 1;
    for (int j = 0; j < 4; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], ones, _mm512_maskz_loadu_epi8(some, b[j] + l));
  }
  return _mm_slli_epi32(reduce(sum[0], sum[1], sum[2], sum[3]), 7);
}

void multiply(const GemmTile& t) {
  const int64_t k = t.p->k, stride = padded(k);
  for (int64_t j = 0; j < t.cols; j += 4) {
    const int8_t* b[4];  // beyond the edge the last row is repeated; its sums are not used
    for (int64_t q = 0; q < 4; ++q) b[q] = t.p->b + (t.j0 + (j + q < t.cols ? j + q : t.cols - 1)) * k;
    const __m128i correction = corrections(b, k);
    const int8_t* a = t.a + t.i0 * stride;
    int32_t* acc = t.acc + j;
    int64_t left = t.rows;
    for (; left >= 6; left -= 6, a += 6 * stride, acc += 6 * kTileN) kernel<6>(a, stride, b, k, correction, acc);
    switch (left) {
      case 5: kernel<5>(a, stride, b, k, correction, acc); break;
      case 4: kernel<4>(a, stride, b, k, correction, acc); break;
      case 3: kernel<3>(a, stride, b, k, correction, acc); break;
      case 2: kernel<2>(a, stride, b, k, correction, acc); break;
      case 1: kernel<1>(a, stride, b, k, correction, acc); break;
    }
  }
}

}  // namespace

constexpr GemmLoops gemm_loops = {pack, multiply, GemmEpilogue<Vec>::add_outliers, GemmEpilogue<Vec>::epilogue};

}  // namespace octavo::cpu::avx512
#endif
