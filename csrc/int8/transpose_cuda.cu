// int8 codes and their transpose, from one look at x. Bound by memory: sizeof(T) + 1 bytes per element, + 1 with the
// codes as they stand.
//
// A block takes 128 rows and 64 columns, a thread 4 rows and 8 columns of them: 16-byte loads, of which 8 lanes make up
// a row. While they are under way a thread per column makes the scales. A thread has the codes of a column's 4 rows in
// one word, which goes to shared memory; from there 8 lanes write 16 bytes each of a row of the transpose. Chunks of 16
// bytes lie in shared memory where their number, xor that of the column's group of 8, says: words are stored, and
// chunks loaded, by lanes of 32 different banks.
#include "common/launch.h"
#include "common/numeric.h"
#include "common/ptx.h"
#include "common/random.h"
#include "common/tile.h"
#include "int8/transpose.h"

namespace octavo::GPU_NS {

constexpr int kTurnRows = 128, kTurnCols = 64, kTurnThreads = 256;
constexpr int kOwnRows = 4, kOwnCols = 8;                     // of a thread
constexpr int kGroups = kTurnCols / kOwnCols;                 // of columns
constexpr int kColumnWords = kTurnRows / 4, kChunkWords = 4;  // of a column of the tile

// Where in shared memory chunk `chunk` of column e of a group begins, in words.
__device__ __forceinline__ unsigned turned_chunk(unsigned group, unsigned e, unsigned chunk) {
  static_assert(kColumnWords / kChunkWords == kGroups);
  return group * kOwnCols * kColumnWords + e * kColumnWords + (chunk ^ group) * kChunkWords;
}

// Four codes in a word, the first in the lowest byte.
__device__ __forceinline__ uint32_t four_bytes(int8_t a, int8_t b, int8_t c, int8_t d) {
  return permute_bytes(permute_bytes(a, b, 0x40), permute_bytes(c, d, 0x40), 0x5410);
}

// Rows row ... and columns column ... of x, which are the thread's. Past the edge it reads the last ones again, whose
// codes go nowhere: that costs less than zeros would.
template <class T, bool kVector>
__device__ __forceinline__ void load_own(const EncodeTransposed& p, int64_t row, int64_t column,
                                         T (&v)[kOwnRows][kOwnCols]) {
  constexpr int kWidth = kVector ? kVectorWidth<T> : 1;
  const int64_t packs = p.cols / kWidth, first = column / kWidth, left = packs - 1 - first;
  const int last = left < kOwnCols ? static_cast<int>(left) : kOwnCols;
  UNROLL for (int r = 0; r < kOwnRows; ++r) {
    const int64_t start = (row + r < p.rows ? row + r : p.rows - 1) * packs + first;
    UNROLL for (int part = 0; part < kOwnCols / kWidth; ++part) {
      const auto pack = load_pack<kWidth>(static_cast<const T*>(p.x), start + (part < last ? part : last));
      UNROLL for (int e = 0; e < kWidth; ++e) v[r][part * kWidth + e] = pack.at[e];
    }
  }
}

template <bool kVector>
__device__ __forceinline__ void store_own(const EncodeTransposed& p, int64_t row, int64_t column,
                                          const int8_t (&q)[kOwnRows][kOwnCols]) {
  const int64_t packs = p.cols / kOwnCols, first = row * packs + column / kOwnCols;
  UNROLL for (int r = 0; r < kOwnRows; ++r) {
    if (row + r >= p.rows) return;
    if constexpr (kVector) {
      if (column >= p.cols) return;
      const Pack<uint32_t, 2> pack = {
          {four_bytes(q[r][0], q[r][1], q[r][2], q[r][3]), four_bytes(q[r][4], q[r][5], q[r][6], q[r][7])}};
      store_pack(reinterpret_cast<uint32_t*>(p.codes), first + r * packs, pack);
    } else {
      UNROLL for (int e = 0; e < kOwnCols; ++e) {
        if (column + e < p.cols) p.codes[(row + r) * p.cols + column + e] = q[r][e];
      }
    }
  }
}

// kVector: rows of x and codes can be accessed in packs. turned_vector: those of the transpose.
template <class T, bool kVector, bool kRandom>
__global__ void __launch_bounds__(kTurnThreads) encode_transposed_kernel(EncodeTransposed p, bool turned_vector) {
  SHARED(uint32_t, turned, [kTurnCols * kColumnWords]);
  SHARED(float, inverses, [kTurnCols]);
  const unsigned across = static_cast<unsigned>(ceil_div(p.cols, kTurnCols));
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / across) * kTurnRows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % across) * kTurnCols;
  const unsigned group = threadIdx.x % kGroups, quad = threadIdx.x / kGroups;
  const int64_t column = first_column + group * kOwnCols, row = first_row + quad * kOwnRows;

  T v[kOwnRows][kOwnCols];
  load_own<T, kVector>(p, row, column, v);

  // Meanwhile a thread per column. What a group reads at once, 4 of its 8, lies side by side with that of the others.
  if (threadIdx.x < kTurnCols) {
    const unsigned slot = threadIdx.x;
    const int64_t j = first_column + slot % (4 * kGroups) / 4 * kOwnCols + slot / (4 * kGroups) * 4 + slot % 4;
    const bool inside = p.absmax_stride == 0 || j < p.cols;
    const uint32_t absmax = inside ? p.absmax[j * p.absmax_stride] : 0;
    inverses[slot] = inverse_scale_of(absmax);
    const bool writes = p.absmax_stride ? inside && first_row == 0 : blockIdx.x + threadIdx.x == 0;
    if (writes) p.scale[j * p.absmax_stride] = scale_of(absmax);
  }
  __syncthreads();
  float inverse[kOwnCols];
  UNROLL for (int part = 0; part < kOwnCols / 4; ++part) {
    const auto pack = load_pack<4>(inverses, part * kGroups + group);
    UNROLL for (int e = 0; e < 4; ++e) inverse[4 * part + e] = pack.at[e];
  }

  int8_t q[kOwnRows][kOwnCols];
  const uint32_t key = kRandom ? mix_seed(static_cast<uint64_t>(*p.seed)) : 0;
  UNROLL for (int r = 0; r < kOwnRows; ++r) {
    const uint32_t of_row = kRandom ? row_key(key, row + r) : 0;
    UNROLL for (int e = 0; e < kOwnCols; ++e) {
      if constexpr (kRandom)
        q[r][e] = encode_at_random(to_float(v[r][e]), inverse[e], element_bits(of_row, column + e));
      else
        q[r][e] = encode(to_float(v[r][e]), inverse[e]);
    }
  }
  if (p.codes != nullptr) store_own<kVector>(p, row, column, q);
  UNROLL for (int e = 0; e < kOwnCols; ++e) {
    turned[turned_chunk(group, e, quad / kChunkWords) + quad % kChunkWords] =
        four_bytes(q[0][e], q[1][e], q[2][e], q[3][e]);
  }
  __syncthreads();

  constexpr int kChunks = kColumnWords / kChunkWords;
  const unsigned chunk = threadIdx.x % kChunks;
  const int64_t to_column = first_row + chunk * 16;
  if (to_column >= p.rows) return;
  UNROLL for (unsigned i = 0; i < kTurnCols * kChunks / kTurnThreads; ++i) {
    const unsigned own = threadIdx.x / kChunks + i * (kTurnThreads / kChunks);
    const int64_t to_row = first_column + own;
    if (to_row >= p.cols) return;
    const unsigned from = turned_chunk(own / kOwnCols, own % kOwnCols, chunk);
    const auto bytes = load_pack<kChunkWords>(turned, from / kChunkWords);
    if (turned_vector) {
      store_pack(reinterpret_cast<uint32_t*>(p.transposed), to_row * (p.rows / 16) + to_column / 16, bytes);
    } else {
      UNROLL for (int e = 0; e < 16; ++e) {
        if (to_column + e < p.rows)
          p.transposed[to_row * p.rows + to_column + e] = static_cast<int8_t>(bytes.at[e / 4] >> 8 * (e % 4));
      }
    }
  }
}

void encode_transposed(const EncodeTransposed& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) {
    const int64_t scales = p.absmax_stride ? p.cols : 1;
    if (scales > 0) fill_bytes(p.scale, 0, scales * sizeof(float), stream);
    return;
  }
  const int64_t blocks = ceil_div(p.cols, kTurnCols) * ceil_div(p.rows, kTurnRows);
  const bool turned_vector = packable(p.transposed, p.rows, 16);
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vector = packable(static_cast<const T*>(p.x), p.cols, kVectorWidth<T>) && p.cols % kOwnCols == 0 &&
                        packable(p.codes, p.cols, kOwnCols);
    const auto launch = [&](auto kernel) {
      LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kTurnThreads), 0, stream, p, turned_vector);
    };
    if (p.seed != nullptr)
      vector ? launch(encode_transposed_kernel<T, true, true>) : launch(encode_transposed_kernel<T, false, true>);
    else
      vector ? launch(encode_transposed_kernel<T, true, false>) : launch(encode_transposed_kernel<T, false, false>);
  });
}

}  // namespace octavo::GPU_NS
