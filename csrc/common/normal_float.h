#pragma once
// The low-bit code books: normal float (arXiv 2305.14314, section 3) of 2, 3, 4 and 8 bits, and the authors' fp4.
// Values in the order of their codes, the thresholds between them, and where the codes of a tensor lie in memory.
//
// NF4's values and thresholds are those published, to the bit. The others are its definition for another number of
// bits, as LQ-LoRA (arXiv 2311.12023) takes it: quantiles of the normal distribution at 2^(b-1) + 1 places spread
// evenly from 0.9677083 to 0.5 for the positive values and at 2^(b-1) places for the negative ones, over the largest,
// in fp32.
#include "common/codebook.h"
#include "common/numeric.h"

namespace octavo {

enum class QuantType : int { nf2, nf3, nf4, nf8, fp4 };

HD constexpr int bits_of(QuantType type) {
  return type == QuantType::nf2 ? 2 : type == QuantType::nf3 ? 3 : type == QuantType::nf8 ? 8 : 4;
}

// A code book of up to 4 bits. Values below each other in size have ascending ranks; rank = how many thresholds lie
// below the value, so a tie has the lower rank. The code of a rank is the rank, except in fp4, whose codes are sign and
// magnitude: there a value is coded by its magnitude, and what is below 0 gets the code's upper bit, even if nothing
// else is left of it.
struct SmallBook {
  int bits;
  bool sign_and_magnitude;
  uint32_t zero;        // the code of 0
  float value[16];      // code -> value; repeated where there are fewer, so that upper bits of an index do not matter
  float threshold[15];  // between ranks (of magnitudes), ascending; Inf where there are fewer
  uint32_t code[16];    // rank -> code

  // The rank without a search: cell = round(|v| or v, * kCellScale + kCellOffset) holds at most one threshold.
  float cell_threshold[32];
  uint32_t cell_rank[32];  // of what is not above the cell's threshold
};
constexpr float kCellScale = 15.9f, kCellOffset = 15.5f;  // -1 falls into cell 0 and 1 into 31, with rounding

namespace codebook_detail {

constexpr uint32_t kNf2Bits[4] = {0xbf800000, 0x00000000, 0x3ead0338, 0x3f800000};
constexpr uint32_t kNf3Bits[8] = {0xbf800000, 0xbef50ee2, 0xbe5e5a6d, 0x00000000,
                                  0x3e24cae1, 0x3ead0338, 0x3f1007aa, 0x3f800000};
constexpr uint32_t kNf4Bits[16] = {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f,
                                   0xbdba7871, 0x00000000, 0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a,
                                   0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
// The magnitudes of fp4 by their three bits, and the published thresholds between them in the order of size: decimals
// cut short, by up to 14 units in the last place off the middle.
constexpr uint32_t kFp4Bits[8] = {0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000,
                                  0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000};
constexpr float kFp4Thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                     0.4166667f,  0.583333f,  0.8333333f};
constexpr uint32_t kFp4Codes[8] = {0, 1, 6, 7, 4, 5, 2, 3};
constexpr uint32_t kNf8Bits[256] = {
    0xbf800000, 0xbf79416f, 0xbf730e1a, 0xbf6d4e77, 0xbf67f096, 0xbf62e675, 0xbf5e24ef, 0xbf59a2fc, 0xbf555930,
    0xbf51415f, 0xbf4d5659, 0xbf4993b3, 0xbf45f5a6, 0xbf4278ec, 0xbf3f1aae, 0xbf3bd86e, 0xbf38affa, 0xbf359f62,
    0xbf32a4e9, 0xbf2fbf03, 0xbf2cec4e, 0xbf2a2b87, 0xbf277b8e, 0xbf24db5a, 0xbf2249fb, 0xbf1fc695, 0xbf1d5061,
    0xbf1ae6a5, 0xbf1888b6, 0xbf1635f9, 0xbf13eddc, 0xbf11afd8, 0xbf0f7b71, 0xbf0d5031, 0xbf0b2dac, 0xbf09137c,
    0xbf070144, 0xbf04f6a9, 0xbf02f359, 0xbf00f704, 0xbefe02c4, 0xbefa2458, 0xbef65241, 0xbef28c04, 0xbeeed12a,
    0xbeeb2146, 0xbee77bec, 0xbee3e0b9, 0xbee04f4f, 0xbedcc751, 0xbed9486b, 0xbed5d24a, 0xbed264a0, 0xbeceff22,
    0xbecba188, 0xbec84b8f, 0xbec4fcf5, 0xbec1b57a, 0xbebe74e4, 0xbebb3af9, 0xbeb80780, 0xbeb4da46, 0xbeb1b316,
    0xbeae91c1, 0xbeab7615, 0xbea85fe6, 0xbea54f08, 0xbea24350, 0xbe9f3c95, 0xbe9c3aaf, 0xbe993d79, 0xbe9644cd,
    0xbe935088, 0xbe906086, 0xbe8d74a6, 0xbe8a8cc7, 0xbe87a8cb, 0xbe84c891, 0xbe81ebfc, 0xbe7e25df, 0xbe787a9e,
    0xbe72d5fe, 0xbe6d37c9, 0xbe679fcc, 0xbe620dd3, 0xbe5c81ae, 0xbe56fb2b, 0xbe517a1c, 0xbe4bfe53, 0xbe4687a3,
    0xbe4115df, 0xbe3ba8dd, 0xbe364073, 0xbe30dc76, 0xbe2b7cc0, 0xbe262127, 0xbe20c986, 0xbe1b75b5, 0xbe162590,
    0xbe10d8f1, 0xbe0b8fb5, 0xbe0649b7, 0xbe0106d4, 0xbdf78dd5, 0xbded13af, 0xbde29ef2, 0xbdd82f5e, 0xbdcdc4b0,
    0xbdc35ea7, 0xbdb8fd04, 0xbdae9f87, 0xbda445f2, 0xbd99f007, 0xbd8f9d89, 0xbd854e3a, 0xbd7603bd, 0xbd617075,
    0xbd4ce225, 0xbd385857, 0xbd23d296, 0xbd0f506d, 0xbcf5a2cf, 0xbcccaa25, 0xbca3b5f4, 0xbc758aad, 0xbc23aecf,
    0xbba3ad06, 0x00000000, 0x3ba265a9, 0x3c226768, 0x3c739f78, 0x3ca26e62, 0x3ccb1087, 0x3cf3b70b, 0x3d0e3167,
    0x3d228a5a, 0x3d36e6cf, 0x3d4b4739, 0x3d5fac0a, 0x3d7415b5, 0x3d844257, 0x3d8e7cb5, 0x3d98ba30, 0x3da2fb03,
    0x3dad3f69, 0x3db787a0, 0x3dc1d3e3, 0x3dcc2472, 0x3dd67989, 0x3de0d369, 0x3deb3251, 0x3df59681, 0x3e00001e,
    0x3e0537e2, 0x3e0a72ad, 0x3e0fb0a3, 0x3e14f1e6, 0x3e1a369a, 0x3e1f7ee1, 0x3e24cae1, 0x3e2a1abf, 0x3e2f6ea1,
    0x3e34c6ad, 0x3e3a230a, 0x3e3f83e1, 0x3e44e95b, 0x3e4a53a1, 0x3e4fc2df, 0x3e55373f, 0x3e5ab0ee, 0x3e60301b,
    0x3e65b4f3, 0x3e6b3fa7, 0x3e70d068, 0x3e766769, 0x3e7c04dc, 0x3e80d47c, 0x3e83a9f9, 0x3e868302, 0x3e895fb3,
    0x3e8c4029, 0x3e8f2484, 0x3e920ce3, 0x3e94f966, 0x3e97ea2f, 0x3e9adf60, 0x3e9dd91d, 0x3ea0d78b, 0x3ea3dad0,
    0x3ea6e313, 0x3ea9f07d, 0x3ead0338, 0x3eb01b71, 0x3eb33953, 0x3eb65d10, 0x3eb986d7, 0x3ebcb6db, 0x3ebfed52,
    0x3ec32a72, 0x3ec66e74, 0x3ec9b995, 0x3ecd0c13, 0x3ed0662f, 0x3ed3c82d, 0x3ed73253, 0x3edaa4ed, 0x3ede2049,
    0x3ee1a4b7, 0x3ee5328e, 0x3ee8ca28, 0x3eec6be3, 0x3ef01823, 0x3ef3cf52, 0x3ef791dc, 0x3efb6038, 0x3eff3ae2,
    0x3f01912d, 0x3f038b97, 0x3f058cf6, 0x3f07959b, 0x3f09a5d7, 0x3f0bbe03, 0x3f0dde7d, 0x3f1007aa, 0x3f1239f7,
    0x3f1475d6, 0x3f16bbc5, 0x3f190c48, 0x3f1b67f1, 0x3f1dcf5b, 0x3f204330, 0x3f22c425, 0x3f255304, 0x3f27f0a6,
    0x3f2a9dfa, 0x3f2d5c04, 0x3f302be5, 0x3f330edb, 0x3f360647, 0x3f3913b1, 0x3f3c38d2, 0x3f3f7795, 0x3f42d227,
    0x3f464b00, 0x3f49e4f1, 0x3f4da333, 0x3f518987, 0x3f559c46, 0x3f59e094, 0x3f5e5c86, 0x3f63176d, 0x3f681a30,
    0x3f6d6fc6, 0x3f7325f6, 0x3f794e59, 0x3f800000};

// The middle of two values as it is published: their real mean, rounded to fp32.
constexpr float rounded_middle(float a, float b) {
  return static_cast<float>(0.5 * (static_cast<double>(a) + static_cast<double>(b)));
}

constexpr SmallBook make_book(QuantType type) {
  SmallBook book{};
  book.bits = bits_of(type);
  book.sign_and_magnitude = type == QuantType::fp4;
  const int codes = 1 << book.bits, ranks = book.sign_and_magnitude ? 8 : codes;
  for (int i = 0; i < 16; ++i) {
    const int code = i % codes;
    const uint32_t bits = type == QuantType::nf2   ? kNf2Bits[code % 4]
                          : type == QuantType::nf3 ? kNf3Bits[code % 8]
                          : type == QuantType::nf4 ? kNf4Bits[code]
                                                   : kFp4Bits[code % 8] | (code >= 8 ? 0x80000000u : 0);
    book.value[i] = __builtin_bit_cast(float, bits);
    book.code[i] = type == QuantType::fp4 ? kFp4Codes[i % 8] : static_cast<uint32_t>(code);
  }
  for (int rank = 0; rank < 15; ++rank)
    book.threshold[rank] = rank + 1 >= ranks         ? __builtin_inff()
                           : book.sign_and_magnitude ? kFp4Thresholds[rank]
                                                     : rounded_middle(book.value[rank], book.value[rank + 1]);
  for (int code = 0; code < codes; ++code)
    if (book.value[code] == 0.0f && __builtin_bit_cast(uint32_t, book.value[code]) == 0)
      book.zero = static_cast<uint32_t>(code);
  for (int cell = 0, rank = 0; cell < 32; ++cell) {
    // A threshold this close to the edge of a cell could be on either side of it in fp32.
    const double edge = (cell + 0.5 - static_cast<double>(kCellOffset)) / static_cast<double>(kCellScale);
    book.cell_rank[cell] = static_cast<uint32_t>(rank);
    book.cell_threshold[cell] = __builtin_inff();
    if (rank < 15 && static_cast<double>(book.threshold[rank]) < edge) {
      if (static_cast<double>(book.threshold[rank]) > edge - 1e-5) throw "a threshold lies at the edge of a cell";
      book.cell_threshold[cell] = book.threshold[rank++];
    }
    if (rank < 15 && static_cast<double>(book.threshold[rank]) < edge + 1e-5)
      throw "two thresholds in a cell, or one at its edge";
  }
  return book;
}

struct ByteBook {
  float value[kCodes], threshold[kCodes - 1];
};
constexpr ByteBook make_byte_book() {
  ByteBook book{};
  for (int code = 0; code < kCodes; ++code) book.value[code] = __builtin_bit_cast(float, kNf8Bits[code]);
  for (int code = 0; code + 1 < kCodes; ++code)
    book.threshold[code] = rounded_middle(book.value[code], book.value[code + 1]);
  return book;
}

}  // namespace codebook_detail

constexpr SmallBook kNf2 = codebook_detail::make_book(QuantType::nf2),
                    kNf3 = codebook_detail::make_book(QuantType::nf3),
                    kNf4 = codebook_detail::make_book(QuantType::nf4),
                    kFp4 = codebook_detail::make_book(QuantType::fp4);
constexpr codebook_detail::ByteBook kNf8 = codebook_detail::make_byte_book();
constexpr uint32_t kNf8Zero = 127;

// The values of a code book as 16-bit numbers, for products that add up codes before absmax multiplies them. They are
// the nearest ones but for these codes of nf4, which take the neighbour on the other side: with the nearest everywhere,
// the values of bf16 were too large by 1.8e-4 in the mean over normally distributed weights, and the error of a product
// with x that are not around 0 grew like k, not like its root. So it is 5e-6 or less, for every blocksize (fp16: 2e-6).
template <class T>
HD T product_value(QuantType type, const SmallBook& book, uint32_t code) {
  constexpr uint32_t kOthers = dtype_of<T>::value == DType::bf16 ? 1u << 3 | 1u << 10 | 1u << 12 : 1u << 5;
  const float value = book.value[code & 15];
  T out = from_float<T>(value);
  if (type == QuantType::nf4 && kOthers >> (code & 15) & 1) {
    const bool below = __builtin_fabsf(to_float(out)) < __builtin_fabsf(value);
    out.bits = static_cast<uint16_t>(out.bits + (below ? 1 : -1));
  }
  return out;
}

// The code of v = x / absmax by search: the meaning that everything faster must equal. NaN: ask small_block_code.
HD uint32_t small_code(float v, const SmallBook& book) {
  const float a = book.sign_and_magnitude ? __builtin_fabsf(v) : v;
  uint32_t rank = 0;
  for (int i = 0; i < 15; ++i) rank += a > book.threshold[i] ? 1 : 0;
  return book.code[rank] | (book.sign_and_magnitude && v < 0.0f ? 8u : 0u);
}

// The code of any x of a block: block_code of codebook.h for these books.
HD uint32_t small_block_code(float x, float inverse, const SmallBook& book) {
  const float v = x * inverse;
  return v != v || inverse == 0.0f ? book.zero : small_code(v, book);
}

// Codes are packed without gaps, the first one in the upper bits of the first byte: in 4 bits, an even element in the
// upper half. What is left of the last byte is 0, but for half a byte in 4 bits: that is the code of 0, as published.
HD constexpr int64_t packed_bytes(QuantType type, int64_t count) {
  return (count * bits_of(type) + 7) / 8;
}
HD uint32_t packed_code(const uint8_t* packed, int bits, int64_t i) {
  const int64_t bit = i * bits, byte = bit / 8;
  const int offset = static_cast<int>(bit % 8);
  if (offset + bits <= 8) return packed[byte] >> (8 - bits - offset) & ((1u << bits) - 1);
  return (static_cast<uint32_t>(packed[byte]) << 8 | packed[byte + 1]) >> (16 - bits - offset) & ((1u << bits) - 1);
}

}  // namespace octavo
