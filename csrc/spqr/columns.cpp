#include "spqr/columns.h"

#include "common/op.h"

namespace octavo {
namespace {

void check_bits(const char* op, int64_t bits, int64_t group_size, int64_t stats_group_size, int64_t scale_bits,
                int64_t zero_bits) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, op, ": bits must be 1 to 8, got ", bits);
  STD_TORCH_CHECK(group_size >= 2 && group_size <= kMaxBlockColumns, op, ": group_size must be 2 to ", kMaxBlockColumns,
                  ", got ", group_size);
  STD_TORCH_CHECK(stats_group_size >= 16 && stats_group_size <= kMaxStatsRows && stats_group_size % 16 == 0, op,
                  ": stats_group_size must be a multiple of 16 up to ", kMaxStatsRows, ", got ", stats_group_size);
  STD_TORCH_CHECK(
      (scale_bits == 0) == (zero_bits == 0) && scale_bits >= 0 && zero_bits >= 0 && scale_bits + zero_bits <= 8, op,
      ": scale_bits and zero_bits must be both 0, or both at least 1 and together at most 8, got ", scale_bits, " and ",
      zero_bits);
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spqr_quantize_columns(
    const Tensor& weight_, const Tensor& factor_, double threshold, int64_t bits, int64_t group_size,
    int64_t stats_group_size, int64_t scale_bits, int64_t zero_bits, bool leave_one_out) {
  constexpr const char* op = "spqr_quantize_columns";
  check_dtype(op, "weight", weight_, ScalarType::Float);
  check_dtype(op, "factor", factor_, ScalarType::Float);
  check_dim(op, "weight", weight_, 2);
  check_dim(op, "factor", factor_, 2);
  check_same_device(op, "factor", factor_, weight_);
  check_bits(op, bits, group_size, stats_group_size, scale_bits, zero_bits);
  STD_TORCH_CHECK(threshold >= 0.0, op, ": threshold must be 0 or positive, got ", threshold);
  const int64_t n = weight_.size(0), k = weight_.size(1);
  STD_TORCH_CHECK(k <= kMaxBlockColumns && k % group_size == 0, op, ": weight must have a multiple of group_size ",
                  group_size, " columns, at most ", kMaxBlockColumns, ", got shape ", shape_of(weight_));
  STD_TORCH_CHECK(factor_.size(0) == k && factor_.size(1) == k, op, ": factor must have shape [", k, ", ", k, "], got ",
                  shape_of(factor_));
  const Tensor weight = as_contiguous(weight_), factor = as_contiguous(factor_);
  const float* u = factor.const_data_ptr<float>();
  for (int64_t j = 0; j < (factor.is_cpu() ? k : 0); ++j)
    STD_TORCH_CHECK(u[j * k + j] > 0.0f, op, ": the diagonal of factor must be positive, got ", u[j * k + j], " at ",
                    j);

  const int64_t groups = k / group_size;
  const bool bilevel = scale_bits > 0;
  const ScalarType statistic = bilevel ? ScalarType::Byte : ScalarType::Half;
  Tensor codes = empty({n, k}, ScalarType::Byte, weight);
  Tensor scales = empty({n, groups}, statistic, weight), zeros = empty({n, groups}, statistic, weight);
  Tensor second_order = empty({bilevel ? ceil_div(n, stats_group_size) : 0, groups, 4}, ScalarType::Half, weight);
  Tensor residual = empty({n, k}, ScalarType::Half, weight), error = empty({n, k}, ScalarType::Float, weight);
  if (n > 0 && k > 0)
    B::spqr_columns({.weight = weight.const_data_ptr<float>(),
                     .factor = u,
                     .codes = codes.mutable_data_ptr<uint8_t>(),
                     .scales = scales.mutable_data_ptr(),
                     .zeros = zeros.mutable_data_ptr(),
                     .second_order = static_cast<Half*>(second_order.mutable_data_ptr()),
                     .residual = static_cast<Half*>(residual.mutable_data_ptr()),
                     .error = error.mutable_data_ptr<float>(),
                     .threshold = static_cast<float>(threshold),
                     .leave_one_out = leave_one_out,
                     .bits = static_cast<int>(bits),
                     .scale_bits = static_cast<int>(scale_bits),
                     .zero_bits = static_cast<int>(zero_bits),
                     .n = n,
                     .k = k,
                     .group_size = group_size,
                     .stats_rows = bilevel ? stats_group_size : 16},
                    nullptr);
  return {codes, scales, zeros, second_order, residual, error};
}

template <class B>
void register_ops(Library& m) {
  m.impl("spqr_quantize_columns", TORCH_BOX(&spqr_quantize_columns<B>));
}

#define COLUMNS_BACKEND(Name, OF)                          \
  struct Name {                                            \
    static constexpr auto spqr_columns = OF(spqr_columns); \
  };
// On the CPU only: who quantizes on a GPU moves the columns (python/octavo/spqr/engine).
#ifdef OCTAVO_SIMT
OCTAVO_REGISTER(register_ops, COLUMNS_BACKEND)
#else
OCTAVO_REGISTER_CPU(register_ops, COLUMNS_BACKEND)
#endif

}  // namespace
}  // namespace octavo
