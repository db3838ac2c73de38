#pragma once
// ldmatrix and mma on the host SIMT machine. The fragments are laid out as the PTX manual draws them: lane = 4 g + t.
#include <cmath>

#include "simt/machine.h"

namespace octavo::simt_machine {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r brings row r of matrix i, 16 bytes of shared memory; register i
// of a lane gets elements 2 t and 2 t + 1 of row g of matrix i.
struct MatrixRows {
  uint32_t row[4], result[4];
};
inline void load_matrices(uint32_t (&result)[4], const void* row, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that is not 16-byte aligned");
  MatrixRows mine{};
  std::memcpy(mine.row, row, sizeof mine.row);  // each lane reads the row that it names, for the sanitizers
  const auto combine = [](void* const operands[32], uint32_t lanes) {
    if (lanes != kAllLanes) fail("ldmatrix without all lanes of the warp");
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<MatrixRows*>(operands[lane])->result[i] =
            static_cast<const MatrixRows*>(operands[8 * i + lane / 4])->row[lane % 4];
  };
  collective("ldmatrix", kAllLanes, &mine, combine, MemoryOrder::none, where);
  std::memcpy(result, mine.result, sizeof mine.result);
}

// d[16, 8] += a[16, K] b[K, 8] with K = 8 words of elements of type T. Register i of a: row g + 8 (i & 1), word
// t + 4 (i >> 1) along K; register i of b: column g, word t + 4 i; register i of d: row g + 8 (i >> 1), column
// 2 t + (i & 1). Products enter one by one along K: integers wrap, floats are fused (Element::add).
template <class D>
struct Fragments {
  D d[4];
  uint32_t a[4], b[2];
};
template <class Element, class D>
void multiply_fragments(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Fragments<D> mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto combine = [](void* const operands[32], uint32_t lanes) {
    if (lanes != kAllLanes) fail("mma without all lanes of the warp");
    const auto of = [&](int lane) -> Fragments<D>& { return *static_cast<Fragments<D>*>(operands[lane]); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
        for (int word = 0; word < 8; ++word)
          Element::add(of(lane).d[i], of(row % 8 * 4 + word % 4).a[row / 8 + 2 * (word / 4)],
                       of(column * 4 + word % 4).b[word / 4]);
      }
  };
  collective("mma", kAllLanes, &mine, combine, MemoryOrder::none, where);
  std::memcpy(d, mine.d, sizeof d);
}

}  // namespace octavo::simt_machine
