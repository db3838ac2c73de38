#pragma once
// What gemm_cpu.cpp asks of an ISA level, and the epilogue, written once over a vector type V (cpu/vec_*.h).
#include "int8/gemm.h"

namespace octavo::cpu {

// One task of the CPU GEMM: rows [i0, i0 + rows) x columns [j0, j0 + cols) of the output.
struct GemmTile {
  const Int8Gemm* p;
  const int8_t* a;  // p->a, or what pack() made of it
  int64_t i0 = 0, j0 = 0, rows = 0, cols = 0;
  int32_t* acc = nullptr;  // [rows, kTileN] the integer sums
  float* sum = nullptr;    // [rows, kTileN] what becomes of them
};

constexpr int64_t kPackK = 64;
constexpr int64_t kTileM = 96, kTileN = 64;  // an A block of 96 x 4096 codes stays in L2 while B passes through L1
constexpr int64_t kOutlierChunk = 128;       // outlier columns gathered at a time: 128 * 64 floats fit in L1

struct GemmLoops {
  // The form of a that multiply() reads, made of groups of pack_rows rows (a divisor of kTileM), k padded to a
  // multiple of kPackK; null: a itself. Codes outside a are packed too, so that a kernel needs no case for the edge.
  void (*pack)(const Int8Gemm&, int8_t* packed, int64_t begin, int64_t end);  // groups [begin, end)
  int64_t pack_rows;
  void (*multiply)(const GemmTile&);    // fills acc
  void (*scale_rows)(const GemmTile&);  // acc -> sum
  // sum += the outlier columns: w[c, j] = the weights of columns[c], gathered.
  void (*add_outliers)(const GemmTile&, const int32_t* columns, int64_t count, const float* w);
  void (*scale_columns)(const GemmTile&, const float* bias);  // in sum; bias fp32 [kTileN], or null
  void (*store)(const GemmTile&);                             // sum, or with out_dtype i32 acc, to out
};

namespace portable {
extern const GemmLoops gemm_loops;
}
namespace avx2 {
extern const GemmLoops gemm_loops;
}
namespace avx512 {
extern const GemmLoops gemm_loops;
}
namespace amx {
extern const GemmLoops gemm_loops;
}

#ifdef OCTAVO_ISA_LOOPS
namespace {

template <class V>
struct GemmEpilogue {
  using F = typename V::F;

  static float a_scale(const GemmTile& t, int64_t i) { return t.p->a_scale[(t.i0 + i) * t.p->a_scale_stride]; }

  static void scale_rows(const GemmTile& t) {
    for (int64_t i = 0; i < t.rows; ++i) {
      const F first = V::set(t.p->x ? a_scale(t, i) : 1.0f);
      for (int64_t j = i * kTileN; j < (i + 1) * kTileN; j += V::kWidth)
        V::store(t.sum + j, V::mul(V::load(t.acc + j), first));
    }
  }

  static void add_outliers(const GemmTile& t, const int32_t* columns, int64_t count, const float* w) {
    const Int8Gemm& p = *t.p;
    dispatch_float(p.out_dtype, [&](auto type) {
      const auto* x = static_cast<const decltype(type)*>(p.x) + t.i0 * p.k;
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t c = 0; c < count; ++c) {
          const F value = V::set(to_float(x[i * p.k + columns[c]]));
          float* sum = t.sum + i * kTileN;
          const float* row = w + c * kTileN;
          for (int64_t j = 0; j < kTileN; j += V::kWidth)
            V::store(sum + j, V::fma(value, V::load(row + j), V::load(sum + j)));
        }
    });
  }

  static void scale_columns(const GemmTile& t, const float* bias) {
    const float* scale = t.p->b_scale + t.j0;
    for (int64_t j = 0; j < t.cols; j += V::kWidth) {
      const int n = t.cols - j < V::kWidth ? static_cast<int>(t.cols - j) : V::kWidth;
      const F b_scale = t.p->b_scale_stride ? V::load(scale + j, n) : V::set(t.p->b_scale[0]);
      const F add = bias ? V::load(bias + j) : V::set(0.0f);
      for (int64_t i = 0; i < t.rows; ++i) {
        float* sum = t.sum + i * kTileN + j;
        const F last = V::set(t.p->x ? 1.0f : a_scale(t, i));
        V::store(sum, V::fma(V::load(sum), V::mul(last, b_scale), add));
      }
    }
  }

  static void store(const GemmTile& t) {
    const Int8Gemm& p = *t.p;
    if (p.out_dtype == DType::i32) {
      for (int64_t i = 0; i < t.rows; ++i)
        __builtin_memcpy(static_cast<int32_t*>(p.out) + (t.i0 + i) * p.n + t.j0, t.acc + i * kTileN,
                         t.cols * sizeof(int32_t));
      return;
    }
    dispatch_float(p.out_dtype, [&](auto type) {
      for (int64_t i = 0; i < t.rows; ++i) {
        auto* out = static_cast<decltype(type)*>(p.out) + (t.i0 + i) * p.n + t.j0;
        for (int64_t j = 0; j < t.cols; j += V::kWidth)
          V::store(out + j, V::load(t.sum + i * kTileN + j),
                   t.cols - j < V::kWidth ? static_cast<int>(t.cols - j) : V::kWidth);
      }
    });
  }

  // The table of an ISA level, which brings its own pack and multiply.
  static constexpr GemmLoops with(decltype(GemmLoops::pack) pack, int64_t pack_rows,
                                  decltype(GemmLoops::multiply) multiply) {
    return {pack, pack_rows, multiply, scale_rows, add_outliers, scale_columns, store};
  }
};

}  // namespace
#endif  // OCTAVO_ISA_LOOPS

}  // namespace octavo::cpu
