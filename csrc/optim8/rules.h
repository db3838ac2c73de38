#pragma once
// The optimizers: one rule each, over a vector type V (cpu/vec_*.h, or one element on the GPU), shared by every machine
// and level. Rules use V's operations in this order and no others, so that all machines give the same bits.
//
// A rule updates its states in place and returns the direction u of the step; the parameter is then
//   p' = p * shrink - size * u
// Orders of operations are those of torch.optim (decay before the update); where torch adds weight_decay * p to the
// gradient, so does the rule (l2).
#include <cmath>

#include "common/random.h"
#include "optim8/optim8.h"

namespace octavo {

// base^n, n >= 0 whole, by multiplications alone: the same bits on every machine.
HD double whole_power(double base, double n) {
  uint64_t bits = static_cast<uint64_t>(n);
  double result = 1.0;
  for (; bits; bits >>= 1, base *= base)
    if (bits & 1) result *= base;
  return result;
}

// What gradients are multiplied by: 1 / scale, clipping, and -1 to maximize.
HD float grad_factor(const OptimStep& s) {
  float factor = s.maximize ? -1.0f : 1.0f;
  if (s.grad_factor) factor *= *s.grad_factor;
  return s.grad_scale ? factor / *s.grad_scale : factor;
}

// Adam's bias correction as a coefficient: with beta * (1 - beta^(t-1)) / (1 - beta^t) an average weighs what came so
// far as the corrected one does, from its first value on.
HD double debiased(double beta, double t) {
  if (t <= 1) return 0;
  const double before = whole_power(beta, t - 1);
  return beta * (1 - before) / (1 - beta * before);
}

// t: the step's number; sums: [2] of the tensor, or null where they are not known yet or the rule has none.
HD Factors factors_of(Rule rule, const Hyper& h, double lr, double t, float grad, const double* sums) {
  Factors f{};
  f.grad = grad;
  f.eps = static_cast<float>(h.eps);
  f.shrink = h.decoupled != 0 ? static_cast<float>(1 - lr * h.weight_decay) : 1.0f;
  f.l2 = h.decoupled != 0 ? 0.0f : static_cast<float>(h.weight_decay);
  f.beta1 = static_cast<float>(h.beta1), f.rest1 = static_cast<float>(1 - h.beta1);
  f.beta2 = static_cast<float>(h.beta2), f.rest2 = static_cast<float>(1 - h.beta2);
  f.beta3 = static_cast<float>(h.beta3), f.rest3 = static_cast<float>(1 - h.beta3);
  f.root_scale = 1.0f;
  f.trust = 1.0f;
  double size = lr;
  const bool corrected = h.bias_correction != 0;
  const double correction1 = corrected ? 1 - whole_power(h.beta1, t) : 1;
  const double correction2 = corrected ? 1 - whole_power(h.beta2, t) : 1;
  switch (rule) {
    case Rule::adam:
      size = lr / correction1;
      f.root_scale = static_cast<float>(1 / std::sqrt(correction2));
      break;
    case Rule::momentum:
    case Rule::lars:
      // torch starts the buffer with the gradient itself.
      f.beta1 = t <= 1 ? 0.0f : f.beta1;
      f.rest1 = t <= 1 ? 1.0f : static_cast<float>(1 - h.dampening);
      f.a = h.nesterov != 0 ? static_cast<float>(h.beta1) : 1.0f;  // u = a * buffer + b * g
      f.b = h.nesterov != 0 ? 1.0f : 0.0f;
      break;
    case Rule::adagrad: size = lr / (1 + (t - 1) * h.lr_decay); break;
    case Rule::ademamix: {
      // The schedules of arXiv 2409.03137 (section 3.1): both rise from Adam's to their final value.
      const double part_a = h.alpha_steps > 0 && t < h.alpha_steps ? t / h.alpha_steps : 1;
      const double part_b = h.beta3_steps > 0 && t < h.beta3_steps ? t / h.beta3_steps : 1;
      double beta3 = h.beta3;
      if (part_b < 1) {
        const double log1 = std::log(h.beta1), log3 = std::log(h.beta3);
        beta3 = std::exp(log1 * log3 / ((1 - part_b) * log3 + part_b * log1));
        if (beta3 > h.beta3) beta3 = h.beta3;
      }
      f.beta3 = static_cast<float>(beta3), f.rest3 = static_cast<float>(1 - beta3);
      f.a = static_cast<float>(1 / correction1);
      f.b = static_cast<float>(h.alpha * part_a);
      f.root_scale = static_cast<float>(1 / std::sqrt(correction2));
      break;
    }
    case Rule::lamb:
      f.a = static_cast<float>(1 / correction1);
      f.b = static_cast<float>(h.weight_decay);
      f.l2 = 0.0f;
      f.root_scale = static_cast<float>(1 / std::sqrt(correction2));
      if (sums && sums[0] > 0 && sums[1] > 0) size = lr * (std::sqrt(sums[0]) / std::sqrt(sums[1]));
      break;
    case Rule::stable_adamw: {
      const double beta1 = debiased(h.beta1, t), beta2 = debiased(h.beta2, t);
      f.beta2 = static_cast<float>(beta2);
      f.rest1 = static_cast<float>(1 - beta1), f.rest2 = static_cast<float>(1 - beta2);
      f.a = static_cast<float>(h.eps * h.eps);
      if (sums && sums[0] > sums[1]) size = lr / std::sqrt(sums[0] / sums[1]);  // the mean is above 1
      f.l2 = 0.0f;
      f.shrink = static_cast<float>(1 - size * h.weight_decay);
      break;
    }
    default: break;
  }
  if (rule == Rule::lars && sums && sums[0] > 0 && sums[1] > 0) {
    const double p = std::sqrt(sums[0]), g = std::sqrt(sums[1]);
    f.trust = static_cast<float>(h.trust_coefficient * p / (g + h.weight_decay * p + h.eps));
  }
  f.size = static_cast<float>(size);
  return f;
}

// ---- the rules. direction(f, p, g, m, v, root): g has the factor f.grad; m: moments; v: second moment, replaced by
// its successor, of which root becomes the square root. ----

template <class V>
using MomentsOf = typename V::F[2];

template <class V>
HD typename V::F with_l2(const Factors& f, typename V::F p, typename V::F g) {
  return V::fma(V::set(f.l2), p, g);
}

template <class V>
HD void second_moment(const Factors& f, typename V::F g, typename V::F& v, typename V::F& root) {
  v = V::fma(V::mul(g, g), V::set(f.rest2), V::mul(V::set(f.beta2), v));
  root = V::sqrt(v);
}

template <class V>
HD typename V::F denominator(const Factors& f, typename V::F root) {
  return V::fma(root, V::set(f.root_scale), V::set(f.eps));
}

struct SgdRule {
  static constexpr Rule kRule = Rule::sgd;
  static constexpr int kMoments = 0;
  static constexpr bool kSecond = false;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>&, typename V::F&,
                                    typename V::F&) {
    return with_l2<V>(f, p, g);
  }
};

struct MomentumRule {
  static constexpr Rule kRule = Rule::momentum;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = false;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m, typename V::F&,
                                    typename V::F&) {
    g = with_l2<V>(f, p, g);
    m[0] = V::fma(V::set(f.beta1), m[0], V::mul(V::set(f.rest1), g));
    return V::fma(V::set(f.a), m[0], V::mul(V::set(f.b), g));
  }
};

struct LarsRule {  // arXiv 1708.03888: momentum of trust * (g + weight_decay * p)
  static constexpr Rule kRule = Rule::lars;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = false;
  static constexpr Sums kSums = Sums::norms;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m, typename V::F&,
                                    typename V::F&) {
    g = V::mul(V::set(f.trust), with_l2<V>(f, p, g));
    m[0] = V::fma(V::set(f.beta1), m[0], V::mul(V::set(f.rest1), g));
    return V::fma(V::set(f.a), m[0], V::mul(V::set(f.b), g));
  }
};

struct AdamRule {  // arXiv 1412.6980, 1711.05101
  static constexpr Rule kRule = Rule::adam;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m,
                                    typename V::F& v, typename V::F& root) {
    g = with_l2<V>(f, p, g);
    m[0] = V::fma(V::set(f.rest1), V::sub(g, m[0]), m[0]);
    second_moment<V>(f, g, v, root);
    return V::div(m[0], denominator<V>(f, root));
  }
};

struct RmspropRule {
  static constexpr Rule kRule = Rule::rmsprop;
  static constexpr int kMoments = 0;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>&, typename V::F& v,
                                    typename V::F& root) {
    g = with_l2<V>(f, p, g);
    second_moment<V>(f, g, v, root);
    return V::div(g, V::add(root, V::set(f.eps)));
  }
};

struct RmspropMomentumRule {
  static constexpr Rule kRule = Rule::rmsprop_momentum;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m,
                                    typename V::F& v, typename V::F& root) {
    const typename V::F u = RmspropRule::direction<V>(f, p, g, m, v, root);
    m[0] = V::fma(V::set(f.beta1), m[0], u);
    return m[0];
  }
};

struct AdagradRule {
  static constexpr Rule kRule = Rule::adagrad;
  static constexpr int kMoments = 0;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>&, typename V::F& v,
                                    typename V::F& root) {
    g = with_l2<V>(f, p, g);
    v = V::fma(g, g, v);
    root = V::sqrt(v);
    return V::div(g, V::add(root, V::set(f.eps)));
  }
};

struct LionRule {  // arXiv 2302.06675
  static constexpr Rule kRule = Rule::lion;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = false;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m, typename V::F&,
                                    typename V::F&) {
    g = with_l2<V>(f, p, g);
    const typename V::F u = V::fma(V::set(f.rest1), g, V::mul(V::set(f.beta1), m[0]));
    m[0] = V::fma(V::set(f.rest2), g, V::mul(V::set(f.beta2), m[0]));
    return V::sign(u);  // 0 for 0
  }
};

struct AdemamixRule {  // arXiv 2409.03137
  static constexpr Rule kRule = Rule::ademamix;
  static constexpr int kMoments = 2;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::none;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m,
                                    typename V::F& v, typename V::F& root) {
    g = with_l2<V>(f, p, g);
    m[0] = V::fma(V::set(f.rest1), V::sub(g, m[0]), m[0]);
    m[1] = V::fma(V::set(f.rest3), V::sub(g, m[1]), m[1]);
    second_moment<V>(f, g, v, root);
    return V::div(V::fma(V::set(f.b), m[1], V::mul(V::set(f.a), m[0])), denominator<V>(f, root));
  }
};

struct LambRule {  // arXiv 1904.00962
  static constexpr Rule kRule = Rule::lamb;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::norms;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F p, typename V::F g, MomentsOf<V>& m,
                                    typename V::F& v, typename V::F& root) {
    m[0] = V::fma(V::set(f.rest1), V::sub(g, m[0]), m[0]);
    second_moment<V>(f, g, v, root);
    return V::fma(V::set(f.b), p, V::div(V::mul(V::set(f.a), m[0]), denominator<V>(f, root)));
  }
};

// arXiv 2304.13013, Algorithm 2: AdamW whose step, decay included, is divided by the root of the mean over the tensor
// of g^2 / max(v, eps^2), where that is above 1: where second moments have not caught up with the gradient.
struct StableAdamwRule {
  static constexpr Rule kRule = Rule::stable_adamw;
  static constexpr int kMoments = 1;
  static constexpr bool kSecond = true;
  static constexpr Sums kSums = Sums::ratio;
  template <class V>
  static HD typename V::F direction(const Factors& f, typename V::F, typename V::F g, MomentsOf<V>& m, typename V::F& v,
                                    typename V::F& root) {
    m[0] = V::fma(V::set(f.rest1), V::sub(g, m[0]), m[0]);
    second_moment<V>(f, g, v, root);
    return V::div(m[0], V::add(root, V::set(f.eps)));
  }
  // What an element adds to the sum; v: its new second moment.
  template <class V>
  static HD typename V::F ratio(const Factors& f, typename V::F g, typename V::F v) {
    return V::div(V::mul(g, g), V::max(v, V::set(f.a)));
  }
};

// Calls call(RuleStruct{}).
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
void dispatch_rule(Rule rule, const F& call) {
  switch (rule) {
    case Rule::sgd: return call(SgdRule{});
    case Rule::momentum: return call(MomentumRule{});
    case Rule::adam: return call(AdamRule{});
    case Rule::rmsprop: return call(RmspropRule{});
    case Rule::rmsprop_momentum: return call(RmspropMomentumRule{});
    case Rule::adagrad: return call(AdagradRule{});
    case Rule::lion: return call(LionRule{});
    case Rule::ademamix: return call(AdemamixRule{});
    case Rule::lamb: return call(LambRule{});
    case Rule::lars: return call(LarsRule{});
    case Rule::stable_adamw: return call(StableAdamwRule{});
  }
}

// ---- random bits for stochastic rounding ----

// Of one parameter in one step; then mix_bits(key_of_block(key, first) + j) for an element. A hash, so that every
// machine and order gives the same numbers.
HD uint32_t random_key(uint64_t seed, uint32_t id, double t) {
  const uint32_t key = mix_bits(mix_seed(seed) ^ id);
  return mix_bits(key ^ static_cast<uint32_t>(static_cast<uint64_t>(t)));
}

// The key for the elements from `first` on: their low 32 bits enter one by one, the high ones here.
HD uint32_t key_of_block(uint32_t key, int64_t first) {
  return mix_bits(key ^ static_cast<uint32_t>(first >> 32)) + static_cast<uint32_t>(first);
}

}  // namespace octavo
