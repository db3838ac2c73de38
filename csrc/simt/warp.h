#pragma once
// Warp collectives on any value of at most 8 bytes.
#include <cstring>

#include "simt/machine.h"

namespace octavo::simt_machine {

enum class Shuffle { index, up, down, exclusive_or };
enum class Reduce { add, min, max, bit_and, bit_or, bit_xor };

uint64_t shuffle_bits(const char* name, Shuffle kind, uint32_t mask, uint64_t value, int operand, int width,
                      Where where);
uint32_t ballot(const char* name, uint32_t mask, bool vote, Where where);
int64_t reduce(const char* name, Reduce kind, uint32_t mask, int64_t value, Where where);
uint32_t match_any(uint32_t mask, uint64_t value, Where where);
void sync_warp(uint32_t mask, Where where);

template <class T>
T shuffle(const char* name, Shuffle kind, uint32_t mask, T value, int operand, int width, Where where) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(name, kind, mask, bits, operand, width, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace octavo::simt_machine
