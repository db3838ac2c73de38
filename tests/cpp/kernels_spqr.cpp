// SpQR weights on the machine under test: dequantization to the bit, products against sums in double precision, from
// random words in every place, the padding included.
#include "kernels.h"
#include "spqr/tile.h"

namespace kernels {
namespace {

struct SpqrCase {
  int64_t n, k;
  int bits = 3, group_size = 16;
  int64_t stats_group_size = 16;
  int scale_bits = 3, zero_bits = 3;
  bool bilevel = true, perm = true;
  int outliers = 50;  // one weight in so many, and all of row 1; 0: none
};

struct SpqrData {
  SpqrWeight w{};
  Buffer<uint32_t> codes, outliers;
  Buffer<uint8_t> statistics;
  Buffer<Half> plain, second;
  Buffer<int32_t> offsets, wide_perm;
  Buffer<uint16_t> narrow_perm;
  Buffer<float> unit, dense;  // dense [n, k]: in the order of the quantizer, without unit

  static int64_t tiles(const SpqrCase& c) { return ceil_div(c.n, 16); }
  static std::vector<std::pair<int64_t, int64_t>> places(const SpqrCase& c) {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (int64_t i = 0; c.outliers && i < c.n; ++i)
      for (int64_t j = 0; j < c.k; ++j)
        if (i == 1 || (i != 2 && uniform(0, c.outliers - 1) == 0)) all.push_back({i, j});
    return all;
  }

  explicit SpqrData(const SpqrCase& c) : SpqrData(c, places(c)) {}
  SpqrData(const SpqrCase& c, const std::vector<std::pair<int64_t, int64_t>>& at)
      : codes(tiles(c) * ceil_div(c.k, 32) * c.bits * 16),
        outliers(static_cast<int64_t>(at.size()) * (c.k > 65536 ? 2 : 1)),
        statistics(c.bilevel ? tiles(c) * (c.k / c.group_size) * 2 * (c.scale_bits + c.zero_bits) : 0),
        plain(c.bilevel ? 0 : tiles(c) * (c.k / c.group_size) * 32),
        second(c.bilevel ? ceil_div(c.n, c.stats_group_size) * (c.k / c.group_size) * 4 : 0),
        offsets(c.n + 1),
        wide_perm(c.k > 65536 ? c.k : 0),
        narrow_perm(c.k > 65536 ? 0 : c.k),
        unit(1),
        dense(c.n * c.k) {
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint32_t>(test::random()());
    for (int64_t i = 0; i < statistics.size(); ++i) statistics[i] = static_cast<uint8_t>(uniform(0, 255));
    for (int64_t i = 0; i < plain.size(); ++i) plain[i] = from_float<Half>(normal() * 3);
    for (int64_t i = 0; i < second.size(); ++i) second[i] = from_float<Half>(normal() * 2);
    unit[0] = 0x1p-6f;
    w.wide = c.k > 65536;
    std::vector<int32_t> order(static_cast<size_t>(c.k));
    for (int64_t j = 0; j < c.k; ++j) order[static_cast<size_t>(j)] = static_cast<int32_t>(j);
    std::shuffle(order.begin(), order.end(), test::random());
    for (int64_t j = 0; j < c.k; ++j) {
      if (w.wide)
        wide_perm[j] = order[static_cast<size_t>(j)];
      else
        narrow_perm[j] = static_cast<uint16_t>(order[static_cast<size_t>(j)]);
    }
    w.n = c.n, w.k = c.k, w.bits = c.bits, w.group_size = c.group_size, w.stats_group_size = c.stats_group_size;
    w.scale_bits = c.scale_bits, w.zero_bits = c.zero_bits;
    w.codes = codes.data();
    w.unit = unit.data();
    if (c.bilevel) {
      w.statistics = statistics.data();
      w.second_order = second.data();
    } else {
      w.plain = plain.data();
    }
    if (c.perm) w.perm = w.wide ? static_cast<const void*>(wide_perm.data()) : narrow_perm.data();
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j < c.k; ++j) {
        const uint32_t pair =
            spqr_pair(c.bits, spqr_codes(w, i / 16, j / 32) + i % 16, 16, static_cast<int>(j % 32 / 2));
        const SpqrStatistics s = spqr_statistics(w, i, j / c.group_size);
        dense[i * c.k + j] = s.scale * (static_cast<float>(pair >> j % 2 * 16 & 0xffffu) - s.zero);
      }
    std::fill(offsets.data(), offsets.data() + c.n + 1, 0);
    for (size_t e = 0; e < at.size(); ++e) {
      const auto [i, j] = at[e];
      const Half value = from_float<Half>(normal() * 20);
      const auto place = static_cast<int64_t>(e);
      if (w.wide)
        outliers[2 * place] = static_cast<uint32_t>(j), outliers[2 * place + 1] = value.bits;
      else
        outliers[place] = static_cast<uint32_t>(value.bits) << 16 | static_cast<uint32_t>(j);
      dense[i * c.k + j] += to_float(value);
      ++offsets[i + 1];
    }
    for (int64_t i = 0; i < c.n; ++i) offsets[i + 1] += offsets[i];
    if (!at.empty()) {
      w.outliers = outliers.data();
      w.row_offsets = offsets.data();
    }
  }
};

std::string text_of(const SpqrCase& c) {
  return "(" + std::to_string(c.n) + ", " + std::to_string(c.k) + ") bits " + std::to_string(c.bits) + ", groups " +
         std::to_string(c.group_size) + "x" + std::to_string(c.stats_group_size);
}

template <class T>
void check_dequantize(const SpqrCase& c, const SpqrData& data) {
  Buffer<T> out(c.n * c.k), want(c.n * c.k);
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.k; ++j)
      want[i * c.k + spqr_source_column(data.w, j)] = from_float<T>(data.unit[0] * data.dense[i * c.k + j]);
  backend->spqr_dequantize({data.w, out.data(), dtype_of<T>::value}, nullptr);
  check_same(out, want, "spqr_dequantize" + text_of(c));
}

template <class T>
void check_matmul(const SpqrCase& c, const SpqrData& data, int64_t m) {
  Buffer<T> x(m * c.k), out(m * c.n), bias(c.n);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = from_float<T>(normal());
  for (int64_t i = 0; i < bias.size(); ++i) bias[i] = from_float<T>(normal());
  SpqrMatmul p{data.w,     x.data(), dtype_of<T>::value, m, m % 2 ? bias.data() : nullptr, dtype_of<T>::value,
               out.data(), nullptr};
  const int64_t bytes = backend->spqr_workspace(p);
  const bool unaligned = test::unaligned;
  test::unaligned = false;  // the contract aligns the workspace
  Buffer<uint8_t> workspace(ceil_div(bytes, 64) * 64);
  test::unaligned = unaligned;
  if (bytes) p.workspace = workspace.data();
  backend->spqr_matmul(p, nullptr);
  const double rounding = sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, Half> ? 0x1p-11 : 0x1p-8;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t i = 0; i < c.n; ++i) {
      double sum = p.bias ? to_float(bias[i]) : 0.0, terms = std::fabs(sum);
      for (int64_t j = 0; j < c.k; ++j) {
        const double term = static_cast<double>(to_float(x[r * c.k + spqr_source_column(data.w, j)])) * data.unit[0] *
                            data.dense[i * c.k + j];
        sum += term, terms += std::fabs(term);
      }
      // The weight may be rounded to x's dtype with more rows; statistics may add what cancels in a weight.
      const double allowed =
          1.01 * rounding * std::fabs(sum) + terms * (m > kSpqrStreamRows ? rounding : 0.0) + 4e-6 * (terms + 1);
      const double got = to_float(out[r * c.n + i]);
      if (std::fabs(got - sum) <= allowed) continue;
      CHECK_FOR(false, backend->name + " spqr_matmul" + text_of(c) + " m = " + std::to_string(m) + " [" +
                           std::to_string(r) + ", " + std::to_string(i) + "] is " + std::to_string(got) + ", not " +
                           std::to_string(sum));
      return;
    }
  CHECK(true);
}

}  // namespace

void test_spqr() {
  const SpqrCase cases[] = {
      {.n = 1, .k = 16},
      {.n = 17, .k = 48, .bits = 2},
      {.n = 35, .k = 96, .scale_bits = 2, .zero_bits = 1, .outliers = 0},
      {.n = 40, .k = 80, .bits = 4, .outliers = 4},
      {.n = 33, .k = 192, .group_size = 64, .stats_group_size = 32, .scale_bits = 4},
      {.n = 72, .k = 160, .bits = 4, .group_size = 32, .bilevel = false},
      {.n = 132, .k = 112, .perm = false},
      {.n = 20, .k = 2064, .scale_bits = 4, .zero_bits = 4, .outliers = 200},
  };
  for (const SpqrCase& c : cases) {
    const SpqrData data(c);
    for_each_dtype([&](auto type) { check_dequantize<decltype(type)>(c, data); });
    for (const int64_t m : {1, 3, 8, 13, 17, 70}) {
      if (test::left_out()) continue;
      if (m > 3 && c.k > 2000) continue;
      const bool full = !backend->simt() || m < 70;
      for_each_dtype([&](auto type) {
        if (full || sizeof(type) == 2) check_matmul<decltype(type)>(c, data, m);
      });
    }
  }
  const SpqrCase wide{.n = 3, .k = 65568, .outliers = 3000};
  const SpqrData data(wide);
  check_dequantize<Half>(wide, data);
  check_matmul<BFloat16>(wide, data, 1);
}

}  // namespace kernels
