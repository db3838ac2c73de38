// Every kernel of the contracts on every machine at hand, against plain loops over the definitions of common/numeric.h:
// equal bits. `kernels_test [PREFIX [N]]` runs the backends whose name starts with PREFIX (cpu-avx2, simt-reverse,
// ...), and with N one in N of the many products.
#include "kernels.h"

#include <limits>
#include <memory>
#include <numeric>

#include "cpu/isa.h"
#if defined(OCTAVO_TEST_SIMT)
#include "simt/order.h"
#endif

namespace kernels {
namespace {

#define KERNELS_OF(machine)                                                                                       \
  machine::quantize_rows, machine::quantize_columns, machine::quantize_tensor, machine::dequantize_rows,          \
      machine::encode_transposed, machine::outlier_flags, machine::compact_columns, machine::extract_columns,     \
      machine::decompose, machine::int8_gemm, machine::quantize_blocks, machine::dequantize_blocks,               \
      machine::optim_sums, machine::optim_step, machine::csr_matmul_workspace, machine::csr_transposed_workspace, \
      machine::csr_grad_values_workspace, machine::csr_matmul, machine::csr_matmul_transposed,                    \
      machine::csr_grad_values, machine::spqr_workspace, machine::spqr_matmul, machine::spqr_dequantize,          \
      machine::quantize_low_bit, machine::dequantize_low_bit, machine::nf4_workspace, machine::nf4_matmul,        \
      machine::nf4_workspace_transposed, machine::nf4_matmul_transposed

std::vector<Backend> backends() {
  std::vector<Backend> all;
  for (const cpu::Isa level : cpu::available())
    all.push_back({std::string("cpu-") + cpu::name_of(level), [=] { cpu::set_isa(level); }, KERNELS_OF(cpu)});
#if defined(OCTAVO_TEST_SIMT)
  for (const char* order : {"forward", "reverse", "random:1"})
    all.push_back({std::string("simt-") + order, [=] { simt::set_order(order); }, KERNELS_OF(simt)});
#endif
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

// stride: of absmax, 0 for one of the whole matrix.
template <class T>
void test_transposed(Shape s, int stride, bool with_codes, bool with_seed) {
  Buffer<T> x = hard_matrix<T>(s.rows, s.cols);
  for (int64_t e = 0; e < x.size() && stride == 0; ++e)  // one would make all codes 0
    if (abs_bits(to_float(x[e])) >= 0x7f800000u) x[e] = from_float<T>(1.0f);
  const int64_t scales = stride ? s.cols : 1, seed = 0x123456789abcdef;
  Buffer<uint32_t> absmax(scales);
  std::fill_n(absmax.data(), scales, 0u);
  for (int64_t e = 0; e < x.size(); ++e) {
    uint32_t& most = absmax[stride ? e % s.cols : 0];
    most = std::max(most, abs_bits(to_float(x[e])));
  }
  Buffer<int8_t> codes(with_codes ? x.size() : 0), want_codes(codes.size()), turned(x.size()), want_turned(x.size());
  Buffer<float> scale(scales), want_scale(scales);
  for (int64_t j = 0; j < scales; ++j) want_scale[j] = scale_of(absmax[j]);
  for (int64_t i = 0; i < s.rows; ++i)
    for (int64_t j = 0; j < s.cols; ++j) {
      const float v = to_float(x[i * s.cols + j]), inverse = inverse_scale_of(absmax[stride ? j : 0]);
      const uint32_t random = element_bits(row_key(mix_seed(seed), i), j);
      const int8_t code = with_seed ? encode_at_random(v, inverse, random) : encode(v, inverse);
      want_turned[j * s.rows + i] = code;
      if (with_codes) want_codes[i * s.cols + j] = code;
    }
  const DType dtype = dtype_of<T>::value;
  Buffer<uint32_t> found(scales);  // by the kernels that leave the codes to this one
  if (stride)
    backend->quantize_columns({x.data(), dtype, nullptr, nullptr, found.data(), nullptr, nullptr, s.rows, s.cols},
                              nullptr);
  else
    backend->quantize_tensor({x.data(), dtype, nullptr, nullptr, found.data(), x.size()}, nullptr);
  check_same(found, absmax, "absmax alone" + shape(s.rows, s.cols, dtype));
  backend->encode_transposed({x.data(), dtype, absmax.data(), stride, with_codes ? codes.data() : nullptr,
                              turned.data(), scale.data(), with_seed ? &seed : nullptr, s.rows, s.cols},
                             nullptr);
  const std::string where = "encode_transposed" + shape(s.rows, s.cols, dtype) + (with_seed ? " at random" : "");
  check_same(scale, want_scale, where + ".scale");
  check_same(codes, want_codes, where + ".codes");
  check_same(turned, want_turned, where + ".transposed");
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
      test_transposed<T>(s, 0, true, false);
      test_transposed<T>(s, 1, false, false);
      test_transposed<T>(s, 1, false, true);
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

}  // namespace
}  // namespace kernels

// kernels_test [BACKEND [SHARE [aligned | unaligned]]]: the backends whose names begin so, or all; test::share; buffers
// at one of the two kinds of addresses, or at both.
int main(int argc, char** argv) {
  using namespace kernels;
  const std::string prefix = argc > 1 ? argv[1] : "";
  if (argc > 2) test::share = static_cast<uint32_t>(std::max(1, std::atoi(argv[2])));
  const std::string addresses = argc > 3 ? argv[3] : "";
  int ran = 0;
  for (const Backend& each : backends()) {
    if (!each.name.starts_with(prefix)) continue;
    backend = &each;
    each.select();
    const int before = test::failures;
    for (const bool unaligned : {false, true}) {
      if (!addresses.empty() && unaligned != (addresses == "unaligned")) continue;
      test::unaligned = unaligned;
      test_quantize();
      test_outlier();
      test_decompose();
      test_gemm();
      test_blockwise();
      test_optim();
      test_sparse();
      test_spqr();
      test_nf4();
    }
    std::printf("%s: %s\n", each.name.c_str(), test::failures == before ? "ok" : "FAILED");
    ++ran;
  }
  if (ran) return test::finish();
  std::printf("no backend '%s...' on this machine\n", prefix.c_str());
  return 77;  // CTest: skipped
}
