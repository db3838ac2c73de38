#pragma once
// The loops of the sparse products over a vector type V (cpu/vec_*.h), once per ISA level. Serial.
//
// A panel is `lanes` rows of x in fp32, transposed: panel[c * lanes + l] = x[first + l, c], and a column more of zeros,
// which entries without a column read. An entry then multiplies whole vectors: no gather. One row alone is a panel of
// one lane, and its products are dot products of gathered elements.
#include "sparse/sparse.h"

namespace octavo::cpu {

constexpr int64_t kChunk = 4096;  // entries: 16 to 32 KiB, some microseconds of work; few rows are cut

// Rows [first, first + rows) of a matrix as a panel.
struct Panel {
  float* data;
  int64_t first, rows;
  int lanes;  // rows <= lanes
};

struct SparseLoops {
  int most_lanes;  // 16 and its doubles up to here, and 1, are what the loops take
  // Columns [begin, end) of matrix [.., cols] into the panel; the zeros with the last of them.
  void (*pack)(const void* matrix, DType dtype, int64_t cols, const Panel&, int64_t begin, int64_t end);
  // The rows of out that begin and end in the chunk, for the panel's rows; of the others, the sums of their pieces:
  // partial[0, lanes] of the head, partial[1, lanes] of the open row.
  void (*matmul)(const CsrMatmul&, const Panel& x, int64_t chunk, float* partial);
  // The panel's rows of out; sums: [(k + 1) * lanes] to work in.
  void (*transposed)(const CsrMatmulTransposed&, const Panel& g, float* sums);
  // out of the chunk's entries; panels of g and x with the same rows, `count` of each.
  void (*grad_values)(const CsrGradValues&, const Panel* g, const Panel* x, int64_t count, int64_t chunk);
};

namespace portable {
extern const SparseLoops sparse_loops;
}
namespace avx2 {
extern const SparseLoops sparse_loops;
}
namespace avx512 {
extern const SparseLoops sparse_loops;
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS
#include "sparse/row_dot.h"

namespace octavo::cpu {
namespace {

// V and, from the ISA file, transpose(F (&rows)[V::kWidth]).
template <class V>
struct CsrLoops {
  using F = typename V::F;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kTileRows = 16;      // rows of S whose sums are stored together, as vectors along out's rows
  static constexpr int kLongTile = 256;     // the same of one row of x, where a sum is all there is to a row of S
  static constexpr int64_t kShortRow = 16;  // entries, on average over a chunk

  static F multiply_add(F a, F b, F c) {
    if constexpr (kWidth == 1)
      return c + a * b;  // without an instruction for it, fmaf is a call
    else
      return V::fma(a, b, c);
  }

  // ---- panels ----

  template <class T>
  static void pack_as(const T* matrix, int64_t cols, const Panel& panel, int64_t begin, int64_t end) {
    const int64_t stride = panel.lanes;
    if (panel.lanes == 1) {
      for (int64_t c = begin; c < end; c += kWidth) {
        const int n = static_cast<int>(end - c < kWidth ? end - c : kWidth);
        V::store(panel.data + c, V::load(matrix + panel.first * cols + c, n), n);
      }
      return;
    }
    for (int64_t c = begin; c < end; c += kWidth) {
      const int n = static_cast<int>(end - c < kWidth ? end - c : kWidth);
      for (int64_t lane = 0; lane < stride; lane += kWidth) {
        F block[kWidth];
        for (int i = 0; i < kWidth; ++i)
          block[i] = lane + i < panel.rows ? V::load(matrix + (panel.first + lane + i) * cols + c, n) : V::set(0.0f);
        transpose(block);
        for (int i = 0; i < n; ++i) V::store(panel.data + (c + i) * stride + lane, block[i]);
      }
    }
  }

  static void pack(const void* matrix, DType dtype, int64_t cols, const Panel& panel, int64_t begin, int64_t end) {
    dispatch_float(dtype,
                   [&](auto type) { pack_as(static_cast<const decltype(type)*>(matrix), cols, panel, begin, end); });
    if (end != cols) return;
    for (int lane = 0; lane < panel.lanes; ++lane) panel.data[cols * panel.lanes + lane] = 0.0f;
  }

  // ---- a chunk's entries, ready for use: values in fp32, 0 of entries without a column, whose column becomes k ----

  struct Entries {
    alignas(64) float converted[kChunk];
    alignas(64) uint32_t clamped[kChunk];

    // Calls f(values, columns) with uint16_t* or uint32_t* for the columns, null for the values where there are none.
    template <class Use>
    void with(const Csr& s, int64_t begin, int64_t count, const Use& f) {
      const float* values = s.values ? values_of(s, begin, count) : nullptr;
      const auto limit = static_cast<uint32_t>(s.k);
      const auto checked = [&](const auto* columns) {
        if (count == 0 || most_column(columns, count) < limit) return f(values, columns);
        if (values && values != converted) __builtin_memcpy(converted, values, count * sizeof(float));
        for (int64_t e = 0; e < count; ++e) {
          clamped[e] = columns[e] < limit ? columns[e] : limit;
          if (columns[e] >= limit) converted[e] = 0.0f;
        }
        f(values ? converted : nullptr, static_cast<const uint32_t*>(clamped));
      };
      if (s.narrow)
        checked(static_cast<const uint16_t*>(s.columns) + begin);
      else
        checked(static_cast<const uint32_t*>(s.columns) + begin);
    }

   private:
    const float* values_of(const Csr& s, int64_t begin, int64_t count) {
      if (s.dtype == DType::f32) return static_cast<const float*>(s.values) + begin;
      dispatch_float(s.dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(s.values) + begin;
        int64_t e = 0;
        for (; e + kWidth <= count; e += kWidth) V::store(converted + e, V::load(from + e));
        if (const int n = static_cast<int>(count - e); n > 0) V::store(converted + e, V::load(from + e, n), n);
      });
      return converted;
    }
  };

  // ---- x @ S^T ----

  // The sums of a piece of a row, for R vectors of lanes. Several chains of sums, so that additions need not wait.
  // Loops over chains and vectors are unrolled, or the sums would live in memory.
  template <int R, class C>
  static void accumulate(const float* values, const C* columns, int64_t count, const float* panel, float* sums) {
    constexpr int64_t kLanes = R * kWidth;
    constexpr int kChains = kWidth == 1 ? 1 : kWidth == 8 ? (R == 2 ? 4 : 2) : (R >= 4 ? 1 : 4 / R);
    F sum[kChains * R];
#pragma GCC unroll 16
    for (int i = 0; i < kChains * R; ++i) sum[i] = V::set(0.0f);
    const auto add = [&](int64_t e, F* to) __attribute__((always_inline)) {
      const F value = V::set(values[e]);
      const float* from = panel + static_cast<int64_t>(columns[e]) * kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) to[r] = multiply_add(value, V::load(from + r * kWidth), to[r]);
    };
    int64_t e = 0;
    for (; e + kChains <= count; e += kChains)
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add(e + chain, sum + chain * R);
    for (; e < count; ++e) add(e, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum[r] = V::add(sum[r], sum[chain * R + r]);
      V::store(sums + r * kWidth, sum[r]);
    }
  }

  // out[first ..., row ... row + count) from tile[kTileRows, lanes]; what csr_finish does, in vectors.
  template <class Out>
  static void finish_tile(const CsrMatmul& p, const Panel& x, float* tile, int64_t row, int64_t count) {
    float bias[kLongTile];
    for (int64_t i = 0; p.bias && i < count; ++i) bias[i] = load_float(p.bias, p.bias_dtype, row + i);
    const auto finish = [&](int64_t lane, int64_t i, F sum) {
      const int n = static_cast<int>(count - i < kWidth ? count - i : kWidth);
      Out* out = static_cast<Out*>(p.out) + (x.first + lane) * p.s.n + row + i;
      if (p.bias) sum = V::add(sum, V::load(bias + i, n));
      if (p.add) sum = V::add(sum, V::load(out, n));
      V::store(out, sum, n);
    };
    for (int64_t i = 0; i < count; i += kWidth) {
      if (x.lanes == 1) {
        finish(0, i, V::load(tile + i));
        continue;
      }
      for (int64_t lane = 0; lane < x.rows; lane += kWidth) {
        F block[kWidth];
        for (int e = 0; e < kWidth; ++e) block[e] = V::load(tile + (i + e) * x.lanes + lane);
        transpose(block);
        const int64_t n = x.rows - lane < kWidth ? x.rows - lane : kWidth;
        for (int64_t e = 0; e < n; ++e) finish(lane + e, i, block[e]);
      }
    }
  }

  static void row_ends(const Csr& s, int64_t row, int64_t count, int64_t* ends) {
    if (s.wide)
      for (int64_t i = 0; i < count; ++i) ends[i] = static_cast<const int64_t*>(s.offsets)[row + i + 1];
    else
      for (int64_t i = 0; i < count; ++i) ends[i] = static_cast<const int32_t*>(s.offsets)[row + i + 1];
  }

  // Dot products of short rows: one loop with as few branches as can be, since no row's end can be foreseen.
  template <class C, class E>
  __attribute__((noinline)) static void short_dots(const float* values, const C* columns, int64_t e, const E* ends,
                                                   int64_t base, int64_t count, const float* x, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t end = ends[i] - base;
      float sum = 0.0f;
      if (__builtin_expect(end - e < 4 * kShortRow, 1)) {
#pragma GCC unroll 1
        for (; e < end; ++e) {
          const float of_x = x[static_cast<uint32_t>(columns[e])];
          if constexpr (kWidth == 1)
            sum += values[e] * of_x;
          else
            sum = __builtin_fmaf(values[e], of_x, sum);
        }
      } else {
        sum = row_dot(values + e, columns + e, end - e, x);
      }
      out[i] = sum;
      e = end;
    }
  }

  template <int R, class Out>
  static void matmul_as(const CsrMatmul& p, const Panel& x, int64_t index, float* partial) {
    constexpr int64_t kLanes = R == 0 ? 1 : R * kWidth;
    Entries entries;
    const CsrChunk c = csr_chunk(p.s, index, kChunk);
    constexpr int64_t kRows = R == 0 ? kLongTile : kTileRows;
    alignas(64) float tile[kRows * kLanes];
    entries.with(p.s, c.begin, c.end - c.begin, [&](const float* values, const auto* columns) {
      const auto piece = [&](int64_t begin, int64_t end, float* sums) __attribute__((always_inline)) {
        const int64_t at = begin - c.begin, count = end > begin ? end - begin : 0;
        if constexpr (R == 0)
          *sums = row_dot(values + at, columns + at, count, x.data);
        else
          accumulate<R>(values + at, columns + at, count, x.data, sums);
      };
      if (c.head_end > c.begin) piece(c.begin, c.head_end, partial);
      const int64_t whole = c.rows - c.open;
      int64_t begin = csr_offset(p.s, c.first_row);
      const bool short_rows = c.end - c.begin < kShortRow * (whole - c.first_row);
      for (int64_t row = c.first_row; row < whole; row += kRows) {
        const int64_t count = whole - row < kRows ? whole - row : kRows;
        if (R == 0 && short_rows) {
          const auto dots = [&](const auto* ends) {
            short_dots(values, columns, begin - c.begin, ends, c.begin, count, x.data, tile);
          };
          if (p.s.wide)
            dots(static_cast<const int64_t*>(p.s.offsets) + row + 1);
          else
            dots(static_cast<const int32_t*>(p.s.offsets) + row + 1);
          begin = csr_offset(p.s, row + count);
        } else {
          int64_t ends[kRows];
          row_ends(p.s, row, count, ends);
          for (int64_t i = 0; i < count; ++i) {
            piece(begin, ends[i], tile + i * kLanes);
            begin = ends[i];
          }
        }
        finish_tile<Out>(p, x, tile, row, count);
      }
      if (c.open) piece(begin, c.end, partial + kLanes);
    });
  }

  static void matmul(const CsrMatmul& p, const Panel& x, int64_t chunk, float* partial) {
    dispatch_float(p.out_dtype, [&](auto type) {
      using Out = decltype(type);
      switch (x.lanes) {
        case 1: return matmul_as<0, Out>(p, x, chunk, partial);
        case 16: return matmul_as<16 / kWidth, Out>(p, x, chunk, partial);
        case 32:
          if constexpr (kWidth > 1) return matmul_as<32 / kWidth, Out>(p, x, chunk, partial);
          return;
        default:
          if constexpr (kWidth == 16) return matmul_as<64 / kWidth, Out>(p, x, chunk, partial);
      }
    });
  }

  // ---- g @ S ----

  template <int R>
  static void scatter(const CsrMatmulTransposed& p, const Panel& g, float* sums) {
    constexpr int64_t kLanes = R * kWidth;
    for (int64_t at = 0; at < (p.s.k + 1) * kLanes; at += kWidth) V::store(sums + at, V::set(0.0f));
    Entries entries;
    int64_t row = 0, end = p.s.n > 0 ? csr_offset(p.s, 1) : 0;
    for (int64_t first = 0; first < p.s.nnz; first += kChunk) {
      const int64_t count = p.s.nnz - first < kChunk ? p.s.nnz - first : kChunk;
      entries.with(p.s, first, count, [&](const float* values, const auto* columns) {
        for (int64_t e = first; e < first + count;) {
          while (row < p.s.n && end <= e) {
            ++row;
            end = row < p.s.n ? csr_offset(p.s, row + 1) : end;
          }
          if (row >= p.s.n) return;
          F grad[R];
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) grad[r] = V::load(g.data + row * kLanes + r * kWidth);
          const int64_t stop = end < first + count ? end : first + count;
          for (; e < stop; ++e) {
            const F value = V::set(values[e - first]);
            float* to = sums + static_cast<int64_t>(columns[e - first]) * kLanes;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
              V::store(to + r * kWidth, multiply_add(value, grad[r], V::load(to + r * kWidth)));
          }
        }
      });
    }
  }

  template <class T>
  static void unpack(const float* sums, const Panel& panel, int64_t cols, T* out) {
    for (int64_t lane = 0; lane < panel.rows; lane += kWidth) {
      const int64_t rows = panel.rows - lane < kWidth ? panel.rows - lane : kWidth;
      for (int64_t c = 0; c < cols; c += kWidth) {
        const int n = static_cast<int>(cols - c < kWidth ? cols - c : kWidth);
        F block[kWidth];
        for (int i = 0; i < kWidth; ++i) block[i] = i < n ? V::load(sums + (c + i) * panel.lanes + lane) : V::set(0.0f);
        transpose(block);
        for (int64_t i = 0; i < rows; ++i) V::store(out + (panel.first + lane + i) * cols + c, block[i], n);
      }
    }
  }

  static void transposed(const CsrMatmulTransposed& p, const Panel& g, float* sums) {
    scatter<16 / kWidth>(p, g, sums);
    dispatch_float(p.dtype, [&](auto type) { unpack(sums, g, p.s.k, static_cast<decltype(type)*>(p.out)); });
  }

  // ---- the gradient of values ----

  // Adds to sums[e] the product of g's row and x's column of each entry, over the lanes of one panel.
  template <int R, class C>
  static void dot_rows(const Csr& s, const CsrChunk& c, const C* columns, const float* g, const float* x, float* sums) {
    constexpr int64_t kLanes = R * kWidth;
    int64_t row = c.first_row - (c.head_end > c.begin);  // of entry c.begin
    int64_t end = row < s.n ? csr_offset(s, row + 1) : c.end;
    for (int64_t e = c.begin; e < c.end; e += kWidth) {
      const int n = static_cast<int>(c.end - e < kWidth ? c.end - e : kWidth);
      F block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = V::set(0.0f);
        if (i >= n) continue;
        while (row < s.n && end <= e + i) {
          ++row;
          end = row < s.n ? csr_offset(s, row + 1) : end;
        }
        if (row >= s.n) continue;
        const float* a = g + row * kLanes;
        const float* b = x + static_cast<int64_t>(columns[e + i - c.begin]) * kLanes;
        for (int r = 0; r < R; ++r) block[i] = multiply_add(V::load(a + r * kWidth), V::load(b + r * kWidth), block[i]);
      }
      transpose(block);
      F sum = V::load(sums + e - c.begin, n);
      for (int i = 0; i < kWidth; ++i) sum = V::add(sum, block[i]);
      V::store(sums + e - c.begin, sum, n);
    }
  }

  static void grad_values(const CsrGradValues& p, const Panel* g, const Panel* x, int64_t count, int64_t index) {
    Entries entries;
    const CsrChunk c = csr_chunk(p.s, index, kChunk);
    float sums[kChunk];
    for (int64_t e = 0; e < c.end - c.begin; ++e) sums[e] = 0.0f;
    entries.with(p.s, c.begin, c.end - c.begin, [&](const float*, const auto* columns) {
      for (int64_t panel = 0; panel < count; ++panel)
        dot_rows<16 / kWidth>(p.s, c, columns, g[panel].data, x[panel].data, sums);
    });
    dispatch_float(p.out_dtype, [&](auto type) {
      auto* out = static_cast<decltype(type)*>(p.out) + c.begin;
      for (int64_t e = 0; e < c.end - c.begin; e += kWidth) {
        const int n = static_cast<int>(c.end - c.begin - e < kWidth ? c.end - c.begin - e : kWidth);
        V::store(out + e, V::load(sums + e, n), n);
      }
    });
  }

  static constexpr SparseLoops table = {kWidth == 1 ? 16 : kWidth * 4, pack, matmul, transposed, grad_values};
};

}  // namespace
}  // namespace octavo::cpu
#endif  // OCTAVO_ISA_LOOPS
