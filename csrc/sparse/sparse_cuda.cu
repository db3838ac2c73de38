// Products with a sparse matrix in compressed rows. Bound by memory and latency: entries are read once, in whole warps'
// rows of them; work is cut by entries, not by rows; x is read in spans. No atomics on floats, no host synchronisation.
#include "common/launch.h"
#include "common/numeric.h"
#include "common/reduce.h"
#include "sparse/sparse.h"

namespace octavo::GPU_NS {

// What a product's pieces leave for the end: partial[chunk][0, 1][m] of the row that comes from the chunk before and of
// the one that goes on in the next, whose number is open_row[chunk], or -1.
struct CsrPieces {
  float* partial;
  int64_t* open_row;
  int64_t size, chunks;  // entries of a chunk, chunks
};

// csr_first_row by a warp, 32 rows at a time: three rounds of loads for up to 32768 rows.
__device__ inline int64_t warp_first_row(const Csr& s, int64_t e) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int64_t low = 0, high = s.n;
  while (low < high) {
    const int64_t step = ceil_div(high - low, 32), row = low + lane * step;
    const int below = __popc(__ballot_sync(kFullWarp, row < high && csr_offset(s, row) < e));
    if (below == 0) break;
    const int64_t end = low + below * step;
    low += (below - 1) * step + 1;
    if (end < high) high = end;
  }
  return low;
}

// csr_chunk by two warps of a block. The barrier that makes it known to all is the caller's.
__device__ inline void find_chunk(const Csr& s, int64_t index, const CsrPieces& pieces, int64_t (&rows)[2]) {
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const bool last = index + 1 >= pieces.chunks;
  for (int i = warp; i < 2; i += warps) {
    const int64_t row = i == 0 ? (index == 0 ? 0 : warp_first_row(s, index * pieces.size))
                               : (last ? s.n : warp_first_row(s, (index + 1) * pieces.size));
    if (threadIdx.x % 32 == 0) rows[i] = row;
  }
}

__device__ inline CsrChunk known_chunk(const Csr& s, int64_t index, const CsrPieces& pieces, const int64_t (&rows)[2]) {
  CsrChunk c;
  c.begin = index * pieces.size;
  c.end = index + 1 >= pieces.chunks ? s.nnz : c.begin + pieces.size;
  c.first_row = rows[0];
  c.rows = rows[1] > rows[0] ? rows[1] : rows[0];
  const int64_t start = csr_offset(s, c.first_row);
  c.head_end = index == 0 || start < c.begin ? c.begin : start < c.end ? start : c.end;
  c.open = c.rows > c.first_row && csr_offset(s, c.rows) > c.end;
  return c;
}

// The entries of row i, no matter what the offsets are: within the chunk.
__device__ inline void row_span(const Csr& s, int64_t i, const CsrChunk& c, int64_t& begin, int64_t& end) {
  begin = csr_offset(s, i);
  begin = begin < c.begin ? c.begin : begin > c.end ? c.end : begin;
  end = csr_row_end(s, i, c);
}

// Where the sum of a piece belongs: out, or what finish_open_rows_kernel reads.
__device__ inline void put_sum(const CsrMatmul& p, const CsrPieces& pieces, const CsrChunk& c, int64_t index,
                               int64_t row, int64_t j, float sum) {
  if (row < c.first_row)
    pieces.partial[2 * index * p.m + j] = sum;
  else if (c.open && row == c.rows - 1)
    pieces.partial[(2 * index + 1) * p.m + j] = sum;
  else
    csr_finish(p, j, row, sum);
}

// A thread for each chunk and row of x: sums, in order, the pieces of the row that the chunk leaves open.
__global__ void __launch_bounds__(256) finish_open_rows_kernel(CsrMatmul p, CsrPieces pieces) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t index = i / p.m, j = i % p.m;
  if (index + 1 >= pieces.chunks) return;
  const int64_t row = pieces.open_row[index];
  if (row < 0) return;
  const int64_t end = csr_offset(p.s, row + 1);
  float sum = pieces.partial[(2 * index + 1) * p.m + j];
  int64_t last = ceil_div(end, pieces.size);
  if (last > pieces.chunks) last = pieces.chunks;
  UNROLL_BY_8 for (int64_t next = index + 1; next < last; ++next) sum += pieces.partial[2 * next * p.m + j];
  csr_finish(p, j, row, sum);
}

// ---- few rows of x ----
//
// A block takes a chunk: first all products of entries with x, by threads that know no rows, into shared memory; then
// their sums, by as many threads for each row as there are to spare. x lies in shared memory where a block has enough
// entries for that to pay: gathers from there meet some bank conflicts, those from L1 fetch a line for every few
// entries.

constexpr int kFewThreads = 256, kFewItems = 4, kFewChunk = kFewThreads * kFewItems;
constexpr int64_t kFewRows = 16;             // of x
constexpr int64_t kStagedBytes = 28 * 1024;  // with the products, below the 48 KiB that need no opt-in

// Four blocks on a multiprocessor: left to itself, ptxas aims at more and spills.
template <class T, int kRows, bool kStaged>
__global__ void __launch_bounds__(kFewThreads, 4) csr_few_kernel(CsrMatmul p, CsrPieces pieces) {
  SHARED(float, products, [kRows][kFewChunk]);
  SHARED(int64_t, rows, [2]);
  DYNAMIC_SHARED(T, staged);
  const Csr& s = p.s;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t j0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int present = static_cast<int>(p.m - j0 < kRows ? p.m - j0 : kRows);
  const T* x = static_cast<const T*>(p.x) + j0 * s.k;
  if (kStaged) {
    for (int64_t i = thread; i < present * s.k; i += kFewThreads) staged[i] = x[i];
    __syncthreads();
  }
  for (int64_t index = blockIdx.x; index < pieces.chunks; index += gridDim.x) {
    const int64_t first = index * pieces.size, left = s.nnz - first;
    const int count = static_cast<int>(left < pieces.size ? left : pieces.size);
    find_chunk(s, index, pieces, rows);
    for (int i = thread; i < count; i += kFewThreads) {
      const float value = load_float(s.values, s.dtype, first + i);
      const uint32_t column = csr_column(s, first + i);
      const bool exists = column < s.k;
      UNROLL for (int r = 0; r < kRows; ++r) {
        const int64_t at = r * s.k + column;
        products[r][i] = exists && r < present ? value * to_float(kStaged ? staged[at] : x[at]) : 0.0f;
      }
    }
    __syncthreads();
    const CsrChunk c = known_chunk(s, index, pieces, rows);
    const int64_t head = c.head_end > c.begin, sums = c.rows - c.first_row + head;
    int threads = 1;  // of one row
    while (threads < 32 && sums * threads * 2 <= kFewThreads) threads *= 2;
    for (int64_t sum0 = 0; sum0 < sums; sum0 += kFewThreads / threads) {
      const int64_t row = c.first_row - head + sum0 + thread / threads;
      int64_t begin = c.begin, end = c.begin;
      if (row < c.first_row)
        end = c.head_end;
      else if (row < c.rows)
        row_span(s, row, c, begin, end);
      const int first_product = static_cast<int>(begin - c.begin) + thread % threads;
      const int last_product = static_cast<int>(end - c.begin);
      NO_UNROLL for (int r = 0; r < present; ++r) {
        float sum = 0.0f;
        NO_UNROLL for (int i = first_product; i < last_product; i += threads) sum += products[r][i];
        for (int distance = threads / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
        if (thread % threads == 0 && row < c.rows) put_sum(p, pieces, c, index, row, j0 + r, sum);
      }
    }
    if (thread == 0 && blockIdx.y == 0) pieces.open_row[index] = c.open ? c.rows - 1 : -1;
    __syncthreads();  // the products and rows have been read
  }
}

// ---- a matrix transposed, so that one entry's column is a span; with a last row of zeros ----

constexpr int kTransposeTile = 32, kTransposeWarps = 8;

template <class T>
__global__ void __launch_bounds__(kTransposeTile* kTransposeWarps)
    transpose_kernel(const T* in, T* out, int64_t rows, int64_t cols) {
  SHARED(T, tile, [kTransposeTile][kTransposeTile + 1]);
  const int64_t across = ceil_div(cols + 1, kTransposeTile);
  const int64_t col0 = blockIdx.x % across * kTransposeTile, row0 = blockIdx.x / across * kTransposeTile;
  for (int i = static_cast<int>(threadIdx.y); i < kTransposeTile; i += kTransposeWarps) {
    const int64_t row = row0 + i, col = col0 + threadIdx.x;
    tile[i][threadIdx.x] = row < rows && col < cols ? in[row * cols + col] : T{};
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.y); i < kTransposeTile; i += kTransposeWarps) {
    const int64_t row = row0 + threadIdx.x, col = col0 + i;
    if (row < rows && col <= cols) out[col * rows + row] = tile[threadIdx.x][i];
  }
}

template <class T>
void transpose(const void* in, void* out, int64_t rows, int64_t cols, Stream stream) {
  const int64_t tiles = ceil_div(cols + 1, kTransposeTile) * ceil_div(rows, kTransposeTile);
  LAUNCH(transpose_kernel<T>, dim3(static_cast<unsigned>(tiles)), dim3(kTransposeTile, kTransposeWarps), 0, stream,
         static_cast<const T*>(in), static_cast<T*>(out), rows, cols);
}

// ---- many rows of x ----
//
// x^T[k + 1, m] first. A block takes a chunk of entries, a warp of it 128 rows of x: every entry is a value and a span,
// and all warps do the same amount of work, whatever the rows are. Sums of 16 rows of S are turned around in shared
// memory, so that they reach out as spans along n.

constexpr int kManyChunk = 256, kManyWarps = 4, kLaneSums = 4, kWarpRows = 32 * kLaneSums, kSumRows = 16;

template <class T>
__global__ void __launch_bounds__(kManyWarps * 32) csr_many_kernel(CsrMatmul p, CsrPieces pieces, const T* x) {
  SHARED(float, values, [kManyChunk]);
  SHARED(uint32_t, columns, [kManyChunk]);
  SHARED(int64_t, rows, [2]);
  SHARED(float, tiles, [kManyWarps][kSumRows][kWarpRows + 2]);
  const Csr& s = p.s;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t index = blockIdx.x, first = index * kManyChunk;
  find_chunk(s, index, pieces, rows);
  for (int i = static_cast<int>(threadIdx.x); i < kManyChunk && first + i < s.nnz; i += static_cast<int>(blockDim.x)) {
    const uint32_t column = csr_column(s, first + i);
    values[i] = column < s.k ? load_float(s.values, s.dtype, first + i) : 0.0f;
    columns[i] = column < s.k ? column : static_cast<uint32_t>(s.k);
  }
  __syncthreads();
  const CsrChunk c = known_chunk(s, index, pieces, rows);
  if (threadIdx.x == 0 && blockIdx.y == 0) pieces.open_row[index] = c.open ? c.rows - 1 : -1;
  const int64_t j0 = (static_cast<int64_t>(blockIdx.y) * (blockDim.x / 32) + warp) * kWarpRows;
  if (j0 >= p.m) return;
  const int64_t left = p.m - j0;
  bool present[kLaneSums];
  UNROLL for (int r = 0; r < kLaneSums; ++r) present[r] = lane + 32 * r < left;
  const T* const from = x + j0 + lane;

  const auto sum_of = [&](int64_t begin, int64_t end, float (&sum)[kLaneSums]) {
    UNROLL for (int r = 0; r < kLaneSums; ++r) sum[r] = 0.0f;
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int e = static_cast<int>(begin - first); e < static_cast<int>(end - first); ++e) {
      const float value = values[e];
      const T* span = from + static_cast<int64_t>(columns[e]) * p.m;
      UNROLL for (int r = 0; r < kLaneSums; ++r) {
        if (present[r]) sum[r] = fmaf(value, to_float(span[32 * r]), sum[r]);
      }
    }
  };
  const auto put_partial = [&](int which, const float (&sum)[kLaneSums]) {
    UNROLL for (int r = 0; r < kLaneSums; ++r) {
      if (present[r]) pieces.partial[(2 * index + which) * p.m + j0 + lane + 32 * r] = sum[r];
    }
  };

  float sum[kLaneSums];
  if (c.head_end > c.begin) {
    sum_of(c.begin, c.head_end, sum);
    put_partial(0, sum);
  }
  float (&tile)[kSumRows][kWarpRows + 2] = tiles[warp];
  const int64_t whole = c.rows - c.open;
  for (int64_t row0 = c.first_row; row0 < whole; row0 += kSumRows) {
    const int count = static_cast<int>(whole - row0 < kSumRows ? whole - row0 : kSumRows);
    int64_t begin = 0, end = 0;  // of row row0 + lane
    if (lane < count) row_span(s, row0 + lane, c, begin, end);
    for (int i = 0; i < count; ++i) {
      sum_of(__shfl_sync(kFullWarp, begin, i), __shfl_sync(kFullWarp, end, i), sum);
      UNROLL for (int r = 0; r < kLaneSums; ++r) tile[i][lane + 32 * r] = sum[r];
    }
    __syncwarp();
    const int i = lane % kSumRows;
    for (int j = lane / kSumRows; j < kWarpRows && j < left; j += 32 / kSumRows) {
      if (i < count) csr_finish(p, j0 + j, row0 + i, tile[i][j]);
    }
    __syncwarp();  // the tile has been read
  }
  if (c.open) {
    int64_t begin, end;
    row_span(s, c.rows - 1, c, begin, end);
    sum_of(begin, end, sum);
    put_partial(1, sum);
  }
}

namespace {

int64_t element_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

int64_t padded(int64_t bytes) {
  return ceil_div(bytes, 16) * 16;
}

// Small matrices in small chunks, so that there are enough of them. Of the shape only, not of the device: the sums
// depend on it.
int64_t chunk_size(const CsrMatmul& p) {
  if (p.m > kFewRows) return kManyChunk;
  return kFewThreads * (p.s.nnz <= 256 * 512 ? 1 : p.s.nnz <= 512 * 1024 ? 2 : kFewItems);
}

CsrPieces pieces_of(const CsrMatmul& p) {
  const int64_t size = chunk_size(p), chunks = csr_chunks(p.s.nnz, size);
  auto* open_row = static_cast<int64_t*>(p.workspace);
  return {reinterpret_cast<float*>(open_row + chunks), open_row, size, chunks};
}

// Bytes of the pieces; the transposed x follows.
int64_t pieces_bytes(const CsrPieces& pieces, int64_t m) {
  return padded(pieces.chunks * (8 + 2 * 4 * m));
}

template <class T, int kRows>
void launch_few(const CsrMatmul& p, const CsrPieces& pieces, Stream stream) {
  const int64_t groups = ceil_div(p.m, kRows), bytes = kRows * p.s.k * static_cast<int64_t>(sizeof(T));
  int64_t blocks = ceil_div(4 * multiprocessors(), groups);
  if (blocks > pieces.chunks) blocks = pieces.chunks;
  const bool staged = bytes <= kStagedBytes && 2 * p.s.nnz >= blocks * p.s.k;
  if (!staged) blocks = pieces.chunks;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  auto kernel = staged ? csr_few_kernel<T, kRows, true> : csr_few_kernel<T, kRows, false>;
  LAUNCH(kernel, grid, dim3(kFewThreads), staged ? static_cast<size_t>(bytes) : 0, stream, p, pieces);
}

template <class T>
void launch_many(const CsrMatmul& p, const CsrPieces& pieces, Stream stream) {
  T* x = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + pieces_bytes(pieces, p.m));
  transpose<T>(p.x, x, p.m, p.s.k, stream);
  const int64_t warps = ceil_div(p.m, kWarpRows), of_block = warps < kManyWarps ? warps : kManyWarps;
  const dim3 grid(static_cast<unsigned>(pieces.chunks), static_cast<unsigned>(ceil_div(warps, of_block)));
  LAUNCH(csr_many_kernel<T>, grid, dim3(static_cast<unsigned>(32 * of_block)), 0, stream, p, pieces,
         static_cast<const T*>(x));
}

}  // namespace

int64_t csr_matmul_workspace(const CsrMatmul& p) {
  const int64_t transposed = p.m > kFewRows ? (p.s.k + 1) * p.m * element_bytes(p.x_dtype) : 0;
  return pieces_bytes(pieces_of(p), p.m) + transposed;
}

void csr_matmul(const CsrMatmul& p, Stream stream) {
  const CsrPieces pieces = pieces_of(p);
  dispatch_float(p.x_dtype, [&](auto element) {
    using T = decltype(element);
    if (p.m == 1)
      launch_few<T, 1>(p, pieces, stream);
    else if (p.m <= kFewRows)
      launch_few<T, 4>(p, pieces, stream);
    else
      launch_many<T>(p, pieces, stream);
  });
  if (pieces.chunks == 1) return;
  const int64_t blocks = ceil_div((pieces.chunks - 1) * p.m, 256);
  LAUNCH(finish_open_rows_kernel, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, p, pieces);
}

// ---- g @ S ----
//
// A warp owns 64 columns of S for 32 rows of g and walks down the rows of S; g^T makes each step a span. Sums of a
// column are added by one lane each, in an order that only S decides. Where a row's entries in the columns begin has
// been looked up by a kernel before.

constexpr int kOwnedColumns = 64, kOwnerWarps = 4;

// starts[t][i]: how many entries of row i lie before column t * 64, for t up to and with the number of tiles.
__global__ void __launch_bounds__(256) csr_starts_kernel(Csr s, int32_t* starts, int64_t tiles) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= (tiles + 1) * s.n) return;
  const int64_t row = at % s.n, tile = at / s.n;
  const int64_t column = tile * kOwnedColumns < s.k ? tile * kOwnedColumns : s.k;
  const int64_t first = csr_offset(s, row);
  int64_t low = first, high = csr_offset(s, row + 1);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (csr_column(s, middle) < column)
      low = middle + 1;
    else
      high = middle;
  }
  starts[at] = static_cast<int32_t>(low - first);
}

template <class T>
__global__ void __launch_bounds__(kOwnerWarps * 32)
    csr_transposed_kernel(CsrMatmulTransposed p, const T* g, const int32_t* starts, int64_t tiles) {
  SHARED(float, all_sums, [kOwnerWarps][kOwnedColumns][33]);
  const Csr& s = p.s;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  float (&sums)[kOwnedColumns][33] = all_sums[warp];
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kOwnerWarps + warp, tile = task % tiles;
  const int64_t j = task / tiles * 32 + lane, column0 = tile * kOwnedColumns;
  if (j - lane >= p.m) return;
  for (int c = 0; c < kOwnedColumns; ++c) sums[c][lane] = 0.0f;  // of its own lane only, until the end
  for (int64_t row0 = 0; row0 < s.n; row0 += 32) {
    const int64_t row = row0 + lane;
    int64_t begin = 0;
    int count = 0;
    if (row < s.n) {
      const int32_t skipped = starts[tile * s.n + row];
      begin = csr_offset(s, row) + skipped;
      count = starts[(tile + 1) * s.n + row] - skipped;
    }
    // Of 32 rows the first entries, then the second ones, ...: each lane fetches those of its row.
    for (int depth = 0;; ++depth) {
      uint32_t some = __ballot_sync(kFullWarp, depth < count);
      if (some == 0) break;
      float value = 0.0f;
      uint32_t column = 0;
      if (depth < count) {
        value = load_float(s.values, s.dtype, begin + depth);
        column = csr_column(s, begin + depth) - static_cast<uint32_t>(column0);
      }
      while (some != 0) {
        constexpr int kAhead = 4;
        float grad[kAhead];
        int who[kAhead];
        UNROLL for (int i = 0; i < kAhead; ++i) {
          who[i] = some != 0 ? __ffs(static_cast<int>(some)) - 1 : -1;
          some &= some - 1;
          grad[i] = who[i] >= 0 && j < p.m ? to_float(g[(row0 + who[i]) * p.m + j]) : 0.0f;
        }
        UNROLL for (int i = 0; i < kAhead; ++i) {
          if (who[i] < 0) continue;  // for all lanes alike
          const float v = __shfl_sync(kFullWarp, value, who[i]);
          const uint32_t c = __shfl_sync(kFullWarp, column, who[i]);
          if (c < kOwnedColumns) sums[c][lane] = fmaf(v, grad[i], sums[c][lane]);
        }
      }
    }
  }
  __syncwarp();
  for (int r = 0; r < 32 && j - lane + r < p.m; ++r) {
    for (int c = lane; c < kOwnedColumns && column0 + c < s.k; c += 32)
      static_cast<T*>(p.out)[(j - lane + r) * s.k + column0 + c] = from_float<T>(sums[c][r]);
  }
}

int64_t csr_transposed_workspace(const CsrMatmulTransposed& p) {
  const int64_t tiles = ceil_div(p.s.k, kOwnedColumns);
  return padded((p.s.n + 1) * p.m * element_bytes(p.dtype)) + (tiles + 1) * p.s.n * 4;
}

void csr_matmul_transposed(const CsrMatmulTransposed& p, Stream stream) {
  const int64_t tiles = ceil_div(p.s.k, kOwnedColumns);
  auto* starts =
      reinterpret_cast<int32_t*>(static_cast<char*>(p.workspace) + padded((p.s.n + 1) * p.m * element_bytes(p.dtype)));
  if (p.s.n > 0) {
    const int64_t blocks = ceil_div((tiles + 1) * p.s.n, 256);
    LAUNCH(csr_starts_kernel, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, p.s, starts, tiles);
  }
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    T* g = static_cast<T*>(p.workspace);
    transpose<T>(p.g, g, p.m, p.s.n, stream);
    const int64_t blocks = ceil_div(tiles * ceil_div(p.m, 32), kOwnerWarps);
    LAUNCH(csr_transposed_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kOwnerWarps * 32), 0, stream, p,
           static_cast<const T*>(g), static_cast<const int32_t*>(starts), tiles);
  });
}

// ---- the gradient of values: a warp takes 32 entries, its lanes the rows of g^T and x^T ----

constexpr int kGradThreads = 256;

template <class T>
__global__ void __launch_bounds__(kGradThreads) csr_grad_values_kernel(CsrGradValues p, const T* g, const T* x) {
  const Csr& s = p.s;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // Where an entry has no row or column, a row of zeros.
  int64_t row = s.n, column = s.k;
  if (e < s.nnz) {
    const int64_t found = csr_first_row(s, e + 1) - 1;
    const uint32_t named = csr_column(s, e);
    if (found >= 0 && e < csr_offset(s, found + 1) && named < s.k) {
      row = found;
      column = named;
    }
  }
  float own = 0.0f;
  for (int i = 0; i < 32; ++i) {
    const T* a = g + __shfl_sync(kFullWarp, row, i) * p.m;
    const T* b = x + __shfl_sync(kFullWarp, column, i) * p.m;
    float sum = 0.0f;
    for (int64_t j = lane; j < p.m; j += 32) sum = fmaf(to_float(a[j]), to_float(b[j]), sum);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
    if (i == lane) own = sum;
  }
  if (e < s.nnz) store_float(p.out, p.out_dtype, e, own);
}

int64_t csr_grad_values_workspace(const CsrGradValues& p) {
  return padded((p.s.n + 1) * p.m * element_bytes(p.dtype)) + padded((p.s.k + 1) * p.m * element_bytes(p.dtype));
}

void csr_grad_values(const CsrGradValues& p, Stream stream) {
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    T* g = static_cast<T*>(p.workspace);
    T* x = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + padded((p.s.n + 1) * p.m * element_bytes(p.dtype)));
    if (p.m > 0) {
      transpose<T>(p.g, g, p.m, p.s.n, stream);
      transpose<T>(p.x, x, p.m, p.s.k, stream);
    }
    const int64_t blocks = ceil_div(p.s.nnz, kGradThreads);
    LAUNCH(csr_grad_values_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kGradThreads), 0, stream, p,
           static_cast<const T*>(g), static_cast<const T*>(x));
  });
}

}  // namespace octavo::GPU_NS
