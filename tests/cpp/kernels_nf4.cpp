// Low-bit quantization and products on every machine: codes, absmax and values to the bit against plain loops over
// common/normal_float.h, products against sums in double precision.
#include <vector>

#include "common/codebook.h"
#include "kernels.h"
#include "nf4/nf4.h"

namespace kernels {
namespace {

constexpr QuantType kTypes[] = {QuantType::nf2, QuantType::nf3, QuantType::nf4, QuantType::nf8, QuantType::fp4};

std::string name_of(QuantType type) {
  const char* names[] = {"nf2", "nf3", "nf4", "nf8", "fp4"};
  return names[static_cast<int>(type)];
}

const SmallBook& book_of(QuantType type) {
  return type == QuantType::nf2 ? kNf2 : type == QuantType::nf3 ? kNf3 : type == QuantType::fp4 ? kFp4 : kNf4;
}

float value_of(QuantType type, uint32_t code) {
  return type == QuantType::nf8 ? kNf8.value[code] : book_of(type).value[code];
}

uint32_t code_of(QuantType type, float x, float inverse) {
  return type == QuantType::nf8 ? block_code(x, inverse, kNf8.threshold, kNf8Zero)
                                : small_block_code(x, inverse, book_of(type));
}

void put_code(Buffer<uint8_t>& packed, int bits, int64_t i, uint32_t code) {
  for (int bit = 0; bit < bits; ++bit) {
    const int64_t at = i * bits + bit;
    if (code >> (bits - 1 - bit) & 1) packed[at / 8] = static_cast<uint8_t>(packed[at / 8] | 0x80u >> at % 8);
  }
}

std::string text_of(QuantType type, int64_t count, int64_t blocksize, DType dtype) {
  return name_of(type) + " blocks of " + std::to_string(blocksize) + shape(1, count, dtype);
}

// ---- quantize ----

template <class T>
void check_quantize(const Buffer<T>& x, QuantType type, int64_t blocksize, const std::string& kind) {
  const int64_t count = x.size(), blocks = ceil_div(count, blocksize);
  Buffer<uint8_t> packed(packed_bytes(type, count)), want_packed(packed.size());
  Buffer<float> absmax(blocks), want_absmax(blocks);
  std::fill(want_packed.data(), want_packed.data() + want_packed.size(), uint8_t{0});
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * blocksize, end = std::min(first + blocksize, count);
    float most = 0;
    for (int64_t i = first; i < end; ++i) {
      const float v = std::fabs(to_float(x[i]));
      if (std::isfinite(v)) most = std::max(most, v);
    }
    want_absmax[b] = block_absmax(most);
    for (int64_t i = first; i < end; ++i)
      put_code(want_packed, bits_of(type), i, code_of(type, to_float(x[i]), block_inverse(want_absmax[b])));
  }
  if (bits_of(type) == 4 && count % 2) put_code(want_packed, 4, count, book_of(type).zero);
  const std::string where = kind + " " + text_of(type, count, blocksize, dtype_of<T>::value);
  backend->quantize_low_bit({x.data(), dtype_of<T>::value, type, packed.data(), absmax.data(), count, blocksize},
                            nullptr);
  check_same(absmax, want_absmax, "quantize_low_bit " + where + ".absmax");
  check_same(packed, want_packed, "quantize_low_bit " + where + ".packed");
}

// Kinds of blocks change every `run` elements: with the blocks, or across them.
template <class T>
Buffer<T> hard_run(int64_t count, int64_t run) {
  Buffer<T> x(count);
  int64_t kind = 0, special = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i % run == 0) {
      kind = uniform(0, 8);
      special = i + uniform(0, static_cast<int>(run) - 1);
    }
    x[i] = from_float<T>(hard_value(kind, i, special));
  }
  return x;
}

// Every threshold and its neighbours of both signs, times the absmax of their block; again until there are `least`.
Buffer<float> threshold_line(QuantType type, float absmax, int64_t blocksize, size_t least) {
  std::vector<float> all;
  const bool bytes = type == QuantType::nf8;
  const auto append = [&](float threshold) {
    float v = std::nextafterf(threshold, -2.0f);
    for (int step = 0; step < 3; ++step, v = std::nextafterf(v, 2.0f)) {
      if (static_cast<int64_t>(all.size()) % blocksize == 0) all.push_back(absmax);
      all.push_back(v * absmax);
    }
  };
  do {
    for (int t = 0; t < (bytes ? kCodes - 1 : 15); ++t) {
      const float threshold = bytes ? kNf8.threshold[t] : book_of(type).threshold[t];
      if (!std::isfinite(threshold)) continue;
      append(threshold);
      append(-threshold);
    }
  } while (all.size() < least);
  return Buffer<float>(all);
}

void test_quantize() {
  const bool simt = backend->simt();
  for (const QuantType type : kTypes) {
    for_each_dtype([&](auto element) {
      using T = decltype(element);
      for (const int64_t blocksize : {32, 64, 128, 256, 512, 1024, 2048, 4096})
        for (const int64_t count : {0, 1, 7, 31, 64, 65, 257, 1009, 4096, 8192, 8197}) {
          if (count < blocksize / 2 && count > 1) continue;
          if (simt && count > 4096 && blocksize != 64 && blocksize < 1024) continue;
          check_quantize(hard_run<T>(count, blocksize <= 64 ? blocksize : 50), type, blocksize, "hard");
        }
    });
    for (const float absmax : {1.0f, 3.0f, 1e-30f, 2.5e38f, 0x1p-126f})
      for (const int64_t blocksize : {32, 256}) {
        // Whole tiles, too, of machines that treat the last one in another way.
        for (const size_t least : {1, 4096})
          if (least == 1 || bits_of(type) == 4)
            check_quantize(threshold_line(type, absmax, blocksize, least), type, blocksize, "thresholds");
      }
  }
}

// ---- a tensor of random codes ----

struct LowBitData {
  LowBitTensor t{};
  Buffer<uint8_t> packed, absmax_codes;
  Buffer<float> absmax, nested_absmax, offset;
  std::vector<float> scale;  // of each block

  LowBitData(QuantType type, int64_t count, int64_t blocksize, bool nested)
      : packed(packed_bytes(type, count)),
        absmax_codes(nested ? ceil_div(count, blocksize) : 0),
        absmax(nested ? 0 : ceil_div(count, blocksize)),
        nested_absmax(nested ? ceil_div(ceil_div(count, blocksize), kNestedBlock) : 0),
        offset(1) {
    t = {type, packed.data(), count, blocksize, nested ? nullptr : absmax.data(), nullptr, nullptr, nullptr};
    for (int64_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(uniform(0, 255));
    offset[0] = 0.75f;
    for (int64_t i = 0; i < absmax.size(); ++i) absmax[i] = std::fabs(normal()) + 0.1f;
    for (int64_t i = 0; i < absmax_codes.size(); ++i) absmax_codes[i] = static_cast<uint8_t>(uniform(0, 255));
    for (int64_t i = 0; i < nested_absmax.size(); ++i) nested_absmax[i] = std::fabs(normal()) * 0.5f + 0.1f;
    if (nested) {
      t.absmax_codes = absmax_codes.data();
      t.nested_absmax = nested_absmax.data();
      t.offset = offset.data();
    }
    find_scales();
  }
  void find_scales() {
    scale.resize(static_cast<size_t>(ceil_div(t.count, t.blocksize)));
    for (size_t b = 0; b < scale.size(); ++b) scale[b] = low_bit_absmax(t, static_cast<int64_t>(b));
  }
  float code_value(int64_t i) const { return value_of(t.type, packed_code(packed.data(), bits_of(t.type), i)); }
  float scale_at(int64_t i) const { return scale[static_cast<size_t>(i / t.blocksize)]; }
};

template <class T>
void check_dequantize(const LowBitData& data) {
  const LowBitTensor& t = data.t;
  Buffer<T> out(t.count), want(t.count);
  for (int64_t i = 0; i < t.count; ++i) want[i] = from_float<T>(data.code_value(i) * data.scale_at(i));
  backend->dequantize_low_bit({t, out.data(), dtype_of<T>::value}, nullptr);
  check_same(out, want, "dequantize_low_bit " + text_of(t.type, t.count, t.blocksize, dtype_of<T>::value));
}

void test_dequantize() {
  for (const QuantType type : kTypes)
    for (const bool nested : {false, true})
      for (const int64_t blocksize : {32, 64, 256, 4096})
        for (const int64_t count : {0, 1, 5, 64, 1031, 8192, 9001, 33000}) {
          if (count > 10000 && (!nested || blocksize > 64 || backend->simt())) continue;
          LowBitData data(type, count, blocksize, nested);
          const float hard[] = {0.0f, 0x1p-126f, 3e38f, INFINITY, 1e5f, 1e-7f};
          for (int64_t b = 0; b < data.absmax.size(); b += 3) data.absmax[b] = hard[b / 3 % 6];
          data.find_scales();
          for_each_dtype([&](auto element) { check_dequantize<decltype(element)>(data); });
        }
}

// ---- products ----

struct Product {
  QuantType type;
  int64_t n, k, blocksize;
  bool nested, transposed;
};

// Sums in double, and of the terms' magnitudes.
struct Sums {
  std::vector<double> sum, terms;
};

template <class T>
void check_product(const Product& c, const LowBitData& data, int64_t m) {
  if (test::left_out()) return;
  const int64_t inner = c.transposed ? c.n : c.k, outer = c.transposed ? c.k : c.n;
  Buffer<T> x(m * inner), out(m * outer);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_float<T>(normal());
  const int64_t spoiled = m > 2 ? 2 : -1;  // this row has a NaN, and is the only one
  if (spoiled >= 0 && inner > 0) x[spoiled * inner + uniform(0, static_cast<int>(inner) - 1)] = from_float<T>(NAN);
  Buffer<float> bias_float(outer);
  Buffer<T> bias_own(outer);
  for (int64_t i = 0; i < outer; ++i) {
    bias_own[i] = from_float<T>(normal());
    bias_float[i] = normal();
  }
  Nf4Matmul p{};
  p.w = data.t, p.n = c.n, p.k = c.k, p.x = x.data(), p.dtype = dtype_of<T>::value, p.m = m, p.out = out.data();
  p.bias_dtype = p.dtype;
  if (!c.transposed && m % 3 == 1) p.bias = bias_own.data();
  if (!c.transposed && m % 3 == 2) p.bias = bias_float.data(), p.bias_dtype = DType::f32;
  const int64_t bytes = c.transposed ? backend->nf4_workspace_transposed(p) : backend->nf4_workspace(p);
  const bool unaligned = test::unaligned;
  test::unaligned = false;  // the contract aligns the workspace
  Buffer<uint8_t> workspace(ceil_div(bytes, 64) * 64);
  test::unaligned = unaligned;
  if (bytes) p.workspace = workspace.data();
  c.transposed ? backend->nf4_matmul_transposed(p, nullptr) : backend->nf4_matmul(p, nullptr);

  const double rounding = sizeof(T) == 4 ? 0.0 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
  const double smallest = std::is_same_v<T, Half> ? 0x1p-25 : 0.0;  // half of the last place of a denormal
  std::vector<double> sum(static_cast<size_t>(m * outer)), terms(sum), widths(sum);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.k; ++j) {
        const int64_t at = i * c.k + j;
        const double weight = static_cast<double>(data.code_value(at)) * data.scale_at(at);
        const double of_x = to_float(x[r * inner + (c.transposed ? i : j)]), term = of_x * weight;
        const auto to = static_cast<size_t>(r * outer + (c.transposed ? j : i));
        sum[to] += term, terms[to] += std::fabs(term), widths[to] += std::fabs(of_x);
      }
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < outer; ++i) {
      const auto at = static_cast<size_t>(r * outer + i);
      const double bias = !p.bias ? 0.0 : p.bias == bias_own.data() ? to_float(bias_own[i]) : bias_float[i];
      const double want = sum[at] + bias, all = terms[at] + std::fabs(bias);
      const double allowed = 1.01 * (rounding * std::fabs(want) + rounding * terms[at] + smallest * (1 + widths[at])) +
                             4e-6 * (all + 1e-3);
      const double got = to_float(out[r * outer + i]);
      if (r == spoiled && inner > 0 ? std::isnan(got) : std::fabs(got - want) <= allowed) continue;
      CHECK_FOR(false, backend->name + (c.transposed ? " nf4_matmul_transposed " : " nf4_matmul ") +
                           text_of(c.type, c.n * c.k, c.blocksize, p.dtype) + " weight (" + std::to_string(c.n) + ", " +
                           std::to_string(c.k) + ") m = " + std::to_string(m) + " [" + std::to_string(r) + ", " +
                           std::to_string(i) + "] is " + std::to_string(got) + ", not " + std::to_string(want));
      return;
    }
  CHECK(true);
}

void check_products(const Product& c, std::initializer_list<int64_t> rows) {
  const LowBitData data(c.type, c.n * c.k, c.blocksize, c.nested);
  for (const int64_t m : rows) for_each_dtype([&](auto element) { check_product<decltype(element)>(c, data, m); });
}

// A weight beyond the largest fp16, and x in fp16: up to 16 rows its absmax enters in fp32.
void test_large_weights() {
  const Product c{QuantType::nf4, 16, 128, 64, false, false};
  LowBitData data(c.type, c.n * c.k, c.blocksize, false);
  for (int64_t b = 0; b < data.absmax.size(); ++b) data.absmax[b] = 1e5f;
  Buffer<Half> x(c.k), out(c.n);
  for (int64_t j = 0; j < c.k; ++j) x[j] = from_float<Half>(j < 4 ? 0.125f : 0.0f);
  Nf4Matmul p{};
  p.w = data.t, p.n = c.n, p.k = c.k, p.x = x.data(), p.dtype = DType::f16, p.m = 1, p.out = out.data();
  const bool unaligned = test::unaligned;
  test::unaligned = false;
  Buffer<uint8_t> workspace(ceil_div(backend->nf4_workspace(p), 64) * 64);
  test::unaligned = unaligned;
  p.workspace = workspace.data();
  backend->nf4_matmul(p, nullptr);
  for (int64_t i = 0; i < c.n; ++i) {
    double want = 0;
    for (int64_t j = 0; j < 4; ++j) want += 0.125 * data.code_value(i * c.k + j) * 1e5;
    CHECK_FOR(std::fabs(to_float(out[i]) - want) <= 100, backend->name + " nf4_matmul of weights beyond fp16");
  }
}

void test_products() {
  for (const bool transposed : {false, true}) {
    // Rows that are whole blocks: what the fast kernels take.
    check_products({QuantType::nf4, 35, 192, 64, false, transposed}, {1, 2, 3, 8, 13, 16, 17, 70});
    check_products({QuantType::fp4, 40, 96, 32, true, transposed}, {1, 3, 13, 17});
    check_products({QuantType::nf4, 24, 256, 256, true, transposed}, {1, 9, 70});
    check_products({QuantType::nf4, 130, 128, 128, false, transposed}, {2, 16, 130});
    check_products({QuantType::nf4, 17, 1344, 64, true, transposed}, {1, 3, 17});
    check_products({QuantType::nf4, 601, 64, 64, false, transposed}, {1, 17});
    // Any others, of every type.
    for (const QuantType type : kTypes) {
      check_products({type, 13, 77, 64, true, transposed}, {1, 8, 17});
      check_products({type, 20, 64, 32, false, transposed}, {2, 18});
      check_products({type, 7, 33, 128, false, transposed}, {3});
    }
    check_products({QuantType::nf4, 5, 40, 4096, false, transposed}, {1, 16, 17});
    check_products({QuantType::nf4, 1, 1, 32, false, transposed}, {1, 17});
    check_products({QuantType::nf4, 3, 0, 32, false, transposed}, {2});
    check_products({QuantType::nf4, 0, 64, 32, false, transposed}, {2});
  }
  test_large_weights();
}

}  // namespace

void test_nf4() {
  test_quantize();
  test_dequantize();
  test_products();
}

}  // namespace kernels
