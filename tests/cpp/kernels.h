#pragma once
// What the tests of kernels share: the machines, comparison to the bit, inputs that hide bugs.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "blockwise/blockwise.h"
#include "check.h"
#include "common/numeric.h"
#include "common/random.h"
#include "int8/decompose.h"
#include "int8/gemm.h"
#include "int8/quantize.h"
#include "int8/transpose.h"
#include "nf4/nf4.h"
#include "optim8/optim8.h"
#include "outlier/outlier.h"
#include "sparse/sparse.h"
#include "spqr/spqr.h"

namespace kernels {
using namespace octavo;
using test::Buffer;
using test::uniform;

struct Backend {
  std::string name;
  std::function<void()> select;
  decltype(&cpu::quantize_rows) quantize_rows;
  decltype(&cpu::quantize_columns) quantize_columns;
  decltype(&cpu::quantize_tensor) quantize_tensor;
  decltype(&cpu::dequantize_rows) dequantize_rows;
  decltype(&cpu::encode_transposed) encode_transposed;
  decltype(&cpu::outlier_flags) outlier_flags;
  decltype(&cpu::compact_columns) compact_columns;
  decltype(&cpu::extract_columns) extract_columns;
  decltype(&cpu::decompose) decompose;
  decltype(&cpu::int8_gemm) int8_gemm;
  decltype(&cpu::quantize_blocks) quantize_blocks;
  decltype(&cpu::dequantize_blocks) dequantize_blocks;
  decltype(&cpu::optim_sums) optim_sums;
  decltype(&cpu::optim_step) optim_step;
  decltype(&cpu::csr_matmul_workspace) csr_matmul_workspace;
  decltype(&cpu::csr_transposed_workspace) csr_transposed_workspace;
  decltype(&cpu::csr_grad_values_workspace) csr_grad_values_workspace;
  decltype(&cpu::csr_matmul) csr_matmul;
  decltype(&cpu::csr_matmul_transposed) csr_matmul_transposed;
  decltype(&cpu::csr_grad_values) csr_grad_values;
  decltype(&cpu::spqr_workspace) spqr_workspace;
  decltype(&cpu::spqr_matmul) spqr_matmul;
  decltype(&cpu::spqr_dequantize) spqr_dequantize;
  decltype(&cpu::quantize_low_bit) quantize_low_bit;
  decltype(&cpu::dequantize_low_bit) dequantize_low_bit;
  decltype(&cpu::nf4_workspace) nf4_workspace;
  decltype(&cpu::nf4_matmul) nf4_matmul;
  decltype(&cpu::nf4_workspace_transposed) nf4_workspace_transposed;
  decltype(&cpu::nf4_matmul_transposed) nf4_matmul_transposed;

  bool simt() const { return name.starts_with("simt"); }
};

inline const Backend* backend;  // the one under test

// ---- comparison ----

inline bool same(float a, float b) {
  return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b));
}
inline bool same(Half a, Half b) {
  return same(to_float(a), to_float(b));
}
inline bool same(BFloat16 a, BFloat16 b) {
  return same(to_float(a), to_float(b));
}
template <class T>
bool same(T a, T b) {
  return a == b;
}
template <class T>
std::string text(T v) {
  if constexpr (std::is_integral_v<T>)
    return std::to_string(v);
  else
    return std::to_string(to_float(v));
}

template <class T>
void check_same(const Buffer<T>& got, const Buffer<T>& want, const std::string& what) {
  for (int64_t i = 0; i < want.size(); ++i) {
    if (same(got[i], want[i])) continue;
    CHECK_FOR(false, backend->name + " " + what + "[" + std::to_string(i) + "] of " + std::to_string(want.size()) +
                         " is " + text(got[i]) + ", not " + text(want[i]));
    return;
  }
  CHECK(true);
}

inline std::string shape(int64_t rows, int64_t cols, DType dtype) {
  const char* names[] = {" f32", " f16", " bf16", " i32"};
  return std::string("(") + std::to_string(rows) + ", " + std::to_string(cols) + names[static_cast<int>(dtype)] + ")";
}

// ---- inputs ----

constexpr float kThreshold = 6.0f;

inline float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(test::random());
}

// One row in nine of each kind that hides bugs; the others of very different size.
inline float hard_value(int64_t kind, int64_t j, int64_t special) {
  switch (kind % 9) {
    case 0: return uniform(0, 11) == 0 ? normal() * 30 : normal();  // outliers
    case 1: return j % 2 ? -0.0f : 0.0f;                            // nothing
    case 2: return j == special ? NAN : normal();                   // one NaN
    case 3: return j == special ? (j % 2 ? INFINITY : -INFINITY) : normal();
    case 4: return std::ldexp(normal(), -135);                                             // denormal: counts as zero
    case 5: return j == special ? 127.0f : static_cast<float>(uniform(-126, 126)) + 0.5f;  // ties
    case 6: return normal() * 1e30f;                                                       // Inf in fp16
    case 7: return (j % 2 ? -1.0f : 1.0f) * static_cast<float>(uniform(6, 50));            // nothing but outliers
    default: return normal() * std::ldexp(1.0f, uniform(-12, 2));
  }
}

template <class T>
Buffer<T> hard_matrix(int64_t rows, int64_t cols) {
  Buffer<T> x(rows * cols);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t kind = uniform(0, 8), special = cols ? uniform(0, static_cast<int>(cols) - 1) : 0;
    const float scale = std::ldexp(1.0f, uniform(-3, 1));
    for (int64_t j = 0; j < cols; ++j)
      x[i * cols + j] = from_float<T>(kind == 8 ? normal() * scale : hard_value(kind, j, special));
  }
  return x;
}

template <class F>
void for_each_dtype(const F& f) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) dispatch_float(dtype, f);
}

struct Shape {
  int64_t rows, cols;
};

// Empty, single, odd, prime, around vector and tile widths; more columns than a block holds in registers.
inline std::vector<Shape> shapes() {
  std::vector<Shape> all = {{0, 5}, {3, 0},  {1, 1},   {1, 31},   {3, 16},   {5, 33},    {7, 64},   {9, 100},
                            {2, 8}, {65, 7}, {64, 48}, {70, 130}, {130, 17}, {19, 1024}, {11, 1031}};
  all.push_back({2, 17000});
  all.push_back({3, 16640});
  return all;
}

// Columns of which about one in `every` is listed.
struct Listed {
  Buffer<uint8_t> flags;
  Buffer<int32_t> columns, count;
  Listed(int64_t cols, int every) : flags(cols), columns(cols), count(1) {
    int32_t found = 0;
    for (int64_t j = 0; j < cols; ++j) {
      flags[j] = every && uniform(0, every - 1) == 0 ? static_cast<uint8_t>(uniform(1, 255)) : uint8_t{0};
      if (flags[j]) columns[found++] = static_cast<int32_t>(j);
    }
    std::fill(columns.data() + found, columns.data() + cols, -1);
    count[0] = found;
  }

  // Exactly so many of the columns, at random.
  static Listed exactly(int64_t cols, int64_t wanted) {
    Listed listed(cols, 0);
    int32_t found = 0;
    for (int64_t j = 0; j < cols; ++j) {
      if (uniform(0, static_cast<int>(cols - j) - 1) >= wanted - found) continue;
      listed.flags[j] = 1;
      listed.columns[found++] = static_cast<int32_t>(j);
    }
    listed.count[0] = found;
    return listed;
  }
};

void test_gemm();       // kernels_gemm.cpp
void test_blockwise();  // kernels_optim.cpp
void test_optim();
void test_sparse();  // kernels_sparse.cpp
void test_spqr();    // kernels_spqr.cpp
void test_nf4();     // kernels_nf4.cpp

}  // namespace kernels
