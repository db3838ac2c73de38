#pragma once
// The loops of int8 quantization over a vector type V (cpu/vec_*.h), compiled once per ISA level, and the table of
// functions that an ISA file hands to quantize_cpu.cpp. Serial: the caller splits the work among threads.
#include "int8/quantize.h"

namespace octavo::cpu {

struct QuantizeLoops {
  void (*rows)(const QuantizeRows&, int64_t begin, int64_t end);                  // rows [begin, end)
  void (*absmax)(const void* x, DType, int64_t count, uint32_t* absmax);          // absmax[0] = max(absmax[0], ...)
  void (*column_absmax)(const void* row, DType, int64_t cols, uint32_t* absmax);  // per column, one row
  void (*encode_row)(const void* row, DType, int64_t cols, const float* inverse, int64_t inverse_stride,
                     int8_t* codes);  // inverse per column, or one
  void (*dequantize)(const DequantizeRows&, int64_t begin, int64_t end);
  void (*outlier_flags)(const void* row, DType, int64_t cols, float threshold, uint8_t* flags);
};

namespace portable {
extern const QuantizeLoops quantize_loops;
}
namespace avx2 {
extern const QuantizeLoops quantize_loops;
}
namespace avx512 {
extern const QuantizeLoops quantize_loops;
}
const QuantizeLoops& quantize_loops();  // of the active level

// Flags are shared by the threads, which all write the same value.
static inline void set_flag(uint8_t* flag) {
  __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
}

// ISA files only, after the target pragma: everything below has internal linkage, so that no copy of it compiled for
// a higher level can reach an older CPU.
#ifdef OCTAVO_ISA_LOOPS
namespace {

template <class V, class F>
void each_vector(int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + V::kWidth <= count; j += V::kWidth) f(j, V::kWidth);
  if (j < count) f(j, static_cast<int>(count - j));
}

template <class V>
void flag_outliers(uint32_t mask, uint8_t* flags) {
  for (; mask; mask &= mask - 1) set_flag(flags + __builtin_ctz(mask));
}

template <class V>
struct Loops {
  // Elements j ... of a row, without the outliers and the columns to skip. The arguments are copies: a store of codes
  // could change what a reference refers to, as far as the compiler knows.
  template <class T>
  static typename V::F load_kept(const T* x, const uint8_t* skip, float threshold, int64_t j, int n) {
    typename V::F v = V::load(x + j, n);
    if (threshold != 0.0f) v = V::drop(v, V::outliers(v, threshold));
    if (skip) v = V::drop(v, V::nonzero(skip + j, n));
    return v;
  }

  template <class T>
  static uint32_t row_absmax(const T* x, int64_t cols) {
    typename V::U most = V::zero_bits();
    each_vector<V>(cols, [&](int64_t j, int n) { most = V::max_bits(most, V::abs_bits(V::load(x + j, n))); });
    return V::reduce_max(most);
  }

  // The second look at the row finds it in cache: x is read from memory once.
  static void rows(const QuantizeRows& p, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = begin; i < end; ++i) {
        const T* x = static_cast<const T*>(p.x) + i * p.cols;
        int8_t* codes = p.codes + i * p.cols;
        const uint8_t* skip = p.skip;
        const float threshold = p.threshold;
        typename V::U most = V::zero_bits();
        each_vector<V>(p.cols, [=, &most](int64_t j, int n) {
          most = V::max_bits(most, V::abs_bits(load_kept(x, skip, threshold, j, n)));
        });
        const uint32_t absmax = V::reduce_max(most);
        p.scale[i] = scale_of(absmax);
        const typename V::F inverse = V::set(inverse_scale_of(absmax));
        each_vector<V>(
            p.cols, [=](int64_t j, int n) { V::encode(codes + j, load_kept(x, skip, threshold, j, n), inverse, n); });
      }
    });
  }

  static void absmax(const void* x, DType dtype, int64_t count, uint32_t* absmax) {
    dispatch_float(dtype, [&](auto type) {
      const uint32_t most = row_absmax(static_cast<const decltype(type)*>(x), count);
      if (most > *absmax) *absmax = most;
    });
  }

  static void column_absmax(const void* row, DType dtype, int64_t cols, uint32_t* absmax) {
    dispatch_float(dtype, [&](auto type) {
      const auto* x = static_cast<const decltype(type)*>(row);
      each_vector<V>(cols, [&](int64_t j, int n) {
        const typename V::U most = V::max_bits(V::load_bits(absmax + j, n), V::abs_bits(V::load(x + j, n)));
        V::store_bits(absmax + j, most, n);
      });
    });
  }

  static void encode_row(const void* row, DType dtype, int64_t cols, const float* inverse, int64_t inverse_stride,
                         int8_t* codes) {
    dispatch_float(dtype, [&](auto type) {
      const auto* x = static_cast<const decltype(type)*>(row);
      const typename V::F one = V::set(inverse_stride ? 0.0f : *inverse);
      each_vector<V>(cols, [&](int64_t j, int n) {
        V::encode(codes + j, V::load(x + j, n), inverse_stride ? V::load(inverse + j, n) : one, n);
      });
    });
  }

  static void dequantize(const DequantizeRows& p, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = begin; i < end; ++i) {
        const int8_t* codes = p.codes + i * p.cols;
        T* out = static_cast<T*>(p.out) + i * p.cols;
        const typename V::F scale = V::set(p.scale[i]);
        each_vector<V>(p.cols, [&](int64_t j, int n) { V::store(out + j, V::mul(V::load(codes + j, n), scale), n); });
      }
    });
  }

  static void outlier_flags(const void* row, DType dtype, int64_t cols, float threshold, uint8_t* flags) {
    dispatch_float(dtype, [&](auto type) {
      const auto* x = static_cast<const decltype(type)*>(row);
      each_vector<V>(cols, [&](int64_t j, int n) {
        // Lanes beyond n hold 0, which no positive threshold flags.
        if (const uint32_t mask = V::outliers(V::load(x + j, n), threshold)) flag_outliers<V>(mask, flags + j);
      });
    });
  }

  static constexpr QuantizeLoops table = {rows, absmax, column_absmax, encode_row, dequantize, outlier_flags};
};

}  // namespace
#endif  // OCTAVO_ISA_LOOPS

}  // namespace octavo::cpu
