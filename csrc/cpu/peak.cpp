#include "cpu/peak.h"

#include <cstring>
#include <stdexcept>

#include "cpu/isa.h"

namespace octavo::cpu {
namespace portable {

// Operands in L1 rather than in constants: a compiler must not do the loop's work once, before it.
constexpr int kWidth = 1024;

double int8_loop(int64_t iterations) {
  int8_t a[kWidth], b[kWidth];
  std::memset(a, 3, sizeof a);
  std::memset(b, 5, sizeof b);
  volatile int32_t sink = 0;
  for (int64_t i = 0; i < iterations; ++i) {
    int32_t acc = 0;
    for (int j = 0; j < kWidth; ++j) acc += a[j] * b[j];
    a[i % kWidth] = static_cast<int8_t>(acc);
    sink = acc;
  }
  (void)sink;
  return 2.0 * kWidth * static_cast<double>(iterations);
}

double fma_loop(int64_t iterations) {
  float acc[kWidth], b[kWidth];
  for (int j = 0; j < kWidth; ++j) acc[j] = 0.0f, b[j] = 1e-3f * static_cast<float>(j);
  volatile float factor = 0.5f, sink = 0.0f;
  for (int64_t i = 0; i < iterations; ++i) {
    const float f = factor;
    for (int j = 0; j < kWidth; ++j) acc[j] = acc[j] * f + b[j];
  }
  for (const float v : acc) sink = sink + v;
  return 2.0 * kWidth * static_cast<double>(iterations);
}

uint64_t read_loop(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  uint64_t acc[8] = {}, word[8];
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    std::memcpy(word, p + i, 64);
    for (int j = 0; j < 8; ++j) acc[j] += word[j];
  }
  uint64_t sum = 0;
  for (const uint64_t v : acc) sum += v;
  return sum;
}

}  // namespace portable

namespace {

double int8_peak(int64_t iterations) {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 3
    case Isa::amx: return amx::int8_loop(iterations);
#endif
#if OCTAVO_MAX_ISA >= 2
    case Isa::avx512: return avx512::int8_loop(iterations);
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::int8_loop(iterations);
#endif
    default: return portable::int8_loop(iterations);
  }
}

double fma_peak(int64_t iterations) {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::fma_loop(iterations);
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::fma_loop(iterations);
#endif
    default: return portable::fma_loop(iterations);
  }
}

}  // namespace

double peak(const std::string& kind, int64_t iterations) {
  if (iterations < 0) throw std::invalid_argument("octavo: peak: iterations is " + std::to_string(iterations));
  if (kind == "int8") return int8_peak(iterations);
  if (kind == "fma") return fma_peak(iterations);
  throw std::invalid_argument("octavo: peak: unknown kind '" + kind + "': int8 or fma");
}

uint64_t read_all(const void* data, int64_t bytes) {
  switch (isa()) {
#if OCTAVO_MAX_ISA >= 2
    case Isa::amx:
    case Isa::avx512: return avx512::read_loop(data, bytes);
#endif
#if OCTAVO_MAX_ISA >= 1
    case Isa::avx2: return avx2::read_loop(data, bytes);
#endif
    default: return portable::read_loop(data, bytes);
  }
}

}  // namespace octavo::cpu
