#include "simt/tensor_core.h"

#include "common/numeric.h"
#include "simt/intrinsics.h"

namespace octavo::simt_machine {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

struct MatrixRows {
  uint32_t row[4], result[4];
  bool transposed;
};

void combine_rows(void* const operands[32], uint32_t) {
  const auto of = [&](int lane) -> MatrixRows& { return *static_cast<MatrixRows*>(operands[lane]); };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = lane % 4;
      const auto element = [&](int row) { return of(8 * i + row).row[g / 2] >> g % 2 * 16 & 0xffffu; };
      of(lane).result[i] = of(lane).transposed ? element(2 * t) | element(2 * t + 1) << 16 : of(8 * i + g).row[t];
    }
}

struct Int8 {
  using Sum = int32_t;
  static void add(Sum& sum, uint32_t a, uint32_t b) { sum = __dp4a(static_cast<int>(a), static_cast<int>(b), sum); }
};

template <class T>
struct Float {
  using Sum = float;
  static void add(Sum& sum, uint32_t a, uint32_t b) {
    for (const int shift : {0, 16})
      sum = fmaf(to_float(T{static_cast<uint16_t>(a >> shift)}), to_float(T{static_cast<uint16_t>(b >> shift)}), sum);
  }
};

template <class Element>
struct Fragments {
  typename Element::Sum d[4];
  uint32_t a[4], b[2];
};

template <class Element>
void combine_fragments(void* const operands[32], uint32_t) {
  const auto of = [&](int lane) -> Fragments<Element>& { return *static_cast<Fragments<Element>*>(operands[lane]); };
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      for (int word = 0; word < 8; ++word)
        Element::add(of(lane).d[i], of(row % 8 * 4 + word % 4).a[row / 8 + 2 * (word / 4)],
                     of(column * 4 + word % 4).b[word / 4]);
    }
}

template <class Element>
void multiply(typename Element::Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Fragments<Element> mine;
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  collective("mma", kAllLanes, &mine, combine_fragments<Element>, MemoryOrder::none, where);
  std::memcpy(d, mine.d, sizeof d);
}

}  // namespace

void exchange_rows(uint32_t (&result)[4], const uint32_t (&row)[4], bool transposed, Where where) {
  MatrixRows mine{};
  mine.transposed = transposed;
  std::memcpy(mine.row, row, sizeof row);
  collective("ldmatrix", kAllLanes, &mine, combine_rows, MemoryOrder::none, where);
  std::memcpy(result, mine.result, sizeof result);
}

void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  multiply<Int8>(d, a, b, where);
}

void multiply_16bit(DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  dtype == DType::f16 ? multiply<Float<Half>>(d, a, b, where) : multiply<Float<BFloat16>>(d, a, b, where);
}

}  // namespace octavo::simt_machine
