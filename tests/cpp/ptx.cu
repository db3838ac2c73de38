// Every helper of common/ptx.h in a kernel: cuda-check assembles them for each architecture, machine_ptx.cpp runs them.
#include "common/ptx.h"

namespace octavo::GPU_NS {

// What shared memory holds before any wait, after the wait for the first of two groups (both places), and in the end.
__global__ void async_copy_kernel(const int4* in, int4* seen) {
  SHARED(int4, tile, [2]);
  cp_async_16(&tile[0], in);
  cp_async_commit();
  cp_async_16(&tile[1], in + 1, 4);
  cp_async_commit();
  seen[0] = tile[0];
  cp_async_wait<1>();
  seen[1] = tile[0];
  seen[2] = tile[1];
  cp_async_wait<0>();
  seen[3] = tile[1];
}

void async_copy(const int4* in, int4* seen, Stream stream) {
  LAUNCH(async_copy_kernel, 1, 1, 0, stream, in, seen);
}

// All threads of two blocks raise the first two flags.
__global__ void raise_flags_kernel(uint8_t* flags) {
  set_flag(flags + threadIdx.x % 2);
}

void raise_flags(uint8_t* flags, Stream stream) {
  LAUNCH(raise_flags_kernel, 2, 64, 0, stream, flags);
}

// Lane i permutes words 2 i and 2 i + 1 by selector i.
__global__ void permute_kernel(const uint32_t* words, const uint32_t* selectors, uint32_t* out) {
  const int lane = threadIdx.x;
  out[lane] = permute_bytes(words[2 * lane], words[2 * lane + 1], selectors[lane]);
}

void permute(const uint32_t* words, const uint32_t* selectors, uint32_t* out, Stream stream) {
  LAUNCH(permute_kernel, 1, 32, 0, stream, words, selectors, out);
}

// One warp loads four matrices of 8 rows of 16 bytes, transposed: out[lane][4].
__global__ void transpose_kernel(const int4* rows, uint32_t* out) {
  SHARED(int4, tile, [32]);
  const int lane = threadIdx.x;
  tile[lane] = rows[lane];
  __syncthreads();
  uint32_t result[4];
  ldmatrix_x4_transposed(result, &tile[lane]);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = result[i];
}

void transpose(const int4* rows, uint32_t* out, Stream stream) {
  LAUNCH(transpose_kernel, 1, 32, 0, stream, rows, out);
}

// One warp loads a[16][32 bytes] and b[8][32 bytes] as fragments and multiplies them: d[16][8].
template <class T, class D>
__global__ void mma_kernel(const int4* a, const int4* b, D* d) {
  SHARED(int4, a_tile, [16][3]);  // rows 48 bytes apart
  SHARED(int4, b_tile, [8][3]);
  const int lane = threadIdx.x;
  a_tile[lane / 2][lane % 2] = a[lane];
  if (lane < 16) b_tile[lane / 2][lane % 2] = b[lane];
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  ldmatrix_x4(of_a, &a_tile[lane % 16][lane / 16]);
  ldmatrix_x4(of_b, &b_tile[lane % 8][lane / 8 % 2]);  // twice the same two matrices
  D sum[4] = {};
  const uint32_t words[2] = {of_b[2], of_b[3]};
  if constexpr (dtype_of<T>::value == DType::i32)
    mma_int8(sum, of_a, words);
  else
    mma_16bit<T>(sum, of_a, words);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

void mma(DType dtype, const int4* a, const int4* b, void* d, Stream stream) {
  switch (dtype) {
    case DType::i32: {
      auto kernel = mma_kernel<int32_t, int32_t>;
      LAUNCH(kernel, 1, 32, 0, stream, a, b, static_cast<int32_t*>(d));
      break;
    }
    case DType::f16: {
      auto kernel = mma_kernel<Half, float>;
      LAUNCH(kernel, 1, 32, 0, stream, a, b, static_cast<float*>(d));
      break;
    }
    default: {
      auto kernel = mma_kernel<BFloat16, float>;
      LAUNCH(kernel, 1, 32, 0, stream, a, b, static_cast<float*>(d));
    }
  }
}

}  // namespace octavo::GPU_NS
