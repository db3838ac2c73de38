// Sparse products on the machine under test, against plain loops in double over the definitions in sparse/sparse.h:
// within the bound of fp32 sums. Buffers end at an inaccessible page, and matrices may be malformed.
#include "kernels.h"

namespace kernels {
namespace {

// n numbers of a dtype that is known at run time only.
struct Floats {
  DType dtype;
  Buffer<char> data;

  Floats(int64_t n, DType type, const std::function<float()>& value)
      : dtype(type), data(n * element(type), static_cast<size_t>(element(type))) {
    for (int64_t i = 0; i < n; ++i) store_float(data.data(), type, i, value());
  }
  static int64_t element(DType type) { return type == DType::f32 ? 4 : 2; }
  int64_t size() const { return data.size() / element(dtype); }
  double operator[](int64_t i) const { return static_cast<double>(load_float(data.data(), dtype, i)); }
};

enum class Rows { scattered, one_full, empty_but_last, full };

struct SparseCase {
  int64_t m, n, k;
  Rows rows = Rows::scattered;
  bool narrow = false, wide = false;
  DType values = DType::f32, x = DType::f32, out = DType::f32;
  bool bias = false, add = false;
  bool malformed = false;  // some columns outside [0, k)
  int every = 4;           // of scattered rows: one column in so many
};

struct Matrix {
  std::vector<int64_t> offsets{0}, columns;

  explicit Matrix(const SparseCase& c) {
    for (int64_t i = 0; i < c.n; ++i) {
      const bool full = c.rows == Rows::full || (c.rows == Rows::one_full && i == c.n / 2) ||
                        (c.rows == Rows::empty_but_last && i == c.n - 1);
      for (int64_t j = 0; j < c.k; ++j)
        if (full || (c.rows == Rows::scattered && uniform(0, c.every - 1) == 0)) {
          columns.push_back(j);
          if (uniform(0, 19) == 0) columns.push_back(j);  // twice
        }
      if (c.malformed && uniform(0, 1)) columns.push_back(c.narrow ? 65535 : uniform(0, 1) ? 0x7fffffff : -1);
      offsets.push_back(static_cast<int64_t>(columns.size()));
    }
  }
  int64_t nnz() const { return static_cast<int64_t>(columns.size()); }
};

template <class T>
Buffer<char> integers(const std::vector<int64_t>& values) {
  Buffer<char> data(static_cast<int64_t>(values.size() * sizeof(T)), sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    const T v = static_cast<T>(values[i]);
    std::memcpy(data.data() + i * sizeof(T), &v, sizeof v);
  }
  return data;
}

// Room for a kernel, aligned as an allocator's.
Buffer<char> room(int64_t bytes) {
  return Buffer<char>((bytes + 63) / 64 * 64, 64);
}

std::string name_of(const char* what, const SparseCase& c, int64_t nnz) {
  return backend->name + " " + what + shape(c.m, c.n, c.out) + " k = " + std::to_string(c.k) +
         ", nnz = " + std::to_string(nnz) + ", rows " + std::to_string(static_cast<int>(c.rows));
}

// |got - want| at most the roundings of `terms` fp32 operations on sums of `magnitude` and of the result.
void check_close(const Floats& got, const std::vector<double>& want, const std::vector<double>& magnitude,
                 int64_t terms, const std::string& what) {
  const double unit = got.dtype == DType::f32 ? 0x1p-24 : got.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  for (size_t i = 0; i < want.size(); ++i) {
    const double bound =
        magnitude[i] * static_cast<double>(terms + 4) * 0x1p-24 + std::fabs(want[i]) * unit * 1.01 + 0x1p-24;
    if (std::fabs(got[static_cast<int64_t>(i)] - want[i]) <= bound) continue;
    CHECK_FOR(false, what + "[" + std::to_string(i) + "] is " + std::to_string(got[static_cast<int64_t>(i)]) +
                         ", not " + std::to_string(want[i]));
    return;
  }
  CHECK(true);
}

void test_sparse_case(const SparseCase& c) {
  if (test::left_out()) return;
  const Matrix matrix(c);
  const int64_t nnz = matrix.nnz();
  const Buffer<char> columns = c.narrow ? integers<uint16_t>(matrix.columns) : integers<int32_t>(matrix.columns);
  const Buffer<char> offsets = c.wide ? integers<int64_t>(matrix.offsets) : integers<int32_t>(matrix.offsets);
  const Floats values(nnz, c.values, normal), bias(c.n, c.values, normal);
  const Floats x(c.m * c.k, c.x, normal), g(c.m * c.n, c.x, normal);
  const Csr s{values.data.data(), c.values, columns.data(), offsets.data(), c.narrow, c.wide, c.n, c.k, nnz};

  Floats out(c.m * c.n, c.out, normal), back(c.m * c.k, c.x, normal), grads(nnz, c.out, normal);
  std::vector<double> want(static_cast<size_t>(c.m * c.n)), size(want.size()),
      want_back(static_cast<size_t>(c.m * c.k)), back_size(want_back.size()), want_grads(static_cast<size_t>(nnz)),
      grads_size(want_grads.size());
  for (int64_t j = 0; j < c.m; ++j)
    for (int64_t i = 0; i < c.n; ++i) {
      const auto at = static_cast<size_t>(j * c.n + i);
      want[at] = (c.bias ? bias[i] : 0.0) + (c.add ? out[j * c.n + i] : 0.0);
      size[at] = (c.bias ? std::fabs(bias[i]) : 0.0) + (c.add ? std::fabs(out[j * c.n + i]) : 0.0);
      for (int64_t e = matrix.offsets[static_cast<size_t>(i)]; e < matrix.offsets[static_cast<size_t>(i) + 1]; ++e) {
        const int64_t column = matrix.columns[static_cast<size_t>(e)];
        if (column < 0 || column >= c.k) continue;
        const double product = values[e] * x[j * c.k + column], returned = values[e] * g[j * c.n + i];
        want[at] += product;
        size[at] += std::fabs(product);
        want_back[static_cast<size_t>(j * c.k + column)] += returned;
        back_size[static_cast<size_t>(j * c.k + column)] += std::fabs(returned);
        want_grads[static_cast<size_t>(e)] += g[j * c.n + i] * x[j * c.k + column];
        grads_size[static_cast<size_t>(e)] += std::fabs(g[j * c.n + i] * x[j * c.k + column]);
      }
    }

  CsrMatmul p{s,     x.data.data(), c.x,    c.bias ? bias.data.data() : nullptr, c.values, c.add, out.data.data(),
              c.out, c.m,           nullptr};
  Buffer<char> workspace = room(backend->csr_matmul_workspace(p));
  p.workspace = workspace.data();
  backend->csr_matmul(p, nullptr);
  check_close(out, want, size, c.k, name_of("csr_matmul", c, nnz));

  CsrMatmulTransposed t{s, g.data.data(), c.x, back.data.data(), c.m, nullptr};
  if (c.k > 0) {
    Buffer<char> more = room(backend->csr_transposed_workspace(t));
    t.workspace = more.data();
    backend->csr_matmul_transposed(t, nullptr);
    check_close(back, want_back, back_size, c.n, name_of("csr_matmul_transposed", c, nnz));
  }

  CsrGradValues v{s, g.data.data(), x.data.data(), c.x, grads.data.data(), c.out, c.m, nullptr};
  v.s.values = nullptr;
  if (nnz > 0) {
    Buffer<char> more = room(backend->csr_grad_values_workspace(v));
    v.workspace = more.data();
    backend->csr_grad_values(v, nullptr);
    check_close(grads, want_grads, grads_size, c.m, name_of("csr_grad_values", c, nnz));
  }
}

}  // namespace

void test_sparse() {
  const struct {
    int64_t m, n, k;
  } sizes[] = {{1, 1, 1},   {1, 7, 0},   {1, 40, 300},  {2, 17, 33},  {3, 16, 64},   {4, 33, 70},   {5, 3, 1},
               {15, 9, 31}, {16, 31, 8}, {17, 65, 129}, {33, 20, 40}, {64, 15, 257}, {129, 18, 16}, {200, 5, 65}};
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  for (const auto [m, n, k] : sizes)
    for (const Rows rows : {Rows::scattered, Rows::one_full, Rows::empty_but_last, Rows::full})
      for (const bool odd : {false, true})
        test_sparse_case({.m = m,
                          .n = n,
                          .k = k,
                          .rows = rows,
                          .narrow = odd,
                          .wide = uniform(0, 1) != 0,
                          .values = dtypes[uniform(0, 2)],
                          .x = dtypes[uniform(0, 2)],
                          .out = dtypes[uniform(0, 2)],
                          .bias = uniform(0, 1) != 0,
                          .add = uniform(0, 1) != 0,
                          .malformed = odd});
  // Rows of several chunks, on the CPU and on a GPU, in the kernels for few and for many rows of x.
  for (const int64_t m : {1, 3, 18})
    for (const Rows rows : {Rows::one_full, Rows::empty_but_last, Rows::full}) {
      test_sparse_case({.m = m, .n = 3, .k = 9000, .rows = rows, .narrow = true, .values = DType::f16, .bias = true});
      test_sparse_case({.m = m, .n = 700, .k = 40, .rows = rows, .malformed = true});
    }
  test_sparse_case({.m = 1, .n = 5000, .k = 9, .every = 30});
}

}  // namespace kernels
