// The int8 product on the machine under test, against plain loops over the definition in int8/gemm.h: equal bits.
#include "kernels.h"

namespace kernels {
namespace {

struct GemmCase {
  int64_t m, n, k;
  DType out = DType::f32;
  bool bias = false, one_a_scale = false, one_b_scale = false;
  int outliers = -1;         // -1: no x; 0: x, but none listed; else about one column in so many
  int64_t exactly = -1;      // with outliers = 0: so many of the columns
  bool kept = false;         // some outlier columns have 16-bit weights
  DType other = DType::f32;  // of bias and kept weights
  bool extreme = false;      // all codes at the ends of their range
};

// n numbers of the dtype, as the raw memory that a params struct points to.
Buffer<char> floats(int64_t n, DType dtype, const std::function<float()>& value) {
  const int64_t element = dtype == DType::f32 ? 4 : 2;
  Buffer<char> data(n * element, element);
  dispatch_float(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < n; ++i) {
      const T v = from_float<T>(value());
      std::memcpy(data.data() + i * static_cast<int64_t>(sizeof v), &v, sizeof v);
    }
  });
  return data;
}

template <class T>
void run_gemm(const GemmCase& c) {
  Buffer<int8_t> a(c.m * c.k), b(c.n * c.k);
  const auto code = [&](int low) { return c.extreme ? (uniform(0, 1) ? low : 127) : uniform(low, 127); };
  for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<int8_t>(code(-127));
  for (int64_t i = 0; i < b.size(); ++i) b[i] = static_cast<int8_t>(code(-128));
  Buffer<float> a_scale(c.one_a_scale ? 1 : c.m), b_scale(c.one_b_scale ? 1 : c.n);
  for (int64_t i = 0; i < a_scale.size(); ++i) a_scale[i] = i == 2 ? NAN : i == 3 ? 0.0f : std::fabs(normal()) * 0.01f;
  for (int64_t j = 0; j < b_scale.size(); ++j) b_scale[j] = std::fabs(normal()) * 0.01f;
  const Buffer<char> bias = floats(c.n, c.other, normal);
  const Buffer<char> x = floats(c.outliers >= 0 ? c.m * c.k : 0, c.out, [] { return normal() * 8; });
  const Listed listed =
      c.exactly >= 0 ? Listed::exactly(c.k, c.exactly) : Listed(c.outliers >= 0 ? c.k : 0, std::max(c.outliers, 0));
  const int64_t slots = 5;
  Buffer<int32_t> slot(c.k);
  for (int64_t j = 0; j < c.k; ++j) slot[j] = uniform(-2, slots + 1);  // outside [0, slots): not kept
  const Buffer<char> weight = floats(slots * c.n, c.other, normal);
  for (int64_t i = 0; i < a.size(); ++i)
    if (c.outliers >= 0 && listed.flags[i % c.k]) a[i] = 0;

  Buffer<T> out(c.m * c.n), want(c.m * c.n);
  Int8Gemm p{};
  p.a = a.data();
  p.b = b.data();
  p.out = out.data();
  p.out_dtype = c.out;
  p.m = c.m;
  p.n = c.n;
  p.k = c.k;
  if (c.out != DType::i32) {
    p.a_scale = a_scale.data();
    p.b_scale = b_scale.data();
    p.a_scale_stride = !c.one_a_scale;
    p.b_scale_stride = !c.one_b_scale;
  }
  if (c.bias) p.bias = bias.data();
  p.bias_dtype = p.outlier_weight_dtype = c.other;
  if (c.outliers >= 0) {
    p.x = x.data();
    p.columns = listed.columns.data();
    p.count = listed.count.data();
    if (c.kept) {
      p.outlier_slot = slot.data();
      p.outlier_weight = weight.data();
      p.outlier_slots = slots;
    }
  }
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) {
      int64_t acc = 0;
      for (int64_t e = 0; e < c.k; ++e) acc += a[i * c.k + e] * b[j * c.k + e];
      if constexpr (std::is_same_v<T, int32_t>) {
        want[i * c.n + j] = static_cast<int32_t>(acc);
      } else {
        const float row = a_scale[c.one_a_scale ? 0 : i];
        float v = scale_row(static_cast<int32_t>(acc), c.outliers >= 0 ? row : 1.0f);
        for (const bool kept : {false, true}) {
          if (kept)
            v = scale_column(v, (c.outliers >= 0 ? 1.0f : row) * b_scale[c.one_b_scale ? 0 : j],
                             c.bias ? load_float(bias.data(), c.other, j) : 0.0f);
          for (int32_t e = 0; c.outliers >= 0 && e < listed.count[0]; ++e) {
            const int32_t column = listed.columns[e];
            if ((c.kept && slot[column] >= 0 && slot[column] < slots) != kept) continue;
            const float w = kept ? load_float(weight.data(), c.other, slot[column] * c.n + j)
                                 : static_cast<float>(b[j * c.k + column]);
            v = std::fma(load_float(x.data(), c.out, i * c.k + column), w, v);
          }
        }
        want[i * c.n + j] = from_float<T>(v);
      }
    }
  backend->int8_gemm(p, nullptr);
  check_same(out, want,
             "int8_gemm" + shape(c.m, c.n, c.out) + " k = " + std::to_string(c.k) + ", outliers " +
                 std::to_string(listed.count.size() ? listed.count[0] : 0));
}

void test_gemm_case(const GemmCase& c) {
  if (test::left_out()) return;
  if (c.out == DType::i32) return run_gemm<int32_t>(c);
  dispatch_float(c.out, [&](auto type) { run_gemm<decltype(type)>(c); });
}

// Each edge of each tile: one below, at and above, in rows, columns and k. Tiles of the CPU (96 x 64, groups of 6 and
// 16 rows, 64 and 2048 of k) and of the GPU.
void test_gemm_edges() {
  const struct {
    int64_t m, n, k;
  } tiles[] = {{6, 4, 64}, {16, 16, 64}, {64, 32, 128}, {64, 64, 64}, {96, 64, 64}, {128, 128, 64}};
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  for (const auto [m, n, k] : tiles)
    for (int edge = 0; edge < 9; ++edge) {
      const int64_t rows = m + edge % 3 - 1, cols = n + edge / 3 - 1;
      for (const int64_t depth : {k - 16, k - 1, k, k + 1, k + 16}) {
        const DType out = dtypes[uniform(0, 2)];
        test_gemm_case({.m = rows, .n = cols, .k = depth, .out = DType::i32});
        test_gemm_case({.m = rows, .n = cols, .k = depth, .out = out, .bias = true, .outliers = 9, .other = out});
      }
    }
  for (int64_t k = 0; k <= 65; ++k) test_gemm_case({.m = 19, .n = 18, .k = k, .out = DType::i32});
  for (const int64_t m : {1, 20, 70}) test_gemm_case({.m = m, .n = 70, .k = 0, .bias = true, .outliers = 0});
  for (int64_t m = 1; m <= 17; ++m)
    test_gemm_case(
        {.m = m, .n = 35, .k = 208, .out = dtypes[m % 3], .bias = true, .outliers = 30, .other = DType::f16});
  for (const int64_t m : {3, 40, 130})
    for (const int64_t count : {0, 1, 7, 8, 9, 15, 16, 17, 160})
      for (const bool kept : {false, true})
        for (const DType out : dtypes)
          test_gemm_case({.m = m,
                          .n = 136,
                          .k = 160,
                          .out = out,
                          .outliers = 0,
                          .exactly = count,
                          .kept = kept,
                          .other = kept ? out : DType::f32});
}

}  // namespace

void test_gemm() {
  const struct {
    int64_t m, n, k;
  } sizes[] = {{1, 1, 1},     {1, 70, 33},    {2, 3, 5},      {1, 65, 64},   {4, 33, 1040}, {3, 70, 512},
               {5, 129, 64},  {15, 64, 16},   {16, 16, 64},   {17, 33, 65},  {33, 65, 31},  {64, 64, 128},
               {97, 66, 100}, {130, 131, 77}, {40, 20, 1028}, {30, 60, 416}, {65, 48, 272}, {140, 136, 208}};
  for (const auto [m, n, k] : sizes) {
    for (const DType other : {DType::f32, DType::f16, DType::bf16}) {
      test_gemm_case({.m = m, .n = n, .k = k, .out = other, .bias = true, .other = other});
      test_gemm_case({.m = m, .n = n, .k = k, .out = other, .outliers = 9, .kept = true, .other = other});
    }
    test_gemm_case({.m = m, .n = n, .k = k, .out = DType::i32});
    test_gemm_case({.m = m, .n = n, .k = k, .one_a_scale = true, .one_b_scale = true, .outliers = 0});
    test_gemm_case({.m = m, .n = n, .k = k, .bias = true, .one_b_scale = true, .outliers = 2, .other = DType::bf16});
    test_gemm_case({.m = m, .n = n, .k = k, .out = DType::f16, .bias = true, .outliers = 1, .kept = true});
  }
  if (test::unaligned) return;
  test_gemm_edges();
  // The largest sums, where one product too many would leave int32.
  test_gemm_case({.m = 3, .n = 5, .k = backend->simt() ? 2047 : kMaxK, .out = DType::i32, .extreme = true});
  test_gemm_case({.m = 20, .n = 5, .k = backend->simt() ? 1025 : 40001, .out = DType::i32, .extreme = true});
}

}  // namespace kernels
