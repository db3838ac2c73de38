#pragma once
// Packs of elements on their way to int8 codes.
#include <type_traits>

#include "common/tile.h"

namespace octavo::GPU_NS {

template <class T, int N>
__device__ inline Pack<int8_t, N> encode_pack(const Pack<T, N>& x, float inverse) {
  Pack<int8_t, N> codes;
  UNROLL for (int e = 0; e < N; ++e) codes.at[e] = encode(to_float(x.at[e]), inverse);
  return codes;
}

// Pack number `pack` of the row that starts at pack `start`, without the columns that skip_bytes names: its bytes are
// tested all at once, since few are set.
template <bool kSkip, int N, class T>
__device__ inline Pack<T, N> load_kept(const uint8_t* skip_bytes, const T* x, int64_t start, int64_t pack) {
  auto kept = load_pack<N>(x, start + pack);
  if constexpr (kSkip) {
    using Bytes = std::conditional_t<N == 8, uint64_t, std::conditional_t<N == 4, uint32_t, uint8_t>>;
    static_assert(sizeof(Bytes) == N);
    const Bytes skip = reinterpret_cast<const Bytes*>(skip_bytes)[pack];
    if (skip != 0) {
      UNROLL for (int e = 0; e < N; ++e) {
        if (skip >> 8 * e & 0xff) kept.at[e] = T{};
      }
    }
  }
  return kept;
}

}  // namespace octavo::GPU_NS
