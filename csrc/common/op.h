#pragma once
// What an op file needs of libtorch: the stable ABI only, so that one binary serves every torch >= 2.13.
// The only header that sees libtorch; kernels never include it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace octavo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;

// ---- text for messages ----

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Bool: return "bool";
    case ScalarType::BFloat16: return "bfloat16";
    default: return "another dtype";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : "another device";
}

// ---- checks: each message holds the op, the argument and the actual value ----

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline DType float_dtype(const char* op, const char* name, ScalarType type) {
  STD_TORCH_CHECK(is_float(type), op, ": ", name, " must be float32, float16 or bfloat16, got ", name_of(type));
  return type == ScalarType::Float ? DType::f32 : type == ScalarType::Half ? DType::f16 : DType::bf16;
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  return float_dtype(op, name, t.scalar_type());
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " must be ", name_of(type), ", got ",
                  name_of(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimension", dim == 1 ? "" : "s", ", got shape ",
                  shape_of(t));
}

inline void check_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got a scalar");
}

// Row offsets of n rows with `count` entries in all, as they lie in the host's memory.
template <class T>
void check_row_offsets(const char* op, const T* at, int64_t n, int64_t count) {
  STD_TORCH_CHECK(at[0] == 0, op, ": row_offsets must begin with 0, got ", at[0]);
  STD_TORCH_CHECK(at[n] == count, op, ": row_offsets must end with the number of entries, ", count, ", got ", at[n]);
  T decreasing = 0;
  for (int64_t i = 0; i < n; ++i) decreasing |= static_cast<T>(at[i] > at[i + 1]);
  if (decreasing == 0) return;
  int64_t i = 0;
  while (at[i] <= at[i + 1]) ++i;
  STD_TORCH_CHECK(false, op, ": row_offsets must not decrease, got ", at[i], ", ", at[i + 1], " at ", i, ", ", i + 1);
}

inline void check_length(const char* op, const char* name, const Tensor& t, int64_t length, const char* meaning) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == length, op, ": ", name, " must have shape [", length, "] (", meaning,
                  "), got ", shape_of(t));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(device_of(t) == device_of(x), op, ": ", name, " is on ", device_of(t), " but the first argument on ",
                  device_of(x));
}

// A threshold as the fp32 that the kernels compare with: a positive one stays positive.
inline float check_threshold(const char* op, double threshold, bool zero_allowed) {
  STD_TORCH_CHECK(zero_allowed ? threshold >= 0.0 : threshold > 0.0, op, ": threshold must be ",
                  zero_allowed ? "0 (no outliers) or positive" : "positive", ", got ", threshold);
  const float value = static_cast<float>(threshold);
  return threshold > 0.0 && value == 0.0f ? 0x1p-149f : value;
}

// ---- tensors ----

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

inline std::vector<int64_t> shape(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline std::vector<int64_t> leading_shape(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end() - 1};
}

inline std::vector<int64_t> with_last(std::vector<int64_t> leading, int64_t last) {
  leading.push_back(last);
  return leading;
}

inline int64_t last_size(const Tensor& t) {
  return t.size(t.dim() - 1);
}

inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// The device of x for the time of one op, and its current stream (null on the CPU), where kernels are of one level.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) {
    if (!x.is_cuda()) return;
    guard_.emplace(x.get_device());
    stream_ = torch::stable::accelerator::getCurrentStream(x.get_device()).nativeHandle();
  }
  Stream stream() const { return stream_; }

 private:
#ifndef OCTAVO_SIMT
  cpu::OneIsa level_;
#endif
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

// ---- backends ----

// A kernel that does nothing: with it an op is its checks and the shapes and dtypes of what it returns. Registered for
// meta tensors, in a namespace of its own, since fakes ask these before they answer (python/octavo/core/fakes.py).
template <class F>
struct Nothing;
template <class R, class... A>
struct Nothing<R(A...)> {
  static R call(A...) { return R(); }
};

#define OCTAVO_OF_CPU(kernel) cpu::kernel
#define OCTAVO_OF_CUDA(kernel) cuda::kernel
#define OCTAVO_OF_SIMT(kernel) simt::kernel
#define OCTAVO_OF_CHECKS(kernel) Nothing<decltype(cpu::kernel)>::call

// Every family registers its ops once per backend of the build: OCTAVO_REGISTER(register_ops, macro that makes a struct
// of kernels) expands to octavo/CPU and octavo_checks/Meta (+ octavo/CUDA), or in a test build of the host SIMT machine
// to octavo_simt/CPU.
#define OCTAVO_REGISTER_FOR(Backend, library, key, register_ops) \
  STABLE_TORCH_LIBRARY_IMPL(library, key, m) {                   \
    register_ops<Backend>(m);                                    \
  }
#define OCTAVO_REGISTER_CPU(register_ops, make_backend)                                        \
  make_backend(Cpu, OCTAVO_OF_CPU) make_backend(Checks, OCTAVO_OF_CHECKS) OCTAVO_REGISTER_FOR( \
      Cpu, octavo, CPU, register_ops) OCTAVO_REGISTER_FOR(Checks, octavo_checks, Meta, register_ops)
#ifdef OCTAVO_SIMT
#define OCTAVO_REGISTER(register_ops, make_backend) \
  make_backend(Simt, OCTAVO_OF_SIMT) OCTAVO_REGISTER_FOR(Simt, octavo_simt, CPU, register_ops)
#elif defined(OCTAVO_WITH_CUDA)
#define OCTAVO_REGISTER(register_ops, make_backend) \
  OCTAVO_REGISTER_CPU(register_ops, make_backend)   \
  make_backend(Cuda, OCTAVO_OF_CUDA) OCTAVO_REGISTER_FOR(Cuda, octavo, CUDA, register_ops)
#else
#define OCTAVO_REGISTER(register_ops, make_backend) OCTAVO_REGISTER_CPU(register_ops, make_backend)
#endif

}  // namespace octavo
