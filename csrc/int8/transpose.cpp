#include "int8/transpose.h"

#include "common/op.h"
#include "int8/quantize.h"

namespace octavo {
namespace {

const int64_t* check_seed(const char* op, const std::optional<Tensor>& seed, const Tensor& x) {
  if (!seed) return nullptr;
  check_dtype(op, "seed", *seed, ScalarType::Long);
  check_same_device(op, "seed", *seed, x);
  STD_TORCH_CHECK(seed->numel() == 1, op, ": seed must be one number, got shape ", shape_of(*seed));
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

template <class B>
std::tuple<Tensor, Tensor, Tensor> quantize_tensorwise_transpose(const Tensor& x_) {
  constexpr const char* op = "quantize_tensorwise_transpose";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t rows = row_count(x), cols = last_size(x);
  Tensor codes = empty(shape(x), ScalarType::Char, x), transposed = empty({cols, rows}, ScalarType::Char, x);
  Tensor scale = empty({}, ScalarType::Float, x), absmax = empty({}, ScalarType::Int, x);
  uint32_t* bits = static_cast<uint32_t*>(absmax.mutable_data_ptr());
  B::quantize_tensor(
      {.x = x.const_data_ptr(), .dtype = dtype, .codes = nullptr, .scale = nullptr, .absmax = bits, .count = x.numel()},
      device.stream());
  B::encode_transposed({.x = x.const_data_ptr(),
                        .dtype = dtype,
                        .absmax = bits,
                        .absmax_stride = 0,
                        .codes = codes.mutable_data_ptr<int8_t>(),
                        .transposed = transposed.mutable_data_ptr<int8_t>(),
                        .scale = scale.mutable_data_ptr<float>(),
                        .seed = nullptr,
                        .rows = rows,
                        .cols = cols},
                       device.stream());
  return {codes, transposed, scale};
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_columns_transpose(const char* op, const Tensor& x_,
                                                                      const std::optional<Tensor>& seed,
                                                                      bool with_rows) {
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const int64_t* seed_data = check_seed(op, seed, x_);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t rows = row_count(x), cols = last_size(x);
  Tensor transposed = empty({cols, rows}, ScalarType::Char, x), scale = empty({cols}, ScalarType::Float, x);
  Tensor absmax = empty({cols}, ScalarType::Int, x);
  uint32_t* bits = static_cast<uint32_t*>(absmax.mutable_data_ptr());
  Tensor row_codes, row_scale;
  if (with_rows) {
    row_codes = empty(shape(x), ScalarType::Char, x);
    row_scale = empty(leading_shape(x), ScalarType::Float, x);
  }
  B::quantize_columns({.x = x.const_data_ptr(),
                       .dtype = dtype,
                       .codes = nullptr,
                       .scale = nullptr,
                       .absmax = bits,
                       .row_codes = with_rows ? row_codes.mutable_data_ptr<int8_t>() : nullptr,
                       .row_scale = with_rows ? row_scale.mutable_data_ptr<float>() : nullptr,
                       .rows = cols || with_rows ? rows : 0,  // without columns nothing comes of a row
                       .cols = cols},
                      device.stream());
  B::encode_transposed({.x = x.const_data_ptr(),
                        .dtype = dtype,
                        .absmax = bits,
                        .absmax_stride = 1,
                        .codes = nullptr,
                        .transposed = transposed.mutable_data_ptr<int8_t>(),
                        .scale = scale.mutable_data_ptr<float>(),
                        .seed = seed_data,
                        .rows = rows,
                        .cols = cols},
                       device.stream());
  return {row_codes, row_scale, transposed, scale};
}

template <class B>
std::tuple<Tensor, Tensor> quantize_columnwise_transpose(const Tensor& x, const std::optional<Tensor>& seed) {
  auto [row_codes, row_scale, transposed, scale] =
      quantize_columns_transpose<B>("quantize_columnwise_transpose", x, seed, false);
  return {transposed, scale};
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_rowwise_columnwise_transpose(const Tensor& x,
                                                                                 const std::optional<Tensor>& seed) {
  return quantize_columns_transpose<B>("quantize_rowwise_columnwise_transpose", x, seed, true);
}

template <class B>
void register_ops(Library& m) {
  m.impl("quantize_tensorwise_transpose", TORCH_BOX(&quantize_tensorwise_transpose<B>));
  m.impl("quantize_columnwise_transpose", TORCH_BOX(&quantize_columnwise_transpose<B>));
  m.impl("quantize_rowwise_columnwise_transpose", TORCH_BOX(&quantize_rowwise_columnwise_transpose<B>));
}

#define TRANSPOSE_BACKEND(Name, OF)                                  \
  struct Name {                                                      \
    static constexpr auto quantize_columns = OF(quantize_columns);   \
    static constexpr auto quantize_tensor = OF(quantize_tensor);     \
    static constexpr auto encode_transposed = OF(encode_transposed); \
  };
OCTAVO_REGISTER(register_ops, TRANSPOSE_BACKEND)

}  // namespace
}  // namespace octavo
