#pragma once
// SpQR codes and statistics on a GPU (and the host SIMT machine). A lane takes rows of a tile: words of code pairs come
// out as pairs of 16-bit floats, exactly, ready for tensor cores; statistics as fp32.
#include "common/launch.h"
#include "common/ptx.h"
#include "spqr/tile.h"

namespace octavo::GPU_NS {

// An integer below 2^kMantissa in the mantissa of kBase, a power of two: base + integer.
template <class E>
struct CodeFormat;
template <>
struct CodeFormat<Half> {
  static constexpr int kMantissa = 10, kBias = 15;
};
template <>
struct CodeFormat<BFloat16> {
  static constexpr int kMantissa = 7, kBias = 127;
};

// Both codes of pair e of a row's words, as E. The code stays where it lies in the mantissa, p bits up, and one fma
// brings it down: (base + 2^p code) * 2^-p - base * 2^-p. So a word is shifted once for several pairs, not for each.
// e is a constant after unrolling.
template <class E, int kBits>
__device__ __forceinline__ uint32_t code_pair(const uint32_t (&planes)[kBits], int e) {
  constexpr int kMantissa = CodeFormat<E>::kMantissa, kBias = CodeFormat<E>::kBias;
  constexpr int kSpan = kMantissa / kBits * kBits;  // bits of a shifted word that the mantissa covers
  constexpr uint32_t kBoth = 0x00010001u;
  uint32_t word;
  int p;
  if (spqr_pair_is_split(kBits, e)) {  // bits from the tops of the three words, put next to each other
    constexpr int kShift = 15 / kSpan * kSpan, kTop = 15 - kShift;
    const auto choose = [](uint32_t a, uint32_t b, uint32_t bit) { return (a & ~(bit * kBoth)) | (b & (bit * kBoth)); };
    word = choose(planes[kBits - 1] >> kShift, planes[kBits - 2] >> kShift >> 1, 1u << (kTop - 1));
    word = choose(word, planes[0] >> kShift >> 2, 1u << (kTop - 2));
    p = kTop - 2;
  } else {
    const PairPlace place = spqr_pair_place(kBits, e);
    word = planes[place.plane] >> (place.shift / kSpan * kSpan);
    p = place.shift % kSpan;
  }
  const uint32_t mask = ((1u << kBits) - 1) << p;
  const uint32_t base = static_cast<uint32_t>(kBias + kMantissa) << kMantissa;
  const uint32_t factor = static_cast<uint32_t>(kBias - p) << kMantissa;
  const uint32_t offset = 0x8000u | static_cast<uint32_t>(kBias + kMantissa - p) << kMantissa;
  return fma_pair<E>((word & mask * kBoth) | base * kBoth, factor * kBoth, offset * kBoth);
}

// What takes the fields of two neighbouring rows apart.
struct FieldShape {
  uint32_t scale_mask, zero_mask;
  int scale_bits, width;

  __device__ explicit FieldShape(const SpqrWeight& w)
      : scale_mask((1u << w.scale_bits) - 1),
        zero_mask((1u << w.zero_bits) - 1),
        scale_bits(w.scale_bits),
        width(w.scale_bits + w.zero_bits) {}

  // Statistics from bits that start with the row's field, and the group's second-order record.
  __device__ __forceinline__ SpqrStatistics decode(uint32_t bits, uint2 second) const {
    const auto half = [](uint32_t word) { return to_float(Half{static_cast<uint16_t>(word)}); };
    const auto code = [](uint32_t field, uint32_t mask) { return bits_float((field & mask) | 0x4b000000u) - 0x1p23f; };
    return {(code(bits, scale_mask) - half(second.x >> 16)) * half(second.x),
            (code(bits >> scale_bits, zero_mask) - half(second.y >> 16)) * half(second.y)};
  }
};

// Which second-order record a tile has. Tiles are blocks, or fewer: 32 bits; a 64-bit division would be a call.
__device__ inline int64_t second_order_row(const SpqrWeight& w, int64_t tile) {
  const int64_t tiles = w.stats_group_size / kTileRows16;
  return tiles > UINT32_MAX ? 0 : static_cast<unsigned>(tile) / static_cast<unsigned>(tiles);
}

// The statistics of one row in a group, as they are in memory.
struct RawStatistics {
  uint32_t bits;  // the field, or plain scale and zero
  uint2 second;

  __device__ void load(const SpqrWeight& w, int64_t tile, int r, int64_t group, int64_t groups, int64_t second_row) {
    if (w.second_order == nullptr) {
      const Half* plain = w.plain + (tile * groups + group) * (2 * kTileRows16) + r;
      bits = plain[0].bits | static_cast<uint32_t>(plain[kTileRows16].bits) << 16;
      return;
    }
    bits = spqr_field(w.statistics + (tile * groups + group) * spqr_record_bytes(w), w.scale_bits + w.zero_bits, r);
    const Half* from = w.second_order + (second_row * groups + group) * 4;
    second = make_uint2(from[0].bits | static_cast<uint32_t>(from[1].bits) << 16,
                        from[2].bits | static_cast<uint32_t>(from[3].bits) << 16);
  }
  __device__ SpqrStatistics decode(const SpqrWeight& w, const FieldShape& fields) const {
    if (w.second_order != nullptr) return fields.decode(bits, second);
    return {to_float(Half{static_cast<uint16_t>(bits)}), to_float(Half{static_cast<uint16_t>(bits >> 16)})};
  }
};

// Starts copying 16 bytes, of which `bytes` (clamped to 0 ... 16) are there; the rest becomes zero.
__device__ __forceinline__ void copy_piece(unsigned char* to, const unsigned char* from, int64_t bytes, bool aligned) {
  const int there = bytes < 0 ? 0 : bytes > 16 ? 16 : static_cast<int>(bytes);
  if (aligned) {
    cp_async_16(to, from, there);
  } else {
    NO_UNROLL for (int i = 0; i < 16; ++i) to[i] = i < there ? from[i] : 0;
  }
}

}  // namespace octavo::GPU_NS
