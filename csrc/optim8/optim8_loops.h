#pragma once
// An optimizer's step over a vector type V (cpu/vec_*.h), once per ISA level. Serial over the blocks of one tensor.
//
// A block of 256 elements goes through once: states are decoded, the rule applied and the parameter written in one
// loop, the new states wait in 3 KiB on the stack for their absmax, and are then encoded. Nothing larger is ever in
// fp32.
#include "optim8/optim8.h"

namespace octavo::cpu {

struct OptimLoops {
  // Blocks [begin, end) of tensor t; returns how many elements were left alone.
  int64_t (*step)(const OptimStep&, const OptimTensor& t, const Factors&, int64_t begin, int64_t end);
  // Adds what these blocks add to the tensor's sums[2].
  void (*sums)(const OptimStep&, const OptimTensor& t, const Factors&, int64_t begin, int64_t end, double* sums);
};

namespace portable {
extern const OptimLoops optim_loops;
}
namespace avx2 {
extern const OptimLoops optim_loops;
}
namespace avx512 {
extern const OptimLoops optim_loops;
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS
#include "blockwise/codec.h"
#include "optim8/rules.h"

namespace octavo::cpu {
namespace {

// Where a block lies in its tensor.
struct BlockPlace {
  int64_t first;  // element
  int count;      // of elements
  BlockPlace(const OptimTensor& t, int64_t block) {
    const int64_t row = block / t.row_blocks, from = (block - row * t.row_blocks) * kOptimBlock;
    first = row * t.row + from;
    count = static_cast<int>(t.row - from < kOptimBlock ? t.row - from : kOptimBlock);
  }
};

template <class V>
struct StepLoops {
  using F = typename V::F;
  using U = typename V::U;

  template <class T>
  static void load_block(const T* from, int count, float* to) {
    for (int j = 0; j < count; j += V::kWidth) {
      const int n = count - j < V::kWidth ? count - j : V::kWidth;
      V::store(to + j, V::load(from + j, n));  // the buffers have room for a whole last vector
    }
  }

  // 16-bit parameters, in fp32 for the time of a block, with what Kahan's compensation keeps.
  template <class T>
  static void load_param(const T* p, const T* compensation, int count, float* to) {
    load_block(p, count, to);
    if (!compensation) return;
    for (int j = 0; j < count; j += V::kWidth) {
      const int n = count - j < V::kWidth ? count - j : V::kWidth;
      V::store(to + j, V::add(V::load(to + j), V::load(compensation + j, n)));
    }
  }

  template <class T>
  static void store_param(const float* from, int count, T* p, T* compensation, bool stochastic, uint32_t key) {
    for (int j = 0; j < count; j += V::kWidth) {
      const int n = count - j < V::kWidth ? count - j : V::kWidth;
      const F v = V::load(from + j);
      if constexpr (dtype_of<T>::value == DType::bf16) {
        if (stochastic) {
          store_at_random(v, n, p + j, key + static_cast<uint32_t>(j));
          continue;
        }
      }
      V::store(p + j, v, n);
      if (compensation) V::store(compensation + j, V::sub(v, V::load(p + j, n)), n);
    }
  }

  // Adds 16 random bits below those that stay, and truncates: up with the probability of the part cut off.
  static void store_at_random(F v, int n, BFloat16* p, uint32_t key) {
    U x = V::add_bits(V::set_bits(key), V::lane_ids());
    x = V::xor_bits(x, V::template shift_right<16>(x));
    x = V::mul_bits(x, V::set_bits(0x7feb352du));
    x = V::xor_bits(x, V::template shift_right<15>(x));
    x = V::mul_bits(x, V::set_bits(0x846ca68bu));
    x = V::and_bits(V::xor_bits(x, V::template shift_right<16>(x)), V::set_bits(0xffffu));
    const U kept = V::bits(V::select(V::finite(v), V::from_bits(x), V::set(0.0f)));  // Inf must not become NaN
    V::store_high_halves(p, V::add_bits(V::bits(v), kept), n);
  }

  template <class Rule, bool kQuantized>
  struct Block {
    static constexpr int kStates = Rule::kMoments + (Rule::kSecond ? 1 : 0);
    static constexpr int kSecondAt = Rule::kMoments;  // of the second moment among the states
    static constexpr int kSlots = kStates > 0 ? kStates : 1;

    const StateCodec<V> codec{};
    alignas(64) float param[kOptimBlock], grad[kOptimBlock], next[2][kSlots][kOptimBlock];

    // The whole block whose new states wait in next[slot] to be encoded.
    struct Waiting {
      bool any = false;
      int slot = 0;
      int64_t first = 0;
      float inverse[kSlots] = {};
      uint32_t key[kSlots] = {};  // of the dither, for the whole tensor
    } waiting;

    // The states of n elements from index i on, as the rule takes them.
    static void load_states(const Block& self, const OptimTensor& t, int64_t i, int n, const float* absmax, F (&m)[2],
                            F& v, F& root) {
      for (int s = 0; s < kStates; ++s) {
        F value;
        if constexpr (kQuantized) {
          const uint8_t* codes = static_cast<const uint8_t*>(t.state[s]) + i;
          value = s == kSecondAt ? self.codec.root(codes, n) : self.codec.moment(codes, n);
          value = V::mul(value, V::set(absmax[s]));
        } else {
          value = V::load(static_cast<const float*>(t.state[s]) + i, n);
        }
        if (s != kSecondAt) {
          m[s] = value;
        } else if constexpr (kQuantized) {
          root = value;
          v = V::mul(value, value);
        } else {
          v = value;
        }
      }
    }

    int64_t run(const OptimStep& step, const OptimTensor& t, const Factors f, int64_t begin, int64_t end) {
      int64_t left_alone = 0;
      const DType param_dtype = static_cast<DType>(t.param_dtype), grad_dtype = static_cast<DType>(t.grad_dtype);
      uint32_t key = 0;
      if (step.stochastic && param_dtype == DType::bf16) key = random_key(step.seed, t.id, *t.step);
      for (int s = 0; s < kStates; ++s) waiting.key[s] = dither_key(t.id, *t.step, s);
      for (int64_t block = begin; block < end; ++block) {
        const BlockPlace place(t, block);
        float* p = static_cast<float*>(t.param) + place.first;
        const float* g = static_cast<const float*>(t.grad) + place.first;
        if (param_dtype != DType::f32) {
          dispatch_float(param_dtype, [&](auto type) {
            using T = decltype(type);
            const T* kept = static_cast<const T*>(t.compensation);
            load_param(static_cast<const T*>(t.param) + place.first, kept ? kept + place.first : nullptr, place.count,
                       param);
          });
          p = param;
        }
        if (grad_dtype != DType::f32) {
          dispatch_float(grad_dtype, [&](auto type) {
            load_block(static_cast<const decltype(type)*>(t.grad) + place.first, place.count, grad);
          });
          g = grad;
        }
        left_alone += update(t, f, block, place, p, g);
        if (param_dtype != DType::f32)
          dispatch_float(param_dtype, [&](auto type) {
            using T = decltype(type);
            T* kept = static_cast<T*>(t.compensation);
            store_param(param, place.count, static_cast<T*>(t.param) + place.first, kept ? kept + place.first : nullptr,
                        step.stochastic, key_of_block(key, place.first));
          });
      }
      if (waiting.any) encode_waiting(t);
      return left_alone;
    }

    int64_t update(const OptimTensor& t, const Factors& f, int64_t block, const BlockPlace& place, float* p,
                   const float* g) {
      float absmax[kSlots] = {};
      F most[kSlots], least[kSlots];
      if constexpr (kQuantized)
        for (int s = 0; s < kStates; ++s) {
          absmax[s] = t.absmax[s][block];
          most[s] = least[s] = V::set(0.0f);
        }
      if (waiting.any && place.count < kOptimBlock) encode_waiting(t);
      const int slot = waiting.slot ^ 1;
      int64_t left_alone = 0;
      int j = 0;
      if (waiting.any) {
        for (; j < kOptimBlock; j += V::kWidth) {
          left_alone += elements<true>(t, f, place, absmax, most, least, p, g, slot, j, V::kWidth);
          encode_waiting_at(t, j);
        }
        waiting.any = false;
      }
      for (; j + V::kWidth <= place.count; j += V::kWidth)
        left_alone += elements<true>(t, f, place, absmax, most, least, p, g, slot, j, V::kWidth);
      if (j < place.count)
        left_alone += elements<false>(t, f, place, absmax, most, least, p, g, slot, j, place.count - j);
      if constexpr (kQuantized && kStates > 0) {
        for (int s = 0; s < kStates; ++s) {
          float largest = bits_float(V::reduce_max(V::abs_bits(most[s])));  // -0 is 0
          if (s != kSecondAt) {
            const float other = reach_of(-bits_float(V::reduce_max(V::abs_bits(least[s]))));
            if (other > largest) largest = other;
          }
          // What is left alone keeps its code under the same absmax.
          if (left_alone && largest < absmax[s]) largest = absmax[s];
          t.absmax[s][block] = block_absmax(largest);
          waiting.inverse[s] = block_inverse(block_absmax(largest));
        }
        waiting.slot = slot;
        waiting.first = place.first;
        waiting.any = place.count == kOptimBlock;
        if (!waiting.any)
          for (j = 0; j < place.count; j += V::kWidth)
            encode_at(t, j, place.count - j < V::kWidth ? place.count - j : V::kWidth);
      }
      return left_alone;
    }

    __attribute__((always_inline)) void encode_at(const OptimTensor& t, int j, int n) {
      for (int s = 0; s < kStates; ++s) {
        uint8_t* codes = static_cast<uint8_t*>(t.state[s]) + waiting.first + j;
        const F v = V::mul(V::load(next[waiting.slot][s] + j), V::set(waiting.inverse[s]));
        const F dither = codec.dither(waiting.key[s] + static_cast<uint32_t>(waiting.first + j) * kDitherStep);
        s == kSecondAt ? codec.store_root(codes, v, dither, n) : codec.store_moment(codes, v, dither, n);
      }
    }

    __attribute__((always_inline)) void encode_waiting_at(const OptimTensor& t, int j) {
      if constexpr (kQuantized) encode_at(t, j, V::kWidth);
    }

    void encode_waiting(const OptimTensor& t) {
      for (int j = 0; j < kOptimBlock; j += V::kWidth) encode_waiting_at(t, j);
      waiting.any = false;
    }

    template <bool kWhole>
    __attribute__((always_inline)) int elements(const OptimTensor& t, const Factors& f, const BlockPlace& place,
                                                const float* absmax, F* most, F* least, float* p, const float* g,
                                                int slot, int j, int n) {
      if constexpr (kWhole) n = V::kWidth;
      F m[2], v, root, old[2];
      load_states(*this, t, place.first + j, n, absmax, m, v, root);
      F old_v = v, old_root = root;
      for (int s = 0; s < Rule::kMoments; ++s) old[s] = m[s];
      const F before = V::load(p + j, n);
      const F shrunk = V::mul(before, V::set(f.shrink));
      const F u = Rule::template direction<V>(f, shrunk, V::mul(V::load(g + j, n), V::set(f.grad)), m, v, root);
      F after = V::fma(V::set(-f.size), u, shrunk);
      // Where the new state is NaN or Inf (a gradient that is, or whose square is), nothing changes; nor where the
      // direction is (0 / 0 without an eps, a weight that is Inf).
      typename V::M valid = V::finite(u);
      if constexpr (kStates > 0) valid = V::both(valid, V::finite(Rule::kSecond ? root : m[0]));
      if constexpr (Rule::kMoments == 2) valid = V::both(valid, V::finite(m[1]));
      int left_alone = 0;
      if (__builtin_expect(!V::all(valid), 0)) {
        left_alone = n - V::count(V::both(valid, V::lanes_below(n)));
        after = V::select(valid, after, before);
        v = V::select(valid, v, old_v);
        root = V::select(valid, root, old_root);
        for (int s = 0; s < Rule::kMoments; ++s) m[s] = V::select(valid, m[s], old[s]);
      }
      V::store(p + j, after, n);
      for (int s = 0; s < kStates; ++s) {
        if constexpr (kQuantized) {
          F value = s == kSecondAt ? root : m[s];
          if constexpr (!kWhole) value = V::select(V::lanes_below(n), value, V::set(0.0f));  // code 0 is not 0
          V::store(next[slot][s] + j, value);
          most[s] = V::max(most[s], value);
          if (s != kSecondAt) least[s] = V::min(least[s], value);
        } else {
          V::store(static_cast<float*>(t.state[s]) + place.first + j, s == kSecondAt ? v : m[s], n);
        }
      }
      return left_alone;
    }

    void sums(const OptimTensor& t, const Factors& f, int64_t begin, int64_t end, double* sums) {
      typename V::Sum ratios{};
      for (int64_t block = begin; block < end; ++block) {
        const BlockPlace place(t, block);
        if constexpr (Rule::kSums == Sums::norms)
          dispatch_float(static_cast<DType>(t.param_dtype), [&](auto type) {
            using T = decltype(type);
            const T* kept = static_cast<const T*>(t.compensation);
            load_param(static_cast<const T*>(t.param) + place.first, kept ? kept + place.first : nullptr, place.count,
                       param);
          });
        dispatch_float(static_cast<DType>(t.grad_dtype), [&](auto type) {
          load_block(static_cast<const decltype(type)*>(t.grad) + place.first, place.count, grad);
        });
        float absmax[kSlots] = {};
        if constexpr (kQuantized)
          for (int s = 0; s < kStates; ++s) absmax[s] = t.absmax[s][block];
        if constexpr (Rule::kSums == Sums::ratio) sums[1] += place.count;
        int j = 0;
        for (; j + V::kWidth <= place.count; j += V::kWidth)
          add_sums<true>(t, f, place, absmax, j, V::kWidth, ratios, sums);
        if (j < place.count) add_sums<false>(t, f, place, absmax, j, place.count - j, ratios, sums);
      }
      if constexpr (Rule::kSums == Sums::ratio) sums[0] += V::total(ratios);
    }

    template <bool kWhole>
    __attribute__((always_inline)) void add_sums(const OptimTensor& t, const Factors& f, const BlockPlace& place,
                                                 const float* absmax, int j, int n, typename V::Sum& ratios,
                                                 double* sums) {
      if constexpr (kWhole) n = V::kWidth;
      F m[2], v, root;
      load_states(*this, t, place.first + j, n, absmax, m, v, root);
      const F g = V::mul(V::load(grad + j), V::set(f.grad));
      if constexpr (Rule::kSums == Sums::ratio) {
        Rule::template direction<V>(f, g, g, m, v, root);  // for v: neither the parameter nor m enters it
        const F ratio = Rule::template ratio<V>(f, g, v);
        const typename V::M stays = V::both(V::finite(v), V::at_least(v, V::set(0.0f)));  // v has a root
        const typename V::M valid = V::both(V::both(V::finite(ratio), stays), V::lanes_below(n));
        V::add_to(ratios, V::select(valid, ratio, V::set(0.0f)));
      } else {
        const F p = V::load(param + j);
        F other = g;
        if constexpr (Rule::kSecond) other = Rule::template direction<V>(f, p, g, m, v, root);
        const typename V::M valid = V::both(V::finite(other), V::lanes_below(n));
        sums[0] += V::sum_of_squares(V::select(valid, p, V::set(0.0f)));
        sums[1] += V::sum_of_squares(V::select(valid, other, V::set(0.0f)));
      }
    }
  };

  static int64_t step(const OptimStep& s, const OptimTensor& t, const Factors& f, int64_t begin, int64_t end) {
    int64_t left_alone = 0;
    dispatch_rule(s.rule, [&](auto rule) {
      using Rule = decltype(rule);
      if (t.quantized) {
        Block<Rule, true> block;
        left_alone = block.run(s, t, f, begin, end);
      } else {
        Block<Rule, false> block;
        left_alone = block.run(s, t, f, begin, end);
      }
    });
    return left_alone;
  }

  static void sums(const OptimStep& s, const OptimTensor& t, const Factors& f, int64_t begin, int64_t end,
                   double* sums) {
    dispatch_rule(s.rule, [&](auto rule) {
      using Rule = decltype(rule);
      if constexpr (Rule::kSums != Sums::none) {
        if (t.quantized) {
          Block<Rule, true> block;
          block.sums(t, f, begin, end, sums);
        } else {
          Block<Rule, false> block;
          block.sums(t, f, begin, end, sums);
        }
      }
    });
  }

  static constexpr OptimLoops table = {step, sums};
};

}  // namespace
}  // namespace octavo::cpu
#endif  // OCTAVO_ISA_LOOPS
