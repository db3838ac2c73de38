#pragma once
// What nf4_cpu.cpp asks of an ISA level, and the loops in fp32 over a vector type V (cpu/vec_*.h), which take every
// type, size and alignment.
#include "nf4/nf4.h"

namespace octavo::cpu {

constexpr int64_t kNf4StreamRows = 16;  // up to so many rows of x, the weight's rows are streamed once
constexpr int64_t kNf4RowBlock = 384;   // rows of x a task of a larger product, whole blocks: its sums stay in L2

// x as the loops read it, padded with zeros. Outputs are weight rows, or its columns when transposed.
struct Nf4Input {
  bool transposed;
  int64_t inner, outer;  // what is summed over; outputs
  int64_t columns;       // inner, padded to 128
  int64_t block, rows;   // rows of a block; rows, a multiple of block
  float* x;              // streaming: [rows, columns]; panels: [rows / block, columns, block]; or null
  uint32_t* parts;  // bf16 x as pairs. Panels: [rows / block, columns / 2, block], tiled [.., columns / 32, block, 16];
                    // streaming: [rows, columns / 128, 4, 16]: see nf4_bf16_avx512.cpp; or null
  bool tiled;
  float* scale;  // streaming pairs: [rows], what the sums of a row are multiplied by; see nf4_bf16_avx512.cpp
};

struct Nf4Loops {
  bool parts_streaming, parts_panels, tiled;  // what of bf16 x is wanted as pairs
  int64_t panel_outputs, panel_rows;          // outputs that a task of a larger product takes; its blocks of x
  void (*quantize)(const QuantizeLowBit&, int64_t begin, int64_t end);             // blocks
  void (*dequantize)(const DequantizeLowBit&, int64_t begin, int64_t end);         // blocks
  void (*prepare)(const Nf4Matmul&, const Nf4Input&, int64_t begin, int64_t end);  // blocks of x
  void (*stream)(const Nf4Matmul&, const Nf4Input&, int64_t begin, int64_t end);   // weight rows
  void (*multiply)(const Nf4Matmul&, const Nf4Input&, int64_t output, int64_t row, int64_t rows);
};

// Rows of the weight are whole blocks of 4-bit codes: what the loops in bf16 are made for.
inline bool nf4_aligned(const Nf4Matmul& p) {
  return bits_of(p.w.type) == 4 && p.k > 0 && p.k % p.w.blocksize == 0;
}

namespace portable {
extern const Nf4Loops nf4_loops;
}
namespace avx2 {
extern const Nf4Loops nf4_loops;
}
namespace avx512 {
extern const Nf4Loops nf4_loops;
extern const Nf4Loops nf4_bf16_loops;  // with AVX512-BF16; aligned weights and bf16 x only
}  // namespace avx512
namespace amx {
extern const Nf4Loops nf4_loops;  // panels of aligned weights and bf16 x only
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS
#include "blockwise/codec.h"
#include "cpu/block_absmax.h"
#include "cpu/panel.h"

namespace octavo::cpu {
namespace {

constexpr const SmallBook& small_book(QuantType type) {
  return type == QuantType::nf2 ? kNf2 : type == QuantType::nf3 ? kNf3 : type == QuantType::fp4 ? kFp4 : kNf4;
}

// Codes, one a byte, to a packed run of whole bytes.
inline void pack_codes(const uint8_t* codes, int64_t count, int bits, uint32_t zero, uint8_t* packed) {
  if (bits == 8) {
    __builtin_memcpy(packed, codes, count);
  } else if (bits == 4) {
    for (int64_t i = 0; i < count / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
    if (count % 2) packed[count / 2] = static_cast<uint8_t>(codes[count - 1] << 4 | zero);
  } else {
    uint32_t word = 0;
    int filled = 0;
    for (int64_t i = 0; i < count; ++i) {
      word = word << bits | codes[i];
      for (filled += bits; filled >= 8; filled -= 8) *packed++ = static_cast<uint8_t>(word >> (filled - 8));
    }
    if (filled) *packed = static_cast<uint8_t>(word << (8 - filled));
  }
}

template <class V>
struct Nf4 {
  using F = typename V::F;
  using U = typename V::U;

  // ---- values to codes ----

  struct Encoder {
    const SmallBook& book;
    F scale;
    typename V::Table32 threshold, rank, code;
    Encoder(const SmallBook& b, float inverse)
        : book(b),
          scale(V::set(inverse)),
          threshold(V::table32(reinterpret_cast<const uint32_t*>(b.cell_threshold))),
          rank(V::table32(b.cell_rank)),
          code(V::table32(twice(b.code).data)) {}
    struct Twice {
      uint32_t data[32];
    };
    static Twice twice(const uint32_t* p) {
      Twice out;
      for (int i = 0; i < 32; ++i) out.data[i] = p[i % 16];
      return out;
    }
    static U one_if(typename V::M mask, uint32_t one) {
      return V::bits(V::select(mask, V::from_bits(V::set_bits(one)), V::from_bits(V::zero_bits())));
    }
    U operator()(F x) const {
      const F v = V::mul(x, scale), a = book.sign_and_magnitude ? V::abs(v) : v;
      const U cell = V::to_integer(V::fma(a, V::set(kCellScale), V::set(kCellOffset)));
      const U found =
          V::add_bits(V::lookup(rank, cell), one_if(V::greater(a, V::from_bits(V::lookup(threshold, cell))), 1));
      if (!book.sign_and_magnitude) return found;
      return V::add_bits(V::lookup(code, found), one_if(V::greater(V::set(0.0f), v), 8));
    }
  };

  template <class T>
  static void quantize_as(const QuantizeLowBit& p, int64_t begin, int64_t end) {
    const int bits = bits_of(p.type);
    const SmallBook& book = small_book(p.type);
    uint8_t codes[kMaxLowBitBlock];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * p.blocksize, count = p.count - first < p.blocksize ? p.count - first : p.blocksize;
      const T* x = static_cast<const T*>(p.x) + first;
      const BlockMost most = block_most<V>(x, count);
      const float absmax = block_absmax(most.most), inverse = block_inverse(absmax);
      p.absmax[b] = absmax;
      const auto one_by_one = [&](const auto& code_of) {
        for (int64_t j = 0; j < count; ++j) codes[j] = static_cast<uint8_t>(code_of(to_float(x[j])));
      };
      if (bits == 8)
        one_by_one([&](float v) { return block_code(v, inverse, kNf8.threshold, kNf8Zero); });
      else if (V::kWidth == 1 || !most.finite || inverse == 0.0f)
        one_by_one([&](float v) { return small_block_code(v, inverse, book); });
      else if constexpr (V::kWidth > 1) {
        const Encoder encode(book, inverse);
        int64_t j = 0;
        for (; j + V::kWidth <= count; j += V::kWidth) V::store_codes(codes + j, encode(V::load(x + j)));
        if (const int n = static_cast<int>(count - j); n > 0) V::store_codes(codes + j, encode(V::load(x + j, n)), n);
      }
      pack_codes(codes, count, bits, book.zero, p.packed + first * bits / 8);
    }
  }
  static void quantize(const QuantizeLowBit& p, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) { quantize_as<decltype(type)>(p, begin, end); });
  }

  // ---- codes to values ----

  // Elements [start, start + count) of one block, times absmax.
  template <class T>
  static void decode_run(const LowBitTensor& t, int64_t start, int64_t count, float absmax, T* out) {
    const int bits = bits_of(t.type);
    const float* values = bits == 8 ? kNf8.value : small_book(t.type).value;
    const auto one = [&](int64_t i) { return from_float<T>(values[packed_code(t.packed, bits, start + i)] * absmax); };
    int64_t i = 0;
    if (bits == 4) {
      if (start % 2 && count > 0) out[i] = one(i), ++i;
      const auto table = V::table16(values);
      const F scale = V::set(absmax);
      const uint8_t* bytes = t.packed + (start + i) / 2;
      if constexpr (V::kLooksUpHalves && sizeof(T) == 2) {  // the 16 values of the block, once
        const auto halves = V::template half_table<T>(V::mul(table, scale));
        for (; i + 32 <= count; i += 32, bytes += 16) V::look_up_halves(halves, bytes, out + i);
      }
      for (; i + 2 * V::kWidth <= count; i += 2 * V::kWidth, bytes += V::kWidth) {
        const U both = V::load_codes(bytes);
        F first, second;
        V::interleave(V::lookup16(table, V::template shift_right<4>(both)), V::lookup16(table, both), first, second);
        V::store(out + i, V::mul(first, scale));
        V::store(out + i + V::kWidth, V::mul(second, scale));
      }
    }
    for (; i < count; ++i) out[i] = one(i);
  }

  // Any elements.
  template <class T>
  static void decode(const LowBitTensor& t, int64_t start, int64_t count, T* out) {
    const int shift = __builtin_ctzll(static_cast<uint64_t>(t.blocksize));
    while (count > 0) {
      const int64_t block = start >> shift, left = ((block + 1) << shift) - start, some = count < left ? count : left;
      decode_run(t, start, some, low_bit_absmax(t, block), out);
      start += some, out += some, count -= some;
    }
  }

  static void dequantize(const DequantizeLowBit& p, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t first = begin * p.from.blocksize, last = end * p.from.blocksize;
      decode(p.from, first, (last < p.from.count ? last : p.from.count) - first, static_cast<T*>(p.out) + first);
    });
  }

  // absmax of blocks [first, first + count), as low_bit_absmax gives it.
  static void load_absmax(const LowBitTensor& t, int64_t first, int64_t count, float* out) {
    if (!t.absmax_codes) {
      __builtin_memcpy(out, t.absmax + first, count * sizeof(float));
      return;
    }
    const Codec<V, true> codec;
    const F offset = V::set(*t.offset);
    for (int64_t b = 0; b < count;) {
      const int64_t nested = (first + b) / kNestedBlock, stop = (nested + 1) * kNestedBlock - first;
      const F scale = V::set(t.nested_absmax[nested]);
      for (const int64_t end = stop < count ? stop : count; b < end; b += V::kWidth) {
        const int some = static_cast<int>(end - b < V::kWidth ? end - b : V::kWidth);
        const F value = codec.decode(V::load_codes(t.absmax_codes + first + b, some));
        V::store(out + b, V::add(V::mul(value, scale), offset), some);
      }
      b = stop < count ? stop : count;
    }
  }

  // ---- x ----

  static void prepare(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end) {
    dispatch_float(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      const bool streaming = !in.transposed && p.m <= kNf4StreamRows;
      for (int64_t row = begin * in.block; row < end * in.block; ++row) {
        const T* from = static_cast<const T*>(p.x) + row * in.inner;
        const int64_t inside = row < p.m ? in.inner : 0, block = row / in.block, i = row % in.block;
        if (in.x) {
          float* to = streaming ? in.x + row * in.columns : in.x + block * in.columns * in.block + i;
          prepare_floats(from, inside, in.columns, to, streaming ? 1 : in.block);
        }
        if constexpr (sizeof(T) == 2)
          if (in.parts) prepare_pairs(in, from, inside, in.parts + block * in.columns / 2 * in.block, i);
      }
    });
  }
  template <class T>
  static void prepare_floats(const T* from, int64_t inside, int64_t columns, float* to, int64_t stride) {
    constexpr int64_t kSome = 128;
    alignas(64) float some[kSome];
    for (int64_t j0 = 0; j0 < columns; j0 += kSome)
      for (int64_t j = 0; j < kSome; j += V::kWidth) {
        const int64_t left = inside - j0 - j;
        const int count = static_cast<int>(left < 0 ? 0 : left < V::kWidth ? left : V::kWidth);
        F v = V::set(0.0f);
        if (count > 0) v = V::load(from + j0 + j, count);
        if (stride == 1) {
          V::store(to + j0 + j, v);
        } else {
          V::store(some, v);
          for (int l = 0; l < V::kWidth; ++l) to[(j0 + j + l) * stride] = some[l];
        }
      }
  }
  template <class T>
  static void prepare_pairs(const Nf4Input& in, const T* from, int64_t inside, uint32_t* to, int64_t i) {
    for (int64_t e = 0; e < in.columns / 2; ++e) {
      uint32_t word = 0;
      if (2 * e + 1 < inside)
        __builtin_memcpy(&word, from + 2 * e, 4);
      else if (2 * e < inside)
        word = from[2 * e].bits;
      to[in.tiled ? (e / 16 * in.block + i) * 16 + e % 16 : e * in.block + i] = word;
    }
  }

  // ---- few rows of x: every row of the weight passes once ----

  static constexpr int kStreamRows = V::kWidth == 16 ? 8 : V::kWidth == 8 ? 4 : 1;  // of x at a time
  static constexpr int64_t kStreamColumns = 512;

  // sums[i] += w * x[i], count columns, a multiple of 16.
  template <int kCount>
  static void dot_rows(const float* w, const float* x, int64_t stride, int64_t count, F* sums) {
    constexpr int kChains = kCount == 1 && V::kWidth > 1 ? 4 : 1;
    F acc[kCount][kChains];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
      for (int c = 0; c < kChains; ++c) acc[i][c] = c == 0 ? sums[i] : V::set(0.0f);
    int64_t j = 0;
    for (; j + kChains * V::kWidth <= count; j += kChains * V::kWidth)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const F weight = V::load(w + j + c * V::kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i)
          acc[i][c] = V::fma(weight, V::load(x + i * stride + j + c * V::kWidth), acc[i][c]);
      }
    for (; j < count; j += V::kWidth)
      for (int i = 0; i < kCount; ++i) acc[i][0] = V::fma(V::load(w + j), V::load(x + i * stride + j), acc[i][0]);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      sums[i] = acc[i][0];
      for (int c = 1; c < kChains; ++c) sums[i] = V::add(sums[i], acc[i][c]);
    }
  }

  static void stream(const Nf4Matmul& p, const Nf4Input& in, int64_t begin, int64_t end) {
    alignas(64) float w[kStreamColumns];
    for (int64_t n = begin; n < end; ++n) {
      F sums[kNf4StreamRows];
      for (int i = 0; i < kNf4StreamRows; ++i) sums[i] = V::set(0.0f);
      for (int64_t column = 0; column < p.k; column += kStreamColumns) {
        const int64_t count = p.k - column < kStreamColumns ? p.k - column : kStreamColumns;
        const int64_t padded = ceil_div(count, 16) * 16;
        decode(p.w, n * p.k + column, count, w);
        for (int64_t j = count; j < padded; ++j) w[j] = 0.0f;
        const float* x = in.x + column;
        int64_t i = 0;
        for (; i + kStreamRows <= p.m; i += kStreamRows)
          dot_rows<kStreamRows>(w, x + i * in.columns, in.columns, padded, sums + i);
        if constexpr (kStreamRows > 2)
          for (; i + 2 <= p.m; i += 2) dot_rows<2>(w, x + i * in.columns, in.columns, padded, sums + i);
        for (; i < p.m; ++i) dot_rows<1>(w, x + i * in.columns, in.columns, padded, sums + i);
      }
      const float bias = p.bias ? load_float(p.bias, p.bias_dtype, n) : 0.0f;
      dispatch_float(p.dtype, [&](auto tag) {
        using T = decltype(tag);
        for (int64_t i = 0; i < p.m; ++i)
          static_cast<T*>(p.out)[i * p.n + n] = from_float<T>(V::reduce_add(sums[i]) + bias);
      });
    }
  }

  // ---- more rows of x, and products with the transposed weight: panels in fp32 ----

  static constexpr int64_t kTiles = 4, kOutputs = kTiles * kPanelLanes, kColumns = 256, kSize = kColumns * kPanelLanes;

  // panel[tile][j][lane] = the weight of outputs output ... and steps column ... column + count - 1.
  static void fill_panel(const Nf4Matmul& p, const Nf4Input& in, int64_t output, int64_t outputs, int64_t column,
                         int64_t count, float* panel) {
    alignas(64) float line[kColumns];
    static_assert(kOutputs <= kColumns);
    if (in.transposed) {  // a step is a row of the weight
      for (int64_t j = 0; j < count; ++j) {
        decode(p.w, (column + j) * p.k + output, outputs, line);
        for (int64_t r = outputs; r < kOutputs; ++r) line[r] = 0.0f;
        for (int64_t t = 0; t < kTiles; ++t)
          __builtin_memcpy(panel + t * kSize + j * kPanelLanes, line + t * kPanelLanes, kPanelLanes * sizeof(float));
      }
      return;
    }
    for (int64_t r = 0; r < kOutputs; ++r) {
      if (r < outputs)
        decode(p.w, (output + r) * p.k + column, count, line);
      else
        __builtin_memset(line, 0, sizeof line);
      float* to = panel + r / kPanelLanes * kSize + r % kPanelLanes;
      for (int64_t j = 0; j < count; ++j) to[j * kPanelLanes] = line[j];
    }
  }

  static void multiply(const Nf4Matmul& p, const Nf4Input& in, int64_t output, int64_t row, int64_t rows) {
    constexpr int64_t kRows = FloatPanel<V>::kRows;
    struct Scratch {
      alignas(64) float panel[kTiles * kSize];
      alignas(64) float sums[kNf4RowBlock * kOutputs];
    };
    Scratch& s = *static_cast<Scratch*>(::operator new(sizeof(Scratch), std::align_val_t(64)));
    const int64_t outputs = in.outer - output < kOutputs ? in.outer - output : kOutputs;
    const int64_t tiles = ceil_div(outputs, kPanelLanes);
    __builtin_memset(s.sums, 0, ceil_div(rows, kRows) * kRows * kOutputs * sizeof(float));
    for (int64_t column = 0; column < in.inner; column += kColumns) {
      const int64_t count = in.inner - column < kColumns ? in.inner - column : kColumns;
      fill_panel(p, in, output, outputs, column, count, s.panel);
      for (int64_t i = 0; i < rows; i += kRows)
        FloatPanel<V>::multiply_tiles(in.x + ((row + i) / kRows * in.columns + column) * kRows,
                                      rows - i < kRows ? rows - i : kRows, s.panel, kSize, tiles, count,
                                      s.sums + i * kOutputs, kOutputs);
    }
    for (int64_t i = 0; i < rows; ++i) write_row(p, in, s.sums + i * kOutputs, row + i, output, outputs);
    ::operator delete(&s, std::align_val_t(64));
  }

  // count sums of one row of x, plus bias, to out.
  static void write_row(const Nf4Matmul& p, const Nf4Input& in, const float* sums, int64_t row, int64_t output,
                        int64_t count) {
    dispatch_float(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      T* to = static_cast<T*>(p.out) + row * in.outer + output;
      for (int64_t r = 0; r < count; r += V::kWidth) {
        const int some = static_cast<int>(count - r < V::kWidth ? count - r : V::kWidth);
        F v = V::load(sums + r, some);
        if (p.bias) v = V::add(v, load_bias(p, output + r, some));
        V::store(to + r, v, some);
      }
    });
  }
  static F load_bias(const Nf4Matmul& p, int64_t at, int count) {
    switch (p.bias_dtype) {
      case DType::f16: return V::load(static_cast<const Half*>(p.bias) + at, count);
      case DType::bf16: return V::load(static_cast<const BFloat16*>(p.bias) + at, count);
      default: return V::load(static_cast<const float*>(p.bias) + at, count);
    }
  }

  static constexpr Nf4Loops table{.parts_streaming = false,
                                  .parts_panels = false,
                                  .tiled = false,
                                  .panel_outputs = kOutputs,
                                  .panel_rows = FloatPanel<V>::kRows,
                                  .quantize = quantize,
                                  .dequantize = dequantize,
                                  .prepare = prepare,
                                  .stream = stream,
                                  .multiply = multiply};
};

}  // namespace
}  // namespace octavo::cpu
#endif  // OCTAVO_ISA_LOOPS
