// Seeded bugs, one per run: `simt_bugs NAME` launches one wrong kernel, and CTest expects the report that the build at
// hand (plain, AddressSanitizer + UBSan, ThreadSanitizer) must give. `none` is a right kernel: no report.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>

#include "common/launch.h"

namespace octavo::GPU_NS {
namespace {

constexpr int kBlock = 64;

__global__ void none(float* out) {
  SHARED(float, tile, [kBlock]);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

__global__ void missing_barrier(float* out) {
  SHARED(float, tile, [kBlock]);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[blockIdx.x * kBlock + threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

// A barrier after the reads is missing: the next round's writes meet them.
__global__ void missing_second_barrier(float* out) {
  SHARED(float, tile, [kBlock]);
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    out[blockIdx.x * kBlock + threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
  }
}

// A shuffle does not order shared memory between the lanes of a warp.
__global__ void shuffle_as_barrier(float* out) {
  SHARED(float, tile, [kBlock]);
  tile[threadIdx.x] = 1.0f;
  __shfl_sync(0xffffffffu, 1, 0);
  out[blockIdx.x * kBlock + threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Two blocks write the same element.
__global__ void blocks_overlap(float* out) {
  out[threadIdx.x] = static_cast<float>(blockIdx.x);
}

__global__ void global_past_end(float* out) {
  out[blockIdx.x * kBlock + threadIdx.x + 1] = 1.0f;
}

__global__ void shared_past_end(float* out) {
  SHARED(float, tile, [kBlock]);
  tile[threadIdx.x] = 1.0f;
  __syncthreads();
  const float* next = tile;
  out[blockIdx.x * kBlock + threadIdx.x] = next[threadIdx.x + 1];
}

__global__ void dynamic_past_end(float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[blockIdx.x * kBlock + threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_vector(float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out + 1) = make_float4(1, 2, 3, 4);
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  __syncthreads();
}

}  // namespace
}  // namespace octavo::GPU_NS

int main(int argc, char** argv) {
  using namespace octavo::simt;
  const struct {
    const char* name;
    void (*kernel)(float*);
  } bugs[] = {{"none", none},
              {"missing_barrier", missing_barrier},
              {"missing_second_barrier", missing_second_barrier},
              {"shuffle_as_barrier", shuffle_as_barrier},
              {"blocks_overlap", blocks_overlap},
              {"global_past_end", global_past_end},
              {"shared_past_end", shared_past_end},
              {"dynamic_past_end", dynamic_past_end},
              {"misaligned_vector", misaligned_vector},
              {"divergent_barrier", divergent_barrier}};
  for (const auto& bug : bugs) {
    if (argc != 2 || std::strcmp(argv[1], bug.name) != 0) continue;
    const std::unique_ptr<float[]> out(new float[2 * kBlock]);
    try {
      LAUNCH(bug.kernel, 2, kBlock, kBlock * sizeof(float), nullptr, out.get());
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
    std::printf("ran %s\n", bug.name);
    return 0;
  }
  std::printf("no such bug\n");
  return 2;
}
