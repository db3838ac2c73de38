// Block-wise quantization and the optimizers' step on every machine, against plain loops over common/codebook.h and
// optim8/rules.h: equal bits.
#include <cmath>
#include <limits>
#include <vector>

#include "common/codebook.h"
#include "common/lane.h"
#include "kernels.h"
#include "optim8/rules.h"

namespace kernels {
namespace {

const DynamicMap& map_of(bool is_signed) {
  return is_signed ? kSignedMap : kUnsignedMap;
}

// ---- block-wise quantization ----

struct Blockwise {
  int64_t count, blocksize;
  bool is_signed;
  const float* values;  // of a code book of the caller's, or null
};

template <class T>
void test_blocks(const Buffer<T>& x, const Blockwise& c, const std::string& kind) {
  const DynamicMap& map = map_of(c.is_signed);
  std::vector<float> thresholds(map.threshold, map.threshold + kCodes - 1);
  const float* values = c.values ? c.values : map.value;
  if (c.values)
    for (int i = 0; i + 1 < kCodes; ++i) thresholds[i] = threshold_between(c.values[i], c.values[i + 1]);
  const uint32_t zero = nearest_code(0.0f, thresholds.data());
  const int64_t blocks = ceil_div(c.count, c.blocksize);
  Buffer<uint8_t> codes(c.count), want_codes(c.count);
  Buffer<float> absmax(blocks), want_absmax(blocks);
  Buffer<T> back(c.count), want_back(c.count);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * c.blocksize, end = std::min(first + c.blocksize, c.count);
    float most = 0;
    for (int64_t i = first; i < end; ++i) {
      const float v = std::fabs(to_float(x[i]));
      if (std::isfinite(v)) most = std::max(most, v);
    }
    want_absmax[b] = block_absmax(most);
    for (int64_t i = first; i < end; ++i) {
      const uint32_t code = block_code(to_float(x[i]), block_inverse(want_absmax[b]), thresholds.data(), zero);
      want_codes[i] = static_cast<uint8_t>(code);
      want_back[i] = from_float<T>(values[code] * want_absmax[b]);
    }
  }
  const DType dtype = dtype_of<T>::value;
  const std::string where = kind + " blocks of " + std::to_string(c.blocksize) +
                            (c.is_signed ? " signed" : " unsigned") + (c.values ? " own" : "") +
                            shape(1, c.count, dtype);
  backend->quantize_blocks({x.data(), dtype, c.values, c.is_signed, codes.data(), absmax.data(), c.count, c.blocksize},
                           nullptr);
  check_same(absmax, want_absmax, where + ".absmax");
  check_same(codes, want_codes, where + ".codes");
  backend->dequantize_blocks(
      {want_codes.data(), want_absmax.data(), c.values, c.is_signed, back.data(), dtype, c.count, c.blocksize},
      nullptr);
  check_same(back, want_back, "dequantize " + where);
}

template <class T>
Buffer<T> hard_line(int64_t count) {
  Buffer<T> x(count);
  int64_t kind = 0, special = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i % 64 == 0) {
      kind = uniform(0, 8);
      special = i + uniform(0, 63);
    }
    x[i] = from_float<T>(hard_value(kind, i, special));
  }
  return x;
}

// Every threshold and its neighbours, times the absmax of their block: what arithmetic could take for the wrong code.
Buffer<float> threshold_line(bool is_signed, float absmax, int reach) {
  std::vector<float> all;
  for (const float threshold : map_of(is_signed).threshold) {
    float v = threshold;
    for (int step = 0; step < reach; ++step) v = std::nextafterf(v, -2.0f);
    for (int step = -reach; step <= reach; ++step, v = std::nextafterf(v, 2.0f)) {
      if (all.size() % 64 == 0) all.push_back(absmax);
      all.push_back(v * absmax);
    }
  }
  Buffer<float> x(static_cast<int64_t>(all.size()));
  std::copy(all.begin(), all.end(), x.data());
  return x;
}

template <class T>
void test_block_sizes() {
  for (const int64_t blocksize : {64, 128, 256, 512, 1024, 2048, 4096})
    for (const int64_t count : {1, 63, 64, 65, 257, 1000, 4096, 4097, 9001}) {
      if (blocksize > 256 && count < 1000) continue;
      const Buffer<T> x = hard_line<T>(count);
      test_blocks(x, {count, blocksize, true, nullptr}, "hard");
      test_blocks(x, {count, blocksize, false, nullptr}, "hard");
    }
}

}  // namespace

void test_blockwise() {
  for_each_dtype([](auto type) { test_block_sizes<decltype(type)>(); });
  for (const bool is_signed : {true, false})
    for (const float absmax : {1.0f, 3.0f, 1e-30f, 2.5e38f}) {
      const Buffer<float> x = threshold_line(is_signed, absmax, 4);
      test_blocks(x, {x.size(), 64, is_signed, nullptr}, "thresholds");
    }
  Buffer<float> own(kCodes);
  for (int i = 0; i < kCodes; ++i) own[i] = (static_cast<float>(i) - 100) / 155.0f;  // linear, and not symmetric
  for_each_dtype([&](auto type) {
    using T = decltype(type);
    const Buffer<T> x = hard_line<T>(3001);
    test_blocks(x, {x.size(), 256, true, own.data()}, "hard");
    test_blocks(x, {x.size(), 4096, true, own.data()}, "hard");
  });
}

// ---- optimizers ----

namespace {

// One parameter with everything that belongs to it, twice: for the machine and for the plain loops.
struct Parameter {
  DType param_dtype, grad_dtype;
  int64_t count, row;
  bool quantized, compensated;
  int states;
  double step;
  Buffer<float> fp32, grad32;
  Buffer<uint16_t> half, grad16, kept;
  std::vector<Buffer<float>> floats, absmax;
  std::vector<Buffer<uint8_t>> codes;

  int64_t row_blocks() const { return ceil_div(row, kOptimBlock); }
  int64_t blocks() const { return count ? count / row * row_blocks() : 0; }
  bool wide() const { return param_dtype == DType::f32; }
};

uint16_t bits16(DType dtype, float v) {
  return dtype == DType::f16 ? from_float<Half>(v).bits : from_float<BFloat16>(v).bits;
}
float float16(DType dtype, uint16_t bits) {
  return dtype == DType::f16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

float hard_grad() {
  switch (uniform(0, 15)) {
    case 0: return 0.0f;
    case 1: return -0.0f;
    case 2: return normal() * 1e3f;
    case 3: return normal() * 1e-6f;
    default: return normal();
  }
}

Parameter make(DType param, DType grad, int64_t count, int64_t row, int states, int second_at, bool quantized,
               bool compensated, double step, int bad) {
  const int64_t wide = param == DType::f32 ? count : 0, wide_grad = grad == DType::f32 ? count : 0;
  Parameter p{param,
              grad,
              count,
              row,
              quantized,
              compensated,
              states,
              step,
              Buffer<float>(wide),
              Buffer<float>(wide_grad),
              Buffer<uint16_t>(count - wide),
              Buffer<uint16_t>(count - wide_grad),
              Buffer<uint16_t>(compensated ? count : 0),
              {},
              {},
              {}};
  const int64_t special = count ? uniform(0, static_cast<int>(count) - 1) : 0;
  for (int64_t i = 0; i < count; ++i) {
    const float v = normal();
    if (wide)
      p.fp32[i] = v;
    else
      p.half[i] = bits16(param, v);
    if (compensated) p.kept[i] = bits16(param, v * 1e-3f * normal());
    float g = hard_grad();
    if (bad == 1 && i == special) g = NAN;
    if (bad == 2 && (i % 7 == 3)) g = i % 2 ? INFINITY : -INFINITY;
    if (bad == 3 && i / 256 == 0) g = NAN;  // a whole block
    if (wide_grad)
      p.grad32[i] = g;
    else
      p.grad16[i] = bits16(grad, g);
  }
  for (int s = 0; s < states; ++s) {
    Buffer<float> floats(quantized ? 0 : count), absmax(quantized ? p.blocks() : 0);
    Buffer<uint8_t> codes(quantized ? count : 0);
    for (int64_t i = 0; i < floats.size(); ++i) floats[i] = s == second_at ? std::fabs(normal()) : normal();
    for (int64_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(uniform(0, 255));
    for (int64_t b = 0; b < absmax.size(); ++b) absmax[b] = uniform(0, 5) ? std::fabs(normal()) : 0.0f;
    p.floats.push_back(floats);
    p.absmax.push_back(absmax);
    p.codes.push_back(codes);
  }
  return p;
}

OptimTensor describe(Parameter& p, uint32_t id) {
  OptimTensor t{};
  t.param = p.wide() ? static_cast<void*>(p.fp32.data()) : p.half.data();
  t.grad = p.grad_dtype == DType::f32 ? static_cast<void*>(p.grad32.data()) : p.grad16.data();
  for (int s = 0; s < p.states; ++s) {
    t.state[s] = p.quantized ? static_cast<void*>(p.codes[s].data()) : p.floats[s].data();
    t.absmax[s] = p.quantized ? p.absmax[s].data() : nullptr;
  }
  t.compensation = p.compensated ? p.kept.data() : nullptr;
  t.step = &p.step;
  t.count = p.count;
  t.row = p.row;
  t.row_blocks = p.row_blocks();
  t.param_dtype = static_cast<int32_t>(p.param_dtype);
  t.grad_dtype = static_cast<int32_t>(p.grad_dtype);
  t.quantized = p.quantized;
  t.id = id;
  return t;
}

// One element as a rule takes it.
template <class Rule>
struct Element {
  float p, g, old[3] = {}, m[2] = {}, v = 0, root = 0;

  Element(const OptimTensor& t, int64_t i, int64_t block) {
    const DType param = static_cast<DType>(t.param_dtype), grad = static_cast<DType>(t.grad_dtype);
    for (int k = 0; k < Rule::kMoments + (Rule::kSecond ? 1 : 0); ++k) {
      if (t.quantized)
        old[k] = state_value(map_of(k != Rule::kMoments), static_cast<uint8_t*>(t.state[k])[i]) * t.absmax[k][block];
      else
        old[k] = static_cast<float*>(t.state[k])[i];
      if (k < Rule::kMoments) m[k] = old[k];
    }
    if (Rule::kSecond) {
      root = t.quantized ? old[Rule::kMoments] : 0;
      v = t.quantized ? root * root : old[Rule::kMoments];
    }
    p = param == DType::f32 ? static_cast<float*>(t.param)[i] : float16(param, static_cast<uint16_t*>(t.param)[i]);
    if (t.compensation) p += float16(param, static_cast<uint16_t*>(t.compensation)[i]);
    g = grad == DType::f32 ? static_cast<const float*>(t.grad)[i]
                           : float16(grad, static_cast<const uint16_t*>(t.grad)[i]);
  }
};

// The sums of one tensor that has not stepped yet, against those that the machine made: other orders of as many terms.
template <class Rule>
void check_sums(const OptimStep& s, const OptimTensor& t, const std::string& name) {
  const Factors f = factors_of(Rule::kRule, s.hyper, s.lr ? *s.lr : s.hyper.lr, *t.step, grad_factor(s), nullptr);
  double want[2] = {};
  for (int64_t i = 0; i < t.count; ++i) {
    Element<Rule> x(t, i, i / t.row * t.row_blocks + i % t.row / kOptimBlock);
    const float g = x.g * f.grad, u = Rule::template direction<Lane>(f, x.p, g, x.m, x.v, x.root);
    if constexpr (Rule::kSums == Sums::ratio) {
      const float ratio = g * g / std::max(x.v, static_cast<float>(s.hyper.eps * s.hyper.eps));
      if (std::isfinite(x.v) && std::isfinite(ratio)) want[0] += static_cast<double>(ratio);
      want[1] += 1;
    } else {
      const float other = Rule::kSecond ? u : g;
      if (!std::isfinite(other)) continue;
      want[0] += static_cast<double>(x.p) * static_cast<double>(x.p);
      want[1] += static_cast<double>(other) * static_cast<double>(other);
    }
  }
  for (int i = 0; i < 2; ++i) {
    const double got = s.sums[2 * t.id + static_cast<uint32_t>(i)];
    CHECK_FOR(std::fabs(got - want[i]) <= 1e-12 * want[i],
              backend->name + " " + name + " sum " + std::to_string(got) + ", not " + std::to_string(want[i]));
  }
}

// The step of one tensor, element by element; returns how many elements are left alone.
template <class Rule>
int64_t plain_step(const OptimStep& s, const OptimTensor& t, const Factors& f) {
  constexpr int kStates = Rule::kMoments + (Rule::kSecond ? 1 : 0);
  const DType param = static_cast<DType>(t.param_dtype);
  const uint32_t key = random_key(s.seed, t.id, *t.step);
  int64_t left_alone = 0;
  for (int64_t first = 0, block = 0; first < t.count; ++block) {
    const int64_t in_row = first % t.row, count = std::min(kOptimBlock, t.row - in_row);
    float next[3][kOptimBlock] = {}, most[3] = {};
    bool any_left = false;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t i = first + j;
      Element<Rule> x(t, i, block);
      auto& [p, g, old, m, v, root] = x;
      const float shrunk = p * f.shrink;
      const float u = Rule::template direction<Lane>(f, shrunk, g * f.grad, m, v, root);
      const bool valid = std::isfinite(u) && std::isfinite(Rule::kSecond ? root : m[0]) && std::isfinite(m[1]);
      const float after = valid ? std::fmaf(-f.size, u, shrunk) : p;
      if (!valid) {
        ++left_alone;
        any_left = true;
      }
      for (int k = 0; k < kStates; ++k) {
        const float kept = k < Rule::kMoments ? m[k] : t.quantized ? root : v;
        next[k][j] = valid ? kept : old[k];
        most[k] = std::max(most[k], k == Rule::kMoments ? next[k][j] : reach_of(next[k][j]));
        if (!t.quantized) static_cast<float*>(t.state[k])[i] = next[k][j];
      }
      if (param == DType::f32) {
        static_cast<float*>(t.param)[i] = after;
        continue;
      }
      uint16_t stored = bits16(param, after);
      if (s.stochastic && param == DType::bf16) {
        const uint32_t random = mix_bits(key_of_block(key, first) + static_cast<uint32_t>(j)) & 0xffffu;
        stored = static_cast<uint16_t>((float_bits(after) + (std::isfinite(after) ? random : 0)) >> 16);
      } else if (t.compensation) {
        static_cast<uint16_t*>(t.compensation)[i] = bits16(param, after - float16(param, stored));
      }
      static_cast<uint16_t*>(t.param)[i] = stored;
    }
    for (int k = 0; t.quantized && k < kStates; ++k) {
      const float absmax = block_absmax(any_left ? std::max(most[k], t.absmax[k][block]) : most[k]);
      t.absmax[k][block] = absmax;
      for (int64_t j = 0; j < count; ++j) {
        const float value = next[k][j] * block_inverse(absmax);
        const DynamicMap& map = map_of(k != Rule::kMoments);
        const uint32_t random = dither_key(t.id, *t.step, k) + static_cast<uint32_t>(first + j) * kDitherStep;
        static_cast<uint8_t*>(t.state[k])[first + j] = static_cast<uint8_t>(state_code(map, value, dither_of(random)));
      }
    }
    first += count;
  }
  return left_alone;
}

Hyper hyper_of(Rule rule, int variant) {
  Hyper h{};
  h.lr = 1e-2;
  h.weight_decay = variant ? 0.1 : 0.0;
  h.eps = 1e-8;
  h.beta1 = rule == Rule::rmsprop || rule == Rule::adagrad ? 0.0 : 0.9;
  h.beta2 = 0.99;
  h.beta3 = 0.999;
  h.dampening = variant ? 0.3 : 0.0;
  h.alpha = 5;
  h.alpha_steps = variant ? 100 : 0;
  h.beta3_steps = variant ? 100 : 0;
  h.lr_decay = 0.01;
  h.trust_coefficient = 0.02;
  h.decoupled = variant == 1;
  h.nesterov = variant == 1;
  h.bias_correction = 1;
  return h;
}

// All parameters in one call, as a model has them: both widths, every size, several steps of counting.
void test_rule(const RuleInfo& info, int variant) {
  int second_at = -1;
  dispatch_rule(info.rule, [&](auto rule) {
    if (decltype(rule)::kSecond) second_at = decltype(rule)::kMoments;
  });
  const bool compensated = variant == 2, stochastic = variant == 1;
  std::vector<Parameter> made;
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  for (const bool quantized : {true, false}) {
    const auto add = [&](DType p, DType g, int64_t count, int64_t row, double step, int bad) {
      made.push_back(make(p, g, count, row, info.states, second_at, quantized, compensated && p != f32, step, bad));
    };
    add(f32, f32, 9001, 9001, 1, 0);
    add(f32, bf16, 700, 100, 3, 0);  // rows of less than a block
    add(f32, f16, 1, 1, 1000, 0);
    add(f32, f32, 0, 0, 1, 0);
    add(f32, f32, 600, 600, 1000, 1);
    add(f32, f32, 515, 515, 7, 2);
    add(f32, f32, 1024, 1024, 7, 3);
    add(f32, f32, 3 * 300, 300, 7, 0);  // rows of a block and a piece
    add(bf16, bf16, 2049, 2049, 1, 0);
    add(bf16, f32, 777, 777, 5, 2);
    add(f16, f16, 1024, 512, 5, 0);
    add(f16, f32, 17, 17, 100000, 0);
    add(bf16, bf16, 255, 255, 2, 3);
  }
  std::vector<Parameter> want = made;  // Buffer copies
  std::vector<OptimTensor> tensors, want_tensors;
  std::vector<int32_t> chunks;
  OptimStep s{};
  for (const bool wide : {true, false}) {
    for (size_t i = 0; i < made.size(); ++i) {
      if (made[i].wide() != wide) continue;
      OptimTensor t = describe(made[i], static_cast<uint32_t>(i)), w = describe(want[i], static_cast<uint32_t>(i));
      t.position = static_cast<int64_t>(i);
      t.first_block = s.block_count;
      t.first_chunk = static_cast<int64_t>(chunks.size());
      s.block_count += made[i].blocks();
      chunks.insert(chunks.end(), ceil_div(made[i].blocks(), kChunkBlocks), static_cast<int32_t>(tensors.size()));
      tensors.push_back(t);
      want_tensors.push_back(w);
    }
    if (wide) s.wide_chunks = static_cast<int64_t>(chunks.size());
  }
  std::vector<double> chunk_sums(2 * chunks.size()), sums(2 * tensors.size(), -1);
  int64_t nonfinite = 5;
  const float lr = 2e-2f, scale = 4.0f, factor = 0.75f, none = 0.0f;
  s.tensors = tensors.data();
  s.chunks = chunks.data();
  s.tensor_count = static_cast<int64_t>(tensors.size());
  s.chunk_count = static_cast<int64_t>(chunks.size());
  s.rule = info.rule;
  s.hyper = hyper_of(info.rule, variant);
  s.lr = variant ? &lr : nullptr;
  s.grad_scale = variant ? &scale : nullptr;
  s.grad_factor = variant ? &factor : nullptr;
  s.found_inf = variant ? &none : nullptr;
  s.chunk_sums = chunk_sums.data();
  s.new_sums = sums.data();
  if (info.sums != Sums::none) s.sums = sums.data();
  s.nonfinite = &nonfinite;
  s.seed = 0x123456789abcdefull;
  s.maximize = variant == 2;
  s.stochastic = stochastic;
  const std::string where = std::string(info.name) + " variant " + std::to_string(variant) + ", parameter ";
  int64_t left_alone = 0;
  if (info.sums != Sums::none) backend->optim_sums(s, nullptr);
  dispatch_rule(info.rule, [&](auto rule) {
    for (size_t i = 0; info.sums != Sums::none && i < want_tensors.size(); ++i)
      check_sums<decltype(rule)>(s, want_tensors[i], where + std::to_string(want_tensors[i].id));
  });
  backend->optim_step(s, nullptr);
  dispatch_rule(info.rule, [&](auto rule) {
    for (size_t i = 0; i < want_tensors.size(); ++i) {
      const double* own = s.sums ? s.sums + 2 * want_tensors[i].id : nullptr;
      const Factors f =
          factors_of(info.rule, s.hyper, s.lr ? lr : s.hyper.lr, *want_tensors[i].step, grad_factor(s), own);
      left_alone += plain_step<decltype(rule)>(s, want_tensors[i], f);
    }
  });
  CHECK_FOR(nonfinite == 5 + left_alone, backend->name + " " + where + "all: left alone " +
                                             std::to_string(nonfinite - 5) + ", not " + std::to_string(left_alone));
  for (size_t i = 0; i < made.size(); ++i) {
    const std::string name = where + std::to_string(i) + (made[i].quantized ? " (8 bits)" : " (32 bits)");
    check_same(made[i].fp32, want[i].fp32, name);
    check_same(made[i].half, want[i].half, name);
    check_same(made[i].kept, want[i].kept, name + ".compensation");
    for (int k = 0; k < info.states; ++k) {
      const std::string state = name + ".state" + std::to_string(k);
      check_same(made[i].absmax[k], want[i].absmax[k], state + ".absmax");
      check_same(made[i].codes[k], want[i].codes[k], state);
      check_same(made[i].floats[k], want[i].floats[k], state);
    }
  }
  // With an Inf found, nothing changes.
  const float found = 1.0f;
  s.found_inf = &found;
  const int64_t before = nonfinite;
  if (info.sums != Sums::none) backend->optim_sums(s, nullptr);
  for (const double sum : sums) CHECK(sum == (info.sums != Sums::none ? 0 : -1));
  backend->optim_step(s, nullptr);
  CHECK(nonfinite == before);
  for (size_t i = 0; i < made.size(); ++i)
    check_same(made[i].fp32, want[i].fp32, where + std::to_string(i) + " found_inf");
}

}  // namespace

void test_optim() {
  for (const RuleInfo& info : kRules)
    for (const int variant : {0, 1, 2}) test_rule(info, variant);
}

}  // namespace kernels
