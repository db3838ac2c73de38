// Low-bit tensors on a GPU: quantize, dequantize, and what the products share (the choice of kernel, the sums of blocks
// that took parts of a product). The products themselves are in nf4_stream_cuda.cu, nf4_tiles_cuda.cu, nf4_fma_cuda.cu.
#include <algorithm>
#include <type_traits>

#include "common/reduce.h"
#include "nf4/decode_gpu.h"
#include "nf4/work_gpu.h"

namespace octavo::GPU_NS {

// ---- quantize ----
//
// A thread block takes 4096 elements, the largest block of x; a warp 1024 neighbouring ones, in four rows of 8 elements
// a lane, which stay in registers between the absmax and the codes. A block of x is lanes of a row (by shuffles), one
// row or several, or several warps (through shared memory).

constexpr int kQuantizeThreads = 128, kQuantizeWarps = kQuantizeThreads / 32;
constexpr int kRun = 8, kRow = 32 * kRun, kWarpRows = 4, kWarpElements = kWarpRows * kRow;
constexpr int kTileElements = kQuantizeWarps * kWarpElements;
constexpr uint32_t kInfinity = 0x7f800000u;
static_assert(kTileElements == kMaxLowBitBlock);

// How blocks of x lie in a tile. kRows: rows of a warp in one of them.
template <int kRows>
struct BlockShape {
  static constexpr int kBlocks = kWarpRows / kRows;  // that a lane has a part of
  int blocksize, lanes, warps;                       // lanes of a row, and warps, that share a block

  __device__ explicit BlockShape(int64_t size)
      : blocksize(static_cast<int>(size)),
        lanes(blocksize < kRow ? blocksize / kRun : 32),
        warps(blocksize > kWarpElements ? blocksize / kWarpElements : 1) {}

  // The largest of each block, from what this lane has of it. True if all are finite, those included that this thread
  // must keep in step with.
  __device__ bool most(uint32_t (&v)[kBlocks], uint32_t (&scratch)[kQuantizeWarps]) const {
    const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    UNROLL for (int distance = 1; distance < 32; distance *= 2) {
      if (distance >= lanes) break;
      UNROLL for (int b = 0; b < kBlocks; ++b) v[b] = larger(v[b], __shfl_xor_sync(kFullWarp, v[b], distance));
    }
    bool finite = true;
    UNROLL for (int b = 0; b < kBlocks; ++b) finite = finite && v[b] < kInfinity;
    finite = __all_sync(kFullWarp, finite);
    if (kRows == kWarpRows && warps > 1) {
      if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v[0];
      __syncthreads();
      const int first = threadIdx.x / 32 & ~(warps - 1);
      UNROLL for (int i = 0; i < kQuantizeWarps; ++i) {
        const uint32_t other = scratch[i];
        finite = finite && other < kInfinity;
        if (i >= first && i < first + warps) v[0] = larger(v[0], other);
      }
      __syncthreads();  // who calls again writes there
    }
    return finite;
  }
};

// The code of any x by search, for any type.
__device__ inline uint32_t searched_code(QuantType type, float x, float inverse) {
  return type == QuantType::nf8 ? block_code(x, inverse, kGpuByteBook.threshold, kNf8Zero)
                                : small_block_code(x, inverse, kGpuBooks[static_cast<int>(type)]);
}

// A tile element by element: where it is cut off or not aligned, has a NaN or Inf, or is not of four bits. first: the
// lane's first element in row 0.
template <class T, int kRows>
__device__ void quantize_slowly(const QuantizeLowBit& p, const BlockShape<kRows>& shape, int64_t first,
                                uint32_t (&scratch)[kQuantizeWarps]) {
  constexpr int kBlocks = kWarpRows / kRows;
  const T* x = static_cast<const T*>(p.x);
  const int bits = bits_of(p.type);
  const uint32_t rest = bits == 4 ? kGpuBooks[static_cast<int>(p.type)].zero : 0;  // of the last byte
  uint32_t most[kBlocks] = {};
  UNROLL for (int b = 0; b < kBlocks; ++b) {
    NO_UNROLL for (int e = 0; e < kRows * kRun; ++e) {
      const int64_t at = first + (b * kRows + e / kRun) * kRow + e % kRun;
      if (at >= p.count) continue;
      const uint32_t magnitude = abs_bits(to_float(x[at]));
      if (magnitude < kInfinity && magnitude > most[b]) most[b] = magnitude;
    }
  }
  shape.most(most, scratch);
  UNROLL for (int b = 0; b < kBlocks; ++b) {
    const float absmax = block_absmax(bits_float(most[b])), inverse = block_inverse(absmax);
    const int64_t begin = first + b * kRows * kRow;
    if ((begin & (shape.blocksize - 1)) == 0 && begin < p.count) p.absmax[begin / shape.blocksize] = absmax;
    NO_UNROLL for (int row = 0; row < kRows; ++row) {
      const int64_t run = begin + row * kRow, byte0 = run / kRun * bits;
      uint64_t codes = 0;
      NO_UNROLL for (int e = 0; e < kRun; ++e) {
        const uint32_t code = run + e < p.count ? searched_code(p.type, to_float(x[run + e]), inverse) : rest;
        codes = codes << bits | code;
      }
      const int64_t left = packed_bytes(p.type, p.count) - byte0;
      NO_UNROLL for (int i = 0; i < bits && i < left; ++i) p.packed[byte0 + i] =
          static_cast<uint8_t>(codes >> 8 * (bits - 1 - i));
    }
  }
}

// The code of a value without a search: its cell holds at most one threshold. Lane i of a warp has what belongs to cell
// i, so a cell is looked up by a shuffle.
template <bool kMagnitude>
struct CellSearch {
  float threshold;
  uint32_t codes;  // not above the threshold; kMagnitude: and above, four bits up

  __device__ explicit CellSearch(const SmallBook& book) {
    const int cell = threadIdx.x % 32;
    const uint32_t rank = book.cell_rank[cell];
    threshold = book.cell_threshold[cell];
    codes = kMagnitude ? book.code[rank] | book.code[rank < 15 ? rank + 1 : 15] << 4 : rank;
  }

  // Puts the code behind `before`, four bits up. v: at most 1 in magnitude, up to rounding.
  __device__ __forceinline__ uint32_t append(uint32_t before, float v) const {
    const float a = kMagnitude ? fabsf(v) : v;
    // The cell in the lowest bits: half to even or up is the same, because no threshold is near the edge of a cell.
    const int cell = static_cast<int>(float_bits(__fmaf_rd(a, kCellScale, kRounder + (kCellOffset + 0.5f))));
    const bool above = a > __shfl_sync(kFullWarp, threshold, cell);
    const uint32_t found = __shfl_sync(kFullWarp, codes, cell);
    if (!kMagnitude) return before * 16 + found + (above ? 1 : 0);
    return before * 16 + ((above ? found >> 4 : found & 15) | (v < 0.0f ? 8u : 0u));
  }
};

template <class T, bool kMagnitude, int kRows>
__global__ void __launch_bounds__(kQuantizeThreads, 8) quantize_low_bit_kernel(QuantizeLowBit p, bool fast) {
  constexpr int kWidth = kVectorWidth<T>, kPacks = kRun / kWidth, kBlocks = kWarpRows / kRows;
  SHARED(uint32_t, scratch, [kQuantizeWarps]);
  const BlockShape<kRows> shape(p.blocksize);
  const int64_t tile = blockIdx.x;
  // The lane's first element in row 0; in row i, i * kRow further.
  const int64_t first = tile * kTileElements + threadIdx.x / 32 * kWarpElements + threadIdx.x % 32 * kRun;
  if (!fast || (tile + 1) * kTileElements > p.count) return quantize_slowly<T>(p, shape, first, scratch);
  const CellSearch<kMagnitude> search(kGpuBooks[static_cast<int>(p.type)]);
  float x[kWarpRows][kRun];
  UNROLL for (int row = 0; row < kWarpRows; ++row) UNROLL for (int i = 0; i < kPacks; ++i) {
    const auto pack = load_pack<kWidth>(static_cast<const T*>(p.x), (first + row * kRow) / kWidth + i);
    UNROLL for (int e = 0; e < kWidth; ++e) x[row][i * kWidth + e] = to_float(pack.at[e]);
  }
  uint32_t most[kBlocks] = {};
  UNROLL for (int row = 0; row < kWarpRows; ++row) UNROLL for (int e = 0; e < kRun; ++e) {
    const uint32_t bits = abs_bits(x[row][e]);
    most[row / kRows] = bits > most[row / kRows] ? bits : most[row / kRows];
  }
  if (!shape.most(most, scratch)) return quantize_slowly<T>(p, shape, first, scratch);
  UNROLL for (int b = 0; b < kBlocks; ++b) {
    const float absmax = block_absmax(bits_float(most[b])), inverse = block_inverse(absmax);
    const int64_t begin = first + b * kRows * kRow;
    if ((begin & (shape.blocksize - 1)) == 0) p.absmax[begin >> (__ffs(shape.blocksize) - 1)] = absmax;
    UNROLL for (int row = 0; row < kRows; ++row) {
      uint32_t codes = 0;
      UNROLL for (int e = 0; e < kRun; ++e) codes = search.append(codes, x[b * kRows + row][e] * inverse);
      reinterpret_cast<uint32_t*>(p.packed)[(begin + row * kRow) / kRun] = __byte_perm(codes, 0, 0x0123);
    }
  }
}

template <class T, bool kMagnitude>
void launch_quantize(const QuantizeLowBit& p, Stream stream) {
  const bool fast = bits_of(p.type) == 4 && packable(static_cast<const T*>(p.x), 0, kVectorWidth<T>) &&
                    packable(reinterpret_cast<const uint32_t*>(p.packed), 0, 1);
  auto kernel = p.blocksize <= kRow       ? quantize_low_bit_kernel<T, kMagnitude, 1>
                : p.blocksize <= 2 * kRow ? quantize_low_bit_kernel<T, kMagnitude, 2>
                                          : quantize_low_bit_kernel<T, kMagnitude, kWarpRows>;
  const auto tiles = static_cast<unsigned>(ceil_div(p.count, kTileElements));
  LAUNCH(kernel, dim3(tiles), dim3(kQuantizeThreads), 0, stream, p, fast);
}

void quantize_low_bit(const QuantizeLowBit& p, Stream stream) {
  if (p.count == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    p.type == QuantType::fp4 ? launch_quantize<T, true>(p, stream) : launch_quantize<T, false>(p, stream);
  });
}

// ---- back ----
//
// A pack is what 16 bytes of out hold; a thread has four of them on their way.

constexpr int kDequantizeThreads = 256, kDequantizePacks = 4;

template <class T>
constexpr int kDequantizeTile = kDequantizeThreads * kDequantizePacks * kVectorWidth<T>;

template <class T>
__global__ void __launch_bounds__(kDequantizeThreads, 4)
    dequantize_low_bit_kernel(DequantizeLowBit p, BytePlanes<4> book_in, bool fast) {
  constexpr int kWidth = kVectorWidth<T>;
  using Codes = std::conditional_t<kWidth == 8, uint32_t, uint16_t>;  // of a pack
  T* out = static_cast<T*>(p.out);
  const LowBitTensor& from = p.from;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kDequantizeTile<T>;
  if (!fast || begin + kDequantizeTile<T> > from.count) {
    const LowBitReader value(from);
    NO_UNROLL for (int i = threadIdx.x; i < kDequantizeTile<T>; i += kDequantizeThreads) {
      if (begin + i < from.count) out[begin + i] = from_float<T>(value(begin + i));
    }
    return;
  }
  BytePlanes<4> book[1];
  in_registers({book_in}, book);
  const int log2_blocksize = __ffs(static_cast<int>(from.blocksize)) - 1;
  const float offset = offset_of(from);
  uint32_t codes[kDequantizePacks];
  RawAbsmax raw[kDequantizePacks];
  UNROLL for (int i = 0; i < kDequantizePacks; ++i) {
    const int64_t at = begin / kWidth + i * kDequantizeThreads + threadIdx.x;
    codes[i] = reinterpret_cast<const Codes*>(from.packed)[at];
    raw[i].load(from, at * kWidth >> log2_blocksize);
  }
  float absmax[kDequantizePacks];
  UNROLL for (int i = 0; i < kDequantizePacks; ++i) absmax[i] = raw[i].decode(from, offset);
  UNROLL for (int i = 0; i < kDequantizePacks; ++i) {
    const int64_t at = begin / kWidth + i * kDequantizeThreads + threadIdx.x;
    const Quads quads(codes[i]);
    float v[kWidth];
    UNROLL for (int quad = 0; quad < kWidth / 4; ++quad) quads.half[quad].values(book[0], v + 4 * quad);
    UNROLL for (int e = 0; e < kWidth; ++e) v[e] *= absmax[i];
    Pack<uint32_t, 4> pack;
    UNROLL for (int e = 0; e < 4; ++e) {
      if constexpr (kWidth == 8)
        pack.at[e] = round_pair<T>(v[2 * e], v[2 * e + 1]);
      else
        pack.at[e] = float_bits(v[e]);
    }
    store_pack(static_cast<uint32_t*>(p.out), at, pack);
  }
}

BytePlanes<4> float_planes(QuantType type) {
  return byte_planes<4>([&](uint32_t i) { return float_bits(small_book(type).value[i]); });
}

void dequantize_low_bit(const DequantizeLowBit& p, Stream stream) {
  if (p.from.count == 0) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kVectorWidth<T>;
    const bool fast = bits_of(p.from.type) == 4 && packable(static_cast<const T*>(p.out), 0, kWidth) &&
                      reinterpret_cast<uintptr_t>(p.from.packed) % (kWidth / 2) == 0;
    const auto tiles = static_cast<unsigned>(ceil_div(p.from.count, kDequantizeTile<T>));
    auto kernel = dequantize_low_bit_kernel<T>;
    LAUNCH(kernel, dim3(tiles), dim3(kDequantizeThreads), 0, stream, p, float_planes(p.from.type), fast);
  });
}

// ---- products ----

Nf4Plan nf4_plan(const Nf4Matmul& p, bool transposed) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool is_float = p.dtype == DType::f32;
  Nf4Plan plan{};
  plan.transposed = transposed;
  plan.whole_rows = bits_of(p.w.type) == 4 && p.k % p.w.blocksize == 0 && aligned(p.w.packed);
  plan.inner = transposed ? p.n : p.k;
  plan.outer = transposed ? p.k : p.n;
  plan.splits = 1;
  if (!transposed && plan.whole_rows && (is_float || (p.m <= kNf4StreamMost && aligned(p.x)))) {
    plan.kernel = Nf4Kernel::stream;
    plan.tiles = ceil_div(p.n, 16);
    plan.bytes = is_float ? p.m * p.k * 6 : 0;
    return plan;
  }
  const int64_t available = multiprocessors();
  const auto tiles_of = [&](int64_t m, int64_t n) { return ceil_div(p.m, m) * ceil_div(plan.outer, n); };
  const auto use = [&](Nf4Kernel kernel, int m, int n) {
    plan.kernel = kernel, plan.tile_m = m, plan.tile_n = n;
    plan.tiles = tiles_of(m, n);
  };
  if (is_float || (!transposed && p.m <= kNf4StreamMost)) {
    use(Nf4Kernel::fma, is_float && p.m > 16 ? 64 : 16, 64);
  } else if (!plan.whole_rows) {
    use(Nf4Kernel::tiles, 64, 64);
  } else if (p.m <= 16) {
    use(Nf4Kernel::tiles, 16, 128);
  } else if (p.m > 64 && tiles_of(128, 128) >= available) {
    use(Nf4Kernel::tiles, 128, 128);
  } else {
    use(Nf4Kernel::tiles, 64, 64);
  }
  // Parts of at least 256, an even number of steps, as long as there are less than four blocks a multiprocessor: then
  // the sums in memory are a small part of what the weight is.
  const int64_t steps = ceil_div(plan.inner, kNf4Step);
  const int64_t wanted = std::max<int64_t>(1, 4 * available / std::max<int64_t>(plan.tiles, 1));
  const int64_t per_split = ceil_div(std::max<int64_t>(ceil_div(steps, wanted), 8), 2) * 2;
  plan.steps_per_split = static_cast<int>(per_split);
  plan.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(steps, per_split)));
  if (plan.splits > 1) plan.bytes = plan.splits * p.m * plan.outer * 4;
  return plan;
}

// Adds up what the blocks of a split have left, always in the same order; bias, and the output's dtype.
template <class T>
__global__ void __launch_bounds__(256)
    nf4_add_splits_kernel(const float* sums, int splits, Nf4Matmul p, int64_t outer) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, count = p.m * outer;
  if (i >= count) return;
  float sum = 0.0f;
  UNROLL_BY_8 for (int split = 0; split < splits; ++split) sum += sums[split * count + i];
  if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, i % outer);
  static_cast<T*>(p.out)[i] = from_float<T>(sum);
}

void multiply(Nf4Matmul p, bool transposed, Stream stream) {
  const Nf4Plan plan = nf4_plan(p, transposed);
  const int64_t count = p.m * plan.outer;
  if (count == 0) return;
  if (transposed) p.bias = nullptr;
  if (plan.inner > 0) switch (plan.kernel) {
      case Nf4Kernel::stream: nf4_stream(p, plan, stream); break;
      case Nf4Kernel::tiles: nf4_tiles(p, plan, stream); break;
      case Nf4Kernel::fma: nf4_fma(p, plan, stream); break;
    }
  if (plan.inner > 0 && plan.splits == 1) return;
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    auto kernel = nf4_add_splits_kernel<T>;
    LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, stream,
           static_cast<const float*>(p.workspace), plan.inner > 0 ? plan.splits : 0, p, plan.outer);
  });
}

int64_t nf4_workspace(const Nf4Matmul& p) {
  return nf4_plan(p, false).bytes;
}
void nf4_matmul(const Nf4Matmul& p, Stream stream) {
  multiply(p, false, stream);
}
int64_t nf4_workspace_transposed(const Nf4Matmul& p) {
  return nf4_plan(p, true).bytes;
}
void nf4_matmul_transposed(const Nf4Matmul& p, Stream stream) {
  multiply(p, true, stream);
}

}  // namespace octavo::GPU_NS
