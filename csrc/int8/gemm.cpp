#include "int8/gemm.h"

#include "common/op.h"
#include "int8/decompose.h"
#include "int8/quantize.h"

namespace octavo {
namespace {

void check_operands(const char* op, const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  check_rows(op, a_name, a);
  check_dim(op, b_name, b, 2);
  check_dtype(op, b_name, b, ScalarType::Char);
  check_same_device(op, b_name, b, a);
  STD_TORCH_CHECK(last_size(a) == b.size(1), op, ": ", a_name, " of shape ", shape_of(a), " has k = ", last_size(a),
                  " but ", b_name, " of shape ", shape_of(b), " has k = ", b.size(1));
  STD_TORCH_CHECK(b.size(1) <= kMaxK, op, ": k = ", b.size(1), " is more than ", kMaxK,
                  ", where a sum of int8 products can leave int32");
}

std::optional<Tensor> check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& b) {
  if (!bias) return std::nullopt;
  float_dtype(op, "bias", *bias);
  check_length(op, "bias", *bias, b.size(0), "the output features");
  check_same_device(op, "bias", *bias, b);
  return as_contiguous(*bias);
}

Tensor check_scale(const char* op, const char* name, const Tensor& scale, const std::vector<int64_t>& wanted,
                   const Tensor& like, bool single_allowed) {
  check_dtype(op, name, scale, ScalarType::Float);
  check_same_device(op, name, scale, like);
  std::string text = "[";
  for (size_t i = 0; i < wanted.size(); ++i) text += (i ? ", " : "") + std::to_string(wanted[i]);
  STD_TORCH_CHECK(shape(scale) == wanted || (single_allowed && scale.numel() == 1), op, ": ", name, " must have shape ",
                  text, single_allowed ? "] or one element, got " : "], got ", shape_of(scale));
  return as_contiguous(scale);
}

void set_bias(Int8Gemm& p, const char* op, const std::optional<Tensor>& bias) {
  if (!bias) return;
  p.bias = bias->const_data_ptr();
  p.bias_dtype = float_dtype(op, "bias", *bias);
}

template <class B>
Tensor int8_mm(const Tensor& a_, const Tensor& b_) {
  constexpr const char* op = "int8_mm";
  check_dtype(op, "a", a_, ScalarType::Char);
  check_operands(op, "a", a_, "b", b_);
  const Tensor a = as_contiguous(a_), b = as_contiguous(b_);
  const OnDeviceOf device(a);
  Tensor out = empty(with_last(leading_shape(a), b.size(0)), ScalarType::Int, a);
  Int8Gemm p{};
  p.a = a.const_data_ptr<int8_t>();
  p.b = b.const_data_ptr<int8_t>();
  p.out = out.mutable_data_ptr();
  p.out_dtype = DType::i32;
  p.m = row_count(a), p.n = b.size(0), p.k = b.size(1);
  B::int8_gemm(p, device.stream());
  return out;
}

template <class B>
Tensor int8_gemm(const Tensor& a_, const Tensor& b_, const Tensor& a_scale_, const Tensor& b_scale_,
                 const std::optional<Tensor>& bias_, ScalarType out_type) {
  constexpr const char* op = "int8_gemm";
  check_dtype(op, "a", a_, ScalarType::Char);
  check_operands(op, "a", a_, "b", b_);
  const Tensor a = as_contiguous(a_), b = as_contiguous(b_);
  const Tensor a_scale = check_scale(op, "a_scale", a_scale_, leading_shape(a), a, true);
  const Tensor b_scale = check_scale(op, "b_scale", b_scale_, {b.size(0)}, a, true);
  const std::optional<Tensor> bias = check_bias(op, bias_, b);
  Int8Gemm p{};
  p.out_dtype = float_dtype(op, "out_dtype", out_type);
  const OnDeviceOf device(a);
  Tensor out = empty(with_last(leading_shape(a), b.size(0)), out_type, a);
  p.a = a.const_data_ptr<int8_t>();
  p.b = b.const_data_ptr<int8_t>();
  p.a_scale = a_scale.const_data_ptr<float>();
  p.b_scale = b_scale.const_data_ptr<float>();
  p.a_scale_stride = a_scale.numel() != 1;
  p.b_scale_stride = b_scale.numel() != 1;
  set_bias(p, op, bias);
  p.out = out.mutable_data_ptr();
  p.m = row_count(a), p.n = b.size(0), p.k = b.size(1);
  B::int8_gemm(p, device.stream());
  return out;
}

// Split x into outlier columns and int8 codes, then one product that adds the outlier columns, as many as the
// device-side count says.
template <class B>
Tensor int8_linear(const Tensor& x_, const Tensor& weight_, const Tensor& weight_scale_,
                   const std::optional<Tensor>& bias_, double threshold, const std::optional<Tensor>& slot_,
                   const std::optional<Tensor>& kept_) {
  constexpr const char* op = "int8_linear";
  Int8Gemm p{};
  p.out_dtype = float_dtype(op, "x", x_);
  check_operands(op, "x", x_, "weight", weight_);
  const float limit = check_threshold(op, threshold, true);
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  p.m = row_count(x), p.n = weight.size(0), p.k = weight.size(1);
  const Tensor weight_scale = check_scale(op, "weight_scale", weight_scale_, {p.n}, x, false);
  const std::optional<Tensor> bias = check_bias(op, bias_, weight);
  STD_TORCH_CHECK(slot_.has_value() == kept_.has_value(), op, ": outlier_slot and outlier_weight go together, got ",
                  slot_ ? "only outlier_slot" : "only outlier_weight");
  std::optional<Tensor> slot, kept;
  if (slot_ && limit > 0.0f) {
    check_dtype(op, "outlier_slot", *slot_, ScalarType::Int);
    check_length(op, "outlier_slot", *slot_, p.k, "the input features");
    check_same_device(op, "outlier_slot", *slot_, x);
    check_dim(op, "outlier_weight", *kept_, 2);
    STD_TORCH_CHECK(kept_->size(1) == p.n, op, ": outlier_weight must have shape [slots, ", p.n, "], got ",
                    shape_of(*kept_));
    check_same_device(op, "outlier_weight", *kept_, x);
    p.outlier_weight_dtype = float_dtype(op, "outlier_weight", *kept_);
    slot = as_contiguous(*slot_);
    kept = as_contiguous(*kept_);
    p.outlier_slot = slot->const_data_ptr<int32_t>();
    p.outlier_weight = kept->const_data_ptr();
    p.outlier_slots = kept->size(0);
  }

  const OnDeviceOf device(x);
  Tensor codes = empty({p.m, p.k}, ScalarType::Char, x), scale = empty({p.m}, ScalarType::Float, x);
  Tensor out = empty(with_last(leading_shape(x), p.n), x.scalar_type(), x);
  Tensor flags, columns, count;  // live until the last launch
  if (limit > 0.0f) {
    flags = empty({p.k}, ScalarType::Byte, x);
    columns = empty({p.k}, ScalarType::Int, x);
    count = empty({1}, ScalarType::Int, x);
    p.x = x.const_data_ptr();
    p.columns = columns.const_data_ptr<int32_t>();
    p.count = count.const_data_ptr<int32_t>();
    B::decompose({.x = p.x,
                  .dtype = p.out_dtype,
                  .threshold = limit,
                  .flags = flags.mutable_data_ptr<uint8_t>(),
                  .columns = columns.mutable_data_ptr<int32_t>(),
                  .count = count.mutable_data_ptr<int32_t>(),
                  .codes = codes.mutable_data_ptr<int8_t>(),
                  .scale = scale.mutable_data_ptr<float>(),
                  .rows = p.m,
                  .cols = p.k},
                 device.stream());
  } else {
    B::quantize_rows({.x = x.const_data_ptr(),
                      .dtype = p.out_dtype,
                      .codes = codes.mutable_data_ptr<int8_t>(),
                      .scale = scale.mutable_data_ptr<float>(),
                      .skip = nullptr,
                      .threshold = 0.0f,
                      .rows = p.m,
                      .cols = p.k},
                     device.stream());
  }
  p.a = codes.const_data_ptr<int8_t>();
  p.b = weight.const_data_ptr<int8_t>();
  p.a_scale = scale.const_data_ptr<float>();
  p.b_scale = weight_scale.const_data_ptr<float>();
  p.a_scale_stride = p.b_scale_stride = 1;
  set_bias(p, op, bias);
  p.out = out.mutable_data_ptr();
  B::int8_gemm(p, device.stream());
  return out;
}

template <class B>
void register_ops(Library& m) {
  m.impl("int8_mm", TORCH_BOX(&int8_mm<B>));
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm<B>));
  m.impl("int8_linear", TORCH_BOX(&int8_linear<B>));
}

#define GEMM_BACKEND(Name, OF)                               \
  struct Name {                                              \
    static constexpr auto quantize_rows = OF(quantize_rows); \
    static constexpr auto decompose = OF(decompose);         \
    static constexpr auto int8_gemm = OF(int8_gemm);         \
  };
OCTAVO_REGISTER(register_ops, GEMM_BACKEND)

}  // namespace
}  // namespace octavo
