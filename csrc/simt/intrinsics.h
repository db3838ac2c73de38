#pragma once
// The CUDA names that kernels use, on the host SIMT machine. Each means what the CUDA C++ programming guide says.
#include <cmath>
#include <limits>
#include <type_traits>

#include "simt/warp.h"

namespace octavo {

// ---- synchronisation ----

inline void __syncthreads(simt_machine::Where where = simt_machine::Where::current()) {
  simt_machine::barrier(false, where);
}
inline int __syncthreads_count(int predicate, simt_machine::Where where = simt_machine::Where::current()) {
  return simt_machine::barrier(predicate != 0, where).yes;
}
inline int __syncthreads_or(int predicate, simt_machine::Where where = simt_machine::Where::current()) {
  return simt_machine::barrier(predicate != 0, where).yes != 0;
}
inline int __syncthreads_and(int predicate, simt_machine::Where where = simt_machine::Where::current()) {
  const auto votes = simt_machine::barrier(predicate != 0, where);
  return votes.yes == votes.threads;
}
inline void __syncwarp(unsigned mask = ~0u, simt_machine::Where where = simt_machine::Where::current()) {
  simt_machine::sync_warp(mask, where);
}
inline void __threadfence() {
  simt_machine::memory_fence();
}
inline void __threadfence_block() {
  simt_machine::memory_fence();
}

// ---- warp collectives ----

#define OCTAVO_SHUFFLE(name, kind)                                                                        \
  template <class T>                                                                                      \
  T name(unsigned mask, T value, int operand, int width = 32,                                             \
         simt_machine::Where where = simt_machine::Where::current()) {                                    \
    return simt_machine::shuffle(#name, simt_machine::Shuffle::kind, mask, value, operand, width, where); \
  }
OCTAVO_SHUFFLE(__shfl_sync, index)
OCTAVO_SHUFFLE(__shfl_up_sync, up)
OCTAVO_SHUFFLE(__shfl_down_sync, down)
OCTAVO_SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef OCTAVO_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt_machine::Where where = simt_machine::Where::current()) {
  return simt_machine::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, simt_machine::Where where = simt_machine::Where::current()) {
  return simt_machine::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt_machine::Where where = simt_machine::Where::current()) {
  return simt_machine::ballot("__all_sync", mask, predicate == 0, where) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt_machine::Where where = simt_machine::Where::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt_machine::match_any(mask, bits, where);
}

#define OCTAVO_REDUCE(name, kind)                                                                       \
  template <class T>                                                                                    \
  T name(unsigned mask, T value, simt_machine::Where where = simt_machine::Where::current()) {          \
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);                               \
    return static_cast<T>(simt_machine::reduce(#name, simt_machine::Reduce::kind, mask, value, where)); \
  }
OCTAVO_REDUCE(__reduce_add_sync, add)
OCTAVO_REDUCE(__reduce_min_sync, min)
OCTAVO_REDUCE(__reduce_max_sync, max)
OCTAVO_REDUCE(__reduce_and_sync, bit_and)
OCTAVO_REDUCE(__reduce_or_sync, bit_or)
OCTAVO_REDUCE(__reduce_xor_sync, bit_xor)
#undef OCTAVO_REDUCE

// ---- integers ----

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(static_cast<unsigned>(x)) : 32;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __dp4a(int a, int b, int sum) {
  auto total = static_cast<unsigned>(sum);  // wraps, as the instruction does
  for (int shift = 0; shift < 32; shift += 8)
    total += static_cast<unsigned>(static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift));
  return static_cast<int>(total);
}
// The high word of high:low shifted left by shift % 32.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
// The low word of high:low shifted right by shift % 32.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// ---- floats ----

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline int __float_as_int(float value) {
  return static_cast<int>(__float_as_uint(value));
}
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  if (value >= 0x1p31f) return std::numeric_limits<int>::max();
  if (value < -0x1p31f) return std::numeric_limits<int>::min();
  return static_cast<int>(std::nearbyint(value));
}
// a * b + c, rounded down.
inline float __fmaf_rd(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;  // the product is exact; what the sum lacks:
  const double of_c = sum - product, rest = (product - (sum - of_c)) + (c - of_c);
  const float rounded = static_cast<float>(sum);
  const bool below = rounded > sum || (static_cast<double>(rounded) == sum && rest < 0);
  return below ? std::nextafterf(rounded, -std::numeric_limits<float>::infinity()) : rounded;
}
inline float __saturatef(float value) {  // NaN gives 0
  return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}
// Of two floats the one that is not NaN wins, as in CUDA.
template <class A, class B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- memory ----

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}

// Atomics are relaxed, as on the GPU: they order nothing else.
template <class T, class F>
T atomic_update(T* address, const F& next) {
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = next(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
#define OCTAVO_ATOMIC(name, expression)                                               \
  template <class T>                                                                  \
  T name(T* address, std::type_identity_t<T> value) {                                 \
    return atomic_update(address, [=](T old) { return static_cast<T>(expression); }); \
  }
OCTAVO_ATOMIC(atomicAdd, old + value)
OCTAVO_ATOMIC(atomicMax, old < value ? value : old)
OCTAVO_ATOMIC(atomicMin, value < old ? value : old)
OCTAVO_ATOMIC(atomicAnd, old& value)
OCTAVO_ATOMIC(atomicOr, old | value)
OCTAVO_ATOMIC(atomicXor, old ^ value)
OCTAVO_ATOMIC(atomicExch, ((void)old, value))
#undef OCTAVO_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return atomic_update(address, [=](T old) { return old == expected ? desired : old; });
}

}  // namespace octavo
