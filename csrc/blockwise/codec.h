#pragma once
// Codes of the dynamic maps to values and back over a vector type V (cpu/vec_*.h): the arithmetic of common/codebook.h,
// with its tables in registers. ISA files only, after the target pragma: everything has internal linkage.
#include "common/codebook.h"
#include "common/numeric.h"

namespace octavo::cpu {
namespace {

constexpr const DynamicMap& dynamic_map(bool is_signed) {
  return is_signed ? kSignedMap : kUnsignedMap;
}

// One lane needs no arithmetic: a table to decode, a search to encode.
template <class V, bool kSigned, bool kOneLane = V::kWidth == 1>
struct Codec {
  typename V::F decode(typename V::U code) const { return dynamic_map(kSigned).value[code]; }
  typename V::U encode(typename V::F v) const { return nearest_code(v, dynamic_map(kSigned).threshold); }  // v: finite
};

template <class V, bool kSigned>
struct Codec<V, kSigned, false> {
  using F = typename V::F;
  using U = typename V::U;
  static constexpr const DynamicMap& kMap = dynamic_map(kSigned);

  typename V::Table8 step = V::table8(kMap.step), base = V::table8(kMap.base);
  typename V::Table32 correction = V::table32(kMap.correction), region = V::table32(kMap.region);
  typename V::Table8 slope = V::table8(kMap.slope), offset = V::table8(kMap.offset), last = V::table8(kMap.last);

  Codec() {}  // not implicit: that one would be made before the target pragma's functions may be used

  F decode(U code) const {
    const U whole = kSigned ? V::add_bits(V::add_bits(code, code), V::set_bits(static_cast<uint32_t>(-254)))
                            : V::add_bits(code, V::set_bits(1));
    const F x = V::to_float(whole), a = kSigned ? V::abs(x) : x;
    const U d = V::template shift_right<23>(V::bits(a));
    const U rough = V::bits(V::fma(a, V::lookup(step, d), V::lookup(base, d)));
    const U packed = V::lookup(correction, V::template shift_right<3>(code));
    const U at = V::and_bits(V::add_bits(V::add_bits(code, code), V::add_bits(code, code)), V::set_bits(28));
    const U units = V::and_bits(V::shift_right_by(packed, at), V::set_bits(15));
    const U exact = V::add_bits(rough, V::add_bits(units, V::set_bits(0u - kCorrectionZero)));
    return kSigned ? V::with_sign_of(V::from_bits(exact), x) : V::from_bits(exact);
  }

  U encode(F v) const {
    v = V::max(v, V::set(kMap.value[0]));
    const U rotated = V::max_bits(kSigned ? V::rotate_left_1(V::bits(v)) : V::add_bits(V::bits(v), V::bits(v)),
                                  V::set_bits(kLowestRotated));
    const U where = V::lookup(region, V::template shift_right<24>(rotated));
    const U d = V::template shift_right<24>(V::add_bits(rotated, where));
    const F a = kSigned ? V::abs(v) : v;
    const F exact = V::min(V::fma(a, V::lookup(slope, d), V::lookup(offset, d)), V::lookup(last, d));
    const F level = V::round(exact);
    const uint32_t doubtful = V::lane_bits(V::at_least(V::abs(V::sub(exact, level)), V::set(0.5f - kDoubt)));
    U code = kSigned ? V::add_bits(V::to_integer(V::with_sign_of(level, v)), V::set_bits(127)) : V::to_integer(level);
    if (__builtin_expect(doubtful != 0, 0)) code = search(v, code, doubtful);
    return code;
  }

 private:
  __attribute__((noinline)) static U search(F v, U code, uint32_t doubtful) {
    float values[V::kWidth];
    uint32_t codes[V::kWidth];
    V::store(values, v);
    V::store_bits(codes, code);
    for (; doubtful; doubtful &= doubtful - 1) {
      const int lane = __builtin_ctz(doubtful);
      codes[lane] = nearest_code(values[lane], kMap.threshold);
    }
    return V::load_bits(codes);
  }
};

// state_value and state_code of common/codebook.h.
template <class V, bool kOneLane = V::kWidth == 1>
struct StateCodec {
  float moment(const uint8_t* code, int = 1) const { return state_value(kSignedMap, *code); }
  float root(const uint8_t* code, int = 1) const { return state_value(kUnsignedMap, *code); }
  void store_moment(uint8_t* code, float v, float dither, int = 1) const {
    *code = static_cast<uint8_t>(state_code(kSignedMap, v, dither));
  }
  void store_root(uint8_t* code, float v, float dither, int = 1) const {
    *code = static_cast<uint8_t>(state_code(kUnsignedMap, v, dither));
  }
  static float dither(uint32_t first) { return dither_of(first); }
};

template <class V>
struct StateCodec<V, false> {
  using F = typename V::F;
  using U = typename V::U;

  struct Tables {
    typename V::Table8 step, base, slope, offset;
    typename V::Table32 region;
    explicit Tables(const DynamicMap& map)
        : step(V::table8(map.step)),
          base(V::table8(map.base)),
          slope(V::table8(map.edge_slope)),
          offset(V::table8(map.edge_offset)),
          region(V::table32(map.edge_region)) {}

    U decade(F v) const {
      const U bits = V::bits(v), rotated = V::max_bits(V::add_bits(bits, bits), V::set_bits(kLowestRotated));
      const U where = V::lookup(region, V::template shift_right<24>(rotated));
      return V::template shift_right<24>(V::add_bits(rotated, where));
    }
  };
  const Tables moments{kSignedMap}, roots{kUnsignedMap};

  // Of the elements from `first` on, the key and their number times kDitherStep.
  static F dither(uint32_t first) {
    const U random = V::add_bits(V::set_bits(first), V::mul_bits(V::lane_ids(), V::set_bits(kDitherStep)));
    const U bits = V::add_bits(V::template shift_right<9>(random), V::set_bits(0x3f800000u));
    return V::fma(V::from_bits(bits), V::set(kDitherScale), V::set(-1.5f * kDitherScale));
  }

  F moment(const uint8_t* codes, int n = V::kWidth) const {
    const F x = V::fma(V::to_float(V::load_codes(codes, n)), V::set(2.0f), V::set(-254.0f));
    const U d = V::template shift_right<23>(V::bits(x));
    return V::fma(x, V::lookup(moments.step, d), V::times_sign_of(V::lookup(moments.base, d), x));
  }
  F root(const uint8_t* codes, int n = V::kWidth) const {
    const F x = V::add(V::to_float(V::load_codes(codes, n)), V::set(1.0f));
    const U d = V::template shift_right<23>(V::bits(x));
    return V::fma(x, V::lookup(roots.step, d), V::lookup(roots.base, d));
  }
  void store_moment(uint8_t* codes, F v, F dither, int n = V::kWidth) const {
    const U d = moments.decade(v);
    const F exact = V::fma(V::abs(v), V::lookup(moments.slope, d), V::lookup(moments.offset, d));
    const F level = V::min(V::round(V::add(exact, dither)), V::set(128.0f));
    V::store_signed_codes(codes, V::to_integer(V::times_sign_of(level, v)), n);
  }
  void store_root(uint8_t* codes, F v, F dither, int n = V::kWidth) const {
    const U d = roots.decade(v);
    const F exact = V::fma(v, V::lookup(roots.slope, d), V::lookup(roots.offset, d));
    V::store_codes(codes, V::to_integer(V::from_1_where_positive(V::min(V::add(exact, dither), V::set(255.0f)), v)), n);
  }
};

}  // namespace
}  // namespace octavo::cpu
