#pragma once
// The loops of block-wise quantization over a vector type V (cpu/vec_*.h), once per ISA level. Serial over blocks.
#include "blockwise/blockwise.h"

namespace octavo::cpu {

struct BlockwiseLoops {
  // Blocks [begin, end). thresholds: of the caller's code book, or null.
  void (*quantize)(const QuantizeBlocks&, const float* thresholds, int64_t begin, int64_t end);
  void (*dequantize)(const DequantizeBlocks&, int64_t begin, int64_t end);
};

namespace portable {
extern const BlockwiseLoops blockwise_loops;
}
namespace avx2 {
extern const BlockwiseLoops blockwise_loops;
}
namespace avx512 {
extern const BlockwiseLoops blockwise_loops;
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS
#include "blockwise/codec.h"
#include "cpu/block_absmax.h"

namespace octavo::cpu {
namespace {

template <class V>
struct BlockLoops {
  using F = typename V::F;
  using U = typename V::U;

  // Any element, any code book: what is rare.
  template <class T>
  static void quantize_slowly(const T* x, int64_t count, float inverse, const float* thresholds, uint32_t zero,
                              uint8_t* codes) {
    for (int64_t j = 0; j < count; ++j)
      codes[j] = static_cast<uint8_t>(block_code(to_float(x[j]), inverse, thresholds, zero));
  }

  template <class T, bool kSigned>
  static void quantize_as(const QuantizeBlocks& p, const float* thresholds, int64_t begin, int64_t end) {
    const Codec<V, kSigned> codec;
    const DynamicMap& map = dynamic_map(kSigned);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * p.blocksize, count = p.count - first < p.blocksize ? p.count - first : p.blocksize;
      const T* x = static_cast<const T*>(p.x) + first;
      uint8_t* codes = p.codes + first;
      const BlockMost most = block_most<V>(x, count);
      const float absmax = block_absmax(most.most);
      const float inverse = block_inverse(absmax);
      p.absmax[b] = absmax;
      if (thresholds) {
        quantize_slowly(x, count, inverse, thresholds, nearest_code(0.0f, thresholds), codes);
      } else if (!most.finite) {
        quantize_slowly(x, count, inverse, map.threshold, map.zero, codes);
      } else {
        const F scale = V::set(inverse);
        int64_t j = 0;
        for (; j + V::kWidth <= count; j += V::kWidth)
          V::store_codes(codes + j, codec.encode(V::mul(V::load(x + j), scale)));
        if (const int n = static_cast<int>(count - j); n > 0)
          V::store_codes(codes + j, codec.encode(V::mul(V::load(x + j, n), scale)), n);
      }
    }
  }

  static void quantize(const QuantizeBlocks& p, const float* thresholds, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) {
      using T = decltype(type);
      p.is_signed ? quantize_as<T, true>(p, thresholds, begin, end) : quantize_as<T, false>(p, thresholds, begin, end);
    });
  }

  template <class T, bool kSigned>
  static void dequantize_as(const DequantizeBlocks& p, int64_t begin, int64_t end) {
    const Codec<V, kSigned> codec;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * p.blocksize, count = p.count - first < p.blocksize ? p.count - first : p.blocksize;
      const uint8_t* codes = p.codes + first;
      T* out = static_cast<T*>(p.out) + first;
      if (p.values) {
        for (int64_t j = 0; j < count; ++j) out[j] = from_float<T>(p.values[codes[j]] * p.absmax[b]);
        continue;
      }
      const F absmax = V::set(p.absmax[b]);
      int64_t j = 0;
      for (; j + V::kWidth <= count; j += V::kWidth)
        V::store(out + j, V::mul(codec.decode(V::load_codes(codes + j)), absmax));
      if (const int n = static_cast<int>(count - j); n > 0)
        V::store(out + j, V::mul(codec.decode(V::load_codes(codes + j, n)), absmax), n);
    }
  }

  static void dequantize(const DequantizeBlocks& p, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) {
      using T = decltype(type);
      p.is_signed ? dequantize_as<T, true>(p, begin, end) : dequantize_as<T, false>(p, begin, end);
    });
  }

  static constexpr BlockwiseLoops table = {quantize, dequantize};
};

}  // namespace
}  // namespace octavo::cpu
#endif  // OCTAVO_ISA_LOOPS
