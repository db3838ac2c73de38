#pragma once
// A block of 256 elements in the lanes of a warp, 8 each: how it comes from memory and goes back.
//
// Element e of a lane: with fp32 parameters 4 * lane + e, and from e = 4 on 128 more; with 16-bit ones 8 * lane + e.
// Either way the parameter is read in 16-byte accesses. Blocks that are not whole, or not aligned, go element by
// element: 32 * e + lane.
#include "common/reduce.h"
#include "common/tile.h"
#include "optim8/optim8.h"
#include "optim8/rules.h"

namespace octavo::GPU_NS {

constexpr int kEach = kOptimBlock / 32;  // elements of a block that a lane holds
constexpr uint32_t kInfinity = 0x7f800000u;

__device__ inline int lane_id() {
  return static_cast<int>(threadIdx.x % 32);
}

// Where a block lies, and a lane's elements in it.
struct BlockPlace {
  int64_t first;  // element of the block
  int64_t mine;   // element 0 of the lane; the others follow at the same distances in every lane
  int start;      // mine - first
  int left;       // of the block, from mine on
  bool packed;

  // part: neighbouring elements of a lane. flat: whether blocks follow each other without a gap, each whole but for the
  // last.
  __device__ BlockPlace(const OptimTensor& t, int64_t elements, int64_t block, int part, bool aligned, bool flat) {
    int64_t count;
    if (flat) {
      first = block * kOptimBlock;
      count = elements - first;
    } else {
      const int64_t row = block / t.row_blocks, from = (block - row * t.row_blocks) * kOptimBlock;
      first = row * t.row + from;
      count = t.row - from;
    }
    // The same in every lane. As a vote it is one predicate, where the compiler would test its parts again and again.
    packed = __all_sync(kFullWarp, aligned && count >= kOptimBlock && first % kEach == 0) != 0;
    start = lane_id() * (packed ? part : 1);
    mine = first + start;
    left = (count < kOptimBlock ? static_cast<int>(count) : static_cast<int>(kOptimBlock)) - start;
  }
};

// Units of four codes, two 16-bit floats or one fp32: a word in either case.
template <class T>
constexpr int kUnit = static_cast<int>(4 / sizeof(T));
template <class T>
constexpr int kUnits = kEach / kUnit<T>;
// Units of one access to `part` neighbouring elements, up to 16 bytes.
template <class T, int part>
constexpr int kAccess = part / kUnit<T> < 4 ? part / kUnit<T> : 4;

template <bool kWide>
struct Lanes {
  static constexpr int kPart = kWide ? 4 : 8;  // neighbouring elements
  static constexpr int kParts = kEach / kPart, kPartStride = 32 * kPart;
  // How far element e of a lane is from its element 0.
  static HD constexpr int offset(int e, bool packed) { return packed ? e / kPart * kPartStride + e % kPart : 32 * e; }

  // Calls f(first unit, address of its access) for each access of the lane.
  template <class T, class Word, class F>
  static __device__ __forceinline__ void for_accesses(T* base, const BlockPlace& place, const F& f) {
    auto* pack = reinterpret_cast<Word*>(base + place.mine);
    UNROLL for (int u = 0; u < kUnits<T>; u += kAccess<T, kPart>)
        f(u, pack + offset(u * kUnit<T>, true) / (kUnit<T> * kAccess<T, kPart>));
  }

  // T: float, or uint16_t and uint8_t for what lies in words. Outside the tensor: `outside`.
  template <class T, class Word>
  static __device__ void load(const void* memory, const BlockPlace& place, Word (&words)[kUnits<T>], uint32_t outside) {
    const T* from = in_global(static_cast<const T*>(memory));
    if (place.packed) {
      for_accesses<const T, const Pack<Word, kAccess<T, kPart>>>(from, place, [&](int u, auto* pack) {
        const auto loaded = *pack;
        UNROLL for (int i = 0; i < kAccess<T, kPart>; ++i) words[u + i] = loaded.at[i];
      });
    } else {
      UNROLL for (int u = 0; u < kUnits<T>; ++u) {
        words[u] = Word{};
        UNROLL for (int i = 0; i < kUnit<T>; ++i) {
          const int at = offset(u * kUnit<T> + i, false);
          if constexpr (kUnit<T> == 1)
            words[u] = at < place.left ? from[place.mine + at] : Word{};
          else
            words[u] |= (at < place.left ? from[place.mine + at] : outside) << 8 * sizeof(T) * i;
        }
      }
    }
  }

  template <class T, class Word>
  static __device__ void store(void* memory, const BlockPlace& place, const Word (&words)[kUnits<T>]) {
    T* to = in_global(static_cast<T*>(memory));
    if (place.packed) {
      for_accesses<T, Pack<Word, kAccess<T, kPart>>>(to, place, [&](int u, auto* pack) {
        Pack<Word, kAccess<T, kPart>> stored;
        UNROLL for (int i = 0; i < kAccess<T, kPart>; ++i) stored.at[i] = words[u + i];
        *pack = stored;
      });
    } else {
      UNROLL for (int u = 0; u < kUnits<T>; ++u) {
        UNROLL for (int i = 0; i < kUnit<T>; ++i) {
          const int at = offset(u * kUnit<T> + i, false);
          if (at >= place.left) continue;
          if constexpr (kUnit<T> == 1)
            to[place.mine + at] = words[u];
          else
            to[place.mine + at] = static_cast<T>(words[u] >> 8 * sizeof(T) * i);
        }
      }
    }
  }

  // ---- floats ----

  template <class T>
  static __device__ void load_floats(const void* from, const BlockPlace& place, float (&to)[kEach]) {
    if constexpr (sizeof(T) == 4) {
      load<float>(from, place, to, 0);
    } else {
      uint32_t words[kEach / 2];
      load<uint16_t>(from, place, words, 0);
      UNROLL for (int w = 0; w < kEach / 2; ++w) {
        to[2 * w] = to_float(T{static_cast<uint16_t>(words[w])});
        to[2 * w + 1] = to_float(T{static_cast<uint16_t>(words[w] >> 16)});
      }
    }
  }

  template <class T>
  static __device__ void store_halves(void* to, const BlockPlace& place, const T (&from)[kEach]) {
    uint32_t words[kEach / 2];
    UNROLL for (int w = 0; w < kEach / 2; ++w) words[w] = from[2 * w].bits | static_cast<uint32_t>(from[2 * w + 1].bits)
                                                                                 << 16;
    store<uint16_t>(to, place, words);
  }

  static __device__ void load_floats(const void* from, DType dtype, const BlockPlace& place, float (&to)[kEach]) {
    if (dtype == DType::f32)
      load_floats<float>(from, place, to);
    else if (dtype == DType::f16)
      load_floats<Half>(from, place, to);
    else
      load_floats<BFloat16>(from, place, to);
  }

  // ---- parameters: fp32 as they are; 16 bits with what Kahan's compensation keeps ----

  static __device__ void load_param(const OptimTensor& t, const BlockPlace& place, float (&p)[kEach]) {
    if constexpr (kWide) {
      load_floats<float>(t.param, place, p);
    } else {
      const bool half = static_cast<DType>(t.param_dtype) == DType::f16;
      if (half)
        load_floats<Half>(t.param, place, p);
      else
        load_floats<BFloat16>(t.param, place, p);
      if (t.compensation == nullptr) return;
      float kept[kEach];
      if (half)
        load_floats<Half>(t.compensation, place, kept);
      else
        load_floats<BFloat16>(t.compensation, place, kept);
      UNROLL for (int e = 0; e < kEach; ++e) p[e] += kept[e];
    }
  }

  template <class T>
  static __device__ void store_rounded(const OptimTensor& t, const BlockPlace& place, const float (&p)[kEach]) {
    T stored[kEach];
    UNROLL for (int e = 0; e < kEach; ++e) stored[e] = from_float<T>(p[e]);
    store_halves(t.param, place, stored);
    if (t.compensation == nullptr) return;
    UNROLL for (int e = 0; e < kEach; ++e) stored[e] = from_float<T>(p[e] - to_float(stored[e]));
    store_halves(t.compensation, place, stored);
  }

  // Adds 16 random bits below those that stay, and truncates: up with the probability of the part cut off.
  static __device__ void store_at_random(const OptimTensor& t, const BlockPlace& place, const float (&p)[kEach],
                                         uint32_t key) {
    BFloat16 stored[kEach];
    UNROLL for (int e = 0; e < kEach; ++e) {
      const uint32_t random = mix_bits(key + static_cast<uint32_t>(place.start + offset(e, place.packed))) & 0xffffu;
      const uint32_t bits = float_bits(p[e]) + (abs_bits(p[e]) < kInfinity ? random : 0);  // Inf must not become NaN
      stored[e] = {static_cast<uint16_t>(bits >> 16)};
    }
    store_halves(t.param, place, stored);
  }

  static __device__ void store_param(const OptimTensor& t, const BlockPlace& place, const float (&p)[kEach],
                                     bool stochastic, uint32_t key) {
    if constexpr (kWide)
      store<float>(t.param, place, p);
    else if (static_cast<DType>(t.param_dtype) == DType::f16)
      store_rounded<Half>(t, place, p);
    else if (!stochastic)
      store_rounded<BFloat16>(t, place, p);
    else
      store_at_random(t, place, p, key_of_block(key, place.first));
  }
};

// Whether the blocks of t can be moved in packs, as far as its addresses decide.
__device__ inline bool aligned(const OptimTensor& t, int states) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                   reinterpret_cast<uintptr_t>(t.compensation);
  for (int s = 0; s < states; ++s) {
    const auto address = reinterpret_cast<uintptr_t>(t.state[s]);
    bits |= t.quantized ? address * 2 : address;  // codes: 8 bytes
  }
  return bits % 16 == 0;
}

}  // namespace octavo::GPU_NS
