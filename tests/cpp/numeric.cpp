// common/numeric.h against definitions written independently, in double.
#include "common/numeric.h"

#include <cmath>
#include <limits>

#include "check.h"
#include "common/codebook.h"

namespace {
using namespace octavo;

constexpr double kInf = std::numeric_limits<double>::infinity();

// A binary float of `mantissa` stored bits and smallest normal exponent `min_exponent`, from its fields.
double decode(uint32_t magnitude, int mantissa, int min_exponent) {
  const uint32_t exponent = magnitude >> mantissa, fraction = magnitude & ((1u << mantissa) - 1);
  const double value = exponent ? (1u << mantissa) + fraction : fraction;
  return std::ldexp(value, min_exponent + static_cast<int>(exponent ? exponent - 1 : 0) - mantissa);
}

// The magnitude bits nearest to v >= 0, ties to even. Magnitudes are ordered as the values are: bisect.
uint32_t nearest(double v, int mantissa, int min_exponent, uint32_t infinity) {
  uint32_t low = 0, high = infinity;  // decode(infinity) is the number that would follow the largest finite one
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (decode(middle, mantissa, min_exponent) <= v ? low : high) = middle;
  }
  const double below = v - decode(low, mantissa, min_exponent), above = decode(high, mantissa, min_exponent) - v;
  if (below != above) return below < above ? low : high;
  return low % 2 ? high : low;
}

template <class T>
struct Format;
template <>
struct Format<Half> {
  static constexpr int mantissa = 10, min_exponent = -14;
  static constexpr uint32_t infinity = 0x7c00;
};
template <>
struct Format<BFloat16> {
  static constexpr int mantissa = 7, min_exponent = -126;
  static constexpr uint32_t infinity = 0x7f80;
};

std::string hex(uint32_t bits) {
  char text[16];
  std::snprintf(text, sizeof text, "%08x", bits);
  return text;
}

template <class T>
void check_from_float(float v) {
  const uint32_t got = from_float<T>(v).bits;
  if (std::isnan(v)) {
    CHECK_FOR((got & 0x7fff) > Format<T>::infinity, hex(float_bits(v)));
    return;
  }
  uint32_t want =
      std::isinf(v) ? Format<T>::infinity
                    : nearest(std::fabs(double{v}), Format<T>::mantissa, Format<T>::min_exponent, Format<T>::infinity);
  if (std::signbit(v)) want |= 0x8000;
  CHECK_FOR(got == want, hex(float_bits(v)) + " gives " + hex(got) + ", not " + hex(want));
}

template <class T>
void test_format() {
  using F = Format<T>;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T stored{static_cast<uint16_t>(bits)};
    const float v = to_float(stored);
    const uint32_t magnitude = bits & 0x7fff;
    if (magnitude > F::infinity) {
      CHECK_FOR(std::isnan(v), hex(bits));
    } else {
      const double want = magnitude == F::infinity ? kInf : decode(magnitude, F::mantissa, F::min_exponent);
      CHECK_FOR(double{v} == (bits & 0x8000 ? -want : want) && std::signbit(v) == (bits >= 0x8000), hex(bits));
      CHECK_FOR(from_float<T>(v).bits == bits, hex(bits));
    }
    if (magnitude > F::infinity) check_from_float<T>(v);
    if (magnitude >= F::infinity) continue;
    // The midpoint to the next value, exact in fp32 for both formats save the denormals of bf16, and its neighbours.
    const double next = decode(magnitude + 1, F::mantissa, F::min_exponent);
    const float middle = static_cast<float>((std::fabs(double{v}) + next) / 2);
    for (const float near : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)})
      check_from_float<T>(std::copysign(near, v));
  }
  for (int i = 0; i < 200000; ++i) check_from_float<T>(bits_float(static_cast<uint32_t>(test::random()())));
  for (const float v : {65504.0f, 65519.99f, 65520.0f, 65536.0f, 3.4e38f, INFINITY, 1e-45f, 0x1p-25f, 0x1.8p-25f,
                        0x1p-24f, 0x1.ffep-15f, 0x1.fffp-15f, 0.0f})
    for (const float sign : {1.0f, -1.0f}) check_from_float<T>(sign * v);
}

void test_scales() {
  CHECK(scale_of(float_bits(127.0f)) == 1.0f && inverse_scale_of(float_bits(127.0f)) == 1.0f);
  CHECK(scale_of(float_bits(1.0f)) == 1.0f / 127.0f && inverse_scale_of(float_bits(0.5f)) == 254.0f);
  // Zero and what counts as zero.
  for (const float absmax : {0.0f, 1e-45f, std::nextafter(kMinAbsmax, 0.0f)})
    CHECK(scale_of(float_bits(absmax)) == 0.0f && inverse_scale_of(float_bits(absmax)) == 0.0f);
  for (const float absmax : {kMinAbsmax, 3.4e38f, std::numeric_limits<float>::max()}) {
    CHECK(scale_of(float_bits(absmax)) > 0.0f && std::isfinite(inverse_scale_of(float_bits(absmax))));
    CHECK(encode(absmax, inverse_scale_of(float_bits(absmax))) == 127);
    CHECK(encode(-absmax, inverse_scale_of(float_bits(absmax))) == -127);
  }
  for (const float bad : {INFINITY, NAN}) {
    CHECK(std::isnan(scale_of(abs_bits(bad))) && inverse_scale_of(abs_bits(bad)) == 0.0f);
    CHECK(encode(bad, 0.0f) == 0 && encode(-bad, 0.0f) == 0);
  }
  CHECK(abs_bits(-NAN) > abs_bits(-INFINITY) && abs_bits(INFINITY) > abs_bits(-3.4e38f) && abs_bits(-0.0f) == 0);
}

void test_encode() {
  CHECK(encode(0.5f, 1.0f) == 0 && encode(1.5f, 1.0f) == 2 && encode(2.5f, 1.0f) == 2);
  CHECK(encode(-0.5f, 1.0f) == 0 && encode(-1.5f, 1.0f) == -2 && encode(-2.5f, 1.0f) == -2);
  CHECK(encode(126.5f, 1.0f) == 126 && encode(127.5f, 1.0f) == 127 && encode(-128.0f, 1.0f) == -127);
  CHECK(encode(300.0f, 1.0f) == 127 && encode(-300.0f, 1.0f) == -127);
  for (int i = 0; i < 100000; ++i) {
    const float absmax =
        std::ldexp(1.0f + static_cast<float>(test::uniform(0, 1 << 22)) / (1 << 22), test::uniform(-119, 126));
    const float v = absmax * (static_cast<float>(test::uniform(-1 << 22, 1 << 22)) / (1 << 22));
    const double exact = double{v} * 127.0 / double{absmax};
    const int code = encode(v, inverse_scale_of(float_bits(absmax)));
    CHECK_FOR(std::fabs(code - exact) <= 0.5 + 1e-4, std::to_string(v) + " of " + std::to_string(absmax));
    const double back = code * double{scale_of(float_bits(absmax))};
    CHECK_FOR(std::fabs(back - double{v}) <= (0.5 + 1e-4) / 127 * double{absmax}, std::to_string(v));
  }
}

void test_outlier() {
  CHECK(is_outlier(6.0f, 6.0f) && is_outlier(-6.0f, 6.0f) && !is_outlier(std::nextafter(6.0f, 0.0f), 6.0f));
  CHECK(is_outlier(-INFINITY, 6.0f) && !is_outlier(NAN, 6.0f));
}

void test_product_scales() {
  for (int i = 0; i < 100000; ++i) {
    const auto number = [](int exponent) {
      return std::ldexp(static_cast<float>(test::uniform(-1 << 23, 1 << 23)), exponent - 23);
    };
    const int acc = test::uniform(-2000000000, 2000000000);
    const float a = number(-8), b = number(-8), bias = number(2);
    const double product = double(acc) * a * b;
    CHECK(std::fabs(scale_column(scale_row(acc, a), b, bias) - (product + bias)) <=
          (std::fabs(product) + std::fabs(bias)) * 0x1.8p-23);
  }
  CHECK(scale_column(scale_row(10, 2.0f), 3.0f, 11.0f) == 10 * 6 + 11);
  CHECK(std::isnan(scale_column(scale_row(0, NAN), 1.0f, 0.0f)));
}

void test_load_float() {
  const float f[] = {1.5f, -2.0f};
  const Half h[] = {from_float<Half>(1.5f), from_float<Half>(-2.0f)};
  const BFloat16 b[] = {from_float<BFloat16>(1.5f), from_float<BFloat16>(-2.0f)};
  for (int i = 0; i < 2; ++i)
    CHECK(load_float(f, DType::f32, i) == f[i] && load_float(h, DType::f16, i) == f[i] &&
          load_float(b, DType::bf16, i) == f[i]);
}

// ---- the dynamic maps ----

double distance(float v, float value) {
  return std::fabs(static_cast<double>(v) - static_cast<double>(value));
}

// The nearest of a map's values, the lower code on a tie, without thresholds.
uint32_t nearest_value(const DynamicMap& map, float v) {
  uint32_t best = 0;
  for (uint32_t code = 1; code < kCodes; ++code)
    if (distance(v, map.value[code]) < distance(v, map.value[best])) best = code;
  return best;
}

void test_map(const DynamicMap& map) {
  CHECK(map.value[map.zero] == 0.0f && map.value[255] == 1.0f);
  for (uint32_t code = 0; code < kCodes; ++code) {
    const float value = map.value[code];
    CHECK(code == 0 || map.value[code - 1] < value);
    CHECK(nearest_code(value, map.threshold) == code);
    // The arithmetic of optimizer states: nearly the value, and back to the same code under any absmax.
    const float state = state_value(map, code);
    CHECK(std::abs(static_cast<int64_t>(float_bits(std::fabs(state))) -
                   static_cast<int64_t>(float_bits(std::fabs(value)))) <= 8);
    CHECK(std::signbit(state) == std::signbit(value) || value == 0.0f);
    for (const float absmax : {3.0f, 1e-30f, 1e30f, 0.1f})
      for (const float dither : {dither_of(0), 0.0f, dither_of(~0u)})
        CHECK(state_code(map, state * absmax * block_inverse(absmax), dither) == code);
  }
  CHECK(state_value(map, map.zero) == 0.0f && state_value(map, 255) == 1.0f);
  // Between neighbouring values the mean of many draws is near the value, and a value keeps its code.
  for (uint32_t code = map.zero; code < kCodes; ++code) {
    const float here = state_value(map, code);
    for (uint32_t i = 0; i < 3000; ++i) CHECK(state_code(map, here, dither_of(i * kDitherStep)) == code);
    if (code == 255 || code == map.zero) continue;
    const float above = state_value(map, code + 1);
    for (const float part : {0.1f, 0.5f, 0.8f}) {
      const float v = here + part * (above - here);
      double sum = 0;
      for (uint32_t i = 0; i < 3000; ++i) {
        const uint32_t drawn = state_code(map, v, dither_of(12345 + i * kDitherStep));
        CHECK(drawn == code || drawn == code + 1);
        sum += state_value(map, drawn);
      }
      // From the last level of a decade to the first of the next, the level bends (codebook.h).
      const uint32_t next = code - map.zero + (map.is_signed ? 1 : 2);
      const double bound = (next & (next - 1)) == 0 ? 0.5 : 0.01;
      CHECK(std::fabs(sum / 3000 - v) <= bound * static_cast<double>(above - here));
    }
  }
  for (int i = 0; i + 1 < kCodes; ++i) {
    const float threshold = map.threshold[i];
    float v = threshold;
    for (int step = 0; step < 40; ++step) v = std::nextafterf(v, -2.0f);
    for (int step = -40; step <= 40; ++step, v = std::nextafterf(v, 2.0f)) {
      const uint32_t code = nearest_code(v, map.threshold);
      CHECK(code == nearest_value(map, v));
      if (!map.is_signed && v < 0) continue;
      const uint32_t state = state_code(map, v, 0.0f), floor = !map.is_signed && v > 0 && code == 0 ? 1 : code;
      CHECK(state == floor || state == static_cast<uint32_t>(i) || state == static_cast<uint32_t>(i) + 1);
    }
  }
}

void test_maps() {
  test_map(kSignedMap);
  test_map(kUnsignedMap);
  // What is divided by must not become 0, however small; 0 stays 0.
  for (const float dither : {dither_of(0), 0.0f, dither_of(~0u)}) {
    for (const float tiny : {1e-45f, 1e-38f, 1e-20f, 1e-8f, 1e-7f}) CHECK(state_code(kUnsignedMap, tiny, dither) == 1);
    CHECK(state_code(kUnsignedMap, 0.0f, dither) == 0);
    for (const float zero : {0.0f, -0.0f, 1e-45f, -1e-45f}) CHECK(state_code(kSignedMap, zero, dither) == 127);
    CHECK(state_code(kSignedMap, -1.0f, dither) <= 1 && state_code(kSignedMap, -1.0000001f, dither) <= 1);
    CHECK(state_code(kSignedMap, 1.0000001f, dither) == 255 && state_code(kUnsignedMap, 1.0000001f, dither) == 255);
  }
  // Blocks: the absmax below which everything is 0, and codes of what is not a number.
  CHECK(block_absmax(0x1p-126f) == 0x1p-126f && block_absmax(0x1.fffffcp-127f) == 0.0f);
  // A moment of either sign, however large, leaves a block that can be decoded.
  for (const float m : {3.4e38f, -3.4e38f, -1.0f, 1.0f, -0.0f}) CHECK(std::isfinite(block_absmax(reach_of(m))));
  CHECK(!std::signbit(reach_of(-0.0f)) && !std::signbit(reach_of(0.0f)));
  CHECK(block_inverse(0.0f) == 0.0f && std::isfinite(block_inverse(0x1p-126f)));
  for (const float inverse : {0.0f, 2.0f}) CHECK(block_code(NAN, inverse, kSignedMap.threshold, 127) == 127);
  CHECK(block_code(INFINITY, 2.0f, kSignedMap.threshold, 127) == 255);
  CHECK(block_code(-INFINITY, 2.0f, kSignedMap.threshold, 127) == 0);
  CHECK(block_code(INFINITY, 0.0f, kSignedMap.threshold, 127) == 127);
}

}  // namespace

int main() {
  test_maps();
  test_format<Half>();
  test_format<BFloat16>();
  test_scales();
  test_encode();
  test_outlier();
  test_product_scales();
  test_load_float();
  return test::finish();
}
