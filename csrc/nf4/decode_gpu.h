#pragma once
// Low-bit codes on a GPU (and the host SIMT machine). Four bits are what a permute takes: four codes of a packed word
// are its selector, and two of its results, one for the lower eight values and one for the upper, give one byte of four
// values. So a value costs two and a half instructions in 16 bits, and no access to memory.
#include "blockwise/codec_gpu.h"
#include "common/ptx.h"
#include "common/tile.h"
#include "nf4/nf4.h"

namespace octavo::GPU_NS {

// In global memory, for what is rare. nf8 has a book of another kind; its place is never read.
__device__ const SmallBook kGpuBooks[] = {kNf2, kNf3, kNf4, kNf4, kFp4};
__device__ const codebook_detail::ByteBook kGpuByteBook = kNf8;

inline const SmallBook& small_book(QuantType type) {
  return type == QuantType::nf2 ? kNf2 : type == QuantType::nf3 ? kNf3 : type == QuantType::fp4 ? kFp4 : kNf4;
}

// ---- absmax ----

// What a block's absmax is made of, as it is in memory: loaded some time before it is needed. Where there is no block
// it stays zeros, which decode to a finite number if any absmax is finite.
struct RawAbsmax {
  float scale = 0.0f;
  uint32_t code = 0;

  __device__ __forceinline__ void load(const LowBitTensor& t, int64_t block) {
    if (t.absmax_codes == nullptr) {
      scale = t.absmax[block];
    } else {
      code = t.absmax_codes[block];
      scale = t.nested_absmax[block >> 8];
      static_assert(kNestedBlock == 1 << 8);
    }
  }
  // low_bit_absmax of nf4.h. offset: *t.offset, where there is one.
  __device__ __forceinline__ float decode(const LowBitTensor& t, float offset) const {
    return t.absmax_codes == nullptr ? scale : kGpuMaps[1].value[code] * scale + offset;
  }
};

__device__ __forceinline__ float offset_of(const LowBitTensor& t) {
  return t.absmax_codes == nullptr ? 0.0f : *t.offset;
}

// ---- any type, element by element ----

struct LowBitReader {
  const LowBitTensor& t;
  const float* values;
  int bits;
  float offset;
  int log2_blocksize;

  __device__ explicit LowBitReader(const LowBitTensor& from)
      : t(from),
        values(from.type == QuantType::nf8 ? kGpuByteBook.value : kGpuBooks[static_cast<int>(from.type)].value),
        bits(bits_of(from.type)),
        offset(offset_of(from)) {
    // Not above: initializers, unlike this, are what nvcc's host compiler sees, and it has no __ffs.
    log2_blocksize = __ffs(static_cast<int>(from.blocksize)) - 1;
  }

  __device__ float operator()(int64_t i) const {
    RawAbsmax absmax;
    absmax.load(t, i >> log2_blocksize);
    return values[packed_code(t.packed, bits, i)] * absmax.decode(t, offset);
  }
};

// ---- four bits, by permutes ----

// The 16 values, byte by byte: byte w % 4 of word at[b][w / 4] is byte b of value w.
template <int kBytes>
struct BytePlanes {
  uint32_t at[kBytes][4];
};

// Made on the host. bits(i): of value i.
template <int kBytes, class F>
BytePlanes<kBytes> byte_planes(const F& bits) {
  BytePlanes<kBytes> planes{};
  for (uint32_t i = 0; i < 16; ++i)
    for (int b = 0; b < kBytes; ++b) planes.at[b][i / 4] |= (bits(i) >> 8 * b & 0xff) << 8 * (i % 4);
  return planes;
}

// A kernel's parameter in registers, by way of shared memory: the assembler would fetch it again for each use, which
// takes as many instructions as the permutes. (There are two copies, because it would do the same to what is equal in
// all threads.) The whole block calls it.
template <int kPlanes, int kBytes>
__device__ __forceinline__ void in_registers(const BytePlanes<kBytes> (&from)[kPlanes],
                                             BytePlanes<kBytes> (&to)[kPlanes]) {
  SHARED(uint4, words, [2][kPlanes * kBytes]);
  if (threadIdx.x < 2) {
    UNROLL for (int i = 0; i < kPlanes * kBytes; ++i) {
      const uint32_t* plane = from[i / kBytes].at[i % kBytes];
      words[threadIdx.x][i] = make_uint4(plane[0], plane[1], plane[2], plane[3]);
    }
  }
  __syncthreads();
  UNROLL for (int i = 0; i < kPlanes * kBytes; ++i) {
    const uint4 word = words[threadIdx.x % 2][i];
    uint32_t* plane = to[i / kBytes].at[i % kBytes];
    plane[0] = word.x, plane[1] = word.y, plane[2] = word.z, plane[3] = word.w;
  }
}

struct CodeBook {
  float value[16];
};
inline CodeBook code_book(QuantType type) {
  CodeBook book{};
  for (int i = 0; i < 16; ++i) book.value[i] = small_book(type).value[i];
  return book;
}

// The values times absmax, each rounded once: what dequantizing gives. For 32 codes or more of a block, this table
// costs less than to multiply the values.
template <class T>
__device__ __forceinline__ BytePlanes<2> scaled_planes(const CodeBook& book, float absmax) {
  BytePlanes<2> planes;
  UNROLL for (int w = 0; w < 4; ++w) {
    const float* v = book.value + 4 * w;
    const uint32_t low = round_pair<T>(v[0] * absmax, v[1] * absmax),
                   high = round_pair<T>(v[2] * absmax, v[3] * absmax);
    planes.at[0][w] = permute_bytes(low, high, 0x6420);
    planes.at[1][w] = permute_bytes(low, high, 0x7531);
  }
  return planes;
}

// Half of a word's eight codes. Its nibbles from the lowest up are elements 1, 0, 3, 2.
struct Quad {
  uint32_t selector;  // in the lower 16 bits: codes without their upper bits
  uint32_t upper;     // byte i: 0xff where code i is 8 or more

  // Byte i: the plane's byte of code i.
  __device__ __forceinline__ uint32_t bytes(const uint32_t (&plane)[4]) const {
    const uint32_t below = permute_bytes(plane[0], plane[1], selector);
    const uint32_t above = permute_bytes(plane[2], plane[3], selector);
    return (below & ~upper) | (above & upper);
  }
  // Elements 0 and 1, 2 and 3, in 16 bits, the first low.
  __device__ __forceinline__ void pairs(const BytePlanes<2>& planes, uint32_t& first, uint32_t& second) const {
    const uint32_t low = bytes(planes.at[0]), high = bytes(planes.at[1]);
    first = permute_bytes(low, high, 0x4051);
    second = permute_bytes(low, high, 0x6273);
  }
  // All four, in fp32.
  __device__ __forceinline__ void values(const BytePlanes<4>& planes, float* v) const {
    const uint32_t b0 = bytes(planes.at[0]), b1 = bytes(planes.at[1]);
    const uint32_t b2 = bytes(planes.at[2]), b3 = bytes(planes.at[3]);
    UNROLL for (int pair = 0; pair < 2; ++pair) {
      const uint32_t order = pair ? 0x6273 : 0x4051;
      const uint32_t low = permute_bytes(b0, b1, order), high = permute_bytes(b2, b3, order);
      v[2 * pair] = bits_float(permute_bytes(low, high, 0x5410));
      v[2 * pair + 1] = bits_float(permute_bytes(low, high, 0x7632));
    }
  }
};

// A word's eight codes.
struct Quads {
  Quad half[2];

  __device__ __forceinline__ explicit Quads(uint32_t codes) {
    const uint32_t selector = computed(codes & 0x77777777u), shifted = codes << 4;
    half[0] = {selector, permute_bytes(codes, shifted, 0x9d8c)};
    half[1] = {selector >> 16, permute_bytes(codes, shifted, 0xbfae)};
  }
};

}  // namespace octavo::GPU_NS
