#pragma once
// Codes to values and back on a GPU (and the host SIMT machine), from small tables in shared memory that no pattern of
// codes or values makes slow: lanes of a warp that meet in a bank read the same word.
#include "common/codebook.h"
#include "common/launch.h"
#include "common/numeric.h"
#include "common/ptx.h"

namespace octavo::GPU_NS {

// In global memory, to fill tables from, and for what is rare. [is_signed]
__device__ const DynamicMap kGpuMaps[2] = {kUnsignedMap, kSignedMap};

// v >> n, as an index. nvcc would turn an ordinary shift and the scaling of the index into shift and mask; this one
// leaves the scaling to the access itself, where it costs nothing.
template <int n>
__device__ __forceinline__ int index_from(uint32_t v) {
  return static_cast<int>(__funnelshift_r(v, 0, n));
}

// Adding it rounds a float of small magnitude to an integer, half to even, which then is the low bits of the sum.
constexpr float kRounder = 0x1.8p23f;

// Byte 0 of four words.
__device__ __forceinline__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// ---- any code book, decoded ----
//
// Each lane of a half-warp has a copy of the 256 values of its own, in two banks: a pair of neighbouring values is one
// 8-byte access, of which the code's lowest bit chooses. Five instructions, where the arithmetic of codebook.h with its
// corrections takes fourteen. One copy for every lane would save two more, for 32 KiB instead of 16.

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

// ---- the dynamic maps, encoded: the nearest code, exactly ----
//
// codebook.h's arithmetic, with slope and offset divided by the decade's last level: then the hardware's saturation to
// [0, 1] takes the minimum.

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

// The codes of N values v, four in a word. v: at most 1 in magnitude, up to rounding; NaN gives the code of 0.
template <bool kSigned, int N>
__device__ __forceinline__ void encode_codes(const EncodeTable& table, const float (&v)[N], uint32_t (&words)[N / 4]) {
  constexpr float kZero = kRounder + (kSigned ? 127 : 0);
  float worst = 0.0f;
  uint32_t rounded[N];
  UNROLL for (int e = 0; e < N; ++e) {
    // Of NaN and a number, fmaxf takes the number: NaN goes the way of 0 from here on.
    const float a = fmaxf(kSigned ? fabsf(v[e]) : v[e], bits_float(kLowestRotated >> 1));
    const uint32_t rotated = kSigned ? __funnelshift_l(float_bits(v[e]), float_bits(a), 1) : float_bits(a) << 1;
    const float4 line = table.line[index_from<24>(rotated + table.region[index_from<24>(rotated) - kRegionExponent])];
    float part = __saturatef(fmaf(a, line.x, line.y));
    if (kSigned) part = bits_float(float_bits(part) | (float_bits(v[e]) & 0x80000000u));
    const float sum = fmaf(part, line.z, kZero);
    worst = fmaxf(worst, fabsf(fmaf(part, line.z, kZero - sum)));
    rounded[e] = float_bits(kSigned ? fmaxf(sum, kRounder) : sum);  // -1 is no value of the signed map
  }
  UNROLL for (int w = 0; w < N / 4; ++w) words[w] =
      low_bytes(rounded[4 * w], rounded[4 * w + 1], rounded[4 * w + 2], rounded[4 * w + 3]);
  if (worst >= 0.5f - kDoubt) {  // 6 in 100000 values: the thresholds decide
    UNROLL for (int w = 0; w < N / 4; ++w) words[w] = 0;
    NO_UNROLL for (int e = 0; e < N; ++e) {
      float value = v[0];
      UNROLL for (int i = 1; i < N; ++i) value = i == e ? v[i] : value;  // registers have no index
      const DynamicMap& map = kGpuMaps[kSigned];
      const uint32_t code = value == value ? nearest_code(value, map.threshold) : map.zero;
      UNROLL for (int w = 0; w < N / 4; ++w) words[w] |= e / 4 == w ? code << 8 * (e % 4) : 0;
    }
  }
}

// ---- optimizer states: state_value and state_code of codebook.h ----

constexpr int kRegionBits = 23;  // a float is not rotated here: its exponent starts at bit 23

struct StateTable {
  float2 value[16];     // step and base, by exponent: signed & 7, unsigned - 127
  uint32_t region[32];  // half of DynamicMap's
  float2 line[8];       // slope and offset
};

__device__ inline void fill_table(StateTable& table, const DynamicMap& map) {
  for (unsigned i = threadIdx.x; i < 16; i += blockDim.x) {
    const unsigned d = (map.is_signed ? i : i + 127) & 7;
    table.value[i] = make_float2(map.step[d], map.base[d]);
  }
  for (unsigned i = threadIdx.x; i < 32; i += blockDim.x)
    table.region[i] = static_cast<uint32_t>(static_cast<int32_t>(map.edge_region[i]) >> 1);
  for (unsigned i = threadIdx.x; i < 8; i += blockDim.x)
    table.line[i] = make_float2(map.edge_slope[i], map.edge_offset[i]);
}

// The value of byte `byte` (a constant after unrolling) of four codes.
template <bool kSigned>
__device__ __forceinline__ float state_value(const StateTable& table, uint32_t codes, int byte) {
  const float code = static_cast<float>(codes >> 8 * byte & 0xff);  // one instruction
  if (kSigned) {
    const float x = fmaf(code, 2.0f, -254.0f);
    const uint32_t offset = float_bits(x) >> (kRegionBits - 3) & 7 * sizeof(float2);
    const float2 line = *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(table.value) + offset);
    return fmaf(x, line.x, bits_float(float_bits(line.y) ^ (float_bits(x) & 0x80000000u)));
  }
  const float x = code + 1.0f;
  const float2 line = table.value[index_from<kRegionBits>(float_bits(x)) - 127];
  return fmaf(x, line.x, line.y);
}

// codebook.h's dither_of, with the shift and the exponent in one instruction.
__device__ __forceinline__ float dither_from(uint32_t random) {
  return fmaf(bits_float(__funnelshift_r(random, 0x3f800000u >> 23, 9)), kDitherScale, -1.5f * kDitherScale);
}

// The codes of N values v, four in a word. v: finite, at most 1 in magnitude, up to rounding; unsigned: not below 0.
// random[e]: what dither_of takes for element e.
template <bool kSigned, int N>
__device__ __forceinline__ void state_codes(const StateTable& table, const float (&v)[N], const uint32_t (&random)[N],
                                            uint32_t (&words)[N / 4]) {
  uint32_t code[N];
  UNROLL for (int e = 0; e < N; ++e) {
    const float a = kSigned ? fabsf(v[e]) : v[e];
    const uint32_t bits = float_bits(fmaxf(a, bits_float(kLowestRotated >> 1)));
    const float2 line =
        table.line[index_from<kRegionBits>(bits + table.region[index_from<kRegionBits>(bits) - kRegionExponent])];
    float level = fmaf(a, line.x, line.y) + dither_from(random[e]);
    if (kSigned) {
      level = bits_float(float_bits(level) ^ (float_bits(v[e]) & 0x80000000u)) + kRounder;
      code[e] = float_bits(level) - (0x4b400000u - 127);  // may be -1: packing saturates
    } else {
      level = fmaxf(level, 1.0f) + kRounder;
      code[e] = v[e] > 0.0f ? float_bits(level) : 0;
    }
  }
  UNROLL for (int w = 0; w < N / 4; ++w) {
    const uint32_t* four = code + 4 * w;
    words[w] = kSigned ? pack_bytes(static_cast<int32_t>(four[0]), static_cast<int32_t>(four[1]),
                                    pack_bytes(static_cast<int32_t>(four[2]), static_cast<int32_t>(four[3]), 0))
                       : low_bytes(four[0], four[1], four[2], four[3]);
  }
}

}  // namespace octavo::GPU_NS
