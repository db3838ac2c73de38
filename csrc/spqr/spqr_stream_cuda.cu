// Few rows of x: the weight streams through, once for 8 rows of x (4 of fp32). A block takes a tile of 16 rows of the
// weight, its warps share the chunks of columns. README.md of this folder explains the plan and counts it.
//
// A lane (g, t) = (lane / 4, lane % 4) decodes rows 2 g and 2 g + 1 of chunk t of four, its own words only: a lane of
// an mma holds rows g and g + 8, columns 4 of 16, so the four lanes of a row bring different chunks to one mma. What
// keeps their sums apart is the other operand: its column 2 t + c has x row c (or, for one row, half c of the chunk) in
// the places of chunk t and zeros in the others. Then each lane gets back the sums of just its chunk, and applies to
// them the statistics of its two rows, which nobody else needs. Nothing passes from lane to lane before the end.
#include <type_traits>

#include "common/tile.h"
#include "spqr/decode_gpu.h"
#include "spqr/work_gpu.h"

namespace octavo::GPU_NS {

constexpr int kStreamStages = 2;    // steps that a warp has under way: 4 KiB, 50 KiB a multiprocessor
constexpr int kStreamTogether = 4;  // chunks of one mma

// A warp's part of shared memory for one step: code words of a tile, then what covers the statistics of the step's
// groups in aligned pieces of 16 bytes (up to 16 groups of 16 bytes, and a record may begin anywhere in a piece).
template <int kBits>
struct StreamStage {
  // 32 bytes further from chunk to chunk than needed: then 8-byte reads by rows and chunks cover all banks.
  static constexpr int kChunkBytes = kBits * 64 + 32;
  static constexpr int kStatisticsPieces = 17, kSecondPieces = 9;
  static constexpr int kStatistics = kStreamStepChunks * kChunkBytes;
  static constexpr int kSecond = kStatistics + kStatisticsPieces * 16;
  static constexpr int kBytes = kSecond + kSecondPieces * 16;
  static constexpr int kBlockBytes = kStreamWarps * kStreamStages * kBytes;
  static_assert(kBlockBytes <= 48 << 10 && kStreamStages * kBytes >= 16 * 16 * 4);
};

template <class T>
constexpr int kStreamPlanes = std::is_same_v<T, float> ? 3 : 1;  // of 16-bit numbers that make an element of x

template <class T, int kBits, int kRows>
__global__ void __launch_bounds__(kStreamWarps * 32, kRows == 1 ? 4 : 3)
    spqr_stream_kernel(SpqrMatmul p, SpqrStaged at) {
  using Stage = StreamStage<kBits>;
  using E = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;
  constexpr int kPlanes = kStreamPlanes<T>;
  constexpr int kBlocks = kRows == 1 ? 1 : kRows / 2;  // of 8 columns of an mma: two rows of x, or two halves of one
  constexpr int kSumsOfX = kPlanes * kRows * 64, kChunkOfX = spqr_chunk_of_x(kPlanes, kRows);  // bytes
  DYNAMIC_SHARED(unsigned char, shared);
  const SpqrWeight& w = p.w;
  const int thread = threadIdx.x % (kStreamWarps * 32), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const unsigned passes = static_cast<unsigned>(at.passes);  // those of a tile one after another: it is then in L2
  const int64_t tile = blockIdx.x / passes, pass = blockIdx.x % passes;
  const int chunks = static_cast<int>((w.k + 31) >> 5), steps = static_cast<int>(at.chunks / kStreamStepChunks);
  unsigned char* const mine = shared + warp * (kStreamStages * Stage::kBytes);

  // ---- from memory. Of the statistics a lane copies one piece of 16 bytes, of one kind or of the other.
  const int record_bytes = spqr_record_bytes(w), group_shift = w.group_size == 64 ? 2 : w.group_size == 32 ? 1 : 0;
  const int groups_per_step = 16 >> group_shift, groups = static_cast<int>(w.k >> (4 + group_shift));
  const auto* codes = reinterpret_cast<const unsigned char*>(spqr_codes(w, tile, 0)) + lane * 16;
  const unsigned char* statistics = w.statistics + tile * groups * record_bytes;
  const unsigned char* second_order =
      reinterpret_cast<const unsigned char*>(w.second_order + int64_t{blockIdx.x / at.blocks_per_second} * groups * 4);
  const bool bilevel = w.second_order != nullptr;
  const bool is_second = lane >= Stage::kStatisticsPieces;
  const int piece = (is_second ? lane - Stage::kStatisticsPieces : lane) * 16;
  const unsigned char* records = is_second ? second_order : statistics;
  const int bytes_per_group = is_second ? 8 : record_bytes;
  const auto low_bits = [](const void* pointer) { return static_cast<int>(reinterpret_cast<uintptr_t>(pointer)) % 16; };
  const bool aligned = (low_bits(w.codes) | low_bits(w.statistics) | low_bits(w.second_order)) == 0;
  const int rest = aligned ? 15 : 0;  // of a record's address: where it lies in its first piece
  const auto fetch = [&](int step, int slot) {
    unsigned char* stage = mine + slot * Stage::kBytes;
    const int chunk0 = step * kStreamStepChunks;
    const unsigned char* from = codes + static_cast<int64_t>(chunk0) * (kBits * 64);
    UNROLL for (int i = 0; i < kBits; ++i) {
      const int chunk = (i * 32 + lane) / (kBits * 4);
      copy_piece(stage + (i * 32 + lane) * 16 + chunk * 32, from + i * 512, chunk0 + chunk < chunks ? 16 : 0, aligned);
    }
    if (bilevel && lane < Stage::kStatisticsPieces + Stage::kSecondPieces) {
      const int64_t left = static_cast<int64_t>(groups - step * groups_per_step) * bytes_per_group;
      const unsigned char* begin = records + static_cast<int64_t>(step * groups_per_step) * bytes_per_group;
      const int skipped = low_bits(begin) & rest;
      copy_piece(stage + Stage::kStatistics + lane * 16, begin - skipped + piece, left + skipped - piece, aligned);
    }
    cp_async_commit();
  };
  UNROLL for (int slot = 0; slot < kStreamStages; ++slot) fetch(warp + slot * kStreamWarps, slot);

  // The tile's outliers, shared equally by position: those of this warp come into L2 while codes are multiplied.
  const auto own_outliers = [&](int& begin, int& end) {
    const int64_t last = tile * 16 + 16;
    const int first = w.row_offsets[tile * 16];
    const int64_t count = w.row_offsets[last < w.n ? last : w.n] - first;
    begin = first + static_cast<int>(count * warp / kStreamWarps);
    end = first + static_cast<int>(count * (warp + 1) / kStreamWarps);
  };
  int outlier = 0, outlier_end = 0;
  if (w.row_offsets != nullptr) {
    own_outliers(outlier, outlier_end);
    const int ahead = lane * (w.wide ? 16 : 32);  // a line of 128 bytes each
    if (ahead < outlier_end - outlier) prefetch_l2(w.outliers + (outlier + int64_t{ahead}) * (w.wide ? 2 : 1));
  }

  // ---- x: the lanes that hold column 2 t + c bring chunk t, the others zeros
  const auto* work = static_cast<const unsigned char*>(p.workspace);
  const unsigned char* const zeros = work + (at.x - kChunkOfX);
  const unsigned char* of_chunk = work + at.x + (pass * at.chunks + warp * kStreamStepChunks + t) * kChunkOfX;
  const bool match = t == g / 2;

  // ---- main loop
  const FieldShape fields(w);
  const int field_bit = fields.width * 2 * g;  // of rows 2 g and 2 g + 1, in a record
  float acc[kBlocks][4] = {};                  // [.][2 i + c]: row 2 g + i of the tile, row c of two of x
  int slot = 0;
  // All warps take equally many turns, the last on zeros perhaps: that the lanes of a warp are together, which mma and
  // shuffles need, the compiler then sees by itself.
  NO_UNROLL for (int first = 0; first < steps; first += kStreamWarps) {
    const int step = first + warp;
    cp_async_wait<kStreamStages - 1>();
    __syncwarp();
    const unsigned char* stage = mine + slot * Stage::kBytes;
    const int group0 = step * groups_per_step;
    const int statistics_at = (low_bits(statistics) + group0 * record_bytes) & rest;
    const int second_at = low_bits(second_order) & rest;  // a step has a multiple of 16 bytes
    // The lane's codes of a half of its chunk, as mma takes them: a[i] has pairs 2 i and 2 i + 1.
    const auto codes_of = [&](int part, auto half, uint32_t (&a)[4][4]) {
      uint32_t planes[2][kBits];
      UNROLL for (int i = 0; i < kBits; ++i) {
        const uint2 words = *reinterpret_cast<const uint2*>(stage + (part + t) * Stage::kChunkBytes + i * 64 + g * 8);
        planes[0][i] = words.x, planes[1][i] = words.y;
      }
      UNROLL for (int i = 0; i < 4; ++i) UNROLL for (int e = 0; e < 4; ++e) a[i][e] =
          code_pair<E, kBits>(planes[e % 2], decltype(half)::value * 8 + 2 * i + e / 2);
    };
    const auto levels_of = [&](int part, int half, SpqrStatistics(&levels)[2]) {
      const int group = (2 * (part + t) + half) >> group_shift;  // of the step
      if (bilevel) {
        const auto* record = reinterpret_cast<const uint16_t*>(stage + Stage::kStatistics + statistics_at +
                                                               group * record_bytes + field_bit / 16 * 2);
        const uint32_t bits = (record[0] | static_cast<uint32_t>(record[1]) << 16) >> field_bit % 16;
        const uint2 second = *reinterpret_cast<const uint2*>(stage + Stage::kSecond + second_at + group * 8);
        levels[0] = fields.decode(bits, second);
        levels[1] = fields.decode(bits >> fields.width, second);
      } else {
        UNROLL for (int i = 0; i < 2; ++i) {
          const bool there = group0 + group < groups;
          const Half* plain = w.plain + (tile * groups + group0 + group) * 32 + 2 * g + i;
          levels[i] = {there ? to_float(plain[0]) : 0.0f, there ? to_float(plain[16]) : 0.0f};
        }
      }
    };
    // d += codes * x, where x are 16 columns of two rows, or of one.
    const auto multiply = [&](float (&d)[4], const uint32_t (&a)[4][4], const unsigned char* x) {
      UNROLL for (int plane = 0; plane < kPlanes; ++plane) UNROLL for (int i = 0; i < 2; ++i) {
        const uint4 b = *reinterpret_cast<const uint4*>(x + plane * (kRows * 64) + i * 16);
        mma_16bit<E>(d, a[2 * i], {b.x, b.y});
        mma_16bit<E>(d, a[2 * i + 1], {b.z, b.w});
      }
    };
    const auto add = [](float& sum, const SpqrStatistics& s, float product, float sum_of_x) {
      sum = fmaf(s.scale, fmaf(-s.zero, sum_of_x, product), sum);
    };
    using First = std::integral_constant<int, 0>;
    using Second = std::integral_constant<int, 1>;
    NO_UNROLL for (int part = 0; part < kStreamStepChunks; part += kStreamTogether) {
      if constexpr (kRows == 1) {
        SpqrStatistics levels[2][2];  // half, row
        float d[4] = {};              // column c is half c
        uint32_t a[4][4];
        levels_of(part, 0, levels[0]);
        codes_of(part, First{}, a);
        multiply(d, a, match && g % 2 == 0 ? of_chunk : zeros);
        levels_of(part, 1, levels[1]);
        codes_of(part, Second{}, a);
        multiply(d, a, (match && g % 2 == 1 ? of_chunk : zeros) + 32);
        const float2 sum = *reinterpret_cast<const float2*>(of_chunk + kSumsOfX);
        UNROLL for (int e = 0; e < 4; ++e) add(acc[0][e], levels[e % 2][e / 2], d[e], e % 2 ? sum.y : sum.x);
      } else {
        // A loop, not unrolled: all of its loads together would take more registers than there are.
        NO_UNROLL for (int half = 0; half < 2; ++half) {
          SpqrStatistics levels[2];
          uint32_t a[4][4];
          levels_of(part, half, levels);
          half == 0 ? codes_of(part, First{}, a) : codes_of(part, Second{}, a);
          const unsigned char* x = (match ? of_chunk + g % 2 * 64 : zeros) + half * 32;
          const unsigned char* sums = of_chunk + kSumsOfX + half * (kRows * 4);
          UNROLL for (int block = 0; block < kBlocks; ++block) {
            float d[4] = {};
            multiply(d, a, x + block * 128);
            const float2 sum = *reinterpret_cast<const float2*>(sums + block * 8);
            UNROLL for (int e = 0; e < 4; ++e) add(acc[block][e], levels[e / 2], d[e], e % 2 ? sum.y : sum.x);
          }
        }
      }
      of_chunk += kStreamTogether * kChunkOfX;
    }
    of_chunk += (kStreamWarps - 1) * kStreamStepChunks * kChunkOfX;
    __syncwarp();  // the stage has been read
    fetch(step + kStreamStages * kStreamWarps, slot);
    slot = slot + 1 == kStreamStages ? 0 : slot + 1;
  }
  cp_async_wait<0>();
  __syncwarp();

  // ---- the warp's sums, in its part of shared memory: [16][kRows]
  float* const total = reinterpret_cast<float*>(mine);
  UNROLL for (int block = 0; block < kBlocks; ++block) {
    UNROLL for (int e = 0; e < 4; ++e) {
      if (kRows == 1 && e % 2) continue;
      float sum = acc[block][e];
      if constexpr (kRows == 1) sum += acc[block][e + 1];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (t == 0) total[(2 * g + e / 2) * kRows + (kRows == 1 ? 0 : block * 2 + e % 2)] = sum;
    }
  }
  __syncwarp();

  // ---- outliers: kAcross lanes take an entry, with two rows of x each (or the one)
  constexpr int kWidth = kRows == 1 ? 1 : 2, kAcross = kRows / kWidth, kEntries = 32 / kAcross;
  int row_end = 0;  // lane r: where outliers of row r of the tile end
  if (w.row_offsets != nullptr) {
    own_outliers(outlier, outlier_end);  // again: two registers less in the main loop
    const int64_t row = tile * 16 + lane + 1;
    row_end = w.row_offsets[row < w.n ? row : w.n];
  }
  const auto* columns = reinterpret_cast<const T*>(work + at.columns) + pass * w.k * kRows + lane % kAcross * kWidth;
  NO_UNROLL for (int r = 0; outlier < outlier_end; ++r) {
    const int of_row = __shfl_sync(0xffffffffu, row_end, r), end = of_row < outlier_end ? of_row : outlier_end;
    if (outlier >= end) continue;
    float sum[kWidth] = {};
    NO_UNROLL for (int i = outlier + lane / kAcross; i < end; i += kEntries) {
      const SpqrOutlier entry = spqr_outlier(w, i);
      const auto x = load_pack<kWidth>(columns + entry.column * kRows, 0);
      UNROLL for (int c = 0; c < kWidth; ++c) sum[c] = fmaf(entry.value, to_float(x.at[c]), sum[c]);
    }
    UNROLL for (int c = 0; c < kWidth; ++c) {
      UNROLL for (int distance = kAcross; distance < 32; distance *= 2) sum[c] +=
          __shfl_xor_sync(0xffffffffu, sum[c], distance);
      if (lane < kAcross) total[r * kRows + lane * kWidth + c] += sum[c];
    }
    outlier = end;
  }

  // ---- the block's sums
  __syncthreads();
  NO_UNROLL for (int output = thread; output < 16 * kRows; output += kStreamWarps * 32) {
    const int64_t i = tile * 16 + output / kRows, j = pass * kRows + output % kRows;
    if (i >= w.n || j >= p.m) continue;
    float sum = 0.0f;
    UNROLL for (int from = 0; from < kStreamWarps; ++from) sum +=
        reinterpret_cast<const float*>(shared + from * (kStreamStages * Stage::kBytes))[output];
    const float bias = p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_dtype, i);
    static_cast<T*>(p.out)[j * w.n + i] = from_float<T>(fmaf(*w.unit, sum, bias));
  }
}

template <class T, int kBits>
void launch_stream(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  auto kernel = staged.rows == 1 ? spqr_stream_kernel<T, kBits, 1> : spqr_stream_kernel<T, kBits, 4>;
  if constexpr (!std::is_same_v<T, float>) {
    if (staged.rows == 8) kernel = spqr_stream_kernel<T, kBits, 8>;
  }
  const auto blocks = static_cast<unsigned>(spqr_row_tiles(p.w) * staged.passes);
  LAUNCH(kernel, dim3(blocks), dim3(kStreamWarps * 32), StreamStage<kBits>::kBlockBytes, stream, p, staged);
}

void spqr_stream(const SpqrMatmul& p, const SpqrStaged& staged, Stream stream) {
  dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (p.w.bits) {
      case 2: return launch_stream<T, 2>(p, staged, stream);
      case 3: return launch_stream<T, 3>(p, staged, stream);
      default: return launch_stream<T, 4>(p, staged, stream);
    }
  });
}

}  // namespace octavo::GPU_NS
