#include "spqr/spqr.h"

#include "common/op.h"
#include "spqr/columns.h"

namespace octavo {
namespace {

// The tensors of one weight, kept alive and contiguous while p points into them.
struct Held {
  std::vector<Tensor> tensors;
  template <class T>
  const T* keep(const Tensor& t) {
    tensors.push_back(as_contiguous(t));
    return static_cast<const T*>(tensors.back().const_data_ptr());
  }
};

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& wanted,
                 const char* meaning) {
  STD_TORCH_CHECK(shape(t) == wanted, op, ": ", name, " must have shape ", text_of(wanted), " (", meaning, "), got ",
                  shape_of(t));
}

void check_bits(const char* op, const char* name, int64_t bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 4, op, ": ", name, " must be 1 to 4, got ", bits);
}

SpqrWeight check_weight(const char* op, Held& held, const Tensor& first, const Tensor& codes, const Tensor& statistics,
                        const std::optional<Tensor>& second_order, const Tensor& unit, const Tensor& outliers,
                        const Tensor& row_offsets, const std::optional<Tensor>& perm, int64_t n, int64_t k,
                        int64_t group_size, int64_t stats_group_size, int64_t scale_bits, int64_t zero_bits) {
  SpqrWeight w{};
  w.n = n, w.k = k;
  STD_TORCH_CHECK(n >= 0 && n < int64_t{1} << 40, op, ": n must be from 0 to below 2^40, got ", n);
  STD_TORCH_CHECK(k >= 0, op, ": k must not be negative, got ", k);
  STD_TORCH_CHECK(k <= INT32_MAX, op, ": k must be below 2^31, got ", k);
  STD_TORCH_CHECK(group_size == 16 || group_size == 32 || group_size == 64, op,
                  ": group_size must be 16, 32 or 64, got ", group_size);
  STD_TORCH_CHECK(k % group_size == 0, op, ": k = ", k, " is not a multiple of group_size ", group_size);
  STD_TORCH_CHECK(stats_group_size >= 16 && stats_group_size <= kMaxStatsRows && stats_group_size % 16 == 0, op,
                  ": stats_group_size must be a multiple of 16 up to ", kMaxStatsRows, ", got ", stats_group_size);
  check_bits(op, "scale_bits", scale_bits);
  check_bits(op, "zero_bits", zero_bits);
  w.group_size = static_cast<int>(group_size);
  w.stats_group_size = stats_group_size;
  w.scale_bits = static_cast<int>(scale_bits), w.zero_bits = static_cast<int>(zero_bits);
  const int64_t tiles = ceil_div(n, 16), chunks = ceil_div(k, 32), groups = k / group_size;

  check_dtype(op, "codes", codes, ScalarType::Int);
  check_same_device(op, "codes", codes, first);
  check_dim(op, "codes", codes, 4);
  const int64_t bits = codes.size(2);
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, op, ": codes of shape ", shape_of(codes), " have ", bits,
                  " bits; 2, 3 and 4 are known");
  check_shape(op, "codes", codes, {tiles, chunks, bits, 16}, "[ceil(n / 16), ceil(k / 32), bits, 16]");
  w.bits = static_cast<int>(bits);
  w.codes = held.keep<uint32_t>(codes);

  check_same_device(op, "statistics", statistics, first);
  if (second_order) {
    check_dtype(op, "statistics", statistics, ScalarType::Byte);
    check_shape(op, "statistics", statistics, {tiles, groups, 2 * (scale_bits + zero_bits)},
                "[ceil(n / 16), k / group_size, 2 * (scale_bits + zero_bits)]");
    check_dtype(op, "second_order", *second_order, ScalarType::Half);
    check_same_device(op, "second_order", *second_order, first);
    check_shape(op, "second_order", *second_order, {ceil_div(n, stats_group_size), groups, 4},
                "[ceil(n / stats_group_size), k / group_size, 4]");
    w.statistics = held.keep<uint8_t>(statistics);
    w.second_order = held.keep<Half>(*second_order);
  } else {
    check_dtype(op, "statistics", statistics, ScalarType::Half);
    check_shape(op, "statistics", statistics, {tiles, groups, 2, 16}, "[ceil(n / 16), k / group_size, 2, 16]");
    w.plain = held.keep<Half>(statistics);
  }
  check_dtype(op, "unit", unit, ScalarType::Float);
  check_shape(op, "unit", unit, {1}, "one number");
  check_same_device(op, "unit", unit, first);
  w.unit = held.keep<float>(unit);

  w.wide = k > 65536;
  check_dtype(op, "outliers", outliers, ScalarType::Int);
  check_dim(op, "outliers", outliers, 2);
  check_shape(op, "outliers", outliers, {outliers.size(0), w.wide ? 2 : 1},
              w.wide ? "[outliers, 2] for k > 65536" : "[outliers, 1]");
  check_same_device(op, "outliers", outliers, first);
  check_dtype(op, "row_offsets", row_offsets, ScalarType::Int);
  check_length(op, "row_offsets", row_offsets, n + 1, "n + 1");
  check_same_device(op, "row_offsets", row_offsets, first);
  if (outliers.size(0) > 0) {
    w.outliers = held.keep<uint32_t>(outliers);
    w.row_offsets = held.keep<int32_t>(row_offsets);
    if (row_offsets.is_cpu()) check_row_offsets(op, w.row_offsets, n, outliers.size(0));
  }
  if (perm) {
    check_dtype(op, "perm", *perm, ScalarType::Int);
    check_length(op, "perm", *perm, w.wide ? k : ceil_div(k, 2), w.wide ? "k" : "ceil(k / 2): two 16-bit ids a word");
    check_same_device(op, "perm", *perm, first);
    w.perm = held.keep<void>(*perm);
  }
  return w;
}

template <class B>
Tensor spqr_linear(const Tensor& x_, const Tensor& codes, const Tensor& statistics,
                   const std::optional<Tensor>& second_order, const Tensor& unit, const Tensor& outliers,
                   const Tensor& row_offsets, const std::optional<Tensor>& perm, const std::optional<Tensor>& bias,
                   int64_t n, int64_t group_size, int64_t stats_group_size, int64_t scale_bits, int64_t zero_bits) {
  constexpr const char* op = "spqr_linear";
  SpqrMatmul p{};
  p.dtype = float_dtype(op, "x", x_);
  check_rows(op, "x", x_);
  Held held;
  const Tensor x = as_contiguous(x_);
  p.w = check_weight(op, held, x, codes, statistics, second_order, unit, outliers, row_offsets, perm, n, last_size(x),
                     group_size, stats_group_size, scale_bits, zero_bits);
  p.m = row_count(x);
  p.x = x.const_data_ptr();
  if (bias) {
    p.bias_dtype = float_dtype(op, "bias", *bias);
    check_length(op, "bias", *bias, n, "the output features");
    check_same_device(op, "bias", *bias, x);
    p.bias = held.keep<void>(*bias);
  }
  const OnDeviceOf device(x);
  Tensor out = empty(with_last(leading_shape(x), n), x.scalar_type(), x), workspace;
  if (p.m == 0 || n == 0) return out;
  p.out = out.mutable_data_ptr();
  if (const int64_t bytes = B::spqr_workspace(p)) {
    workspace = empty({bytes}, ScalarType::Byte, x);
    p.workspace = workspace.mutable_data_ptr();
  }
  B::spqr_matmul(p, device.stream());
  return out;
}

template <class B>
Tensor spqr_dequantize(const Tensor& codes, const Tensor& statistics, const std::optional<Tensor>& second_order,
                       const Tensor& unit, const Tensor& outliers, const Tensor& row_offsets,
                       const std::optional<Tensor>& perm, int64_t n, int64_t k, ScalarType type, int64_t group_size,
                       int64_t stats_group_size, int64_t scale_bits, int64_t zero_bits) {
  constexpr const char* op = "spqr_dequantize";
  SpqrDequantize p{};
  p.dtype = float_dtype(op, "dtype", type);
  Held held;
  p.w = check_weight(op, held, codes, codes, statistics, second_order, unit, outliers, row_offsets, perm, n, k,
                     group_size, stats_group_size, scale_bits, zero_bits);
  const OnDeviceOf device(codes);
  Tensor out = empty({n, k}, type, codes);
  p.out = out.mutable_data_ptr();
  if (out.numel() > 0) B::spqr_dequantize(p, device.stream());
  return out;
}

template <class B>
void register_ops(Library& m) {
  m.impl("spqr_linear", TORCH_BOX(&spqr_linear<B>));
  m.impl("spqr_dequantize", TORCH_BOX(&spqr_dequantize<B>));
}

#define SPQR_BACKEND(Name, OF)                                   \
  struct Name {                                                  \
    static constexpr auto spqr_workspace = OF(spqr_workspace);   \
    static constexpr auto spqr_matmul = OF(spqr_matmul);         \
    static constexpr auto spqr_dequantize = OF(spqr_dequantize); \
  };
OCTAVO_REGISTER(register_ops, SPQR_BACKEND)

}  // namespace
}  // namespace octavo
