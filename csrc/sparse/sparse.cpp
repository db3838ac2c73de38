#include "sparse/sparse.h"

#include "common/op.h"

namespace octavo {
namespace {

// The tensors of a sparse matrix, contiguous and checked. What takes a pass over the entries is left to validate_csr;
// the offsets, one per row, are read where they lie in the host's memory.
struct CsrTensors {
  std::optional<Tensor> values;
  Tensor columns, offsets;
  Csr s;

  CsrTensors(const char* op, const Tensor* values_, const Tensor& columns_, const Tensor& offsets_, int64_t k)
      : columns(columns_), offsets(offsets_) {
    check_dim(op, "columns", columns_, 1);
    const ScalarType column_type = columns_.scalar_type(), offset_type = offsets_.scalar_type();
    STD_TORCH_CHECK(column_type == ScalarType::Int || column_type == ScalarType::UInt16, op,
                    ": columns must be int32 or uint16, got ", name_of(column_type));
    check_dim(op, "row_offsets", offsets_, 1);
    STD_TORCH_CHECK(offset_type == ScalarType::Int || offset_type == ScalarType::Long, op,
                    ": row_offsets must be int32 or int64, got ", name_of(offset_type));
    STD_TORCH_CHECK(offsets_.size(0) >= 1, op,
                    ": row_offsets must have one element more than there are rows, got none");
    check_same_device(op, "row_offsets", offsets_, columns_);
    STD_TORCH_CHECK(k >= 0 && k <= 0x7fffffffll, op, ": k must be from 0 to 2147483647, got ", k);
    s = {.values = nullptr,
         .dtype = DType::f32,
         .columns = nullptr,
         .offsets = nullptr,
         .narrow = column_type == ScalarType::UInt16,
         .wide = offset_type == ScalarType::Long,
         .n = offsets_.size(0) - 1,
         .k = k,
         .nnz = columns_.size(0)};
    if (values_) {
      s.dtype = float_dtype(op, "values", *values_);
      check_length(op, "values", *values_, s.nnz, "the entries that columns has");
      check_same_device(op, "values", *values_, columns_);
      values = as_contiguous(*values_);
      s.values = values->const_data_ptr();
    }
    columns = as_contiguous(columns_);
    offsets = as_contiguous(offsets_);
    s.columns = columns.const_data_ptr();
    s.offsets = offsets.const_data_ptr();
    if (offsets.is_cpu()) check_offsets(op);
  }

 private:
  void check_offsets(const char* op) const {
    s.wide ? check_row_offsets(op, static_cast<const int64_t*>(s.offsets), s.n, s.nnz)
           : check_row_offsets(op, static_cast<const int32_t*>(s.offsets), s.n, s.nnz);
  }
};

Tensor bytes(int64_t count, const Tensor& like) {
  return empty({count}, ScalarType::Byte, like);
}

void check_last(const char* op, const char* name, const Tensor& t, int64_t size, const char* meaning) {
  check_rows(op, name, t);
  STD_TORCH_CHECK(last_size(t) == size, op, ": the last dimension of ", name, " must be ", size, " (", meaning,
                  "), got shape ", shape_of(t));
}

template <class B>
void run_matmul(CsrMatmul p, const Tensor& like, const OnDeviceOf& device) {
  if (p.m == 0 || p.s.n == 0) return;
  Tensor workspace = bytes(B::csr_matmul_workspace(p), like);
  p.workspace = workspace.mutable_data_ptr();
  B::csr_matmul(p, device.stream());
}

template <class B>
Tensor csr_matmul(const Tensor& values, const Tensor& columns, const Tensor& row_offsets, const Tensor& x_, int64_t n,
                  const std::optional<Tensor>& bias_) {
  constexpr const char* op = "csr_matmul";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_);
  const CsrTensors tensors(op, &values, columns, row_offsets, last_size(x_));
  STD_TORCH_CHECK(n == tensors.s.n, op, ": n is ", n, " but row_offsets has ", tensors.s.n + 1,
                  " elements, which makes ", tensors.s.n, " rows");
  check_same_device(op, "x", x_, columns);
  std::optional<Tensor> bias;
  if (bias_) {
    float_dtype(op, "bias", *bias_);
    check_length(op, "bias", *bias_, n, "the rows of the sparse matrix");
    check_same_device(op, "bias", *bias_, columns);
    bias = as_contiguous(*bias_);
  }
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  Tensor out = empty(with_last(leading_shape(x), n), x.scalar_type(), x);
  run_matmul<B>({.s = tensors.s,
                 .x = x.const_data_ptr(),
                 .x_dtype = dtype,
                 .bias = bias ? bias->const_data_ptr() : nullptr,
                 .bias_dtype = bias ? float_dtype(op, "bias", *bias) : DType::f32,
                 .add = false,
                 .out = out.mutable_data_ptr(),
                 .out_dtype = dtype,
                 .m = row_count(x),
                 .workspace = nullptr},
                x, device);
  return out;
}

template <class B>
void csr_matmul_add(Tensor out, const Tensor& values, const Tensor& columns, const Tensor& row_offsets,
                    const Tensor& x_) {
  constexpr const char* op = "csr_matmul_add";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_), out_dtype = float_dtype(op, "out", out);
  const CsrTensors tensors(op, &values, columns, row_offsets, last_size(x_));
  STD_TORCH_CHECK(shape(out) == with_last(leading_shape(x_), tensors.s.n), op, ": out has shape ", shape_of(out),
                  " but x ", shape_of(x_), " and row_offsets ", shape_of(row_offsets), " make ", tensors.s.n,
                  " columns");
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  check_same_device(op, "out", out, columns);
  check_same_device(op, "x", x_, columns);
  const Tensor x = as_contiguous(x_);
  const OnDeviceOf device(x);
  run_matmul<B>({.s = tensors.s,
                 .x = x.const_data_ptr(),
                 .x_dtype = dtype,
                 .bias = nullptr,
                 .bias_dtype = DType::f32,
                 .add = true,
                 .out = out.mutable_data_ptr(),
                 .out_dtype = out_dtype,
                 .m = row_count(x),
                 .workspace = nullptr},
                x, device);
}

template <class B>
Tensor csr_matmul_transposed(const Tensor& values, const Tensor& columns, const Tensor& row_offsets, const Tensor& g_,
                             int64_t k) {
  constexpr const char* op = "csr_matmul_transposed";
  const DType dtype = float_dtype(op, "g", g_);
  const CsrTensors tensors(op, &values, columns, row_offsets, k);
  check_last(op, "g", g_, tensors.s.n, "the rows that row_offsets makes");
  check_same_device(op, "g", g_, columns);
  const Tensor g = as_contiguous(g_);
  const OnDeviceOf device(g);
  Tensor out = empty(with_last(leading_shape(g), k), g.scalar_type(), g);
  if (out.numel() == 0) return out;
  CsrMatmulTransposed p{.s = tensors.s,
                        .g = g.const_data_ptr(),
                        .dtype = dtype,
                        .out = out.mutable_data_ptr(),
                        .m = row_count(g),
                        .workspace = nullptr};
  Tensor workspace = bytes(B::csr_transposed_workspace(p), g);
  p.workspace = workspace.mutable_data_ptr();
  B::csr_matmul_transposed(p, device.stream());
  return out;
}

template <class B>
Tensor csr_grad_values(const Tensor& columns, const Tensor& row_offsets, const Tensor& g_, const Tensor& x_,
                       ScalarType type) {
  constexpr const char* op = "csr_grad_values";
  check_rows(op, "x", x_);
  const DType dtype = float_dtype(op, "x", x_), out_dtype = float_dtype(op, "dtype", type);
  check_dtype(op, "g", g_, x_.scalar_type());
  const CsrTensors tensors(op, nullptr, columns, row_offsets, last_size(x_));
  check_last(op, "g", g_, tensors.s.n, "the rows that row_offsets makes");
  STD_TORCH_CHECK(leading_shape(g_) == leading_shape(x_), op, ": g and x must have the same leading dimensions, got ",
                  shape_of(g_), " and ", shape_of(x_));
  check_same_device(op, "g", g_, columns);
  check_same_device(op, "x", x_, columns);
  const Tensor g = as_contiguous(g_), x = as_contiguous(x_);
  const OnDeviceOf device(x);
  Tensor out = empty({tensors.s.nnz}, type, x);
  if (out.numel() == 0) return out;
  CsrGradValues p{.s = tensors.s,
                  .g = g.const_data_ptr(),
                  .x = x.const_data_ptr(),
                  .dtype = dtype,
                  .out = out.mutable_data_ptr(),
                  .out_dtype = out_dtype,
                  .m = row_count(x),
                  .workspace = nullptr};
  Tensor workspace = bytes(B::csr_grad_values_workspace(p), x);
  p.workspace = workspace.mutable_data_ptr();
  B::csr_grad_values(p, device.stream());
  return out;
}

template <class B>
void register_ops(Library& m) {
  m.impl("csr_matmul", TORCH_BOX(&csr_matmul<B>));
  m.impl("csr_matmul_add", TORCH_BOX(&csr_matmul_add<B>));
  m.impl("csr_matmul_transposed", TORCH_BOX(&csr_matmul_transposed<B>));
  m.impl("csr_grad_values", TORCH_BOX(&csr_grad_values<B>));
}

#define SPARSE_BACKEND(Name, OF)                                                     \
  struct Name {                                                                      \
    static constexpr auto csr_matmul_workspace = OF(csr_matmul_workspace);           \
    static constexpr auto csr_transposed_workspace = OF(csr_transposed_workspace);   \
    static constexpr auto csr_grad_values_workspace = OF(csr_grad_values_workspace); \
    static constexpr auto csr_matmul = OF(csr_matmul);                               \
    static constexpr auto csr_matmul_transposed = OF(csr_matmul_transposed);         \
    static constexpr auto csr_grad_values = OF(csr_grad_values);                     \
  };
OCTAVO_REGISTER(register_ops, SPARSE_BACKEND)

}  // namespace
}  // namespace octavo
