#pragma once
// Where each bit of an SpQR weight is: index functions, shared by every machine. README.md of this folder draws it.
#include "common/numeric.h"
#include "spqr/spqr.h"

namespace octavo {

constexpr int64_t kTileRows16 = 16;  // rows of a tile: lanes of a vector, or of an mma
constexpr int64_t kChunk = 32;       // columns of a chunk, as 16 pairs
constexpr int kPairs = 16;

HD int64_t spqr_row_tiles(const SpqrWeight& w) {
  return ceil_div(w.n, kTileRows16);
}
HD int64_t spqr_chunks(const SpqrWeight& w) {
  return ceil_div(w.k, kChunk);
}
HD int64_t spqr_groups(const SpqrWeight& w) {
  return w.k / w.group_size;
}

// The words of one row tile and chunk: [bits][16], word r of a plane belongs to row r. Its low half holds codes of even
// columns, its high half those of odd ones, so that both of a pair come out of one shift.
HD const uint32_t* spqr_codes(const SpqrWeight& w, int64_t tile, int64_t chunk) {
  return w.codes + (tile * spqr_chunks(w) + chunk) * (w.bits * kTileRows16);
}

// Pair e (columns 2 e and 2 e + 1 of the chunk) lies in plane `plane`, at bit `shift` of both halves. With 3 bits, five
// codes fill 15 bits of a half, and the three bits that are left are the code of the last pair: its bit i is the top
// bit of plane i.
struct PairPlace {
  int plane, shift;
};
HD constexpr PairPlace spqr_pair_place(int bits, int e) {
  const int per_word = 16 / bits;
  return {e / per_word, e % per_word * bits};
}
HD constexpr bool spqr_pair_is_split(int bits, int e) {
  return bits == 3 && e == 15;
}

// Both codes of pair e, the even column's in the low half. planes[p]: the row's word of plane p.
HD uint32_t spqr_pair(int bits, const uint32_t* planes, int64_t stride, int e) {
  if (spqr_pair_is_split(bits, e))
    return (planes[0] >> 15 & 0x00010001u) | (planes[stride] >> 14 & 0x00020002u) |
           (planes[2 * stride] >> 13 & 0x00040004u);
  const PairPlace place = spqr_pair_place(bits, e);
  const uint32_t mask = (1u << bits) - 1;
  return planes[place.plane * stride] >> place.shift & (mask | mask << 16);
}

// Statistics of row r of a tile in one group: scale_bits + zero_bits bits from bit (scale_bits + zero_bits) * r of the
// record, the scale's code first. They span at most two bytes.
HD int spqr_record_bytes(const SpqrWeight& w) {
  return 2 * (w.scale_bits + w.zero_bits);
}
HD uint32_t spqr_field(const uint8_t* record, int width, int r) {
  const int bit = width * r, byte = bit / 8;
  const uint32_t next = bit % 8 + width > 8 ? record[byte + 1] : 0u;
  return (record[byte] | next << 8) >> (bit % 8) & ((1u << width) - 1);
}

// One level of the second-order quantizer. In this order everywhere, so that dequantized weights agree to the bit.
HD float spqr_level(uint32_t code, float scale, float zero) {
  return (static_cast<float>(code) - zero) * scale;
}

struct SpqrStatistics {
  float scale, zero;
};
HD SpqrStatistics spqr_statistics(const SpqrWeight& w, int64_t row, int64_t group) {
  const int64_t tile = row / kTileRows16;
  const int r = static_cast<int>(row % kTileRows16);
  if (!w.second_order) {
    const Half* plain = w.plain + (tile * spqr_groups(w) + group) * (2 * kTileRows16);
    return {to_float(plain[r]), to_float(plain[kTileRows16 + r])};
  }
  const uint32_t field =
      spqr_field(w.statistics + (tile * spqr_groups(w) + group) * spqr_record_bytes(w), w.scale_bits + w.zero_bits, r);
  const Half* second = w.second_order + (row / w.stats_group_size * spqr_groups(w) + group) * 4;
  return {spqr_level(field & ((1u << w.scale_bits) - 1), to_float(second[0]), to_float(second[1])),
          spqr_level(field >> w.scale_bits, to_float(second[2]), to_float(second[3]))};
}

struct SpqrOutlier {
  int64_t column;
  float value;
};
HD SpqrOutlier spqr_outlier(const SpqrWeight& w, int64_t i) {
  if (w.wide)
    return {static_cast<int64_t>(w.outliers[2 * i]), to_float(Half{static_cast<uint16_t>(w.outliers[2 * i + 1])})};
  const uint32_t word = w.outliers[i];
  return {static_cast<int64_t>(word & 0xffffu), to_float(Half{static_cast<uint16_t>(word >> 16)})};
}

HD int64_t spqr_source_column(const SpqrWeight& w, int64_t j) {
  if (!w.perm) return j;
  return w.wide ? static_cast<const int32_t*>(w.perm)[j] : static_cast<const uint16_t*>(w.perm)[j];
}

}  // namespace octavo
