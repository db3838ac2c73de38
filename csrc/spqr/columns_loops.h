#pragma once
// The inner loop of the quantization over a vector type V (cpu/vec_*.h), once per ISA level: a lane is a row. The
// `stats_rows` rows that share statistics of the second level are a tile, held transposed so that a column of it is
// whole vectors. No fma: a plain PyTorch version (python/octavo/spqr/reference_columns.py) gives the same bits.
#include "spqr/columns.h"

namespace octavo::cpu {

// Of one thread: [k, stats_rows] each, then [stats_rows] each.
struct ColumnScratch {
  float *weight, *error;
  Half* residual;
  uint8_t* codes;
  float *scale, *zero;
};

struct ColumnLoops {
  // Tiles [begin, end). factor is that of p, transposed.
  void (*quantize)(const SpqrColumns& p, const float* factor, const ColumnScratch&, int64_t begin, int64_t end);
};

namespace portable {
extern const ColumnLoops column_loops;
}
namespace avx2 {
extern const ColumnLoops column_loops;
}
namespace avx512 {
extern const ColumnLoops column_loops;
}

}  // namespace octavo::cpu

// ISA files only, after the target pragma.
#ifdef OCTAVO_ISA_LOOPS

namespace octavo::cpu {
namespace {

// Scale and zero of the second level, and what they make of one statistic.
struct SecondLevel {
  Half scale, zero;
  float step, offset, inverse, most;
  bool single;  // all statistics of the tile are one value

  // The same minimum-maximum fit as of weights, over x[0 .. rows). Where the range is too small against the magnitude
  // for half to tell the values apart, or 0, all become the middle: code 1, zero 0.
  SecondLevel(const float* x, int64_t rows, int bits) {
    float low = x[0], high = x[0];
    for (int64_t i = 1; i < rows; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    const float range = high - low, magnitude = -low > high ? -low : high;
    most = static_cast<float>((1 << bits) - 1);
    scale = from_float<Half>(range / most);
    step = to_float(scale);
    single = !(range >= magnitude * 0x1p-10f) || !(step > 0.0f) || !(magnitude <= step * 32768.0f);
    if (single) {
      scale = from_float<Half>(low + 0.5f * range);
      zero = from_float<Half>(0.0f);
      step = to_float(scale);
      offset = inverse = 0.0f;
      return;
    }
    zero = from_float<Half>(-low / step);
    offset = to_float(zero);
    inverse = 1.0f / step;
  }

  uint8_t code(float x) const {
    if (single) return 1;
    const float q = std::nearbyintf(x * inverse + offset);
    return static_cast<uint8_t>(q > 0.0f ? (q < most ? q : most) : 0.0f);
  }
  float value(uint8_t code) const { return (static_cast<float>(code) - offset) * step; }
};

template <class V>
struct TileLoops {
  using F = typename V::F;
  using M = typename V::M;

  struct Fit {
    F scale, zero, inverse;
  };

  // 0 for a scale that a division would not survive: the code is then the one nearest to the zero point.
  static F inverse_of(F scale) {
    const M usable = V::at_least(scale, V::set(0x1p-100f));
    return V::select(usable, V::div(V::set(1.0f), V::select(usable, scale, V::set(1.0f))), V::set(0.0f));
  }

  // scale = (high - low) / most, zero = -low / scale. A range far from 0 (constant groups are the extreme) would need a
  // zero point beyond what is stored: it is widened to include 0, so that a constant is code 0 or `most`. With two
  // levels such a zero point would take all of the range that its tile's others share: there less is far.
  static Fit fit(const SpqrColumns& p, F low, F high, F most) {
    const F nought = V::set(0.0f);
    const F distance = V::max(low, V::sub(nought, high));
    const M far = V::greater(distance, V::mul(V::set(p.scale_bits ? 1.0f : 16.0f), V::sub(high, low)));
    low = V::select(far, V::min(low, nought), low);
    high = V::select(far, V::max(high, nought), high);
    Fit f;
    f.scale = V::div(V::sub(high, low), most);
    f.inverse = inverse_of(f.scale);
    f.zero = V::mul(V::sub(nought, low), f.inverse);
    return f;
  }

  static F code_of(F w, F inverse, F zero, F most) {
    return V::min(V::max(V::round(V::add(V::mul(w, inverse), zero)), V::set(0.0f)), most);
  }

  static F value_of(F code, F scale, F zero) { return V::mul(scale, V::sub(code, zero)); }

  // ((w - Q(w)) / d)^2
  static F loss_of(F w, const Fit& f, F most, F d) {
    const F e = V::div(V::sub(w, value_of(code_of(w, f.inverse, f.zero, most), f.scale, f.zero)), d);
    return V::mul(e, e);
  }

  // What a group loses less when it is fitted between low and high, without the weight number `left_out`.
  static F gain_without(const SpqrColumns& p, const float* w, const float* diagonal, const F* loss, int64_t count,
                        int64_t rows, F low, F high, F left_out, F most) {
    const Fit f = fit(p, low, high, most);
    F gain = V::set(0.0f);
    for (int64_t l = 0; l < count; ++l) {
      const F now = loss_of(V::load(w + l * rows), f, most, V::set(diagonal[l]));
      const M out = V::equal(V::set(static_cast<float>(l)), left_out);
      gain = V::add(gain, V::select(out, loss[l], V::sub(loss[l], now)));
    }
    return gain;
  }

  // The fit of one group of `count` columns, of the rows of one vector: w[l * rows] is column l.
  static Fit fit_group(const SpqrColumns& p, const float* w, const float* diagonal, int64_t count, int64_t rows,
                       F most) {
    F low = V::load(w), high = low, low_at = V::set(0.0f), high_at = V::set(0.0f);
    F next_low = V::set(INFINITY), next_high = V::set(-INFINITY);
    for (int64_t l = 1; l < count; ++l) {
      const F v = V::load(w + l * rows), at = V::set(static_cast<float>(l));
      const M lower = V::greater(low, v), higher = V::greater(v, high);
      next_low = V::select(lower, low, V::min(v, next_low));
      next_high = V::select(higher, high, V::max(v, next_high));
      low = V::select(lower, v, low);
      high = V::select(higher, v, high);
      low_at = V::select(lower, at, low_at);
      high_at = V::select(higher, at, high_at);
    }
    const Fit whole = fit(p, low, high, most);
    if (!p.leave_one_out || !(p.threshold < INFINITY)) return whole;

    // Without a weight between the ends the fit stays what it is, and the gain is that weight's loss: two fits, without
    // the lowest and without the highest, tell all.
    F loss[kMaxBlockColumns];
    for (int64_t l = 0; l < count; ++l) loss[l] = loss_of(V::load(w + l * rows), whole, most, V::set(diagonal[l]));
    const F gain_low = gain_without(p, w, diagonal, loss, count, rows, next_low, high, low_at, most);
    const F gain_high = gain_without(p, w, diagonal, loss, count, rows, low, next_high, high_at, most);
    const F threshold = V::set(p.threshold);
    F kept_low = V::set(INFINITY), kept_high = V::set(-INFINITY);
    for (int64_t l = 0; l < count; ++l) {
      const F v = V::load(w + l * rows), at = V::set(static_cast<float>(l));
      const F at_ends = V::select(V::equal(at, low_at), gain_low, V::select(V::equal(at, high_at), gain_high, loss[l]));
      const M likely = V::greater(at_ends, threshold);
      kept_low = V::select(likely, kept_low, V::min(v, kept_low));
      kept_high = V::select(likely, kept_high, V::max(v, kept_high));
    }
    const M none = V::greater(kept_low, kept_high);
    return fit(p, V::select(none, low, kept_low), V::select(none, high, kept_high), most);
  }

  // Stores the statistics of the tile's rows for group g, and leaves in scratch what they decode to.
  static void store_statistics(const SpqrColumns& p, const ColumnScratch& s, int64_t tile, int64_t rows, int64_t g) {
    const int64_t groups = p.k / p.group_size, first = tile * p.stats_rows;
    if (p.scale_bits == 0) {
      Half *scales = static_cast<Half*>(p.scales), *zeros = static_cast<Half*>(p.zeros);
      for (int64_t r = 0; r < rows; ++r) {
        const Half scale = from_float<Half>(s.scale[r]), zero = from_float<Half>(s.zero[r]);
        scales[(first + r) * groups + g] = scale;
        zeros[(first + r) * groups + g] = zero;
        s.scale[r] = to_float(scale);
        s.zero[r] = to_float(zero);
      }
      return;
    }
    const SecondLevel of_scale(s.scale, rows, p.scale_bits), of_zero(s.zero, rows, p.zero_bits);
    Half* record = p.second_order + (tile * groups + g) * 4;
    record[0] = of_scale.scale;
    record[1] = of_scale.zero;
    record[2] = of_zero.scale;
    record[3] = of_zero.zero;
    uint8_t *scales = static_cast<uint8_t*>(p.scales), *zeros = static_cast<uint8_t*>(p.zeros);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t scale = of_scale.code(s.scale[r]), zero = of_zero.code(s.zero[r]);
      scales[(first + r) * groups + g] = scale;
      zeros[(first + r) * groups + g] = zero;
      s.scale[r] = of_scale.value(scale);
      s.zero[r] = of_zero.value(zero);
    }
  }

  // Columns [begin, end), a group, of the rows of one vector beginning at row v of the tile.
  static void quantize_group(const SpqrColumns& p, const float* factor, const ColumnScratch& s, int64_t begin,
                             int64_t end, int64_t v) {
    const int64_t rows = p.stats_rows;
    const F scale = V::load(s.scale + v), zero = V::load(s.zero + v), inverse = inverse_of(scale);
    const F most = V::set(static_cast<float>((1 << p.bits) - 1)), threshold = V::set(p.threshold);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = j * rows + v;
      const F d = V::set(factor[j * p.k + j]), w = V::load(s.weight + at);
      const F code = code_of(w, inverse, zero, most);
      F result = value_of(code, scale, zero);
      F e = V::div(V::sub(w, result), d);
      const M out = V::greater(V::mul(e, e), threshold);
      F residual = V::set(0.0f);
      if (V::count(out)) residual = V::select(out, V::sub(w, result), residual);
      V::store(s.residual + at, residual);
      if (V::count(out)) {
        result = V::add(result, V::load(s.residual + at));
        e = V::div(V::sub(w, result), d);
      }
      V::store_codes(s.codes + at, V::to_integer(code));
      V::store(s.error + at, e);
      for (int64_t l = j + 1; l < end; ++l) {
        float* later = s.weight + l * rows + v;
        V::store(later, V::sub(V::load(later), V::mul(e, V::set(factor[l * p.k + j]))));
      }
    }
    // The columns after the group once, in the same order of subtractions as column by column.
    for (int64_t l = end; l < p.k; ++l) {
      float* later = s.weight + l * rows + v;
      F w = V::load(later);
      for (int64_t j = begin; j < end; ++j)
        w = V::sub(w, V::mul(V::load(s.error + j * rows + v), V::set(factor[l * p.k + j])));
      V::store(later, w);
    }
  }

  static void quantize(const SpqrColumns& p, const float* factor, const ColumnScratch& s, int64_t begin, int64_t end) {
    float diagonal[kMaxBlockColumns];
    for (int64_t j = 0; j < p.k; ++j) diagonal[j] = factor[j * p.k + j];
    const F most = V::set(static_cast<float>((1 << p.bits) - 1));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * p.stats_rows;
      const int64_t rows = p.n - first < p.stats_rows ? p.n - first : p.stats_rows;
      const int64_t lanes = (rows + V::kWidth - 1) / V::kWidth * V::kWidth;  // those past the rows hold zeros
      for (int64_t j = 0; j < p.k; ++j) {
        for (int64_t r = 0; r < rows; ++r) s.weight[j * p.stats_rows + r] = p.weight[(first + r) * p.k + j];
        for (int64_t r = rows; r < lanes; ++r) s.weight[j * p.stats_rows + r] = 0.0f;
      }
      for (int64_t g = 0; g * p.group_size < p.k; ++g) {
        const int64_t from = g * p.group_size, to = from + p.group_size;
        for (int64_t v = 0; v < lanes; v += V::kWidth) {
          const float* w = s.weight + from * p.stats_rows + v;
          const Fit f = fit_group(p, w, diagonal + from, p.group_size, p.stats_rows, most);
          V::store(s.scale + v, f.scale);
          V::store(s.zero + v, f.zero);
        }
        store_statistics(p, s, tile, rows, g);
        for (int64_t v = 0; v < lanes; v += V::kWidth) quantize_group(p, factor, s, from, to, v);
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < p.k; ++j) {
          const int64_t from = j * p.stats_rows + r, to = (first + r) * p.k + j;
          p.codes[to] = s.codes[from];
          p.residual[to] = s.residual[from];
          p.error[to] = s.error[from];
        }
    }
  }

  static constexpr ColumnLoops table = {quantize};
};

}  // namespace
}  // namespace octavo::cpu
#endif  // OCTAVO_ISA_LOOPS
