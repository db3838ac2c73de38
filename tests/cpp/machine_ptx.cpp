// The host SIMT machine's stand-ins for PTX (common/ptx.h): asynchronous copies, matrix fragments, byte permutes.
#include <cstring>

#include "check.h"
#include "common/launch.h"
#include "common/numeric.h"
#include "ptx.cu"

namespace octavo::GPU_NS {
namespace {

// ---- cp.async ----

void test_async_copy() {
  const int4 in[2] = {{1, 2, 3, 4}, {5, 6, 7, 8}};
  constexpr int kUnwritten = 0x7d7d7d7d;
  int4 seen[4];
  async_copy(in, seen, nullptr);
  CHECK(seen[0].x == kUnwritten);
  CHECK(seen[1].x == 1 && seen[1].w == 4);
  CHECK(seen[2].x == kUnwritten);
  CHECK(seen[3].x == 5 && seen[3].y == 0 && seen[3].w == 0);
}

// ldmatrix and mma as a kernel combines them, against the product of the matrices. Small integers: exact in every type.
template <class T, class D>
void check_mma(DType dtype, T (*element)(int), int k) {
  alignas(16) T a[16 * 32 / sizeof(T)], b[8 * 32 / sizeof(T)];
  for (int i = 0; i < 16 * k; ++i) a[i] = element(test::uniform(-100, 100));
  for (int i = 0; i < 8 * k; ++i) b[i] = element(test::uniform(-100, 100));
  D d[16 * 8];
  mma(dtype, reinterpret_cast<const int4*>(a), reinterpret_cast<const int4*>(b), d, nullptr);
  const auto number = [](T v) {
    if constexpr (std::is_same_v<D, float>)
      return to_float(v);
    else
      return static_cast<int>(v);
  };
  bool same = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      D want{};
      for (int l = 0; l < k; ++l) want += number(a[i * k + l]) * number(b[j * k + l]);
      same = same && d[i * 8 + j] == want;
    }
  CHECK(same);
}

void test_mma() {
  check_mma<int8_t, int32_t>(DType::i32, [](int v) { return static_cast<int8_t>(v); }, 32);
  check_mma<Half, float>(DType::f16, [](int v) { return from_float<Half>(static_cast<float>(v)); }, 16);
  check_mma<BFloat16, float>(DType::bf16, [](int v) { return from_float<BFloat16>(static_cast<float>(v)); }, 16);
}

void test_permute() {
  uint32_t words[64] = {0x33221100u, 0x77665544u, 0x80ff7f00u, 0xf00f817eu};
  uint32_t selectors[32] = {0x7250u, 0xffffba98u}, out[32];
  permute(words, selectors, out, nullptr);
  CHECK(out[0] == 0x77225500u);
  CHECK(out[1] == 0xffff0000u);
  CHECK(out[2] == 0);
}

void test_transposed_matrices() {
  uint16_t elements[4][8][8];  // matrix, row, column
  for (int i = 0; i < 4 * 8 * 8; ++i) elements[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i * 257);
  int4 rows[32];
  std::memcpy(rows, elements, sizeof rows);
  uint32_t out[32][4];
  transpose(rows, out[0], nullptr);
  bool same = true;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int column = lane / 4, row = lane % 4 * 2;
      same = same &&
             out[lane][i] == (elements[i][row][column] | static_cast<uint32_t>(elements[i][row + 1][column]) << 16);
    }
  CHECK(same);
}

void test_set_flag() {
  uint8_t flags[3] = {};
  raise_flags(flags, nullptr);
  CHECK(flags[0] == 1 && flags[1] == 1 && flags[2] == 0);
}

}  // namespace

void test_ptx() {
  test_async_copy();
  test_mma();
  test_permute();
  test_transposed_matrices();
  test_set_flag();
}

}  // namespace octavo::GPU_NS
