// GCC 12 takes 50 s for this file at -O3, where it peels the loops over lanes and then looks at every pair of their
// stores; the portable level gains nothing by that. Sanitized builds stay at -O1.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#pragma GCC optimize("O2")
#endif
#define OCTAVO_ISA_LOOPS
#include "cpu/vec_portable.h"
#include "spqr/spqr_loops.h"

namespace octavo::cpu::portable {
namespace {

struct SpqrVec : Vec {
  static U shift_right_by(U v, U n) { return v >> n; }
  static F to_float(U v) { return static_cast<float>(v); }
  template <class T>
  static float to_float_one(T v) {
    return octavo::to_float(v);
  }
  static U bit_fields(const uint8_t* record, int width, int lane) { return spqr_field(record, width, lane); }
  static void halves_to_floats(const Half* p, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = octavo::to_float(p[i]);
  }
  static void high_halves_to_floats(const uint32_t* words, int64_t count, float* out) {
    for (int64_t e = 0; e < count; ++e) out[e] = octavo::to_float(Half{static_cast<uint16_t>(words[e] >> 16)});
  }
  static float sparse_dot(const uint32_t* words, int64_t count, const float* x) {
    float sum[4] = {};
    for (int64_t e = 0; e < count; ++e)
      sum[e % 4] =
          fmaf(octavo::to_float(Half{static_cast<uint16_t>(words[e] >> 16)}), x[words[e] & 0xffffu], sum[e % 4]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

}  // namespace

constexpr SpqrLoops spqr_loops = Spqr<SpqrVec>::table;
}  // namespace octavo::cpu::portable
