// Block-wise quantization to 8 bits, and back. Bound by memory: 16-byte accesses, x read once and kept in registers
// between a block's absmax and its codes, tables in shared memory once per persistent thread block.
#include "blockwise/blockwise.h"
#include "blockwise/codec_gpu.h"
#include "common/reduce.h"
#include "common/tile.h"

namespace octavo::GPU_NS {

// ---- quantize ----
//
// A thread block takes tiles of 4096 elements, the largest block; a warp 512 neighbouring ones, in rows of one 16-byte
// pack per lane. A block of x is then lanes of a row (by shuffles), rows of a warp, or several warps (through shared
// memory).

constexpr int kQuantizeThreads = 256, kQuantizeWarps = kQuantizeThreads / 32;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr int kWarpElements = 512, kTileElements = kQuantizeWarps * kWarpElements;
static_assert(kTileElements == kMaxBlocksize);

enum class Map { unsigned_dynamic, signed_dynamic, own };

// What the codes of a caller's own code book are found by.
struct OwnThresholds {
  float threshold[kCodes - 1];
  uint32_t zero;
};

template <Map kMap>
struct QuantizeTable {
  using Type = EncodeTable;
};
template <>
struct QuantizeTable<Map::own> {
  using Type = OwnThresholds;
};

__device__ inline void fill_table(OwnThresholds& table, const float* values) {
  for (unsigned i = threadIdx.x; i < kCodes - 1; i += blockDim.x)
    table.threshold[i] = threshold_between(values[i], values[i + 1]);
  __syncthreads();
  if (threadIdx.x == 0) table.zero = nearest_code(0.0f, table.threshold);
}

// Packs of one lane in one tile.
template <class T>
constexpr int kQuantizePacks = kWarpElements / (32 * kVectorWidth<T>);

// The maximum over the aligned group of `lanes` lanes, a power of two, that this one is in.
__device__ inline uint32_t group_max(uint32_t v, int lanes) {
  if (lanes == 32) return warp_max(v);
  UNROLL for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= lanes) break;
    const uint32_t other = __shfl_xor_sync(kFullWarp, v, distance);
    v = other > v ? other : v;
  }
  return v;
}

// How a block of x lies in a tile. kRows: rows of a warp in it; where it takes all of them, it may take several warps.
template <class T, int kRows>
struct BlockShape {
  static constexpr int kWidth = kVectorWidth<T>, kRow = 32 * kWidth;
  static constexpr bool kWide = kRows == kQuantizePacks<T>;
  int blocksize, lanes, warps;  // lanes of a row, and warps, that share a block

  __device__ explicit BlockShape(int64_t size)
      : blocksize(static_cast<int>(size)),
        lanes(blocksize < kRow ? blocksize / kWidth : 32),
        warps(blocksize > kWarpElements ? blocksize / kWarpElements : 1) {}

  struct Most {
    uint32_t block;  // the largest magnitude in the block of x
    bool infinite;   // whether one is, of any that this thread must keep in step with
  };
  // v: of what this lane holds of the block. phase: alternates from call to call.
  __device__ Most most(uint32_t v, uint32_t (&scratch)[2][kQuantizeWarps], int& phase) const {
    v = group_max(v, lanes);
    if (kWide && warps > 1) {
      if (threadIdx.x % 32 == 0) scratch[phase][threadIdx.x / 32] = v;
      __syncthreads();
      v = scratch[phase][threadIdx.x % kQuantizeWarps];
      phase ^= 1;
      const bool infinite = __any_sync(kFullWarp, v == kInfinity);
      return {__shfl_sync(kFullWarp, group_max(v, warps), threadIdx.x / 32), infinite};
    }
    return {v, __any_sync(kFullWarp, v == kInfinity) != 0};
  }
};

// A tile element by element: where it is cut off, not aligned, or has an Inf. x: the lane's first element in row 0, as
// the fast path has it.
template <class T, int kRows, class Search>
__device__ void quantize_slowly(const QuantizeBlocks& p, const BlockShape<T, kRows>& shape, int64_t first,
                                uint32_t (&scratch)[2][kQuantizeWarps], int& phase, const Search& code_of) {
  using Shape = BlockShape<T, kRows>;
  const T* x = static_cast<const T*>(p.x);
  constexpr int kElements = kRows * Shape::kWidth;  // of a lane in a block
  NO_UNROLL for (int b = 0; b < kQuantizePacks<T> / kRows; ++b) {
    const int64_t begin = first + b * kRows * Shape::kRow;
    const auto at = [&](int e) { return begin + e / Shape::kWidth * Shape::kRow + e % Shape::kWidth; };
    uint32_t finite = 0;
    NO_UNROLL for (int e = 0; e < kElements; ++e) {
      if (at(e) >= p.count) continue;
      const uint32_t bits = abs_bits(to_float(x[at(e)]));
      if (bits < kInfinity && bits > finite) finite = bits;
    }
    const float absmax = block_absmax(bits_float(shape.most(finite, scratch, phase).block));
    const float inverse = block_inverse(absmax);
    if ((begin & (shape.blocksize - 1)) == 0 && begin < p.count) p.absmax[begin / shape.blocksize] = absmax;
    NO_UNROLL for (int e = 0; e < kElements; ++e) {
      if (at(e) < p.count) p.codes[at(e)] = static_cast<uint8_t>(code_of(to_float(x[at(e)]), inverse));
    }
  }
}

template <class T, Map kMap, int kRows>
__global__ void __launch_bounds__(kQuantizeThreads, 3) quantize_blocks_kernel(QuantizeBlocks p, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>, kPacks = kQuantizePacks<T>, kBlocks = kPacks / kRows, kRow = 32 * kWidth;
  constexpr bool kSigned = kMap == Map::signed_dynamic;
  SHARED(typename QuantizeTable<kMap>::Type, table, [1]);
  SHARED(uint32_t, scratch, [2][kQuantizeWarps]);
  if constexpr (kMap == Map::own)
    fill_table(table[0], p.values);
  else
    fill_table(table[0], kGpuMaps[kSigned]);
  __syncthreads();
  const auto code_of = [&](float v, float inverse) {
    if constexpr (kMap == Map::own)
      return block_code(v, inverse, table[0].threshold, table[0].zero);
    else
      return block_code(v, inverse, kGpuMaps[kSigned].threshold, kSigned ? 127 : 0);
  };

  const BlockShape<T, kRows> shape(p.blocksize);
  const int log2_blocksize = __ffs(shape.blocksize) - 1;
  int phase = 0;
  const int64_t tiles = ceil_div(p.count, kTileElements);
  NO_UNROLL for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    // The lane's first element in row 0; in row i, i * kRow further.
    const int64_t first = tile * kTileElements + threadIdx.x / 32 * kWarpElements + threadIdx.x % 32 * kWidth;
    if (!aligned || (tile + 1) * kTileElements > p.count) {
      quantize_slowly(p, shape, first, scratch, phase, code_of);
      continue;
    }
    Pack<T, kWidth> x[kPacks];
    UNROLL for (int i = 0; i < kPacks; ++i) x[i] =
        load_pack<kWidth>(static_cast<const T*>(p.x), first / kWidth + i * 32);
    uint32_t most[kBlocks];
    bool infinite = false;
    UNROLL for (int b = 0; b < kBlocks; ++b) {
      float largest = 0.0f;  // but for NaN, which a maximum of floats passes over
      UNROLL for (int i = 0; i < kRows; ++i) {
        UNROLL for (int e = 0; e < kWidth; ++e) largest = fmaxf(largest, fabsf(to_float(x[b * kRows + i].at[e])));
      }
      const auto over_block = shape.most(float_bits(largest), scratch, phase);
      most[b] = over_block.block;
      infinite |= over_block.infinite;
    }
    if (infinite) {
      quantize_slowly(p, shape, first, scratch, phase, code_of);
      continue;
    }
    UNROLL for (int b = 0; b < kBlocks; ++b) {
      const float absmax = block_absmax(bits_float(most[b])), inverse = block_inverse(absmax);
      const int64_t begin = first + b * kRows * kRow;
      if ((begin & (shape.blocksize - 1)) == 0) p.absmax[begin >> log2_blocksize] = absmax;
      UNROLL for (int i = 0; i < kRows; ++i) {
        const auto& pack = x[b * kRows + i];
        Pack<uint32_t, kWidth / 4> codes = {};
        if constexpr (kMap == Map::own) {
          UNROLL for (int e = 0; e < kWidth; ++e) codes.at[e / 4] |= code_of(to_float(pack.at[e]), inverse)
                                                                     << 8 * (e % 4);
        } else {
          float v[kWidth];
          UNROLL for (int e = 0; e < kWidth; ++e) v[e] = to_float(pack.at[e]) * inverse;
          encode_codes<kSigned>(table[0], v, codes.at);
        }
        store_pack(reinterpret_cast<uint32_t*>(p.codes), begin / kWidth + i * 32, codes);
      }
    }
  }
}

// A persistent grid: as many blocks as run at once, or as there is work for.
template <class Kernel>
dim3 persistent_grid(Kernel kernel, int threads, int64_t tiles) {
  const int64_t most = resident_blocks(kernel, threads);
  return dim3(static_cast<unsigned>(tiles < most ? tiles : most));
}

template <class T, Map kMap, int kRows>
void launch_quantize(const QuantizeBlocks& p, Stream stream) {
  const bool aligned =
      packable(static_cast<const T*>(p.x), 0, kVectorWidth<T>) && packable(p.codes, 0, kVectorWidth<T>);
  auto kernel = quantize_blocks_kernel<T, kMap, kRows>;
  const dim3 grid = persistent_grid(kernel, kQuantizeThreads, ceil_div(p.count, kTileElements));
  LAUNCH(kernel, grid, dim3(kQuantizeThreads), 0, stream, p, aligned);
}

template <class T, Map kMap>
void launch_quantize(const QuantizeBlocks& p, Stream stream) {
  constexpr int kRow = 32 * kVectorWidth<T>;
  if (p.blocksize <= kRow) return launch_quantize<T, kMap, 1>(p, stream);
  if (p.blocksize >= kWarpElements) return launch_quantize<T, kMap, kQuantizePacks<T>>(p, stream);
  if constexpr (kQuantizePacks<T> == 4) launch_quantize<T, kMap, 2>(p, stream);  // 256 elements of fp32
}

void quantize_blocks(const QuantizeBlocks& p, Stream stream) {
  if (p.count == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.values != nullptr)
      launch_quantize<T, Map::own>(p, stream);
    else if (p.is_signed)
      launch_quantize<T, Map::signed_dynamic>(p, stream);
    else
      launch_quantize<T, Map::unsigned_dynamic>(p, stream);
  });
}

// ---- back ----
//
// A pack is what 16 bytes of out hold; a pass of a thread block has four rows of packs on their way.

constexpr int kDequantizeThreads = 256, kDequantizePacks = 4;

template <class T>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_blocks_kernel(DequantizeBlocks p, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>, kWords = kWidth / 4;
  SHARED(DecodeTable, table, [1]);
  fill_table(table[0], p.values != nullptr ? p.values : kGpuMaps[p.is_signed].value);
  __syncthreads();
  const int log2_blocksize = __ffs(static_cast<int>(p.blocksize)) - 1;
  T* out = static_cast<T*>(p.out);

  const int64_t packs = aligned ? p.count / kWidth : 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kDequantizeThreads * kDequantizePacks;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads * kDequantizePacks + threadIdx.x;
       first < packs; first += stride) {
    Pack<uint32_t, kWords> codes[kDequantizePacks];
    float absmax[kDequantizePacks];
    UNROLL for (int i = 0; i < kDequantizePacks; ++i) {
      const int64_t at = first + i * kDequantizeThreads;
      if (at >= packs) break;
      codes[i] = load_pack<kWords>(reinterpret_cast<const uint32_t*>(p.codes), at);
      absmax[i] = p.absmax[at * kWidth >> log2_blocksize];
    }
    UNROLL for (int i = 0; i < kDequantizePacks; ++i) {
      const int64_t at = first + i * kDequantizeThreads;
      if (at >= packs) break;
      Pack<T, kWidth> pack;
      UNROLL for (int e = 0; e < kWidth; ++e) pack.at[e] =
          from_float<T>(decode(table[0], codes[i].at[e / 4], e % 4) * absmax[i]);
      store_pack(out, at, pack);
    }
  }
  NO_UNROLL for (int64_t i = packs * kWidth + static_cast<int64_t>(blockIdx.x) * kDequantizeThreads + threadIdx.x;
                 i < p.count; i += static_cast<int64_t>(gridDim.x) * kDequantizeThreads) out[i] =
      from_float<T>(decode(table[0], p.codes[i], 0) * p.absmax[i >> log2_blocksize]);
}

void dequantize_blocks(const DequantizeBlocks& p, Stream stream) {
  if (p.count == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kVectorWidth<T>;
    const bool aligned = packable(static_cast<const T*>(p.out), 0, kWidth) && packable(p.codes, 0, kWidth);
    auto kernel = dequantize_blocks_kernel<T>;
    const dim3 grid = persistent_grid(kernel, kDequantizeThreads,
                                      ceil_div(p.count, int64_t{kDequantizeThreads} * kDequantizePacks * kWidth));
    LAUNCH(kernel, grid, dim3(kDequantizeThreads), 0, stream, p, aligned);
  });
}

}  // namespace octavo::GPU_NS
