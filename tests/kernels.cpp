// Every kernel of the contracts on every machine at hand, against plain loops over the definitions of common/numeric.h:
// equal bits. `kernels_test [PREFIX [N]]` runs the backends whose name starts with PREFIX (cpu-avx2, simt-reverse,
// ...), and with N one in N of the many products.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "check.h"
#include "common/numeric.h"
#include "cpu/isa.h"
#include "int8/decompose.h"
#include "int8/gemm.h"
#include "int8/quantize.h"
#include "outlier/outlier.h"
#include "simt/order.h"

namespace {
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
  decltype(&cpu::outlier_flags) outlier_flags;
  decltype(&cpu::compact_columns) compact_columns;
  decltype(&cpu::extract_columns) extract_columns;
  decltype(&cpu::decompose) decompose;
  decltype(&cpu::int8_gemm) int8_gemm;

  bool simt() const { return name.starts_with("simt"); }
};

#define KERNELS_OF(machine)                                                                              \
  machine::quantize_rows, machine::quantize_columns, machine::quantize_tensor, machine::dequantize_rows, \
      machine::outlier_flags, machine::compact_columns, machine::extract_columns, machine::decompose,    \
      machine::int8_gemm

std::vector<Backend> backends() {
  std::vector<Backend> all;
  for (const cpu::Isa level : cpu::available())
    all.push_back({std::string("cpu-") + cpu::name_of(level), [=] { cpu::set_isa(level); }, KERNELS_OF(cpu)});
  for (const char* order : {"forward", "reverse", "random:1"})
    all.push_back({std::string("simt-") + order, [=] { simt::set_order(order); }, KERNELS_OF(simt)});
  return all;
}

const Backend* backend;

// ---- comparison ----

bool same(float a, float b) {
  return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b));
}
bool same(Half a, Half b) {
  return same(to_float(a), to_float(b));
}
bool same(BFloat16 a, BFloat16 b) {
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

std::string shape(int64_t rows, int64_t cols, DType dtype) {
  const char* names[] = {" f32", " f16", " bf16", " i32"};
  return std::string("(") + std::to_string(rows) + ", " + std::to_string(cols) + names[static_cast<int>(dtype)] + ")";
}

// ---- inputs ----

constexpr float kThreshold = 6.0f;

float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(test::random());
}

// One row in nine of each kind that hides bugs; the others of very different size.
float hard_value(int64_t kind, int64_t j, int64_t special) {
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
std::vector<Shape> shapes() {
  std::vector<Shape> all = {{0, 5}, {3, 0},  {1, 1},   {1, 31},   {3, 16},   {5, 33},    {7, 64},   {9, 100},
                            {2, 8}, {65, 7}, {64, 48}, {70, 130}, {130, 17}, {19, 1024}, {11, 1031}};
  all.push_back({2, 17000});
  all.push_back({3, 16640});
  return all;
}

// ---- quantization ----

template <class T>
void test_rows(Shape s, float threshold, bool with_skip) {
  const Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  Buffer<int8_t> codes(x.size()), want_codes(x.size());
  Buffer<float> scale(s.rows), want_scale(s.rows);
  Buffer<uint8_t> skip(with_skip ? s.cols : 0);
  for (int64_t j = 0; j < skip.size(); ++j) skip[j] = static_cast<uint8_t>(uniform(0, 4) ? 0 : uniform(1, 255));
  for (int64_t i = 0; i < s.rows; ++i) {
    const auto dropped = [&](float v, int64_t j) {
      return (threshold > 0 && is_outlier(v, threshold)) || (with_skip && skip[j] != 0);
    };
    uint32_t absmax = 0;
    for (int64_t j = 0; j < s.cols; ++j) {
      const float v = to_float(x[i * s.cols + j]);
      if (!dropped(v, j)) absmax = std::max(absmax, abs_bits(v));
    }
    want_scale[i] = scale_of(absmax);
    for (int64_t j = 0; j < s.cols; ++j) {
      const float v = to_float(x[i * s.cols + j]);
      want_codes[i * s.cols + j] = dropped(v, j) ? int8_t{0} : encode(v, inverse_scale_of(absmax));
    }
  }
  const DType dtype = dtype_of<T>::value;
  backend->quantize_rows(
      {x.data(), dtype, codes.data(), scale.data(), with_skip ? skip.data() : nullptr, threshold, s.rows, s.cols},
      nullptr);
  const std::string where = "quantize_rows" + shape(s.rows, s.cols, dtype);
  check_same(scale, want_scale, where + ".scale");
  check_same(codes, want_codes, where + ".codes");

  Buffer<T> back(x.size()), want_back(x.size());
  for (int64_t i = 0; i < x.size(); ++i)
    want_back[i] = from_float<T>(static_cast<float>(want_codes[i]) * want_scale[i / s.cols]);
  backend->dequantize_rows({want_codes.data(), want_scale.data(), back.data(), dtype, s.rows, s.cols}, nullptr);
  check_same(back, want_back, "dequantize_rows" + shape(s.rows, s.cols, dtype));
}

template <class T>
void test_columns(Shape s, bool with_rows) {
  const Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  const int64_t row_size = with_rows ? x.size() : 0, rows = with_rows ? s.rows : 0;
  Buffer<int8_t> codes(x.size()), want_codes(x.size()), row_codes(row_size), want_row_codes(row_size);
  Buffer<float> scale(s.cols), want_scale(s.cols), row_scale(rows), want_row_scale(rows);
  Buffer<uint32_t> absmax(s.cols);
  const auto quantize = [&](int64_t count, auto index, Buffer<int8_t>& to, float* scale_to) {
    uint32_t most = 0;
    for (int64_t e = 0; e < count; ++e) most = std::max(most, abs_bits(to_float(x[index(e)])));
    *scale_to = scale_of(most);
    for (int64_t e = 0; e < count; ++e) to[index(e)] = encode(to_float(x[index(e)]), inverse_scale_of(most));
  };
  for (int64_t j = 0; j < s.cols; ++j)
    quantize(s.rows, [&](int64_t i) { return i * s.cols + j; }, want_codes, &want_scale[j]);
  for (int64_t i = 0; i < rows; ++i)
    quantize(s.cols, [&](int64_t j) { return i * s.cols + j; }, want_row_codes, &want_row_scale[i]);

  const DType dtype = dtype_of<T>::value;
  backend->quantize_columns(
      {x.data(), dtype, codes.data(), scale.data(), absmax.data(), with_rows ? row_codes.data() : nullptr,
       with_rows ? row_scale.data() : nullptr, s.rows, s.cols},
      nullptr);
  const std::string where = "quantize_columns" + shape(s.rows, s.cols, dtype);
  check_same(scale, want_scale, where + ".scale");
  check_same(codes, want_codes, where + ".codes");
  check_same(row_scale, want_row_scale, where + ".row_scale");
  check_same(row_codes, want_row_codes, where + ".row_codes");
}

// kind: of hard_value, for the whole tensor; the special value at any place must decide.
template <class T>
void test_tensor(int64_t count, int kind) {
  Buffer<T> x(count);
  const int64_t special = count ? uniform(0, static_cast<int>(count) - 1) : 0;
  for (int64_t i = 0; i < count; ++i) x[i] = from_float<T>(hard_value(kind, i, special));
  Buffer<int8_t> codes(count), want_codes(count);
  Buffer<float> scale(1), want_scale(1);
  Buffer<uint32_t> absmax(1);
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, abs_bits(to_float(x[i])));
  want_scale[0] = scale_of(most);
  for (int64_t i = 0; i < count; ++i) want_codes[i] = encode(to_float(x[i]), inverse_scale_of(most));
  const DType dtype = dtype_of<T>::value;
  backend->quantize_tensor({x.data(), dtype, codes.data(), scale.data(), absmax.data(), count}, nullptr);
  check_same(scale, want_scale, "quantize_tensor" + shape(count, kind, dtype) + ".scale");
  check_same(codes, want_codes, "quantize_tensor" + shape(count, kind, dtype) + ".codes");
}

void test_quantize() {
  for_each_dtype([](auto type) {
    using T = decltype(type);
    for (const Shape s : shapes()) {
      test_rows<T>(s, 0.0f, false);
      test_rows<T>(s, 0.0f, true);
      test_rows<T>(s, kThreshold, false);
      test_rows<T>(s, kThreshold, true);
      test_columns<T>(s, false);
      test_columns<T>(s, true);
    }
    for (const int64_t count : {0, 1, 7, 16, 257, 4096, 70001})
      for (int kind = 0; kind < 9; ++kind)
        if (count < 4096 || kind < 4) test_tensor<T>(count, kind);
  });
}

// ---- outlier columns ----

template <class T>
void test_flags(Shape s) {
  const Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  Buffer<uint8_t> flags(s.cols), want(s.cols);
  std::fill_n(want.data(), s.cols, uint8_t{0});
  for (int64_t i = 0; i < x.size(); ++i) want[i % s.cols] |= is_outlier(to_float(x[i]), kThreshold);
  backend->outlier_flags({x.data(), dtype_of<T>::value, flags.data(), kThreshold, s.rows, s.cols}, nullptr);
  check_same(flags, want, "outlier_flags" + shape(s.rows, s.cols, dtype_of<T>::value));
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

void test_compact(int64_t cols, int every) {
  const Listed want(cols, every);
  Buffer<int32_t> columns(cols), count(1);
  backend->compact_columns({want.flags.data(), columns.data(), count.data(), cols}, nullptr);
  check_same(count, want.count, "compact_columns(" + std::to_string(cols) + ").count");
  check_same(columns, want.columns, "compact_columns(" + std::to_string(cols) + ").columns");
}

// The list is as callers may give it: a count beyond the capacity, columns that do not exist.
template <class T>
void test_extract(Shape s, int64_t capacity, int32_t count, bool scaled) {
  const Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  Buffer<int8_t> codes(x.size());
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(uniform(-127, 127));
  Buffer<float> scale(s.rows);
  for (int64_t i = 0; i < s.rows; ++i) scale[i] = i == 1 ? NAN : normal();
  Buffer<int32_t> columns(capacity);
  for (int64_t c = 0; c < capacity; ++c) columns[c] = uniform(-1, static_cast<int>(s.cols));
  Buffer<T> out(s.rows * capacity), want(s.rows * capacity);
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t c = 0; c < capacity; ++c) {
      const int64_t column = c < count ? columns[c] : -1;
      T value{};
      if (column >= 0 && column < s.cols)
        value =
            scaled ? from_float<T>(static_cast<float>(codes[i * s.cols + column]) * scale[i]) : x[i * s.cols + column];
      want[i * capacity + c] = value;
    }
  backend->extract_columns({scaled ? static_cast<const void*>(codes.data()) : x.data(), scaled ? scale.data() : nullptr,
                            columns.data(), &count, out.data(), dtype_of<T>::value, s.rows, s.cols, capacity},
                           nullptr);
  check_same(out, want, "extract_columns" + shape(s.rows, capacity, dtype_of<T>::value));
}

void test_outlier() {
  for_each_dtype([](auto type) {
    using T = decltype(type);
    for (const Shape s : shapes()) test_flags<T>(s);
    for (const bool scaled : {false, true})
      for (const int32_t count : {0, 3, 40, 1000}) {
        test_extract<T>({37, 50}, 40, count, scaled);
        test_extract<T>({130, 9}, 1, count, scaled);
      }
  });
  for (const int every : {0, 1, 2, 50})
    for (const int64_t cols : {1, 31, 64, 1000, 8192, 8193, 20011}) test_compact(cols, every);
}

// ---- decomposition: against the three kernels that it stands for ----

template <class T>
void test_decompose(Shape s) {
  const Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  const DType dtype = dtype_of<T>::value;
  Buffer<uint8_t> flags(s.cols), want_flags(s.cols);
  Buffer<int32_t> columns(s.cols), want_columns(s.cols), count(1), want_count(1);
  Buffer<int8_t> codes(x.size()), want_codes(x.size());
  Buffer<float> scale(s.rows), want_scale(s.rows);
  cpu::outlier_flags({x.data(), dtype, want_flags.data(), kThreshold, s.rows, s.cols}, nullptr);
  cpu::compact_columns({want_flags.data(), want_columns.data(), want_count.data(), s.cols}, nullptr);
  cpu::quantize_rows({x.data(), dtype, want_codes.data(), want_scale.data(), want_flags.data(), 0.0f, s.rows, s.cols},
                     nullptr);
  backend->decompose({x.data(), dtype, kThreshold, flags.data(), columns.data(), count.data(), codes.data(),
                      scale.data(), s.rows, s.cols},
                     nullptr);
  const std::string where = "decompose" + shape(s.rows, s.cols, dtype);
  check_same(flags, want_flags, where + ".flags");
  check_same(columns, want_columns, where + ".columns");
  check_same(count, want_count, where + ".count");
  check_same(codes, want_codes, where + ".codes");
  check_same(scale, want_scale, where + ".scale");
}

void test_decompose() {
  for_each_dtype([](auto type) {
    using T = decltype(type);
    for (const Shape s : shapes()) test_decompose<T>(s);
    for (const Shape s : {Shape{4, 4096}, Shape{4, 4104}, Shape{1, 16384}, Shape{17, 250}, Shape{33, 40}})
      test_decompose<T>(s);
  });
}

// ---- GEMM ----

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

}  // namespace

int main(int argc, char** argv) {
  const std::string prefix = argc > 1 ? argv[1] : "";
  int ran = 0;
  for (const Backend& each : backends()) {
    if (!each.name.starts_with(prefix)) continue;
    backend = &each;
    each.select();
    const int before = test::failures;
    for (const bool unaligned : {false, true}) {
      test::unaligned = unaligned;
      test_quantize();
      test_outlier();
      test_decompose();
      test_gemm();
    }
    std::printf("%s: %s\n", each.name.c_str(), test::failures == before ? "ok" : "FAILED");
    ++ran;
  }
  if (ran) return test::finish();
  std::printf("no backend '%s...' on this machine\n", prefix.c_str());
  return 77;  // CTest: skipped
}
