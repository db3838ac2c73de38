// int8 codes and their transpose, from one look at x. Bound by memory: sizeof(T) + 1 bytes per element, + 1 with the
// codes as they stand.
//
// A block takes 128 rows and 64 columns, a thread 4 rows and 8 columns of them: 16-byte loads, of which 8 lanes make up
// a row. It has the codes of a column's 4 rows in one word, which goes to shared memory; from there 8 lanes write 16
// bytes each of a row of the transpose. Chunks of 16 bytes lie in shared memory where their number, xor that of the
// column's group of 8, says: words are stored, and chunks loaded, by lanes of 32 different banks.
#include "common/launch.h"
#include "common/numeric.h"
#include "common/random.h"
#include "common/tile.h"
#include "int8/transpose.h"

namespace octavo::GPU_NS {

constexpr int kTurnRows = 128, kTurnCols = 64, kTurnThreads = 256;
constexpr int kOwnRows = 4, kOwnCols = 8;                     // of a thread
constexpr int kGroups = kTurnCols / kOwnCols;                 // of columns
constexpr int kColumnWords = kTurnRows / 4, kChunkWords = 4;  // of a column of the tile

// Where in shared memory chunk `chunk` of a column begins, in words.
__device__ __forceinline__ int turned_chunk(int column, int chunk) {
  return column * kColumnWords + ((chunk ^ (column / kOwnCols)) % 8) * kChunkWords;
}

__device__ __forceinline__ uint32_t four_bytes(const int8_t (&q)[4]) {
  uint32_t word = 0;
  UNROLL for (int e = 0; e < 4; ++e) word |= static_cast<uint32_t>(static_cast<uint8_t>(q[e])) << 8 * e;
  return word;
}

// x[row, column ...], kOwnCols of them; zeros outside of the matrix.
template <class T, bool kVector>
__device__ __forceinline__ void load_own(const EncodeTransposed& p, int64_t row, int64_t column, float (&v)[kOwnCols]) {
  constexpr int kWidth = kVectorWidth<T>;
  const T* x = static_cast<const T*>(p.x);
  UNROLL for (int e = 0; e < kOwnCols; ++e) v[e] = 0.0f;
  if (row >= p.rows) return;
  if constexpr (kVector) {
    if (column >= p.cols) return;
    UNROLL for (int part = 0; part < kOwnCols; part += kWidth) {
      const auto pack = load_pack<kWidth>(x, (row * p.cols + column + part) / kWidth);
      UNROLL for (int e = 0; e < kWidth; ++e) v[part + e] = to_float(pack.at[e]);
    }
  } else {
    UNROLL for (int e = 0; e < kOwnCols; ++e) {
      if (column + e < p.cols) v[e] = to_float(x[row * p.cols + column + e]);
    }
  }
}

template <bool kVector>
__device__ __forceinline__ void store_own(const EncodeTransposed& p, int64_t row, int64_t column,
                                          const int8_t (&q)[kOwnCols]) {
  if (row >= p.rows) return;
  if constexpr (kVector) {
    if (column >= p.cols) return;
    Pack<int8_t, kOwnCols> pack;
    UNROLL for (int e = 0; e < kOwnCols; ++e) pack.at[e] = q[e];
    store_pack(p.codes, (row * p.cols + column) / kOwnCols, pack);
  } else {
    UNROLL for (int e = 0; e < kOwnCols; ++e) {
      if (column + e < p.cols) p.codes[row * p.cols + column + e] = q[e];
    }
  }
}

// kVector: rows of x and codes can be accessed in packs. turned_vector: those of the transpose.
template <class T, bool kVector, bool kRandom>
__global__ void __launch_bounds__(kTurnThreads) encode_transposed_kernel(EncodeTransposed p, bool turned_vector) {
  SHARED(uint32_t, turned, [kTurnCols * kColumnWords]);
  const unsigned across = static_cast<unsigned>(ceil_div(p.cols, kTurnCols));
  const int64_t first_row = static_cast<int64_t>(across ? blockIdx.x / across : 0) * kTurnRows;
  const int64_t first_column = static_cast<int64_t>(across ? blockIdx.x % across : 0) * kTurnCols;
  const int group = threadIdx.x % kGroups, quad = threadIdx.x / kGroups;
  const int64_t column = first_column + group * kOwnCols, row = first_row + quad * kOwnRows;

  float inverse[kOwnCols];
  UNROLL for (int e = 0; e < kOwnCols; ++e) {
    const bool inside = p.absmax_stride == 0 || column + e < p.cols;
    const uint32_t absmax = inside ? p.absmax[(column + e) * p.absmax_stride] : 0;
    inverse[e] = inverse_scale_of(absmax);
    const bool writes = p.absmax_stride ? inside && first_row == 0 && quad == 0 : blockIdx.x + threadIdx.x + e == 0;
    if (writes) p.scale[(column + e) * p.absmax_stride] = scale_of(absmax);
  }

  float v[kOwnRows][kOwnCols];
  UNROLL for (int r = 0; r < kOwnRows; ++r) load_own<T, kVector>(p, row + r, column, v[r]);
  int8_t q[kOwnRows][kOwnCols];
  const uint32_t key = kRandom ? mix_seed(static_cast<uint64_t>(*p.seed)) : 0;
  UNROLL for (int r = 0; r < kOwnRows; ++r) {
    const uint32_t of_row = kRandom ? row_key(key, row + r) : 0;
    UNROLL for (int e = 0; e < kOwnCols; ++e) {
      if constexpr (kRandom)
        q[r][e] = encode_at_random(v[r][e], inverse[e], element_bits(of_row, column + e));
      else
        q[r][e] = encode(v[r][e], inverse[e]);
    }
    if (p.codes != nullptr) store_own<kVector>(p, row + r, column, q[r]);
  }
  UNROLL for (int e = 0; e < kOwnCols; ++e) {
    const int8_t own[4] = {q[0][e], q[1][e], q[2][e], q[3][e]};
    turned[turned_chunk(group * kOwnCols + e, quad / kChunkWords) + quad % kChunkWords] = four_bytes(own);
  }
  __syncthreads();

  constexpr int kChunks = kColumnWords / kChunkWords;
  UNROLL for (int i = 0; i < kTurnCols * kChunks / kTurnThreads; ++i) {
    const int at = threadIdx.x + i * kTurnThreads, chunk = at % kChunks, own = at / kChunks;
    const int64_t to_row = first_column + own, to_column = first_row + chunk * 16;
    if (to_row >= p.cols || to_column >= p.rows) continue;
    const auto bytes = load_pack<kChunkWords>(turned, turned_chunk(own, chunk) / kChunkWords);
    if (turned_vector) {
      store_pack(reinterpret_cast<uint32_t*>(p.transposed), (to_row * p.rows + to_column) / 16, bytes);
    } else {
      UNROLL for (int e = 0; e < 16; ++e) {
        if (to_column + e < p.rows)
          p.transposed[to_row * p.rows + to_column + e] = static_cast<int8_t>(bytes.at[e / 4] >> 8 * (e % 4));
      }
    }
  }
}

void encode_transposed(const EncodeTransposed& p, Stream stream) {
  const int64_t across = ceil_div(p.cols, kTurnCols), down = ceil_div(p.rows, kTurnRows);
  // At least one row of blocks for what is written once per column; the one scale of an empty tensor too is written.
  int64_t blocks = across * (down > 0 ? down : 1);
  if (blocks == 0) blocks = p.absmax_stride == 0;
  if (blocks == 0) return;
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
