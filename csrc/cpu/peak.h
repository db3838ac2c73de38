#pragma once
#include <cstdint>
#include <string>

namespace octavo::cpu {

// What the core itself can do, for the bench to time: loops on registers that issue nothing but the instruction that
// the int8 kernels (or an fp32 GEMM) of the ISA level in force live on.
//   int8   amx tdpbssd, avx512 vpdpbusd, avx2 vpmaddwd + vpaddd (the pair that cannot saturate), portable a C loop
//   fma    amx and avx512 zmm, avx2 ymm, portable a C loop of multiply and add
// Returns the operations done, a multiply and an add counting as two. Serial: the caller runs one per thread.
double peak(const std::string& kind, int64_t iterations);  // throws std::invalid_argument

// Reads the buffer with the loads of the ISA level in force and returns a sum, so that it must. The last bytes, when
// they fill no whole step of at most 256, are not read.
uint64_t read_all(const void* data, int64_t bytes);

// One of each per level; the choice among them is in peak.cpp.
#define OCTAVO_PEAK_LOOPS               \
  double int8_loop(int64_t iterations); \
  double fma_loop(int64_t iterations);  \
  uint64_t read_loop(const void* data, int64_t bytes);
namespace portable {
OCTAVO_PEAK_LOOPS
}
namespace avx2 {
OCTAVO_PEAK_LOOPS
}
namespace avx512 {
OCTAVO_PEAK_LOOPS
}
namespace amx {
double int8_loop(int64_t iterations);
}
#undef OCTAVO_PEAK_LOOPS

}  // namespace octavo::cpu
