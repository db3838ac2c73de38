#pragma once
// CUDA's small vectors, with CUDA's sizes and alignments.
#include <cstdint>

namespace octavo {

#define OCTAVO_VECTOR2(type, scalar)            \
  struct alignas(2 * sizeof(scalar)) type {     \
    scalar x, y;                                \
  };                                            \
  inline type make_##type(scalar x, scalar y) { \
    return {x, y};                              \
  }
#define OCTAVO_VECTOR4(type, scalar)                                \
  struct alignas(4 * sizeof(scalar)) type {                         \
    scalar x, y, z, w;                                              \
  };                                                                \
  inline type make_##type(scalar x, scalar y, scalar z, scalar w) { \
    return {x, y, z, w};                                            \
  }
OCTAVO_VECTOR2(float2, float)
OCTAVO_VECTOR2(int2, int)
OCTAVO_VECTOR2(uint2, unsigned)
OCTAVO_VECTOR4(float4, float)
OCTAVO_VECTOR4(int4, int)
OCTAVO_VECTOR4(uint4, unsigned)
OCTAVO_VECTOR4(char4, signed char)
OCTAVO_VECTOR4(ushort4, unsigned short)
#undef OCTAVO_VECTOR2
#undef OCTAVO_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

}  // namespace octavo
