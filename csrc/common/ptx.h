#pragma once
// Every inline-assembly instruction octavo uses, one named helper each: asm for the device, the same meaning on the
// host SIMT machine. __dp4a, votes and shuffles are CUDA intrinsics already.
#include "common/dtype.h"
#include "common/launch.h"
#include "common/numeric.h"
#ifndef __CUDACC__
#include "simt/async_copy.h"
#include "simt/tensor_core.h"
#endif

namespace octavo::GPU_NS {

// Raises a flag that other threads, of this block or another, may be raising too: an ordinary store would be a race.
__device__ __forceinline__ void set_flag(uint8_t* flag) {
#if !defined(__CUDACC__)
  __atomic_store_n(flag, uint8_t{1}, __ATOMIC_RELAXED);
#else
  asm volatile("st.relaxed.gpu.u8 [%0], %1;" ::"l"(flag), "r"(1));
#endif
}

// v, computed here once: the compiler would otherwise take sums apart and make their common parts again for each use.
__device__ __forceinline__ uint32_t computed(uint32_t v) {
#if defined(__CUDACC__)
  asm("" : "+r"(v));
#endif
  return v;
}

// (above & 0xffff) << 16 | byte(high) << 8 | byte(low), where byte() saturates to [0, 255].
__device__ __forceinline__ uint32_t pack_bytes(int32_t low, int32_t high, uint32_t above) {
#if !defined(__CUDACC__)
  const auto byte = [](int32_t v) { return static_cast<uint32_t>(v < 0 ? 0 : v > 255 ? 255 : v); };
  return above << 16 | byte(high) << 8 | byte(low);
#else
  uint32_t packed;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(above));
  return packed;
#endif
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes b:a; where the upper bit of these four is set,
// that byte's sign, eight times. (__byte_perm clears the upper bits first. What lies above 16 bits never matters.)
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if !defined(__CUDACC__)
  const auto bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7)) & 0xff;
    result |= (selector >> 4 * i & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#endif
}

// Brings the line at this address into L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
#if !defined(__CUDACC__)
  static_cast<void>(global);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// Starts a copy of 16 bytes from global to shared memory; only the first `bytes` are read, the rest becomes zero.
// Both addresses are 16-byte aligned. Before sm_80 the copy is simply made.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
#if !defined(__CUDACC__)
  simt_machine::start_copy_16(shared, global, bytes);
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  uint4 value = make_uint4(0, 0, 0, 0);
  if (bytes == 16) {
    value = *static_cast<const uint4*>(global);
  } else {
    for (int i = 0; i < bytes; ++i)
      reinterpret_cast<unsigned char*>(&value)[i] = static_cast<const unsigned char*>(global)[i];
  }
  *static_cast<uint4*>(shared) = value;
#endif
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if !defined(__CUDACC__)
  simt_machine::commit_copies();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are on their way. Other threads' data needs a barrier too.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#if !defined(__CUDACC__)
  simt_machine::finish_copies(pending);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- pairs of 16-bit floats ----

// Two floats rounded to T = Half or BFloat16, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (dtype_of<T>::value == DType::f16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

// a * b + c for both elements of a word, T = Half or BFloat16, rounded once where the architecture has it; exact
// wherever the result is an element. Before sm_80 the bf16 result is rounded from fp32.
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  if constexpr (dtype_of<T>::value == DType::f16) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
#if __CUDA_ARCH__ >= 800
  if constexpr (dtype_of<T>::value == DType::bf16) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
#endif
#endif
  const auto half = [&](int shift) {
    const auto element = [&](uint32_t word) { return to_float(T{static_cast<uint16_t>(word >> shift)}); };
    return static_cast<uint32_t>(from_float<T>(fmaf(element(a), element(b), element(c))).bits);
  };
  return half(0) | half(16) << 16;
}

// ---- tensor cores. Every lane of the warp calls these; lane = 4 g + t. ----

// Four 8 x 8 matrices of 16-bit elements (or 8 x 16 of bytes) from shared memory: lane 8 i + r names row r of matrix i,
// 16 bytes; result[i] is word t of row g of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
#if defined(__CUDACC__)
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(from)
               : "memory");
#else
  simt_machine::load_matrices(result, row, false, simt_machine::Where::current());
#endif
}

// The same with every matrix transposed: result[i] is rows 2 t and 2 t + 1 of column g of matrix i.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&result)[4], const void* row) {
#if defined(__CUDACC__)
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(from)
               : "memory");
#else
  simt_machine::load_matrices(result, row, true, simt_machine::Where::current());
#endif
}

// d[16, 8] += a[16, 32] b[32, 8] in int8, exact in int32. a[i]: row g + 8 (i & 1), bytes 4 t + 16 (i >> 1) ...;
// b[i]: column g, bytes 4 t + 16 i ...; d[i]: row g + 8 (i >> 1), column 2 t + (i & 1).
__device__ __forceinline__ void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  simt_machine::multiply_int8(d, a, b, simt_machine::Where::current());
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // the same fragments in quarters: 8 rows, 16 bytes
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 2; ++k)
      asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+r"(d[2 * half]), "+r"(d[2 * half + 1])
          : "r"(a[half + 2 * k]), "r"(b[k]));
#endif
}

// Whether tensor cores take T: Half, and BFloat16 from sm_80 on. Before, mma_16bit<BFloat16> is arithmetic.
template <class T>
constexpr bool kMma16Bit = false;
template <>
constexpr bool kMma16Bit<Half> = true;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
constexpr bool kMma16Bit<BFloat16> = true;
#endif

// mma_16bit where there is no such instruction: each lane collects its two rows and columns and multiplies them. A
// call, because kernels have dozens of them.
template <class T>
__device__ __noinline__ float4 mma_by_shuffles(float4 sums, uint4 a, uint2 b) {
  const int lane = threadIdx.x % 32;
  NO_UNROLL for (int t = 0; t < 4; ++t) {
    const auto multiply = [&](uint32_t upper, uint32_t lower, uint32_t columns) {
      const auto of = [&](uint32_t word, int from) { return __shfl_sync(0xffffffffu, word, from); };
      const auto add = [&](float& sum, uint32_t row, uint32_t column) {
        UNROLL for (int shift = 0; shift < 32; shift += 16) {
          const auto element = [&](uint32_t word) { return to_float(T{static_cast<uint16_t>(word >> shift)}); };
          sum = fmaf(element(row), element(column), sum);
        }
      };
      upper = of(upper, lane / 4 * 4 + t), lower = of(lower, lane / 4 * 4 + t);
      const uint32_t even = of(columns, lane % 4 * 8 + t), odd = of(columns, lane % 4 * 8 + 4 + t);
      add(sums.x, upper, even), add(sums.y, upper, odd), add(sums.z, lower, even), add(sums.w, lower, odd);
    };
    multiply(a.x, a.y, b.x);
    multiply(a.z, a.w, b.y);
  }
  return sums;
}

// d[16, 8] += a[16, 16] b[16, 8] in fp32, with T = Half or BFloat16; fragments in words of two elements, as above.
template <class T>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  simt_machine::multiply_16bit(dtype_of<T>::value, d, a, b, simt_machine::Where::current());
#elif __CUDA_ARCH__ >= 800
#define OCTAVO_MMA(type)                                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (dtype_of<T>::value == DType::f16)
    OCTAVO_MMA("f16");
  else
    OCTAVO_MMA("bf16");
#undef OCTAVO_MMA
#elif defined(__CUDA_ARCH__)
  if constexpr (dtype_of<T>::value == DType::bf16) {
    const float4 sums = mma_by_shuffles<T>(make_float4(d[0], d[1], d[2], d[3]), make_uint4(a[0], a[1], a[2], a[3]),
                                           make_uint2(b[0], b[1]));
    d[0] = sums.x, d[1] = sums.y, d[2] = sums.z, d[3] = sums.w;
  } else {
    for (int k = 0; k < 2; ++k)
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
  }
#endif
}

}  // namespace octavo::GPU_NS
