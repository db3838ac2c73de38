#pragma once
// AMX tiles: 16 rows of 64 bytes, of int8 or pairs of bf16. With OCTAVO_AMX_EMULATE the same names compute in plain
// C++, so that a kernel written on them is checked on machines without AMX. Tiles are named by constants, as the
// instructions want them.
#include <cstdint>
#include <cstring>

#ifdef OCTAVO_AMX_EMULATE
namespace octavo::cpu {
namespace {

struct AmxTile {
  alignas(64) int8_t bytes[16][64];
};
thread_local AmxTile amx_tiles[8];

inline void amx_begin() {}
inline void amx_end() {}
template <int kTile>
void amx_zero() {
  std::memset(&amx_tiles[kTile], 0, sizeof(AmxTile));
}
template <int kTile>
void amx_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(amx_tiles[kTile].bytes[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int kTile>
void amx_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, amx_tiles[kTile].bytes[r], 64);
}
// tdpbssd: acc[r][c] += sum over q < 16, i < 4 of a[r][4q + i] * b[q][4c + i]
template <int kAcc, int kA, int kB>
void amx_multiply() {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      int32_t sum;
      std::memcpy(&sum, amx_tiles[kAcc].bytes[r] + 4 * c, 4);
      for (int q = 0; q < 16; ++q)
        for (int i = 0; i < 4; ++i) sum += amx_tiles[kA].bytes[r][4 * q + i] * amx_tiles[kB].bytes[q][4 * c + i];
      std::memcpy(amx_tiles[kAcc].bytes[r] + 4 * c, &sum, 4);
    }
}
// tdpbf16ps: acc[r][c] += sum over q < 16, i < 2 of a[r][2 q + i] * b[q][2 c + i], in fp32
template <int kAcc, int kA, int kB>
void amx_multiply_bf16() {
  const auto element = [](const AmxTile& tile, int row, int i) {
    uint16_t half;
    std::memcpy(&half, tile.bytes[row] + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) {
      float sum;
      std::memcpy(&sum, amx_tiles[kAcc].bytes[r] + 4 * c, 4);
      for (int q = 0; q < 16; ++q)
        for (int i = 0; i < 2; ++i) sum += element(amx_tiles[kA], r, 2 * q + i) * element(amx_tiles[kB], q, 2 * c + i);
      std::memcpy(amx_tiles[kAcc].bytes[r] + 4 * c, &sum, 4);
    }
}

}  // namespace
}  // namespace octavo::cpu
#else
namespace octavo::cpu {
namespace {

// All eight tiles as 16 x 64 bytes. The state belongs to the thread: amx_end() gives it back, so that the context
// switches of a thread that has finished its GEMM do not carry 8 KiB. Written as asm because the compilers' own
// intrinsics are macros that want the tile's number as a literal.
inline void amx_begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void amx_end() {
  asm volatile("tilerelease" ::);
}
template <int kTile>
void amx_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
void amx_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
void amx_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kAcc, int kA, int kB>
void amx_multiply() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kAcc), "i"(kA), "i"(kB));
}
template <int kAcc, int kA, int kB>
void amx_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kAcc), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace octavo::cpu
#endif
