#include "cpu/isa.h"
#if OCTAVO_MAX_ISA >= 3
#include <immintrin.h>

#include "cpu/peak.h"
#pragma GCC target("amx-tile,amx-int8,avx512f")  // last include above; never popped

namespace octavo::cpu::amx {

// Four accumulator tiles, each 16 x 16 int32, from 2 + 2 operand tiles of 16 x 64 bytes: the 2 x 2 block of a GEMM,
// and all eight tile registers.
double int8_loop(int64_t iterations) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) int8_t operand[16 * 64];
  for (int8_t& v : operand) v = 3;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, operand, 64);
  _tile_loadd(5, operand, 64);
  _tile_loadd(6, operand, 64);
  _tile_loadd(7, operand, 64);
  for (int64_t i = 0; i < iterations; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 64 * 4 * static_cast<double>(iterations);
}

}  // namespace octavo::cpu::amx
#endif
