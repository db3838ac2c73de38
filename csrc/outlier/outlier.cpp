#include "outlier/outlier.h"

#include "common/op.h"

namespace octavo {
namespace {

template <class B>
std::tuple<Tensor, Tensor> find_outlier_columns(const Tensor& x_, double threshold) {
  constexpr const char* op = "find_outlier_columns";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const float limit = check_threshold(op, threshold, false);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t cols = last_size(x);
  Tensor flags = empty({cols}, ScalarType::Byte, x);
  Tensor columns = empty({cols}, ScalarType::Int, x), count = empty({1}, ScalarType::Int, x);
  B::outlier_flags({.x = x.const_data_ptr(),
                    .dtype = dtype,
                    .flags = flags.mutable_data_ptr<uint8_t>(),
                    .threshold = limit,
                    .rows = cols ? row_count(x) : 0,
                    .cols = cols},
                   device.stream());
  B::compact_columns({.flags = flags.const_data_ptr<uint8_t>(),
                      .columns = columns.mutable_data_ptr<int32_t>(),
                      .count = count.mutable_data_ptr<int32_t>(),
                      .cols = cols},
                     device.stream());
  return {columns, count};
}

void check_columns(const char* op, const Tensor& columns, const Tensor& count, const Tensor& x) {
  check_dtype(op, "columns", columns, ScalarType::Int);
  check_dtype(op, "count", count, ScalarType::Int);
  check_dim(op, "columns", columns, 1);
  check_length(op, "count", count, 1, "one number");
  check_same_device(op, "columns", columns, x);
  check_same_device(op, "count", count, x);
}

template <class B>
Tensor extract(const Tensor& x_, const Tensor* scale_, const Tensor& columns_, const Tensor& count, ScalarType type,
               DType dtype) {
  const Tensor x = as_contiguous(x_), columns = as_contiguous(columns_);
  const std::optional<Tensor> scale = scale_ ? std::optional(as_contiguous(*scale_)) : std::nullopt;
  const OnDeviceOf device(x);
  Tensor out = empty(with_last(leading_shape(x), columns.size(0)), type, x);
  B::extract_columns({.x = x.const_data_ptr(),
                      .scale = scale ? scale->template const_data_ptr<float>() : nullptr,
                      .columns = columns.const_data_ptr<int32_t>(),
                      .count = count.const_data_ptr<int32_t>(),
                      .out = out.mutable_data_ptr(),
                      .dtype = dtype,
                      .rows = columns.size(0) ? row_count(x) : 0,
                      .cols = last_size(x),
                      .capacity = columns.size(0)},
                     device.stream());
  return out;
}

template <class B>
Tensor extract_columns(const Tensor& x, const Tensor& columns, const Tensor& count) {
  constexpr const char* op = "extract_columns";
  check_rows(op, "x", x);
  const DType dtype = float_dtype(op, "x", x);
  check_columns(op, columns, count, x);
  return extract<B>(x, nullptr, columns, count, x.scalar_type(), dtype);
}

template <class B>
Tensor extract_int8_columns(const Tensor& weight, const Tensor& weight_scale, const Tensor& columns,
                            const Tensor& count, ScalarType type) {
  constexpr const char* op = "extract_int8_columns";
  check_dim(op, "weight", weight, 2);
  check_dtype(op, "weight", weight, ScalarType::Char);
  check_dtype(op, "weight_scale", weight_scale, ScalarType::Float);
  check_length(op, "weight_scale", weight_scale, weight.size(0), "the rows of weight");
  check_same_device(op, "weight_scale", weight_scale, weight);
  const DType dtype = float_dtype(op, "dtype", type);
  check_columns(op, columns, count, weight);
  return extract<B>(weight, &weight_scale, columns, count, type, dtype);
}

template <class B>
void register_ops(Library& m) {
  m.impl("find_outlier_columns", TORCH_BOX(&find_outlier_columns<B>));
  m.impl("extract_columns", TORCH_BOX(&extract_columns<B>));
  m.impl("extract_int8_columns", TORCH_BOX(&extract_int8_columns<B>));
}

#define OUTLIER_BACKEND(Name, OF)                                \
  struct Name {                                                  \
    static constexpr auto outlier_flags = OF(outlier_flags);     \
    static constexpr auto compact_columns = OF(compact_columns); \
    static constexpr auto extract_columns = OF(extract_columns); \
  };
OCTAVO_REGISTER(register_ops, OUTLIER_BACKEND)

}  // namespace
}  // namespace octavo
