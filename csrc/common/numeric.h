#pragma once
// The one definition of octavo's int8 arithmetic. CPU (every ISA), CUDA and the host SIMT machine call these
// functions, or vector forms that give the same bits: contraction is off in every compiler and fma is written out.
#include <cmath>
#include <cstring>

#include "common/dtype.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace octavo {

HD uint32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
#endif
}

HD float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
#endif
}

// ---- 16-bit floats: exact to fp32, from fp32 by round half to even; NaN stays NaN, overflow becomes Inf ----

HD float to_float(float v) {
  return v;
}

HD float to_float(BFloat16 v) {
  return bits_float(static_cast<uint32_t>(v.bits) << 16);
}

HD float to_float(Half v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // Inf, NaN
  // Put the 15 bits where fp32 has exponent and mantissa, then correct the bias by an exact product: this also
  // normalises the denormals.
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;
  return bits_float(float_bits(scaled) | sign);
#endif
}

template <class T>
HD T from_float(float v);

template <>
HD float from_float<float>(float v) {
  return v;
}

template <>
HD BFloat16 from_float<BFloat16>(float v) {
  const uint32_t bits = float_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
HD Half from_float<Half>(float v) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(v))};
#else
  const uint32_t bits = float_bits(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: a denormal, whose unit is 2^-24; adding 0.5 rounds to that unit
    const float aligned = bits_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(aligned) - float_bits(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// Element i of a float tensor whose dtype is known at run time only (bias, kept outlier weights).
HD float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16: return to_float(static_cast<const Half*>(data)[i]);
    case DType::bf16: return to_float(static_cast<const BFloat16*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

// ---- int8 quantization: value = code * scale, scale = absmax / 127, code in [-127, 127] ----

// |v| as an integer that orders like the value, with Inf above every finite number and NaN above Inf:
// an integer maximum of these is an absmax that does not lose a NaN.
HD uint32_t abs_bits(float v) {
  return float_bits(v) & 0x7fffffffu;
}

// Below this absmax, 127 / absmax would leave fp32. Such a row counts as zero: codes 0, scale 0.
constexpr float kMinAbsmax = 0x1p-120f;

HD bool is_outlier(float v, float threshold) {
  return std::fabs(v) >= threshold;
}  // false for NaN, true for Inf

// Scale of a row (column, tensor) from its absmax. A NaN or Inf makes it NaN: with codes 0, everything computed from
// that row is NaN, and nothing else is.
HD float scale_of(uint32_t absmax_bits) {
  if (absmax_bits >= 0x7f800000u) return bits_float(0x7fc00000u);
  const float absmax = bits_float(absmax_bits);
  return absmax < kMinAbsmax ? 0.0f : absmax / 127.0f;
}

// What an element is multiplied by before rounding; 0 for rows that have codes 0.
HD float inverse_scale_of(uint32_t absmax_bits) {
  const float absmax = bits_float(absmax_bits);
  return absmax_bits >= 0x7f800000u || absmax < kMinAbsmax ? 0.0f : 127.0f / absmax;
}

// Round half to even, saturate to [-127, 127]. inverse == 0 gives 0 for every v, NaN and Inf included.
HD int8_t encode(float v, float inverse) {
#ifdef __CUDA_ARCH__
  const int q = __float2int_rn(v * inverse);  // Inf * 0 is NaN, and this conversion makes 0 of NaN: no test needed
#else
  if (inverse == 0.0f) return 0;
  const int q = static_cast<int>(std::nearbyint(v * inverse));
#endif
  return static_cast<int8_t>(q < -127 ? -127 : q > 127 ? 127 : q);
}

// The integer below v * inverse or the one above, the nearer the likelier: random is 32 uniform bits, of which the
// upper 24 count. Its mean is v * inverse up to fp32's rounding of the sum.
HD int8_t encode_at_random(float v, float inverse, uint32_t random) {
#ifdef __CUDA_ARCH__
  // The product with 2^-24 is exact, so fma rounds the same sum; the conversion makes 0 of NaN.
  const int q = __float2int_rd(fmaf(static_cast<float>(random >> 8), 0x1p-24f, v * inverse));
  return static_cast<int8_t>(q < -127 ? -127 : q > 127 ? 127 : q);
#else
  if (inverse == 0.0f) return 0;
  const float q = std::floor(v * inverse + static_cast<float>(random >> 8) * 0x1p-24f);
  return static_cast<int8_t>(q < -127.0f ? -127.0f : q > 127.0f ? 127.0f : q);
#endif
}

// ---- epilogue of the int8 product ----

// Two steps, because outlier columns enter in between (int8/gemm.h): x * code has the scale of the weight's row only,
// x * weight none.
HD float scale_row(int32_t acc, float a_scale) {
  return static_cast<float>(acc) * a_scale;
}

HD float scale_column(float v, float b_scale, float bias) {
  return fmaf(v, b_scale, bias);
}

}  // namespace octavo
