#pragma once
// Decoding SpQR weights over a vector type V (cpu/vec_*.h): codes and statistics as floats, a row a lane. ISA files
// only, after the target pragma.
#include "spqr/tile.h"

namespace octavo::cpu {
namespace {

// Sixteen rows of a tile, or V::kWidth of them: as many as are taken through the columns at once. One lane a vector
// becomes an array, which the compiler may vectorize as it can.
template <class V>
struct SpqrLanes {
  static constexpr int kLanes = V::kWidth == 1 ? 16 : V::kWidth, kVectors = kLanes / V::kWidth;
  struct F {
    typename V::F v[kVectors];
  };
  struct U {
    typename V::U v[kVectors];
  };
#define OCTAVO_LANES(expression)       \
  F out;                               \
  for (int i = 0; i < kVectors; ++i) { \
    out.v[i] = expression;             \
  }                                    \
  return out;
  static F set(float x) { OCTAVO_LANES(V::set(x)) }
  static F load(const float* p) { OCTAVO_LANES(V::load(p + i * V::kWidth)) }
  static F load(const Half* p) { OCTAVO_LANES(V::load(p + i * V::kWidth)) }
  static F fma(const F& a, const F& b, const F& c) { OCTAVO_LANES(V::fma(a.v[i], b.v[i], c.v[i])) }
  static F mul(const F& a, const F& b) { OCTAVO_LANES(V::mul(a.v[i], b.v[i])) }
  static F sub(const F& a, const F& b) { OCTAVO_LANES(V::sub(a.v[i], b.v[i])) }
  static F to_float(const U& u) { OCTAVO_LANES(V::to_float(u.v[i])) }
#undef OCTAVO_LANES
  static void store(float* p, const F& x) {
    for (int i = 0; i < kVectors; ++i) V::store(p + i * V::kWidth, x.v[i]);
  }
  static U load_words(const uint32_t* p) {
    U out;
    for (int i = 0; i < kVectors; ++i) out.v[i] = V::load_bits(p + i * V::kWidth);
    return out;
  }
  template <int n>
  static U field(const U& u, uint32_t mask) {
    U out;
    for (int i = 0; i < kVectors; ++i) out.v[i] = V::and_bits(V::template shift_right<n>(u.v[i]), V::set_bits(mask));
    return out;
  }

  struct Statistics {
    F scale, zero;
  };

  // Rows lane ... lane + kLanes - 1 of a tile, one group.
  static Statistics statistics(const SpqrWeight& w, int64_t tile, int64_t group, int lane) {
    const int64_t groups = spqr_groups(w), at = tile * groups + group;
    if (!w.second_order) {
      const Half* plain = w.plain + at * (2 * kTileRows16) + lane;
      return {load(plain), load(plain + kTileRows16)};
    }
    const int width = w.scale_bits + w.zero_bits;
    const uint8_t* record = w.statistics + at * (2 * width);
    U fields;
    for (int i = 0; i < kVectors; ++i) fields.v[i] = V::bit_fields(record, width, lane + i * V::kWidth);
    const Half* second = w.second_order + (tile * kTileRows16 / w.stats_group_size * groups + group) * 4;
    float of_group[4];
    V::halves_to_floats(second, of_group);
    U scale_codes, zero_codes;
    const auto scale_shift = V::set_bits(w.scale_bits);
    const auto scale_mask = V::set_bits((1u << w.scale_bits) - 1), zero_mask = V::set_bits((1u << w.zero_bits) - 1);
    for (int i = 0; i < kVectors; ++i) {
      scale_codes.v[i] = V::and_bits(fields.v[i], scale_mask);
      zero_codes.v[i] = V::and_bits(V::shift_right_by(fields.v[i], scale_shift), zero_mask);
    }
    return {mul(sub(to_float(scale_codes), set(of_group[1])), set(of_group[0])),
            mul(sub(to_float(zero_codes), set(of_group[3])), set(of_group[2]))};
  }

  // Calls each(e, even, odd) with the codes of pairs 8 half ... 8 half + 7 as floats.
  template <int kBits, int kHalf, class Each>
  __attribute__((always_inline)) static void decode_half(const uint32_t* words, int lane, const Each& each) {
    U planes[kBits];
#pragma GCC unroll 4
    for (int p = 0; p < kBits; ++p) planes[p] = load_words(words + p * kTileRows16 + lane);
    decode_pairs<kBits, kHalf * 8, kHalf * 8 + 8>(planes, each);
  }
  template <int kBits, int kFirst, int kEnd, class Each>
  __attribute__((always_inline)) static void decode_pairs(const U (&planes)[kBits], const Each& each) {
    constexpr uint32_t kMask = (1u << kBits) - 1;
    if constexpr (spqr_pair_is_split(kBits, kFirst)) {
      U even, odd;
      for (int i = 0; i < kVectors; ++i) {
        const auto first = V::and_bits(V::template shift_right<15>(planes[0].v[i]), V::set_bits(0x00010001u));
        const auto second = V::and_bits(V::template shift_right<14>(planes[1].v[i]), V::set_bits(0x00020002u));
        const auto third = V::and_bits(V::template shift_right<13>(planes[2].v[i]), V::set_bits(0x00040004u));
        const auto pair = V::add_bits(V::add_bits(first, second), third);
        even.v[i] = V::and_bits(pair, V::set_bits(kMask));
        odd.v[i] = V::template shift_right<16>(pair);
      }
      each(kFirst, to_float(even), to_float(odd));
    } else {
      constexpr PairPlace place = spqr_pair_place(kBits, kFirst);
      each(kFirst, to_float(field<place.shift>(planes[place.plane], kMask)),
           to_float(field<place.shift + 16>(planes[place.plane], kMask)));
    }
    if constexpr (kFirst + 1 < kEnd) decode_pairs<kBits, kFirst + 1, kEnd>(planes, each);
  }
};

}  // namespace
}  // namespace octavo::cpu
