#pragma once
// The dynamic 8-bit maps of arXiv 2110.02861 (section 2.1): their values to the bit as published, the thresholds
// between codes, and the constants of the arithmetic that encodes and decodes without a search.
//
// A map has seven decades of equal cells, the centres of which are its values: decade i (0 to 6) cuts [0.1, 1] *
// 10^(i - 6) into 2^i cells (signed: both signs) or 2^(i + 1) (unsigned), plus 0 and 1. Codes are in ascending order of
// value. Writing the code's distance from zero as `level`, decade i of the signed map has the levels 2^i ...
// 2^(i + 1) - 1 and the unsigned one 2^(i + 1) - 1 ... 2^(i + 2) - 2: the decade of a level is the exponent of a float.
#include "common/hd.h"

namespace octavo {

constexpr int kCodes = 256;

// Largest fp32 that is not above (a + b) / 2. A value's nearest code is the number of these that lie below it: nearest
// to the real midpoint, which may lie between two floats, and to the lower code on a tie.
HD constexpr float threshold_between(float a, float b) {
  const double middle = 0.5 * (static_cast<double>(a) + static_cast<double>(b));  // exact for neighbours of a map
  const float rounded = static_cast<float>(middle);
  if (static_cast<double>(rounded) <= middle) return rounded;
  const uint32_t bits = __builtin_bit_cast(uint32_t, rounded);
  return __builtin_bit_cast(float, rounded > 0 ? bits - 1 : bits + 1);
}

struct DynamicMap {
  bool is_signed;
  uint32_t zero;                // the code of 0
  float value[kCodes];          // code -> value, ascending
  float threshold[kCodes - 1];  // code = how many thresholds lie below the value

  // ---- decode: value = |x| * step[d] + base[d] with the sign of x, and correction[code] units in the last place more;
  // x = 2 * (code - 127) or code + 1, d = its exponent's low three bits. The published values are sums and products
  // in fp32 with errors of their own: the corrections (4 bits each, 8 more than their value) reproduce them.
  float step[8], base[8];
  uint32_t correction[kCodes / 8];

  // ---- encode: a = |value|, y = its bits rotated left by one (so that the sign is lowest) and at least kLowest.
  // d = (y + region[y >> 24 - 96]) >> 24 is the decade, exactly. Level = round(min(a * slope[d] + offset[d], last[d]))
  // unless that product lies within kDoubt of the middle between two levels: there the thresholds decide.
  uint32_t region[32];
  float slope[8], offset[8], last[8];

  // ---- encode with dither: the same, but for a level that rises without a jump from value to value, where a decade
  // ends at its edge 10^(i - 6) and the next begins, so that there is no last level to keep to ----
  uint32_t edge_region[32];
  float edge_slope[8], edge_offset[8];
};

constexpr int kRegionExponent = 96;              // of region[0]
constexpr uint32_t kLowestRotated = 104u << 24;  // 2^-23, below every threshold above 0
constexpr float kDoubt =
    0x1p-15f;  // the arithmetic is off by less than 2^-16 (tests/cpp/numeric.cpp tries every threshold)
constexpr uint32_t kCorrectionZero = 8;

namespace codebook_detail {

// value > 0, ascending, as bits: create_dynamic_map(signed=True) and (signed=False) of the authors' implementation.
constexpr uint32_t kSignedBits[128] = {
    0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b, 0x3923d70b, 0x398ce705,
    0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff, 0x3aa7ef9d, 0x3af1a9fc, 0x3b1db22d,
    0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d, 0x3bbd70a4, 0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a,
    0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64, 0x3c3ae148, 0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a,
    0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852, 0x3d0ae148, 0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1,
    0x3d500000, 0x3d5b851f, 0x3d670a3d, 0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b,
    0x3d9bd70a, 0x3da1999a, 0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85,
    0x3ddb3334, 0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666, 0x3e60cccd,
    0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc, 0x3eaa0000, 0x3eb13333,
    0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666, 0x3ee3999a, 0x3eeacccc, 0x3ef20000,
    0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000, 0x3f0e999a, 0x3f123334, 0x3f15cccd, 0x3f196666,
    0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd, 0x3f2b6666, 0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd,
    0x3f3d6666, 0x3f410000, 0x3f44999a, 0x3f483333, 0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333,
    0x3f5dcccd, 0x3f616666, 0x3f650000, 0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a,
    0x3f7e3333, 0x3f800000};
constexpr uint32_t kUnsignedBits[255] = {
    0x34ae7baa, 0x35500998, 0x360e9b38, 0x3692ccf6, 0x36de4c51, 0x3714e5d5, 0x3783126e, 0x37e171a0, 0x381fe868,
    0x384f1800, 0x387e479a, 0x3896bb99, 0x38ae5364, 0x38c5eb31, 0x3906594b, 0x394154ca, 0x397c5049, 0x399ba5e4,
    0x39b923a2, 0x39d6a163, 0x39f41f22, 0x3a08ce71, 0x3a178d50, 0x3a264c30, 0x3a350b10, 0x3a43c9ef, 0x3a5288d0,
    0x3a6147af, 0x3a70068e, 0x3a7ec56e, 0x3a958106, 0x3aba5e35, 0x3adf3b64, 0x3b020c4a, 0x3b147ae1, 0x3b26e978,
    0x3b395810, 0x3b4bc6a7, 0x3b5e3540, 0x3b70a3d7, 0x3b818937, 0x3b8ac082, 0x3b93f7cf, 0x3b9d2f1a, 0x3ba66666,
    0x3baf9db2, 0x3bb8d4fd, 0x3bc20c4a, 0x3bcb4395, 0x3bd47ae1, 0x3bddb22e, 0x3be6e978, 0x3bf020c5, 0x3bf9580f,
    0x3c0147ae, 0x3c05e354, 0x3c0a7ef9, 0x3c0f1aa0, 0x3c13b645, 0x3c1851eb, 0x3c1ced92, 0x3c218937, 0x3c2f5c2a,
    0x3c466667, 0x3c5d70a3, 0x3c747ae2, 0x3c85c28f, 0x3c9147af, 0x3c9ccccd, 0x3ca851eb, 0x3cb3d70b, 0x3cbf5c29,
    0x3ccae147, 0x3cd66667, 0x3ce1eb87, 0x3ced70a3, 0x3cf8f5c3, 0x3d023d70, 0x3d080000, 0x3d0dc28f, 0x3d13851f,
    0x3d1947af, 0x3d1f0a3d, 0x3d24cccd, 0x3d2a8f5c, 0x3d3051eb, 0x3d36147b, 0x3d3bd70a, 0x3d41999a, 0x3d475c28,
    0x3d4d1eb8, 0x3d52e147, 0x3d58a3d7, 0x3d5e6667, 0x3d6428f7, 0x3d69eb87, 0x3d6fae15, 0x3d7570a3, 0x3d7b3333,
    0x3d807ae2, 0x3d835c2a, 0x3d863d71, 0x3d891eb8, 0x3d8c0000, 0x3d8ee148, 0x3d91c290, 0x3d94a3d7, 0x3d97851f,
    0x3d9a6667, 0x3d9d47af, 0x3da028f6, 0x3da30a3e, 0x3da5eb85, 0x3da8cccd, 0x3dabae15, 0x3dae8f5c, 0x3db170a4,
    0x3db451eb, 0x3db73333, 0x3dba147b, 0x3dbcf5c3, 0x3dbfd70b, 0x3dc2b852, 0x3dc5999a, 0x3dc87ae2, 0x3dcb5c29,
    0x3dd40000, 0x3de26666, 0x3df0cccd, 0x3dff3333, 0x3e06cccc, 0x3e0e0000, 0x3e153334, 0x3e1c6666, 0x3e23999a,
    0x3e2acccc, 0x3e320000, 0x3e393334, 0x3e406666, 0x3e47999a, 0x3e4ecccc, 0x3e560000, 0x3e5d3334, 0x3e646666,
    0x3e6b999a, 0x3e72cccc, 0x3e7a0000, 0x3e809999, 0x3e843333, 0x3e87cccd, 0x3e8b6666, 0x3e8f0000, 0x3e92999a,
    0x3e963333, 0x3e99cccc, 0x3e9d6666, 0x3ea10000, 0x3ea4999a, 0x3ea83333, 0x3eabcccc, 0x3eaf6666, 0x3eb30000,
    0x3eb6999a, 0x3eba3333, 0x3ebdcccc, 0x3ec16666, 0x3ec50000, 0x3ec8999a, 0x3ecc3333, 0x3ecfcccc, 0x3ed36666,
    0x3ed70000, 0x3eda999a, 0x3ede3333, 0x3ee1cccc, 0x3ee56666, 0x3ee90000, 0x3eec999a, 0x3ef03333, 0x3ef3cccc,
    0x3ef76666, 0x3efb0000, 0x3efe9999, 0x3f01199a, 0x3f02e666, 0x3f04b333, 0x3f068000, 0x3f084ccc, 0x3f0a199a,
    0x3f0be666, 0x3f0db334, 0x3f0f8000, 0x3f114ccd, 0x3f13199a, 0x3f14e666, 0x3f16b334, 0x3f188000, 0x3f1a4ccd,
    0x3f1c199a, 0x3f1de666, 0x3f1fb334, 0x3f218000, 0x3f234ccd, 0x3f25199a, 0x3f26e666, 0x3f28b334, 0x3f2a8000,
    0x3f2c4ccd, 0x3f2e199a, 0x3f2fe666, 0x3f31b334, 0x3f338000, 0x3f354ccd, 0x3f37199a, 0x3f38e666, 0x3f3ab334,
    0x3f3c8000, 0x3f3e4ccd, 0x3f40199a, 0x3f41e666, 0x3f43b334, 0x3f458000, 0x3f474ccc, 0x3f49199a, 0x3f4ae666,
    0x3f4cb334, 0x3f4e8000, 0x3f504ccc, 0x3f52199a, 0x3f53e666, 0x3f55b334, 0x3f578000, 0x3f594ccc, 0x3f5b199a,
    0x3f5ce666, 0x3f5eb334, 0x3f608000, 0x3f624ccc, 0x3f64199a, 0x3f65e666, 0x3f67b334, 0x3f698000, 0x3f6b4ccc,
    0x3f6d199a, 0x3f6ee666, 0x3f70b334, 0x3f728000, 0x3f744ccc, 0x3f76199a, 0x3f77e666, 0x3f79b334, 0x3f7b8000,
    0x3f7d4ccc, 0x3f7f199a, 0x3f800000};

constexpr double power_of_ten(int exponent) {
  constexpr double kPowers[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0};
  return kPowers[exponent + 6];
}

constexpr DynamicMap make_dynamic_map(bool is_signed) {
  DynamicMap map{};
  map.is_signed = is_signed;
  map.zero = is_signed ? 127 : 0;
  const int levels = is_signed ? 128 : 255;
  const uint32_t* bits = is_signed ? kSignedBits : kUnsignedBits;
  for (int level = 1; level <= levels; ++level) {
    const float value = __builtin_bit_cast(float, bits[level - 1]);
    map.value[map.zero + level] = value;
    if (is_signed && level < levels) map.value[127 - level] = -value;
  }
  for (int code = 0; code + 1 < kCodes; ++code)
    map.threshold[code] = threshold_between(map.value[code], map.value[code + 1]);

  // decode
  for (int decade = 0; decade < 7; ++decade) {
    const double cells = is_signed ? 1 << decade : 2 << decade, scale = power_of_ten(decade - 6);
    const double step = scale * 0.9 / cells, first = scale * (0.1 + 0.45 / cells);
    map.step[decade] = static_cast<float>(is_signed ? step / 2 : step);
    map.base[decade] = static_cast<float>(first - step * cells);
  }
  if (is_signed) {  // level 0 is x = 0, which falls to decade 0, and level 1 its only other
    map.step[0] = map.value[128] / 2;
    map.base[0] = 0;
    map.step[7] = 0;  // x = 256: 1
    map.base[7] = 1;
  } else {  // x = 1: 0, and x = 256: 1, have the same low bits of the exponent
    map.step[7] = 1.0f / 255.0f;
    map.base[7] = -map.step[7];
  }
  for (int code = 0; code < kCodes; ++code) {
    const double x = is_signed ? 2 * (code - 127) : code + 1;
    const double a = x < 0 ? -x : x;
    const int d = (__builtin_bit_cast(uint32_t, static_cast<float>(a)) >> 23) & 7;
    const float v = static_cast<float>(a * static_cast<double>(map.step[d]) + static_cast<double>(map.base[d]));
    const float want = map.value[code] < 0 ? -map.value[code] : map.value[code];
    const uint32_t off = __builtin_bit_cast(uint32_t, want) - __builtin_bit_cast(uint32_t, v) + kCorrectionZero;
    if (off > 15) throw "a correction needs more than 4 bits";
    map.correction[code / 8] |= off << (4 * (code % 8));
  }

  // encode
  int d = 0;
  for (int octave = 0; octave < 32; ++octave) {
    const uint32_t exponent = static_cast<uint32_t>(kRegionExponent + octave) << 24;
    map.region[octave] = (static_cast<uint32_t>(d) << 24) - exponent;
    if (d == 7) continue;
    // The threshold below the first level of region d + 1, with a bit more: set where the real midpoint is no float,
    // so that a tie of a negative value (rotated: odd) reaches the next level, and of a positive one does not.
    const int next = d == 6 ? levels : is_signed ? 2 << d : (4 << d) - 1;
    const float low = map.value[map.zero + next - 1], high = map.value[map.zero + next];
    const float middle = threshold_between(low, high);
    const bool between = static_cast<double>(middle) < 0.5 * (static_cast<double>(low) + static_cast<double>(high));
    const uint32_t rotated = (__builtin_bit_cast(uint32_t, middle) << 1) + (between ? 1 : 0);
    if (rotated >> 24 != static_cast<uint32_t>(kRegionExponent + octave)) continue;
    ++d;
    map.region[octave] = (static_cast<uint32_t>(d) << 24) - 1 - rotated;
  }
  if (d != 7) throw "not every decade was found";
  for (int region = 0; region < 7; ++region) {  // decade 0 together with 0
    const double cells = is_signed ? 1 << region : 2 << region, scale = power_of_ten(region - 6);
    const double step = scale * 0.9 / cells, first = scale * (0.1 + 0.45 / cells);
    const double first_level = is_signed ? cells : cells - 1;
    double slope = 1 / step, offset = first_level - first / step;
    if (region == 0) {
      const double zero = map.threshold[map.zero];  // where level 0 ends
      slope = is_signed ? 0.5 / zero : 1 / (static_cast<double>(map.threshold[1]) - zero);
      offset = 0.5 - zero * slope;
    }
    map.slope[region] = static_cast<float>(slope);
    map.offset[region] = static_cast<float>(offset);
    map.last[region] = static_cast<float>(is_signed ? (2 << region) - 1 : (4 << region) - 2);
  }
  map.slope[7] = 0;
  map.offset[7] = map.last[7] = static_cast<float>(levels);

  // encode with dither
  d = 0;
  for (int octave = 0; octave < 32; ++octave) {
    const uint32_t exponent = static_cast<uint32_t>(kRegionExponent + octave) << 24;
    map.edge_region[octave] = (static_cast<uint32_t>(d) << 24) - exponent;
    if (d == 7) continue;
    const float edge = d == 6 ? map.value[254] : static_cast<float>(power_of_ten(d - 6));
    const uint32_t rotated = __builtin_bit_cast(uint32_t, edge) << 1;
    if (rotated >> 24 != static_cast<uint32_t>(kRegionExponent + octave)) continue;
    ++d;
    map.edge_region[octave] = (static_cast<uint32_t>(d) << 24) - 1 - rotated;
  }
  if (d != 7) throw "not every edge was found";
  for (int region = 0; region < 7; ++region) {
    const double cells = is_signed ? 1 << region : 2 << region, scale = power_of_ten(region - 6);
    const double step = scale * 0.9 / cells, first = scale * (0.1 + 0.45 / cells);
    const double first_level = is_signed ? cells : cells - 1;
    map.edge_slope[region] = static_cast<float>(1 / step);
    map.edge_offset[region] = static_cast<float>(first_level - first / step);
  }
  if (is_signed) {  // 0 must be level 0; unsigned, what is above 0 is at least level 1
    map.edge_slope[0] = 1 / map.value[128];
    map.edge_offset[0] = 0;
  }
  const double top = 1 / (1.0 - static_cast<double>(map.value[254]));  // the last level, of 1, is close
  map.edge_slope[7] = static_cast<float>(top);
  map.edge_offset[7] = static_cast<float>(levels - top);
  return map;
}

}  // namespace codebook_detail

constexpr DynamicMap kSignedMap = codebook_detail::make_dynamic_map(true);
constexpr DynamicMap kUnsignedMap = codebook_detail::make_dynamic_map(false);

// Code of v by search: the meaning that everything faster must equal. thresholds: 255, ascending. NaN gives 0: who
// calls takes it out before.
HD uint32_t nearest_code(float v, const float* thresholds) {
  uint32_t code = 0;
  for (uint32_t half = kCodes / 2; half > 0; half /= 2) code += v > thresholds[code + half - 1] ? half : 0;
  return code;
}

// ---- optimizer states: the arithmetic as it is, encoded with dither ----
//
// A step decodes and encodes every state once, so what corrections and doubtful thresholds would cost is left out
// there: a code's value is within 8 units in the last place of the published one, and a code's value has that code,
// whatever the dither. state_value and state_code are that arithmetic; vector forms equal them.

HD float state_value(const DynamicMap& map, uint32_t code) {
  const float x = map.is_signed ? 2.0f * (static_cast<float>(code) - 127.0f) : static_cast<float>(code + 1);
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t d = (bits >> 23) & 7;
  const float base = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, map.base[d]) ^ (bits & 0x80000000u));
  return __builtin_fmaf(x, map.step[d], base);
}

// v: finite, at most 1 in magnitude but for rounding. Unsigned: v >= 0, and what is above 0 gets at least code 1. With
// a dither from (-0.5, 0.5), different each time: the code above or below v, the nearer the likelier. The nearest code
// would hardly ever be another than the old one, where a step changes a state by less than a cell.
HD uint32_t state_code(const DynamicMap& map, float v, float dither) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t doubled = bits << 1, rotated = doubled < kLowestRotated ? kLowestRotated : doubled;
  const uint32_t d = (rotated + map.edge_region[(rotated >> 24) - kRegionExponent]) >> 24;
  const float a = __builtin_bit_cast(float, bits & 0x7fffffffu);
  const int level =
      static_cast<int>(__builtin_rintf(__builtin_fmaf(a, map.edge_slope[d], map.edge_offset[d]) + dither));
  if (!map.is_signed) return static_cast<uint32_t>(!(v > 0) ? 0 : level < 1 ? 1 : level > 255 ? 255 : level);
  const int code = 127 + (bits >> 31 ? -level : level);
  return static_cast<uint32_t>(code < 0 ? 0 : code > 255 ? 255 : code);
}

// Element i of a state gets dither_of(key + i * kDitherStep): spread evenly over the elements of a step and over the
// steps of an element (two additive sequences; the numbers are 2^32 over the plastic number and its square). Less than
// half by 2^-11, so that what already has a code's value keeps it.
constexpr uint32_t kDitherStep = 0xc13fa9a9u;
constexpr float kDitherScale = 1.0f - 0x1p-10f;

HD uint32_t dither_key(uint32_t id, double step, int state) {
  return static_cast<uint32_t>(static_cast<uint64_t>(step)) * 0x91e10da5u + id * 0x9e3779b9u +
         static_cast<uint32_t>(state) * 0x85ebca6bu;
}

HD float dither_of(uint32_t random) {
  const float v = __builtin_bit_cast(float, (random >> 9) | 0x3f800000u);  // [1, 2)
  return __builtin_fmaf(v, kDitherScale, -1.5f * kDitherScale);
}

// What |m| counts for in the absmax of a signed state. The map reaches from -0.99297 to 1: a negative element that is
// the largest of its block would lose 0.7 % a step if the absmax were its magnitude.
constexpr float kNegativeReach = -1.0f / 0.992968738079071f;

HD float reach_of(float m) {
  return m < 0.0f ? m * kNegativeReach : __builtin_fabsf(m);  // not -0, whose bits would be a large integer
}

// ---- blocks ----

// Below this absmax 1 / absmax may leave fp32: such a block counts as zero, and its absmax is stored as 0.
constexpr float kMinBlockAbsmax = 0x1p-126f;

// The absmax that is stored, from the largest finite magnitude in a block; reach_of may have left fp32.
HD float block_absmax(float most) {
  constexpr float kMost = 0x1.fffffep127f;
  return most < kMinBlockAbsmax ? 0.0f : most > kMost ? kMost : most;
}

// What the elements of a block are multiplied by before their nearest code is taken; 0 where all are the code of 0.
HD float block_inverse(float absmax) {
  return absmax == 0.0f ? 0.0f : 1.0f / absmax;
}

// The code of any x: NaN, and everything in a zero block, is the code of 0; Inf is the outermost code of its sign.
HD uint32_t block_code(float x, float inverse, const float* thresholds, uint32_t zero) {
  const float v = x * inverse;
  return v != v ? zero : nearest_code(v, thresholds);
}

}  // namespace octavo
