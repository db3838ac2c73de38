#pragma once
#include "common/hd.h"

namespace octavo {

enum class DType : int32_t { f32, f16, bf16, i32 };

// Storage of a 16-bit float: the bits, nothing else. Arithmetic is always done in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct dtype_of<Half> {
  static constexpr DType value = DType::f16;
};
template <>
struct dtype_of<BFloat16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct dtype_of<int32_t> {
  static constexpr DType value = DType::i32;
};

// Calls f(T{}) with T = float, Half or BFloat16. The op has checked the dtype: nothing else arrives here.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // f may be host code: then only the host calls this
#endif
template <class F>
HD void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f16: return f(Half{});
    case DType::bf16: return f(BFloat16{});
    case DType::i32: return;
  }
}

}  // namespace octavo
