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

// The device of x for the time of one op, and its current stream (null on the CPU).
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) {
    if (!x.is_cuda()) return;
    guard_.emplace(x.get_device());
    stream_ = torch::stable::accelerator::getCurrentStream(x.get_device()).nativeHandle();
  }
  Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

// Every family registers its ops once per backend of the build: OCTAVO_REGISTER(Backend structs' suffix) expands to
// octavo/CPU (+ octavo/CUDA), or in a test build of the host SIMT machine to octavo_simt/CPU.
#ifdef OCTAVO_SIMT
#define OCTAVO_REGISTER(register_ops, make_backend)                         \
  make_backend(Simt, simt) STABLE_TORCH_LIBRARY_IMPL(octavo_simt, CPU, m) { \
    register_ops<Simt>(m);                                                  \
  }
#elif defined(OCTAVO_WITH_CUDA)
#define OCTAVO_REGISTER(register_ops, make_backend)                                           \
  make_backend(Cpu, cpu) make_backend(Cuda, cuda) STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) { \
    register_ops<Cpu>(m);                                                                     \
  }                                                                                           \
  STABLE_TORCH_LIBRARY_IMPL(octavo, CUDA, m) {                                                \
    register_ops<Cuda>(m);                                                                    \
  }
#else
#define OCTAVO_REGISTER(register_ops, make_backend)                  \
  make_backend(Cpu, cpu) STABLE_TORCH_LIBRARY_IMPL(octavo, CPU, m) { \
    register_ops<Cpu>(m);                                            \
  }
#endif

}  // namespace octavo
