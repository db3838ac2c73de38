// One step of an optimizer over many tensors, states in 8 bits or fp32. Bound by memory: every byte is read and written
// once, in accesses of up to 16 bytes that neighbouring lanes make side by side.
//
// One launch for all tensors with fp32 parameters and one for those with 16 bits. A thread block goes through chunks, a
// warp of it through blocks of 256 elements, 8 per lane, that stay in registers from the gradient to the new codes:
// what is shared by a block of states (two maxima) is shared by a warp, and no barrier is met but where another tensor
// brings other factors.
#include <type_traits>

#include "blockwise/codec_gpu.h"
#include "common/lane.h"
#include "common/reduce.h"
#include "optim8/lanes_gpu.h"
#include "optim8/optim8.h"
#include "optim8/rules.h"

namespace octavo::GPU_NS {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;

// ---- states ----

template <class Rule>
struct States {
  static constexpr int kCount = Rule::kMoments + (Rule::kSecond ? 1 : 0);
  static constexpr int kSecondAt = Rule::kMoments;  // of the second moment among them
  static constexpr int kSlots = kCount > 0 ? kCount : 1;
  static HD constexpr bool second(int s) { return s == kSecondAt; }
};

// The states of a lane's elements as they are in memory: codes with their absmax, or floats.
template <class Rule, bool kQuantized, bool kWide>
struct StoredStates {
  using S = States<Rule>;
  uint32_t codes[S::kSlots][kEach / 4];
  float absmax[S::kSlots];
  float floats[S::kSlots][kQuantized ? 1 : kEach];

  __device__ void load(const OptimTensor& t, const BlockPlace& place, int64_t block) {
    UNROLL for (int s = 0; s < S::kCount; ++s) {
      if constexpr (kQuantized) {
        Lanes<kWide>::template load<uint8_t>(t.state[s], place, codes[s], S::second(s) ? 0 : 127);
        absmax[s] = in_global(t.absmax[s])[block];
      } else {
        Lanes<kWide>::template load<float>(t.state[s], place, floats[s], 0);
      }
    }
  }

  // State s of element e as it is kept between steps: of a second moment in 8 bits the root.
  __device__ float value(const StateTable* tables, int s, int e) const {
    if constexpr (kQuantized)
      return (S::second(s) ? state_value<false>(tables[s], codes[s][e / 4], e % 4)
                           : state_value<true>(tables[s], codes[s][e / 4], e % 4)) *
             absmax[s];
    else
      return floats[s][e];
  }
};

// ---- the step ----

// What a rule made of one element.
struct Stepped {
  float u, m[2], v, root;

  template <class Rule, bool kQuantized, bool kWide>
  __device__ Stepped(Rule, const StoredStates<Rule, kQuantized, kWide>& stored, const StateTable* tables, int e,
                     const Factors& f, float p, float g)
      : m{0.0f, 0.0f}, v(0.0f), root(0.0f) {
    using S = States<Rule>;
    UNROLL for (int s = 0; s < S::kCount; ++s) {
      const float value = stored.value(tables, s, e);
      if (!S::second(s)) {
        m[s] = value;
      } else if (kQuantized) {
        root = value;
        v = value * value;
      } else {
        v = value;
      }
    }
    u = Rule::template direction<Lane>(f, p, g * f.grad, m, v, root);
  }

  // State s as it is kept.
  template <class Rule, bool kQuantized>
  __device__ float kept(int s) const {
    return !States<Rule>::second(s) ? m[s] : kQuantized ? root : v;
  }
};

// Of these states NaN and Inf are looked for: they come from a gradient that is, or whose square is. Elements where one
// is found are left alone. (Without states, that is decided by the direction.)
template <class Rule>
HD constexpr bool checked(int s) {
  return States<Rule>::second(s) || !Rule::kSecond || (Rule::kMoments == 2 && s == 1);
}

// Puts back what must be left alone, and makes `most` what it is without. Nothing has been written yet: the old values
// are read again, so that the usual path need not keep them.
template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void leave_alone(Rule rule, const OptimStep& s, const OptimTensor& t, const Factors& f,
                                            const StateTable* tables, const BlockPlace& place, int64_t block,
                                            float (&p)[kEach], float (&state)[States<Rule>::kSlots][kEach],
                                            uint32_t (&most)[States<Rule>::kSlots]) {
  using S = States<Rule>;
  using L = Lanes<kWide>;
  float before[kEach], g[kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  L::load_param(t, place, before);
  if constexpr (S::kCount == 0) L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  stored.load(t, place, block);
  int left_alone = 0;
  UNROLL for (int e = 0; e < kEach; ++e) {
    bool valid = true;
    if constexpr (S::kCount == 0)
      valid = abs_bits(Stepped(rule, stored, tables, e, f, before[e] * f.shrink, g[e]).u) < kInfinity;
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      if (checked<Rule>(i)) valid &= abs_bits(state[i][e]) < kInfinity;
      if (S::second(i)) valid &= state[i][e] >= 0.0f;  // v below 0 has no root
    }
    if (valid) continue;
    p[e] = before[e];
    UNROLL for (int i = 0; i < S::kCount; ++i) state[i][e] = stored.value(tables, i, e);
    if (L::offset(e, place.packed) < place.left) ++left_alone;
  }
  if constexpr (kQuantized) {
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      float largest = left_alone > 0 ? stored.absmax[i] : 0.0f;  // what is left alone keeps its code
      UNROLL for (int e = 0; e < kEach; ++e) largest =
          fmaxf(largest, S::second(i) ? state[i][e] : reach_of(state[i][e]));
      most[i] = float_bits(largest);
    }
  }
  if (left_alone > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(s.nonfinite), static_cast<unsigned long long>(left_alone));
}

template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void step_block(Rule rule, const OptimStep& s, const OptimTensor& t, const Factors& f,
                                           const StateTable* tables, const BlockPlace& place, int64_t block,
                                           uint32_t key, uint32_t dither) {
  using S = States<Rule>;
  using L = Lanes<kWide>;
  float p[kEach], g[kEach], state[S::kSlots][kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  L::load_param(t, place, p);
  L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  stored.load(t, place, block);

  // The largest magnitudes, as integers, which do not lose a NaN, where one is looked for; of roots, their sign is
  // known.
  uint32_t most[S::kSlots] = {};
  UNROLL for (int e = 0; e < kEach; ++e) {
    const float shrunk = p[e] * f.shrink;
    const Stepped next(rule, stored, tables, e, f, shrunk, g[e]);
    p[e] = fmaf(-f.size, next.u, shrunk);
    if (S::kCount == 0) most[0] = max(most[0], abs_bits(next.u));
    UNROLL for (int i = 0; i < S::kCount; ++i) {
      state[i][e] = next.template kept<Rule, kQuantized>(i);
      if (S::second(i))
        most[i] = max(most[i], float_bits(next.root));
      else if (checked<Rule>(i))
        most[i] = max(most[i], abs_bits(kQuantized ? reach_of(state[i][e]) : state[i][e]));
      else if (kQuantized)
        most[i] = float_bits(fmaxf(bits_float(most[i]), reach_of(state[i][e])));
    }
  }

  uint32_t worst = S::kCount == 0 ? most[0] : 0;
  UNROLL for (int i = 0; i < S::kCount; ++i) {
    if (checked<Rule>(i)) worst = max(worst, most[i]);
  }
  if (worst >= kInfinity) leave_alone<Rule, kQuantized, kWide>(rule, s, t, f, tables, place, block, p, state, most);

  L::store_param(t, place, p, s.stochastic, key);
  __syncwarp();  // every lane has read the absmax that lane 0 replaces
  UNROLL for (int i = 0; i < S::kCount; ++i) {
    if constexpr (kQuantized) {
      const float absmax = block_absmax(bits_float(warp_max(most[i])));
      const float inverse = block_inverse(absmax);
      if (lane_id() == 0) in_global(t.absmax[i])[block] = absmax;
      UNROLL for (int e = 0; e < kEach; ++e) state[i][e] *= inverse;
      uint32_t words[kEach / 4];
      uint32_t random[kEach] = {};
      if constexpr (dithered<Rule>(0) || S::kCount > 1) {
        if (dithered<Rule>(i)) {
          const uint32_t step = place.packed ? kDitherStep : 32 * kDitherStep;  // to the next of `part` elements
          UNROLL for (int part = 0; part < kEach; part += L::kPart) {
            uint32_t at = computed(dither + dither_key(0, 0, i) + static_cast<uint32_t>(place.mine) * kDitherStep +
                                   32 * part * kDitherStep);
            UNROLL for (int e = part; e < part + L::kPart; ++e, at = computed(at + step)) random[e] = at;
          }
        }
      }
      const StateTable& table = tables[i];
      if (S::second(i))
        state_codes<false, true>(table, state[i], random, words);
      else if (dithered<Rule>(i))
        state_codes<true, true>(table, state[i], random, words);
      else
        state_codes<true, false>(table, state[i], random, words);
      L::template store<uint8_t>(t.state[i], place, words);
    } else {
      L::template store<float>(t.state[i], place, state[i]);
    }
  }
}

// ---- chunks ----

// What a thread block keeps from chunk to chunk, in shared memory.
template <class Rule>
struct Workplace {
  StateTable tables[States<Rule>::kSlots];
  Factors factors;
};

// One chunk, and what of the workplace is ready. All members are the same in every thread of the block.
struct Chunk {
  const OptimTensor* t;
  int64_t begin;  // its first block in the tensor
  int blocks;     // how many there are
  int32_t index;  // of the tensor
  int64_t count;  // of the tensor's elements
  bool packable, flat;
  float step;

  float factors_step = 0.0f;  // of the factors in shared memory; 0: none yet
  int32_t factors_tensor = -1;
  bool filled = false;

  __device__ void enter(const OptimStep& s, int64_t chunk, int states) {
    index = s.chunks[chunk];
    t = s.tensors + index;
    step = *in_global(t->step);
    count = t->count;
    flat = t->row == count || t->row % kOptimBlock == 0;
    packable = aligned(*t, states);
    begin = (chunk - t->first_chunk) * kChunkBlocks;
    const int64_t end = index + 1 < s.tensor_count ? t[1].first_block : s.block_count;
    const int64_t left = end - t->first_block - begin;
    blocks = static_cast<int>(left < kChunkBlocks ? left : kChunkBlocks);
  }

  // Makes the tables and the factors that this chunk needs, unless they are there. sums: those of all tensors, or null.
  template <class Rule>
  __device__ void prepare(Rule, const OptimStep& s, Workplace<Rule>& place, const double* sums) {
    using S = States<Rule>;
    const bool fill = S::kCount > 0 && t->quantized && !filled;
    const bool derive = step != factors_step || (sums != nullptr && index != factors_tensor);
    if (!fill && !derive) return;
    __syncthreads();  // no warp is at the chunk before any more
    if (fill) {
      UNROLL for (int m = 0; m < S::kCount; ++m)
          fill_table(place.tables[m], kGpuMaps[m < Rule::kMoments], dithered<Rule>(m));
      filled = true;
    }
    if (derive) {
      if (threadIdx.x == 0)
        place.factors = factors_of(Rule::kRule, s.hyper, s.lr != nullptr ? *s.lr : s.hyper.lr, step, grad_factor(s),
                                   sums != nullptr ? sums + 2 * t->position : nullptr);
      factors_step = step;
      factors_tensor = index;
    }
    __syncthreads();
  }
};

// Loads of what the host may set between steps.
__device__ inline bool nothing_to_do(const OptimStep& s) {
  return s.found_inf != nullptr && *s.found_inf != 0.0f;
}

template <class Rule, bool kWide>
__global__ void __launch_bounds__(kStepThreads, 2) optim_step_kernel(OptimStep s, int64_t begin, int64_t end) {
  SHARED(Workplace<Rule>, place, [1]);
  if (nothing_to_do(s)) return;
  Chunk at;
  NO_UNROLL for (int64_t chunk = begin + blockIdx.x; chunk < end; chunk += gridDim.x) {
    at.enter(s, chunk, States<Rule>::kCount);
    at.prepare(Rule{}, s, place[0], Rule::kSums == Sums::none ? nullptr : s.sums);
    const OptimTensor& t = *at.t;
    // In registers, but where three states take them all.
    const std::conditional_t<(Rule::kMoments > 1), const Factors&, const Factors> f = place[0].factors;
    const uint32_t dither = dither_key(t.id, at.step, 0);
    uint32_t key = 0;
    if (!kWide && s.stochastic) key = random_key(s.seed, t.id, at.step);
    NO_UNROLL for (int i = threadIdx.x / 32; i < at.blocks; i += kStepWarps) {
      const int64_t block = at.begin + i;
      const BlockPlace where(t, at.count, block, Lanes<kWide>::kPart, at.packable, at.flat);
      if (t.quantized)
        step_block<Rule, true, kWide>(Rule{}, s, t, f, place[0].tables, where, block, key, dither);
      else
        step_block<Rule, false, kWide>(Rule{}, s, t, f, place[0].tables, where, block, key, dither);
    }
  }
}

// ---- sums over whole tensors ----

__device__ inline double warp_sum(double v) {
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

template <class Rule, bool kQuantized, bool kWide>
__device__ __forceinline__ void add_sums(Rule rule, const OptimTensor& t, const Factors& f, const StateTable* tables,
                                         const BlockPlace& place, int64_t block, double (&sums)[2]) {
  using L = Lanes<kWide>;
  float p[kEach], g[kEach];
  StoredStates<Rule, kQuantized, kWide> stored;
  if constexpr (Rule::kSums == Sums::norms) L::load_param(t, place, p);
  L::load_floats(t.grad, static_cast<DType>(t.grad_dtype), place, g);
  if constexpr (Rule::kSecond) stored.load(t, place, block);
  if constexpr (Rule::kSums == Sums::ratio)
    if (lane_id() == 0) sums[1] += place.left;
  UNROLL for (int e = 0; e < kEach; ++e) {
    float other = g[e] * f.grad;
    if constexpr (Rule::kSums == Sums::ratio) {
      const float v = Stepped(rule, stored, tables, e, f, other, g[e]).v;  // which the parameter does not enter
      const float ratio = Rule::template ratio<Lane>(f, other, v);
      if (abs_bits(ratio) < kInfinity && v >= 0.0f && v < bits_float(kInfinity) &&
          L::offset(e, place.packed) < place.left)
        sums[0] += static_cast<double>(ratio);
      continue;
    }
    if constexpr (Rule::kSecond) other = Stepped(rule, stored, tables, e, f, p[e], g[e]).u;
    if (abs_bits(other) < kInfinity && L::offset(e, place.packed) < place.left) {
      sums[0] += static_cast<double>(p[e]) * static_cast<double>(p[e]);
      sums[1] += static_cast<double>(other) * static_cast<double>(other);
    }
  }
}

// Of each chunk.
template <class Rule, bool kWide>
__global__ void __launch_bounds__(kStepThreads, 3) chunk_sums_kernel(OptimStep s, int64_t begin, int64_t end) {
  SHARED(Workplace<Rule>, place, [1]);
  SHARED(double, parts, [2][kStepWarps][2]);
  if (nothing_to_do(s)) return;
  Chunk at;
  int phase = 0;
  NO_UNROLL for (int64_t chunk = begin + blockIdx.x; chunk < end; chunk += gridDim.x) {
    at.enter(s, chunk, States<Rule>::kCount);
    at.prepare(Rule{}, s, place[0], nullptr);
    const OptimTensor& t = *at.t;
    double sums[2] = {0.0, 0.0};
    NO_UNROLL for (int i = threadIdx.x / 32; i < at.blocks; i += kStepWarps) {
      const int64_t block = at.begin + i;
      const BlockPlace where(t, at.count, block, Lanes<kWide>::kPart, at.packable, at.flat);
      if (t.quantized)
        add_sums<Rule, true, kWide>(Rule{}, t, place[0].factors, place[0].tables, where, block, sums);
      else
        add_sums<Rule, false, kWide>(Rule{}, t, place[0].factors, place[0].tables, where, block, sums);
    }
    for (int i = 0; i < 2; ++i) {
      sums[i] = warp_sum(sums[i]);
      if (lane_id() == 0) parts[phase][threadIdx.x / 32][i] = sums[i];
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      double sum = 0.0;
      for (int warp = 0; warp < kStepWarps; ++warp) sum += parts[phase][warp][threadIdx.x];
      s.chunk_sums[2 * chunk + threadIdx.x] = sum;
    }
    phase ^= 1;
  }
}

// Of each tensor, by one warp: lanes take chunks in turn, so that the sum depends on nothing but their number.
__global__ void __launch_bounds__(kStepThreads) tensor_sums_kernel(OptimStep s) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepWarps + threadIdx.x / 32;
  if (index >= s.tensor_count) return;
  const int64_t begin = s.tensors[index].first_chunk;
  const int64_t end = index + 1 < s.tensor_count ? s.tensors[index + 1].first_chunk : s.chunk_count;
  double sums[2] = {0.0, 0.0};
  for (int64_t chunk = nothing_to_do(s) ? end : begin + lane_id(); chunk < end; chunk += 32)
    for (int i = 0; i < 2; ++i) sums[i] += s.chunk_sums[2 * chunk + i];
  for (int i = 0; i < 2; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (lane_id() == 0) s.new_sums[2 * s.tensors[index].position + i] = sums[i];
  }
}

// ---- launches ----

template <class Kernel>
void launch_chunks(Kernel kernel, const OptimStep& s, int64_t begin, int64_t end, Stream stream) {
  if (begin == end) return;
  const int64_t most = resident_blocks(kernel, kStepThreads);
  const dim3 grid(static_cast<unsigned>(end - begin < most ? end - begin : most));
  LAUNCH(kernel, grid, dim3(kStepThreads), 0, stream, s, begin, end);
}

void optim_sums(const OptimStep& s, Stream stream) {
  dispatch_rule(s.rule, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kSums != Sums::none) {
      launch_chunks(chunk_sums_kernel<Rule, true>, s, 0, s.wide_chunks, stream);
      launch_chunks(chunk_sums_kernel<Rule, false>, s, s.wide_chunks, s.chunk_count, stream);
    }
  });
  const dim3 grid(static_cast<unsigned>(ceil_div(s.tensor_count, kStepWarps)));
  LAUNCH(tensor_sums_kernel, grid, dim3(kStepThreads), 0, stream, s);
}

void optim_step(const OptimStep& s, Stream stream) {
  if (s.block_count == 0) return;
  dispatch_rule(s.rule, [&](auto rule) {
    using Rule = decltype(rule);
    launch_chunks(optim_step_kernel<Rule, true>, s, 0, s.wide_chunks, stream);
    launch_chunks(optim_step_kernel<Rule, false>, s, s.wide_chunks, s.chunk_count, stream);
  });
}

}  // namespace octavo::GPU_NS
