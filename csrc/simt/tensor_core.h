#pragma once
// ldmatrix and mma on the host SIMT machine. The fragments are laid out as the PTX manual draws them: lane = 4 g + t.
#include <cstring>

#include "common/dtype.h"
#include "simt/machine.h"

namespace octavo::simt_machine {

// Lane 8 i + r brings row r of matrix i, 16 bytes; result[i] of a lane is word t of row g of matrix i, or, of a
// transposed one, the 16-bit elements of rows 2 t and 2 t + 1 in column g.
void exchange_rows(uint32_t (&result)[4], const uint32_t (&row)[4], bool transposed, Where where);

// Each lane reads the row that it names, so that sanitizers, which see what is compiled with the kernel, see that.
inline void load_matrices(uint32_t (&result)[4], const void* from, bool transposed, Where where) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("ldmatrix of a row that is not 16-byte aligned");
  uint32_t row[4];
  std::memcpy(row, from, sizeof row);
  exchange_rows(result, row, transposed, where);
}

// d[16, 8] += a[16, K] b[K, 8], K being 8 words of 4 int8 or 2 floats. Register i of a: row g + 8 (i & 1), word
// t + 4 (i >> 1) along K; register i of b: column g, word t + 4 i; register i of d: row g + 8 (i >> 1), column
// 2 t + (i & 1). Products enter one by one along K: integers wrap, floats are fused.
void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);
void multiply_16bit(DType dtype, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);

}  // namespace octavo::simt_machine
