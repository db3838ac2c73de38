#include "int8/quantize.h"

#include "common/op.h"

namespace octavo {
namespace {

template <class B>
std::tuple<Tensor, Tensor> quantize_rowwise(const Tensor& x_, double threshold) {
  constexpr const char* op = "quantize_rowwise";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const float limit = check_threshold(op, threshold, true);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  Tensor codes = empty(shape(x), ScalarType::Char, x), scale = empty(leading_shape(x), ScalarType::Float, x);
  B::quantize_rows({.x = x.const_data_ptr(),
                    .dtype = dtype,
                    .codes = codes.mutable_data_ptr<int8_t>(),
                    .scale = scale.mutable_data_ptr<float>(),
                    .skip = nullptr,
                    .threshold = limit,
                    .rows = row_count(x),
                    .cols = last_size(x)},
                   device.stream());
  return {codes, scale};
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_columns(const char* op, const Tensor& x_, bool with_rows) {
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t cols = last_size(x);
  Tensor codes = empty(shape(x), ScalarType::Char, x), scale = empty({cols}, ScalarType::Float, x);
  Tensor absmax = empty({cols}, ScalarType::Int, x);
  Tensor row_codes, row_scale;
  if (with_rows) {
    row_codes = empty(shape(x), ScalarType::Char, x);
    row_scale = empty(leading_shape(x), ScalarType::Float, x);
  }
  B::quantize_columns({.x = x.const_data_ptr(),
                       .dtype = dtype,
                       .codes = codes.mutable_data_ptr<int8_t>(),
                       .scale = scale.mutable_data_ptr<float>(),
                       .absmax = static_cast<uint32_t*>(absmax.mutable_data_ptr()),
                       .row_codes = with_rows ? row_codes.mutable_data_ptr<int8_t>() : nullptr,
                       .row_scale = with_rows ? row_scale.mutable_data_ptr<float>() : nullptr,
                       .rows = cols || with_rows ? row_count(x) : 0,  // without columns nothing comes of a row
                       .cols = cols},
                      device.stream());
  return {row_codes, row_scale, codes, scale};
}

template <class B>
std::tuple<Tensor, Tensor> quantize_columnwise(const Tensor& x) {
  auto [row_codes, row_scale, codes, scale] = quantize_columns<B>("quantize_columnwise", x, false);
  return {codes, scale};
}

template <class B>
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_rowwise_columnwise(const Tensor& x) {
  return quantize_columns<B>("quantize_rowwise_columnwise", x, true);
}

template <class B>
std::tuple<Tensor, Tensor> quantize_tensorwise(const Tensor& x_) {
  const DType dtype = float_dtype("quantize_tensorwise", "x", x_);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  Tensor codes = empty(shape(x), ScalarType::Char, x), scale = empty({}, ScalarType::Float, x);
  Tensor absmax = empty({}, ScalarType::Int, x);
  B::quantize_tensor({.x = x.const_data_ptr(),
                      .dtype = dtype,
                      .codes = codes.mutable_data_ptr<int8_t>(),
                      .scale = scale.mutable_data_ptr<float>(),
                      .absmax = static_cast<uint32_t*>(absmax.mutable_data_ptr()),
                      .count = x.numel()},
                     device.stream());
  return {codes, scale};
}

template <class B>
Tensor dequantize_rowwise(const Tensor& codes_, const Tensor& scale_, ScalarType type) {
  constexpr const char* op = "dequantize_rowwise";
  check_rows(op, "codes", codes_);
  check_dtype(op, "codes", codes_, ScalarType::Char);
  check_dtype(op, "scale", scale_, ScalarType::Float);
  check_same_device(op, "scale", scale_, codes_);
  STD_TORCH_CHECK(shape(scale_) == leading_shape(codes_), op, ": codes of shape ", shape_of(codes_),
                  " need a scale per row, got scale of shape ", shape_of(scale_));
  const DType dtype = float_dtype(op, "dtype", type);
  const Tensor codes = as_contiguous(codes_), scale = as_contiguous(scale_);
  const OnDeviceOf device(codes);
  Tensor out = empty(shape(codes), type, codes);
  B::dequantize_rows({.codes = codes.const_data_ptr<int8_t>(),
                      .scale = scale.const_data_ptr<float>(),
                      .out = out.mutable_data_ptr(),
                      .dtype = dtype,
                      .rows = row_count(codes),
                      .cols = last_size(codes)},
                     device.stream());
  return out;
}

template <class B>
void register_ops(Library& m) {
  m.impl("quantize_rowwise", TORCH_BOX(&quantize_rowwise<B>));
  m.impl("quantize_columnwise", TORCH_BOX(&quantize_columnwise<B>));
  m.impl("quantize_tensorwise", TORCH_BOX(&quantize_tensorwise<B>));
  m.impl("quantize_rowwise_columnwise", TORCH_BOX(&quantize_rowwise_columnwise<B>));
  m.impl("dequantize_rowwise", TORCH_BOX(&dequantize_rowwise<B>));
}

#define QUANTIZE_BACKEND(Name, OF)                                 \
  struct Name {                                                    \
    static constexpr auto quantize_rows = OF(quantize_rows);       \
    static constexpr auto quantize_columns = OF(quantize_columns); \
    static constexpr auto quantize_tensor = OF(quantize_tensor);   \
    static constexpr auto dequantize_rows = OF(dequantize_rows);   \
  };
OCTAVO_REGISTER(register_ops, QUANTIZE_BACKEND)

}  // namespace
}  // namespace octavo
