#pragma once
// Random bits that every machine and order of execution gives alike: hashes of what they are for.
#include "common/hd.h"

namespace octavo {

// A 32-bit finaliser (the constants of C. Wellons' search, "lowbias32").
HD uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of a 64-bit seed.
HD uint32_t mix_seed(uint64_t seed) {
  const uint32_t low = mix_bits(static_cast<uint32_t>(seed) + 0x9e3779b9u);
  return mix_bits(low ^ static_cast<uint32_t>(seed >> 32));
}

// Of element j of row i.
HD uint32_t row_key(uint32_t key, int64_t i) {
  return mix_bits(key ^ static_cast<uint32_t>(i));
}
HD uint32_t element_bits(uint32_t key, int64_t j) {
  return mix_bits(key + static_cast<uint32_t>(j));
}

}  // namespace octavo
