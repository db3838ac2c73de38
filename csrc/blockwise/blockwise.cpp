#include "blockwise/blockwise.h"

#include "common/codebook.h"
#include "common/op.h"

namespace octavo {
namespace {

void check_blocksize(const char* op, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize && (blocksize & (blocksize - 1)) == 0, op,
                  ": blocksize must be a power of two from ", kMinBlocksize, " to ", kMaxBlocksize, ", got ",
                  blocksize);
}

// The caller's code book, or null for the dynamic map. On a GPU its order is not read.
const float* check_code(const char* op, const std::optional<Tensor>& code, const Tensor& x) {
  if (!code) return nullptr;
  check_dtype(op, "code", *code, ScalarType::Float);
  check_length(op, "code", *code, kCodes, "one value per code");
  check_same_device(op, "code", *code, x);
  STD_TORCH_CHECK(code->is_contiguous(), op, ": code must be contiguous");
  const float* values = code->const_data_ptr<float>();
  if (code->is_cpu())
    for (int i = 0; i < kCodes; ++i) {
      const float most = 3.4028234663852886e38f;
      STD_TORCH_CHECK(values[i] >= -most && values[i] <= most, op, ": code must be finite, got ", values[i], " at ", i);
      STD_TORCH_CHECK(i == 0 || values[i] > values[i - 1], op, ": code must ascend, got ", values[i - 1], ", ",
                      values[i], " at ", i - 1, ", ", i);
    }
  return values;
}

template <class B>
std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x_, int64_t blocksize, bool is_signed,
                                              const std::optional<Tensor>& code) {
  constexpr const char* op = "quantize_blockwise";
  const DType dtype = float_dtype(op, "x", x_);
  check_blocksize(op, blocksize);
  const float* values = check_code(op, code, x_);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t count = x.numel();
  Tensor codes = empty(shape(x), ScalarType::Byte, x);
  Tensor absmax = empty({ceil_div(count, blocksize)}, ScalarType::Float, x);
  if (count > 0)
    B::quantize_blocks({.x = x.const_data_ptr(),
                        .dtype = dtype,
                        .values = values,
                        .is_signed = is_signed,
                        .codes = codes.mutable_data_ptr<uint8_t>(),
                        .absmax = absmax.mutable_data_ptr<float>(),
                        .count = count,
                        .blocksize = blocksize},
                       device.stream());
  return {codes, absmax};
}

template <class B>
Tensor dequantize_blockwise(const Tensor& codes_, const Tensor& absmax_, ScalarType type, int64_t blocksize,
                            bool is_signed, const std::optional<Tensor>& code) {
  constexpr const char* op = "dequantize_blockwise";
  check_dtype(op, "codes", codes_, ScalarType::Byte);
  check_dtype(op, "absmax", absmax_, ScalarType::Float);
  check_blocksize(op, blocksize);
  check_length(op, "absmax", absmax_, ceil_div(codes_.numel(), blocksize), "one per block");
  check_same_device(op, "absmax", absmax_, codes_);
  const DType dtype = float_dtype(op, "dtype", type);
  const float* values = check_code(op, code, codes_);
  const Tensor codes = as_contiguous(codes_), absmax = as_contiguous(absmax_);
  const OnDeviceOf device(codes);
  Tensor out = empty(shape(codes), type, codes);
  if (codes.numel() > 0)
    B::dequantize_blocks({.codes = codes.const_data_ptr<uint8_t>(),
                          .absmax = absmax.const_data_ptr<float>(),
                          .values = values,
                          .is_signed = is_signed,
                          .out = out.mutable_data_ptr(),
                          .dtype = dtype,
                          .count = codes.numel(),
                          .blocksize = blocksize},
                         device.stream());
  return out;
}

template <class B>
void register_ops(Library& m) {
  m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise<B>));
  m.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise<B>));
}

#define BLOCKWISE_BACKEND(Name, OF)                                  \
  struct Name {                                                      \
    static constexpr auto quantize_blocks = OF(quantize_blocks);     \
    static constexpr auto dequantize_blocks = OF(dequantize_blocks); \
  };
OCTAVO_REGISTER(register_ops, BLOCKWISE_BACKEND)

}  // namespace
}  // namespace octavo
