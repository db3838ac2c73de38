// Every operator of the library on one screen.
#include "common/op.h"
#ifdef OCTAVO_SIMT
#include "simt/order.h"
#else
#include "cpu/parallel.h"
#endif

namespace octavo {

static void define_ops(Library& m) {
  // int8 quantization
  m.def("quantize_rowwise(Tensor x, float threshold=0.0) -> (Tensor codes, Tensor scale)");
  m.def("quantize_columnwise(Tensor x) -> (Tensor codes, Tensor scale)");
  m.def("quantize_tensorwise(Tensor x) -> (Tensor codes, Tensor scale)");
  m.def(
      "quantize_rowwise_columnwise(Tensor x) -> "
      "(Tensor row_codes, Tensor row_scale, Tensor column_codes, Tensor column_scale)");
  m.def("quantize_tensorwise_transpose(Tensor x) -> (Tensor codes, Tensor transposed, Tensor scale)");
  m.def("quantize_columnwise_transpose(Tensor x, Tensor? seed=None) -> (Tensor transposed, Tensor scale)");
  m.def(
      "quantize_rowwise_columnwise_transpose(Tensor x, Tensor? seed=None) -> "
      "(Tensor row_codes, Tensor row_scale, Tensor transposed, Tensor column_scale)");
  m.def("dequantize_rowwise(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor");
  // outlier columns
  m.def("find_outlier_columns(Tensor x, float threshold) -> (Tensor columns, Tensor count)");
  m.def("extract_columns(Tensor x, Tensor columns, Tensor count) -> Tensor");
  m.def(
      "extract_int8_columns(Tensor weight, Tensor weight_scale, Tensor columns, Tensor count, ScalarType dtype) -> "
      "Tensor");
  // int8 products: a[..., k] x b[n, k]
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("int8_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, float threshold=0.0, "
      "Tensor? outlier_slot=None, Tensor? outlier_weight=None) -> Tensor");
  // 8-bit block-wise quantization
  m.def(
      "quantize_blockwise(Tensor x, int blocksize=256, bool signed=True, Tensor? code=None) -> "
      "(Tensor codes, Tensor absmax)");
  m.def(
      "dequantize_blockwise(Tensor codes, Tensor absmax, ScalarType dtype, int blocksize=256, bool signed=True, "
      "Tensor? code=None) -> Tensor");
  // low-bit block-wise quantization and products: csrc/nf4/nf4.h
  m.def("nf4_quantize(Tensor x, str quant_type=\"nf4\", int blocksize=64) -> (Tensor packed, Tensor absmax)");
  m.def(
      "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int[] size, "
      "ScalarType dtype, str quant_type=\"nf4\", int blocksize=64) -> Tensor");
  m.def(
      "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? bias, int n, "
      "str quant_type=\"nf4\", int blocksize=64) -> Tensor");
  m.def(
      "nf4_linear_transposed(Tensor g, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int k, "
      "str quant_type=\"nf4\", int blocksize=64) -> Tensor");
  // SpQR: one block of columns, as in csrc/spqr/columns.h
  m.def(
      "spqr_quantize_columns(Tensor weight, Tensor factor, float threshold, int bits, int group_size, "
      "int stats_group_size=16, int scale_bits=0, int zero_bits=0, bool leave_one_out=True) -> "
      "(Tensor codes, Tensor scales, Tensor zeros, Tensor second_order, Tensor residual, Tensor error)");
  // sparse matrices in compressed rows (CSR)
  m.def("csr_matmul(Tensor values, Tensor columns, Tensor row_offsets, Tensor x, int n, Tensor? bias=None) -> Tensor");
  m.def("csr_matmul_add(Tensor(a!) out, Tensor values, Tensor columns, Tensor row_offsets, Tensor x) -> ()");
  m.def("csr_matmul_transposed(Tensor values, Tensor columns, Tensor row_offsets, Tensor g, int k) -> Tensor");
  m.def("csr_grad_values(Tensor columns, Tensor row_offsets, Tensor g, Tensor x, ScalarType dtype) -> Tensor");
  // optimizers over many tensors: states, absmax and compensation as in csrc/optim8/optim8.cpp
  m.def(
      "optim_table(Tensor[] params, Tensor[] grads, Tensor[] steps, Tensor[] states, Tensor[] absmax, "
      "Tensor[] compensation, int[] ids) -> Tensor");
  m.def(
      "optim_step(Tensor(a!)[] params, Tensor[] grads, Tensor[] steps, Tensor(b!)[] states, Tensor(c!)[] absmax, "
      "Tensor(d!)[] compensation, Tensor(e!) nonfinite, Tensor table, str rule, float[] hyper, Tensor? lr=None, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? grad_factor=None, bool maximize=False, "
      "bool stochastic=False, int seed=0, Tensor? sums=None) -> ()");
  m.def(
      "optim_sums(Tensor[] params, Tensor[] grads, Tensor[] steps, Tensor[] states, Tensor[] absmax, "
      "Tensor[] compensation, Tensor table, str rule, float[] hyper, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "Tensor? grad_factor=None, bool maximize=False) -> Tensor");
  // SpQR weights: csrc/spqr/README.md
  m.def(
      "spqr_linear(Tensor x, Tensor codes, Tensor statistics, Tensor? second_order, Tensor unit, Tensor outliers, "
      "Tensor row_offsets, Tensor? perm, Tensor? bias, int n, int group_size, int stats_group_size=16, "
      "int scale_bits=3, int zero_bits=3) -> Tensor");
  m.def(
      "spqr_dequantize(Tensor codes, Tensor statistics, Tensor? second_order, Tensor unit, Tensor outliers, "
      "Tensor row_offsets, Tensor? perm, int n, int k, ScalarType dtype, int group_size, int stats_group_size=16, "
      "int scale_bits=3, int zero_bits=3) -> Tensor");
}

#ifdef OCTAVO_SIMT
STABLE_TORCH_LIBRARY(octavo_simt, m) {  // same schemas, the CUDA kernels on the host (tests)
  define_ops(m);
}

// For ctypes: the order in which the machine runs threads. False: not an order.
extern "C" __attribute__((visibility("default"))) bool octavo_simt_set_order(const char* order) {
  try {
    simt::set_order(order);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}
#else
STABLE_TORCH_LIBRARY(octavo, m) {
  define_ops(m);
}

STABLE_TORCH_LIBRARY(octavo_checks, m) {  // same schemas, nothing but the checks: see common/op.h
  define_ops(m);
}

void cpu::parallel_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
#endif

}  // namespace octavo
