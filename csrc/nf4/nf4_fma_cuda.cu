// Products in fp32 without tensor cores: fp32 x transposed, and up to 16 rows of any x where a row of the weight is not
// whole blocks of four-bit codes. A block computes kM x 64 outputs, for all of `inner` or for a part of it, from
// steps of 32 that it decodes into shared memory. The weight enters as it is, in fp32.
#include <type_traits>

#include "nf4/decode_gpu.h"
#include "nf4/work_gpu.h"

namespace octavo::GPU_NS {

constexpr int kFmaThreads = 128, kFmaN = 64,
              kFmaXRow = kNf4Step + 4;  // floats: rows next to each other shift by a piece

// Where piece `piece` (four columns) of row `row` of the step's weights lies: threads next to each other read and write
// all banks once.
__device__ __forceinline__ int fma_place(int row, int piece) {
  return row * kFmaN + (piece ^ piece / 8 ^ row % 2 * 2) * 4;
}

// kRows: of x, of a thread, which has four columns.
template <class T, int kRows, bool kTransposed, bool kWholeRows>
__global__ void __launch_bounds__(kFmaThreads) nf4_fma_kernel(Nf4Matmul p, BytePlanes<4> book, Nf4Plan plan) {
  constexpr int kM = kRows * 8;
  SHARED(float, x_tile, [kM][kFmaXRow]);
  SHARED(float, w_tile, [kNf4Step * kFmaN]);
  const LowBitTensor& w = p.w;
  const unsigned down = static_cast<unsigned>(ceil_div(p.m, kM));
  const int64_t m0 = static_cast<int64_t>(blockIdx.x % down) * kM;
  const unsigned split = blockIdx.x / down % static_cast<unsigned>(plan.splits);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x / down / static_cast<unsigned>(plan.splits)) * kFmaN;
  const int thread = threadIdx.x % kFmaThreads, piece = thread % 16, row0 = thread / 16;
  const int64_t begin = static_cast<int64_t>(split) * plan.steps_per_split * kNf4Step;
  const int64_t past = begin + static_cast<int64_t>(plan.steps_per_split) * kNf4Step;
  const int64_t end = past < plan.inner ? past : plan.inner;
  const T* x = static_cast<const T*>(p.x);

  // ---- the weight: 16 columns of a row a thread; zeros past an edge
  const int own_row = kTransposed ? thread / 4 : thread % kFmaN;
  const int own_part = kTransposed ? thread % 4 : thread / kFmaN;
  const int log2_blocksize = __ffs(static_cast<int>(w.blocksize)) - 1;
  const float offset = offset_of(w);
  const auto put = [&](int e, float value) {
    const int row = kTransposed ? own_row : own_part * 16 + e, column = kTransposed ? own_part * 16 + e : own_row;
    w_tile[fma_place(row, column / 4) + column % 4] = value;
  };
  const auto decode = [&](int64_t inner0) {
    const int64_t row = (kTransposed ? inner0 : n0) + own_row, column = (kTransposed ? n0 : inner0) + own_part * 16;
    const bool inside = row < p.n && column < p.k;
    if constexpr (kWholeRows) {
      uint2 words = make_uint2(0, 0);
      float absmax = 0.0f;
      if (inside) {
        const int64_t at = row * p.k + column;
        words = reinterpret_cast<const uint2*>(w.packed)[at >> 4];
        RawAbsmax raw;
        raw.load(w, at >> log2_blocksize);
        absmax = raw.decode(w, offset);
      }
      const Quads quads[2] = {Quads(words.x), Quads(words.y)};
      UNROLL for (int quad = 0; quad < 4; ++quad) {
        float v[4];
        quads[quad / 2].half[quad % 2].values(book, v);
        if constexpr (kTransposed)
          *reinterpret_cast<float4*>(w_tile + fma_place(own_row, own_part * 4 + quad)) =
              make_float4(v[0] * absmax, v[1] * absmax, v[2] * absmax, v[3] * absmax);
        else
          UNROLL for (int e = 0; e < 4; ++e) put(quad * 4 + e, v[e] * absmax);
      }
    } else {
      const LowBitReader value(w);
      NO_UNROLL for (int e = 0; e < 16; ++e) put(e, inside && column + e < p.k ? value(row * p.k + column + e) : 0.0f);
    }
  };

  float acc[kRows][4] = {};
  NO_UNROLL for (int64_t inner0 = begin; inner0 < end; inner0 += kNf4Step) {
    __syncthreads();  // the step before has been multiplied
    UNROLL for (int i = 0; i < kM / 4; ++i) {
      const int row = thread / 32 + i * 4;
      const int64_t at = inner0 + thread % 32;
      x_tile[row][thread % 32] = m0 + row < p.m && at < end ? to_float(x[(m0 + row) * plan.inner + at]) : 0.0f;
    }
    decode(inner0);
    __syncthreads();
    UNROLL for (int k = 0; k < kNf4Step; k += 4) {
      float4 from_x[kRows];
      UNROLL for (int i = 0; i < kRows; ++i) from_x[i] = *reinterpret_cast<const float4*>(&x_tile[row0 + i * 8][k]);
      UNROLL for (int step = 0; step < 4; ++step) {
        const float4 weight = *reinterpret_cast<const float4*>(w_tile + fma_place(k + step, piece));
        UNROLL for (int i = 0; i < kRows; ++i) {
          const float v = step == 0 ? from_x[i].x : step == 1 ? from_x[i].y : step == 2 ? from_x[i].z : from_x[i].w;
          acc[i][0] = fmaf(v, weight.x, acc[i][0]);
          acc[i][1] = fmaf(v, weight.y, acc[i][1]);
          acc[i][2] = fmaf(v, weight.z, acc[i][2]);
          acc[i][3] = fmaf(v, weight.w, acc[i][3]);
        }
      }
    }
  }

  // ---- sums of a part to the workspace; or bias and the output's dtype
  UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int e = 0; e < 4; ++e) {
    const int64_t row = m0 + row0 + i * 8, column = n0 + piece * 4 + e;
    if (row >= p.m || column >= plan.outer) continue;
    if (plan.splits > 1) {
      static_cast<float*>(p.workspace)[(split * p.m + row) * plan.outer + column] = acc[i][e];
    } else {
      const float bias = p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, column);
      static_cast<T*>(p.out)[row * plan.outer + column] = from_float<T>(acc[i][e] + bias);
    }
  }
}

template <class T, int kRows, bool kTransposed, bool kWholeRows>
void launch_fma(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  auto kernel = nf4_fma_kernel<T, kRows, kTransposed, kWholeRows>;
  const auto blocks = static_cast<unsigned>(plan.tiles * plan.splits);
  const auto book = byte_planes<4>([&](uint32_t i) { return float_bits(small_book(p.w.type).value[i]); });
  LAUNCH(kernel, dim3(blocks), dim3(kFmaThreads), 0, stream, p, book, plan);
}

template <class T, bool kTransposed, bool kWholeRows>
void choose_fma(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (plan.tile_m == 64) return launch_fma<T, 8, kTransposed, kWholeRows>(p, plan, stream);
  }
  launch_fma<T, 2, kTransposed, kWholeRows>(p, plan, stream);
}

void nf4_fma(const Nf4Matmul& p, const Nf4Plan& plan, Stream stream) {
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      if (plan.transposed)
        return plan.whole_rows ? choose_fma<T, true, true>(p, plan, stream)
                               : choose_fma<T, true, false>(p, plan, stream);
    }
    choose_fma<T, false, false>(p, plan, stream);
  });
}

}  // namespace octavo::GPU_NS
