#pragma once
// Codes to values and back on a GPU (and the host SIMT machine): the results of common/codebook.h, from tables in
// shared memory that no pattern of codes or values makes slow, since the lanes of a warp never meet in a bank.
#include "common/codebook.h"
#include "common/launch.h"
#include "common/numeric.h"

namespace octavo::GPU_NS {

// In global memory, for what is rare and to fill the tables from. [is_signed]
__device__ const DynamicMap kGpuMaps[2] = {kUnsignedMap, kSignedMap};

// ---- decode ----
//
// Each lane of a half-warp has a copy of the 256 values of its own, in two banks: a pair of neighbouring values is one
// 8-byte access, of which the code's lowest bit chooses. Five instructions, where the arithmetic of codebook.h takes
// fourteen; and any code book will do. One copy for every lane would save two more, for 32 KiB instead of 16.

constexpr int kDecodeCopies = 16;

struct DecodeTable {
  float2 pair[kCodes / 2][kDecodeCopies];
};

// By the whole (one-dimensional) block; a barrier must follow.
__device__ inline void fill_table(DecodeTable& table, const float* values) {
  float4* to = reinterpret_cast<float4*>(&table);
  for (unsigned i = threadIdx.x; i < sizeof(DecodeTable) / sizeof(float4); i += blockDim.x) {
    const unsigned pair = i / (kDecodeCopies / 2);
    const float even = values[2 * pair], odd = values[2 * pair + 1];
    to[i] = make_float4(even, odd, even, odd);
  }
}

// The value of byte `byte` (a constant after unrolling) of four codes.
__device__ __forceinline__ float decode(const DecodeTable& table, uint32_t codes, int byte) {
  constexpr uint32_t kRow = sizeof(table.pair[0]), kRows = (kCodes / 2 - 1) * kRow;
  static_assert(kRow == 2 << 6);
  const uint32_t shifted = byte == 0 ? codes << 6 : codes >> (8 * byte - 6);
  const uint32_t offset = (shifted & kRows) | threadIdx.x % kDecodeCopies * static_cast<uint32_t>(sizeof(float2));
  const float2 pair = *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(&table) + offset);
  return codes >> 8 * byte & 1 ? pair.y : pair.x;
}

// ---- encode ----
//
// codebook.h's arithmetic, with slope and offset divided by the decade's last level: then the hardware's saturation to
// [0, 1] takes the minimum. region has one word per bank and line fills the 32 banks, so that lanes that meet in a bank
// read the same word.

struct EncodeTable {
  uint32_t region[32];
  float4 line[8];  // slope / last, offset / last, last, unused
};

__device__ inline void fill_table(EncodeTable& table, const DynamicMap& map) {
  for (unsigned i = threadIdx.x; i < 32; i += blockDim.x) table.region[i] = map.region[i];
  for (unsigned i = threadIdx.x; i < 8; i += blockDim.x) {
    const double last = map.last[i];
    table.line[i] = make_float4(static_cast<float>(map.slope[i] / last), static_cast<float>(map.offset[i] / last),
                                map.last[i], 0.0f);
  }
}

// Adding it rounds a float of small magnitude to an integer, half to even, which then is the low bits of the sum.
constexpr float kRounder = 0x1.8p23f;

// The codes of N values v, four in a word. v: at most 1 in magnitude, up to rounding; NaN gives the code of 0.
// kPositiveFromOne: what is above 0 gets at least code 1 (unsigned map).
template <bool kSigned, bool kPositiveFromOne, int N>
__device__ __forceinline__ void encode_codes(const EncodeTable& table, const float (&v)[N], uint32_t (&words)[N / 4]) {
  constexpr float kZero = kRounder + (kSigned ? 127 : 0);
  float worst = 0.0f;
  uint32_t rounded[N];
  UNROLL for (int e = 0; e < N; ++e) {
    // Of NaN and a number, fmaxf takes the number: NaN goes the way of 0 from here on.
    const float a = fmaxf(kSigned ? fabsf(v[e]) : v[e], bits_float(kLowestRotated >> 1));
    const uint32_t rotated = kSigned ? __funnelshift_l(float_bits(v[e]), float_bits(a), 1) : float_bits(a) << 1;
    const uint32_t where = table.region[static_cast<int>(rotated >> 24) - kRegionExponent];
    const float4 line = table.line[(rotated + where) >> 24];
    float part = __saturatef(fmaf(a, line.x, line.y));
    if (kSigned) part = bits_float(float_bits(part) | (float_bits(v[e]) & 0x80000000u));
    float sum = fmaf(part, line.z, kZero);
    worst = fmaxf(worst, fabsf(fmaf(part, line.z, kZero - sum)));
    if (kSigned) sum = fmaxf(sum, kRounder);  // -1 is no value of the map
    if (kPositiveFromOne && v[e] > 0.0f) sum = fmaxf(sum, kRounder + 1);
    rounded[e] = float_bits(sum);
  }
  UNROLL for (int w = 0; w < N / 4; ++w) {
    const uint32_t low = __byte_perm(rounded[4 * w], rounded[4 * w + 1], 0x0040);
    const uint32_t high = __byte_perm(rounded[4 * w + 2], rounded[4 * w + 3], 0x0040);
    words[w] = __byte_perm(low, high, 0x5410);
  }
  if (worst >= 0.5f - kDoubt) {  // 6 in 100000 values
    UNROLL for (int w = 0; w < N / 4; ++w) words[w] = 0;
    NO_UNROLL for (int e = 0; e < N; ++e) {
      float value = v[0];
      UNROLL for (int i = 1; i < N; ++i) value = i == e ? v[i] : value;  // registers have no index
      const DynamicMap& map = kGpuMaps[kSigned];
      uint32_t code = value == value ? nearest_code(value, map.threshold) : map.zero;
      if (kPositiveFromOne && value > 0.0f && code == 0) code = 1;
      UNROLL for (int w = 0; w < N / 4; ++w) words[w] |= e / 4 == w ? code << 8 * (e % 4) : 0;
    }
  }
}

}  // namespace octavo::GPU_NS
