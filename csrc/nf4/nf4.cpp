#include "nf4/nf4.h"

#include <algorithm>

#include "common/op.h"

namespace octavo {
namespace {

QuantType check_type(const char* op, const std::string& name) {
  constexpr std::pair<const char*, QuantType> kKnown[] = {{"nf2", QuantType::nf2},
                                                          {"nf3", QuantType::nf3},
                                                          {"nf4", QuantType::nf4},
                                                          {"nf8", QuantType::nf8},
                                                          {"fp4", QuantType::fp4}};
  for (const auto& [known, type] : kKnown)
    if (name == known) return type;
  STD_TORCH_CHECK(false, op, ": quant_type must be 'nf2', 'nf3', 'nf4', 'nf8' or 'fp4', got '", name, "'");
}

void check_blocksize(const char* op, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= kMinLowBitBlock && blocksize <= kMaxLowBitBlock && (blocksize & (blocksize - 1)) == 0,
                  op, ": blocksize must be a power of two from ", kMinLowBitBlock, " to ", kMaxLowBitBlock, ", got ",
                  blocksize);
}

// The tensors of one weight, kept alive and contiguous while the kernel's struct points into them.
struct Held {
  Tensor tensors[4];
  int count = 0;
  template <class T>
  const T* keep(const Tensor& t) {
    tensors[count] = as_contiguous(t);
    return static_cast<const T*>(tensors[count++].const_data_ptr());
  }
};

LowBitTensor check_low_bit(const char* op, Held& held, const Tensor& first, const Tensor& packed, const Tensor& absmax,
                           const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                           int64_t count, const std::string& quant_type, int64_t blocksize) {
  LowBitTensor t{};
  t.type = check_type(op, quant_type);
  check_blocksize(op, blocksize);
  t.count = count, t.blocksize = blocksize;
  const int64_t blocks = ceil_div(count, blocksize), bytes = packed_bytes(t.type, count);
  check_dtype(op, "packed", packed, ScalarType::Byte);
  STD_TORCH_CHECK(packed.dim() == 1 && packed.size(0) == bytes, op, ": packed must have shape [", bytes, "] (", count,
                  " elements of ", bits_of(t.type), " bits), got ", shape_of(packed));
  check_same_device(op, "packed", packed, first);
  check_length(op, "absmax", absmax, blocks, "one per block");
  check_same_device(op, "absmax", absmax, first);
  t.packed = held.keep<uint8_t>(packed);
  STD_TORCH_CHECK(nested_absmax.has_value() == offset.has_value(), op,
                  ": nested_absmax and offset go together, got only ", nested_absmax ? "nested_absmax" : "offset");
  if (!nested_absmax) {
    check_dtype(op, "absmax", absmax, ScalarType::Float);
    t.absmax = held.keep<float>(absmax);
    return t;
  }
  check_dtype(op, "absmax", absmax, ScalarType::Byte);
  check_dtype(op, "nested_absmax", *nested_absmax, ScalarType::Float);
  check_length(op, "nested_absmax", *nested_absmax, ceil_div(blocks, kNestedBlock), "one for 256 of absmax");
  check_same_device(op, "nested_absmax", *nested_absmax, first);
  check_dtype(op, "offset", *offset, ScalarType::Float);
  check_length(op, "offset", *offset, 1, "one number");
  check_same_device(op, "offset", *offset, first);
  t.absmax_codes = held.keep<uint8_t>(absmax);
  t.nested_absmax = held.keep<float>(*nested_absmax);
  t.offset = held.keep<float>(*offset);
  return t;
}

// The product of sizes; refused where it leaves int64.
int64_t check_count(const char* op, const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 0, op, ": sizes must not be negative, got ", size);
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(count, size, &count) && count < int64_t{1} << 56, op,
                    ": more elements than memory could hold, the last size read is ", size);
  return count;
}

template <class B>
std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& x_, std::string quant_type, int64_t blocksize) {
  constexpr const char* op = "nf4_quantize";
  const DType dtype = float_dtype(op, "x", x_);
  const QuantType type = check_type(op, quant_type);
  check_blocksize(op, blocksize);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  const int64_t count = x.numel();
  Tensor packed = empty({packed_bytes(type, count)}, ScalarType::Byte, x);
  Tensor absmax = empty({ceil_div(count, blocksize)}, ScalarType::Float, x);
  if (count > 0)
    B::quantize_low_bit({.x = x.const_data_ptr(),
                         .dtype = dtype,
                         .type = type,
                         .packed = packed.mutable_data_ptr<uint8_t>(),
                         .absmax = absmax.mutable_data_ptr<float>(),
                         .count = count,
                         .blocksize = blocksize},
                        device.stream());
  return {packed, absmax};
}

template <class B>
Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                      const std::optional<Tensor>& offset, std::vector<int64_t> sizes, ScalarType type,
                      std::string quant_type, int64_t blocksize) {
  constexpr const char* op = "nf4_dequantize";
  DequantizeLowBit p{};
  p.dtype = float_dtype(op, "dtype", type);
  Held held;
  p.from = check_low_bit(op, held, packed, packed, absmax, nested_absmax, offset, check_count(op, sizes), quant_type,
                         blocksize);
  const OnDeviceOf device(packed);
  Tensor out = empty(sizes, type, packed);
  p.out = out.mutable_data_ptr();
  if (p.from.count > 0) B::dequantize_low_bit(p, device.stream());
  return out;
}

// What both products share. x: [..., inner]; returns [..., outer].
template <class Workspace, class Multiply>
Tensor multiply(const char* op, const Tensor& x_, const Tensor& packed, const Tensor& absmax,
                const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                const std::optional<Tensor>& bias, int64_t n, int64_t k, bool transposed, const std::string& quant_type,
                int64_t blocksize, const Workspace& workspace_of, const Multiply& run) {
  Nf4Matmul p{};
  p.dtype = float_dtype(op, transposed ? "g" : "x", x_);
  const Tensor x = as_contiguous(x_);
  Held held;
  p.n = n, p.k = k;
  p.w =
      check_low_bit(op, held, x, packed, absmax, nested_absmax, offset, check_count(op, {n, k}), quant_type, blocksize);
  p.m = row_count(x);
  p.x = x.const_data_ptr();
  Tensor bias_kept;
  if (bias) {
    p.bias_dtype = float_dtype(op, "bias", *bias);
    check_length(op, "bias", *bias, n, "the output features");
    check_same_device(op, "bias", *bias, x);
    bias_kept = as_contiguous(*bias);
    p.bias = bias_kept.const_data_ptr();
  }
  const OnDeviceOf device(x);
  Tensor out = empty(with_last(leading_shape(x), transposed ? k : n), x.scalar_type(), x), workspace;
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  if (const int64_t bytes = workspace_of(p)) {
    workspace = empty({bytes}, ScalarType::Byte, x);
    p.workspace = workspace.mutable_data_ptr();
  }
  run(p, device.stream());
  return out;
}

template <class B>
Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                  const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                  const std::optional<Tensor>& bias, int64_t n, std::string quant_type, int64_t blocksize) {
  constexpr const char* op = "nf4_linear";
  check_rows(op, "x", x);
  STD_TORCH_CHECK(n >= 0, op, ": n must not be negative, got ", n);
  return multiply(op, x, packed, absmax, nested_absmax, offset, bias, n, last_size(x), false, quant_type, blocksize,
                  B::nf4_workspace, B::nf4_matmul);
}

template <class B>
Tensor nf4_linear_transposed(const Tensor& g, const Tensor& packed, const Tensor& absmax,
                             const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset, int64_t k,
                             std::string quant_type, int64_t blocksize) {
  constexpr const char* op = "nf4_linear_transposed";
  check_rows(op, "g", g);
  STD_TORCH_CHECK(k >= 0, op, ": k must not be negative, got ", k);
  return multiply(op, g, packed, absmax, nested_absmax, offset, std::nullopt, last_size(g), k, true, quant_type,
                  blocksize, B::nf4_workspace_transposed, B::nf4_matmul_transposed);
}

template <class B>
void register_ops(Library& m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize<B>));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize<B>));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear<B>));
  m.impl("nf4_linear_transposed", TORCH_BOX(&nf4_linear_transposed<B>));
}

#define NF4_BACKEND(Name, OF)                                                      \
  struct Name {                                                                    \
    static constexpr auto quantize_low_bit = OF(quantize_low_bit);                 \
    static constexpr auto dequantize_low_bit = OF(dequantize_low_bit);             \
    static constexpr auto nf4_workspace = OF(nf4_workspace);                       \
    static constexpr auto nf4_matmul = OF(nf4_matmul);                             \
    static constexpr auto nf4_workspace_transposed = OF(nf4_workspace_transposed); \
    static constexpr auto nf4_matmul_transposed = OF(nf4_matmul_transposed);       \
  };
OCTAVO_REGISTER(register_ops, NF4_BACKEND)

}  // namespace
}  // namespace octavo
