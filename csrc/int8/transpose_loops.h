#pragma once
// One tile of encode_transposed over a vector type V (cpu/vec_*.h), compiled once per ISA level.
#include "int8/transpose.h"

namespace octavo::cpu {

// Codes of a tile, 72 KiB, stay in L2 until they are turned; a row of x or codes is read or written 512 elements on
// end, which the hardware's prefetcher follows, and a row of the transpose by two lines of cache. Rows of the tile are
// a line longer than its columns, for powers of two would meet in the same sets of the cache.
constexpr int64_t kTransposeRows = 128, kTransposeCols = 512, kTransposeStride = kTransposeCols + 64;

struct TransposeLoops {
  // Rows [i0, i0 + kTransposeRows) and columns [j0, j0 + kTransposeCols), as far as there are. inverse: [cols], or [1]
  // where the stride is 0; key: of the seed; codes: [kTransposeRows * kTransposeStride] of scratch.
  void (*tile)(const EncodeTransposed&, int64_t i0, int64_t j0, const float* inverse, uint32_t key, int8_t* codes);
};

namespace portable {
extern const TransposeLoops transpose_loops;
}
namespace avx2 {
extern const TransposeLoops transpose_loops;
}
namespace avx512 {
extern const TransposeLoops transpose_loops;
}

#ifdef OCTAVO_ISA_LOOPS
namespace {

// Bytes of 16 x 16, to[j][i] = from[i][j].
inline void transpose_bytes(const int8_t* from, int64_t from_stride, int8_t* to, int64_t to_stride) {
#ifdef OCTAVO_SSE_BYTES
  // Interleaving row i with row i + 8, four times, moves the four bits of the row number to the place of the column's.
  __m128i v[16], w[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
      w[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = w[i];
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), v[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

template <class V>
struct TransposeTile {
  template <class T>
  static void encode_row(const T* x, int8_t* codes, int64_t cols, const float* inverse, bool one, const int64_t* seed,
                         uint32_t key, int64_t j0) {
    const typename V::F common = V::set(*inverse);
    for (int64_t j = 0; j < cols; j += V::kWidth) {
      const int n = cols - j < V::kWidth ? static_cast<int>(cols - j) : V::kWidth;
      const typename V::F v = V::load(x + j, n), by = one ? common : V::load(inverse + j, n);
      if (!seed) {
        V::encode(codes + j, v, by, n);
        continue;
      }
      // encode_at_random; a code is a whole number here, and the last step only makes it a byte.
      const auto random = mix<V>(V::add_bits(V::set_bits(key + static_cast<uint32_t>(j0 + j)), V::lane_ids()));
      const typename V::F part = V::mul(V::to_float(V::template shift_right<8>(random)), V::set(0x1p-24f));
      const typename V::F q = V::floor(V::add(V::mul(v, by), part));
      const typename V::F bounded = V::max(V::min(q, V::set(127.0f)), V::set(-127.0f));
      V::encode(codes + j, bounded, V::select(V::equal(by, V::set(0.0f)), V::set(0.0f), V::set(1.0f)), n);
    }
  }

  template <class W>
  static typename W::U mix(typename W::U x) {  // mix_bits
    x = W::xor_bits(x, W::template shift_right<16>(x));
    x = W::mul_bits(x, W::set_bits(0x7feb352du));
    x = W::xor_bits(x, W::template shift_right<15>(x));
    x = W::mul_bits(x, W::set_bits(0x846ca68bu));
    return W::xor_bits(x, W::template shift_right<16>(x));
  }

  static void tile(const EncodeTransposed& p, int64_t i0, int64_t j0, const float* inverse, uint32_t key,
                   int8_t* codes) {
    const int64_t rows = p.rows - i0 < kTransposeRows ? p.rows - i0 : kTransposeRows;
    const int64_t cols = p.cols - j0 < kTransposeCols ? p.cols - j0 : kTransposeCols;
    const bool one = p.absmax_stride == 0;
    dispatch_float(p.dtype, [&](auto type) {
      const auto* x = static_cast<const decltype(type)*>(p.x) + i0 * p.cols + j0;
      for (int64_t i = 0; i < rows; ++i) {
        int8_t* row = codes + i * kTransposeStride;
        encode_row(x + i * p.cols, row, cols, inverse + (one ? 0 : j0), one, p.seed, p.seed ? row_key(key, i0 + i) : 0,
                   j0);
        if (p.codes) __builtin_memcpy(p.codes + (i0 + i) * p.cols + j0, row, cols);
      }
    });
    // Whole blocks: what lies beyond rows and cols is turned, and not used.
    alignas(64) int8_t turned[16 * kTransposeRows];
    for (int64_t j = 0; j < cols; j += 16) {
      for (int64_t i = 0; i < rows; i += 16)
        transpose_bytes(codes + i * kTransposeStride + j, kTransposeStride, turned + i, kTransposeRows);
      for (int64_t e = 0; e < 16 && j + e < cols; ++e) {
        int8_t* to = p.transposed + (j0 + j + e) * p.rows + i0;
        const int8_t* from = turned + e * kTransposeRows;
        if (rows == kTransposeRows)
          __builtin_memcpy(to, from, kTransposeRows);
        else
          __builtin_memcpy(to, from, rows);
      }
    }
  }

  static constexpr TransposeLoops table = {tile};
};

}  // namespace
#endif  // OCTAVO_ISA_LOOPS

}  // namespace octavo::cpu
