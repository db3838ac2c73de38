// The host SIMT machine itself: that it computes what CUDA computes, and that it catches what it claims to catch.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <thread>

#include "check.h"
#include "common/launch.h"
#include "common/numeric.h"
#include "common/ptx.h"
#include "simt/order.h"

namespace octavo::GPU_NS {
void test_ptx();  // machine_ptx.cpp

namespace {

using test::contains;
using test::message_of;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kBlock = 96;  // three warps

std::string launch_error(void (*launch)()) {
  return message_of<std::runtime_error>(launch);
}

// ---- barriers, shared memory, order ----

__global__ void reverse_kernel(const int* in, int* out, bool wait) {
  SHARED(int, tile, [kBlock]);
  const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  tile[i] = in[block * kBlock + i];
  if (wait) __syncthreads();
  out[block * kBlock + i] = tile[kBlock - 1 - i];
}

std::vector<int> reversed(const char* order, bool wait) {
  set_order(order);
  std::vector<int> in(4 * kBlock), out(in.size());
  std::iota(in.begin(), in.end(), 0);
  LAUNCH(reverse_kernel, 4, kBlock, 0, nullptr, in.data(), out.data(), wait);
  return out;
}

// Two rounds through the same words. Without a barrier after the reads, a warp that is a round ahead spoils them for
// the others; the warp barrier is one more place where a fair scheduler would let those catch up.
__global__ void two_rounds_kernel(int* out, bool wait) {
  SHARED(int, word, [kBlock / 32]);
  const int i = static_cast<int>(threadIdx.x), warp = i / 32;
  for (int round = 0; round < 2; ++round) {
    __syncwarp();
    if (i % 32 == 0) word[warp] = round;
    __syncthreads();
    __syncwarp();
    out[round * kBlock + i] = word[(warp + 1) % (kBlock / 32)];
    if (wait) __syncthreads();
  }
}

std::vector<int> two_rounds(const char* order, bool wait) {
  set_order(order);
  std::vector<int> out(2 * kBlock);
  LAUNCH(two_rounds_kernel, 1, kBlock, 0, nullptr, out.data(), wait);
  set_order("forward");
  return out;
}

void test_barrier() {
  std::vector<int> want(4 * kBlock);
  for (int i = 0; i < 4 * kBlock; ++i) want[i] = i / kBlock * kBlock + kBlock - 1 - i % kBlock;
  for (const char* order : {"forward", "reverse", "random:1", "random:4294967295"})
    CHECK(reversed(order, true) == want);
#if !defined(__SANITIZE_THREAD__)  // there it is a report: tests/simt_bugs
  // Without the barrier the result depends on the order, and is wrong in each: this is how a missing one shows.
  CHECK(reversed("forward", false) != reversed("reverse", false));
  for (const char* order : {"forward", "reverse", "random:1"}) CHECK(reversed(order, false) != want);
  for (const char* order : {"forward", "reverse"}) CHECK(two_rounds(order, true) != two_rounds(order, false));
#endif
  for (const char* order : {"reverse", "random:1"}) CHECK(two_rounds(order, true) == two_rounds("forward", true));
  set_order("forward");
}

__global__ void record_kernel(int* place, int* next) {
  place[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

std::vector<int> recorded(const char* order) {
  set_order(order);
  std::vector<int> place(3 * 40);
  int next = 0;
  LAUNCH(record_kernel, 3, 40, 0, nullptr, place.data(), &next);
  set_order("forward");
  return place;
}

void test_order() {
  std::vector<int> forward(3 * 40);
  std::iota(forward.begin(), forward.end(), 0);
  CHECK(recorded("forward") == forward);
  CHECK(recorded("reverse") == std::vector<int>(forward.rbegin(), forward.rend()));
  CHECK(recorded("random:5") == recorded("random:5"));
  CHECK(recorded("random:5") != recorded("random:6") && recorded("random:5") != forward);
  auto sorted = recorded("random:5");
  std::sort(sorted.begin(), sorted.end());
  CHECK(sorted == forward);
  for (const char* bad :
       {"", "backward", "random", "random:", "random:x", "random:-1", "random:1 ", "random:4294967296"})
    CHECK(contains(message_of<std::invalid_argument>([&] { set_order(bad); }), std::string("got '") + bad + "'"));
}

__global__ void votes_kernel(int* any, int* all, int* count) {
  const int i = static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y);
  if (i == 69) return;  // a thread that has exited takes no part
  any[i] = __syncthreads_or(i == 41);
  all[i] = __syncthreads_and(i != 41) * 2 + __syncthreads_and(i >= 0);
  count[i] = __syncthreads_count(i % 3 == 0);
}

void test_votes() {
  int any[70], all[70], count[70];
  LAUNCH(votes_kernel, 1, dim3(7, 10), 0, nullptr, any, all, count);
  for (int i = 0; i < 69; ++i) CHECK(any[i] == 1 && all[i] == 1 && count[i] == 23);
}

__global__ void poison_kernel(unsigned char* out, float* dynamic_out) {
  SHARED(unsigned char, bytes, [33]);
  SHARED(float, number);
  DYNAMIC_SHARED(float, dynamic);
  if (threadIdx.x < 33) out[blockIdx.x * 33 + threadIdx.x] = bytes[threadIdx.x];
  if (threadIdx.x == 0) dynamic_out[blockIdx.x] = dynamic[4];
  __syncthreads();
  if (threadIdx.x < 33) bytes[threadIdx.x] = 1;
  if (threadIdx.x < 5) dynamic[threadIdx.x] = 1.0f;
  if (threadIdx.x == 0) number = 1.0f;
}

void test_poison() {
  unsigned char out[3 * 33];
  float dynamic[3];
  LAUNCH(poison_kernel, 3, 64, 5 * sizeof(float), nullptr, out, dynamic);
  for (const unsigned char byte : out) CHECK(byte == simt_machine::kPoison);
  for (const float value : dynamic) CHECK(value > 1e37f);
}

template <int kWords>
__global__ void aligned_kernel(uint64_t* address) {
  SHARED(unsigned char, odd, [kWords]);
  SHARED(float, tile, [2][kWords]);
  DYNAMIC_SHARED(float4, dynamic);
  odd[0] = 0;
  tile[1][kWords - 1] = 0;
  dynamic[0] = make_float4(0, 0, 0, 0);
  *address = reinterpret_cast<uint64_t>(odd) | reinterpret_cast<uint64_t>(tile) | reinterpret_cast<uint64_t>(dynamic);
}

void test_alignment() {
  uint64_t address;
  LAUNCH(aligned_kernel<7>, 1, 1, 16, nullptr, &address);
  CHECK(address % 16 == 0);
}

// ---- warps ----

__global__ void shuffle_kernel(int* out, int width) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* mine = out + 4 * threadIdx.x;
  mine[0] = __shfl_sync(kAll, lane, lane * 5, width);
  mine[1] = __shfl_up_sync(kAll, lane, 3, width);
  mine[2] = __shfl_down_sync(kAll, lane, 3, width);
  mine[3] = __shfl_xor_sync(kAll, lane, 5, width);
}

void test_shuffles() {
  for (const int width : {32, 16, 8, 1}) {
    int out[64 * 4];
    LAUNCH(shuffle_kernel, 1, 64, 0, nullptr, out, width);
    for (int i = 0; i < 64; ++i) {
      const int lane = i % 32, first = lane / width * width, inside = lane % width;
      CHECK(out[4 * i] == first + lane * 5 % width);
      CHECK(out[4 * i + 1] == (inside >= 3 ? lane - 3 : lane));
      CHECK(out[4 * i + 2] == (inside + 3 < width ? lane + 3 : lane));
      CHECK(out[4 * i + 3] == ((lane ^ 5) < first + width ? lane ^ 5 : lane));
    }
  }
}

__global__ void typed_shuffle_kernel(double* doubles, float* floats, int64_t* longs) {
  const int lane = static_cast<int>(threadIdx.x), other = lane ^ 31;
  doubles[lane] = __shfl_sync(kAll, lane * 1e300, other);
  floats[lane] = __shfl_sync(kAll, static_cast<float>(lane) * -0.5f, other);
  longs[lane] = __shfl_sync(kAll, int64_t{lane} << 40, other);
}

void test_typed_shuffles() {
  double doubles[32];
  float floats[32];
  int64_t longs[32];
  LAUNCH(typed_shuffle_kernel, 1, 32, 0, nullptr, doubles, floats, longs);
  for (int i = 0; i < 32; ++i)
    CHECK(doubles[i] == (31 - i) * 1e300 && floats[i] == -0.5f * static_cast<float>(31 - i) &&
          longs[i] == int64_t{31 - i} << 40);
}

// Two halves of a warp in collectives of their own, in different order and number.
__global__ void mask_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane >= 16) out[8 * threadIdx.x + 7] = __ballot_sync(mask, lane % 2);
  out[8 * threadIdx.x + 0] = __ballot_sync(mask, lane % 3 == 0);
  out[8 * threadIdx.x + 1] = static_cast<unsigned>(__any_sync(mask, lane == 20));
  out[8 * threadIdx.x + 2] = static_cast<unsigned>(__all_sync(mask, lane != 20));
  out[8 * threadIdx.x + 3] = __reduce_max_sync(mask, lane * 7 % 32);
  out[8 * threadIdx.x + 4] = static_cast<unsigned>(__reduce_add_sync(mask, -static_cast<int>(lane)));
  out[8 * threadIdx.x + 5] = __match_any_sync(mask, lane % 4);
  __syncwarp(mask);
  out[8 * threadIdx.x + 6] = __reduce_xor_sync(mask, 1u << lane);
}

void test_masks() {
  unsigned out[64 * 8];
  LAUNCH(mask_kernel, 1, 64, 0, nullptr, out);
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned lane = i % 32, first = lane / 16 * 16, mask = 0xffffu << first;
    unsigned thirds = 0, match = 0, most = 0;
    int sum = 0;
    for (unsigned other = first; other < first + 16; ++other) {
      if (other % 3 == 0) thirds |= 1u << other;
      if (other % 4 == lane % 4) match |= 1u << other;
      most = std::max(most, other * 7 % 32);
      sum -= static_cast<int>(other);
    }
    const unsigned* mine = out + 8 * i;
    CHECK(mine[0] == thirds && mine[1] == (first == 16) && mine[2] == (first == 0) && mine[3] == most);
    CHECK(static_cast<int>(mine[4]) == sum && mine[5] == match && mine[6] == mask);
    if (first == 16) CHECK(mine[7] == (0xaaaa0000u & mask));
  }
}

__global__ void partial_warp_kernel(unsigned* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __ballot_sync(kAll, 1);
}

void test_partial_warp() {
  unsigned out[40];
  LAUNCH(partial_warp_kernel, 1, 40, 0, nullptr, out);
  for (int i = 0; i < 40; ++i)
    if (i != 3) CHECK(out[i] == (i < 32 ? ~(1u << 3) : 0xffu));
}

// ---- what must be reported ----

__global__ void divergent_kernel() {
  if (threadIdx.x < 16) __shfl_xor_sync(kAll, 1, 1);
  __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void early_exit_kernel() {
  if (threadIdx.x == 5) return;
  __shfl_sync(kAll, 1, 5);
}
__global__ void foreign_mask_kernel() {
  __ballot_sync(0x0000ffffu, 1);
}
__global__ void bad_width_kernel() {
  __shfl_sync(kAll, 1, 0, 12);
}
__global__ void no_wait_kernel(const int4* in) {
  SHARED(int4, tile);
  cp_async_16(&tile, in);
  cp_async_commit();
}
__global__ void misaligned_copy_kernel(const char* in) {
  SHARED(int4, tile);
  cp_async_16(&tile, in + 4);
}
__global__ void large_shared_kernel() {
  SHARED(float, tile, [12289]);
  tile[0] = 0;
}
__global__ void empty_kernel() {}

void test_reports() {
  std::string text = launch_error([] { LAUNCH(divergent_kernel, dim3(1, 2), 64, 0, nullptr); });
  CHECK(contains(text, "deadlock in divergent_kernel launched at ") && contains(text, "block (0, 0, 0)"));
  CHECK(contains(text, "16 threads, the first is 0, wait in __shfl_xor_sync mask ffffffff at "));
  CHECK(contains(text, "48 threads, the first is 16, wait in __syncthreads at ") && contains(text, "machine.cpp:"));

  text = launch_error([] { LAUNCH(two_barriers_kernel, 1, 64, 0, nullptr); });
  CHECK(contains(text, "threads 0 and 32 meet in different barriers"));
  text = launch_error([] { LAUNCH(early_exit_kernel, 1, 32, 0, nullptr); });
  CHECK(contains(text, "shuffles from lane 5, which takes no part"));
  text = launch_error([] { LAUNCH(foreign_mask_kernel, 1, 32, 0, nullptr); });
  CHECK(contains(text, "the calling lane is not in the mask 0000ffff") && contains(text, "thread 16"));
  text = launch_error([] { LAUNCH(bad_width_kernel, 1, 32, 0, nullptr); });
  CHECK(contains(text, "shuffle width 12"));
  text = launch_error([] {
    const int4 in[1] = {};
    LAUNCH(no_wait_kernel, 1, 32, 0, nullptr, in);
  });
  CHECK(contains(text, "cp.async copies that nothing waited for"));
  text = launch_error([] {
    alignas(16) const char in[32] = {};
    LAUNCH(misaligned_copy_kernel, 1, 32, 0, nullptr, in);
  });
  CHECK(contains(text, "not 16-byte aligned"));
  text = launch_error([] { LAUNCH(large_shared_kernel, 1, 1, 0, nullptr); });
  CHECK(contains(text, "49156 bytes of static shared memory"));

  int next = 0, place[4];  // and the machine goes on after all that
  LAUNCH(record_kernel, 2, 2, 0, nullptr, place, &next);
  CHECK(next == 4 && place[3] == 3);
}

void test_launch_limits() {
  const auto rejected = [](dim3 grid, dim3 block, size_t smem) {
    return message_of<std::runtime_error>([&] { LAUNCH(empty_kernel, grid, block, smem, nullptr); });
  };
  CHECK(contains(rejected(dim3(1, 0), 32, 0), "the grid has no blocks; grid (1, 0, 1), block (32, 1, 1)"));
  CHECK(contains(rejected(0, 32, 0), "launch of empty_kernel at "));
  CHECK(contains(rejected(dim3(1, 65536), 32, 0), "the grid is too large"));
  CHECK(contains(rejected(dim3(1, 1, 65536), 32, 0), "the grid is too large"));
  CHECK(contains(rejected(0x80000000u, 32, 0), "the grid is too large"));
  CHECK(contains(rejected(1, 0, 0), "the block has no threads"));
  CHECK(contains(rejected(1, 1025, 0), "the block is too large"));
  CHECK(contains(rejected(1, dim3(32, 33), 0), "the block is too large"));
  CHECK(contains(rejected(1, dim3(1, 1, 65), 0), "the block is too large"));
  CHECK(contains(rejected(1, dim3(65536, 65536), 0), "the block is too large"));
  CHECK(contains(rejected(1, 32, (227 << 10) + 1), "too much shared memory"));
  LAUNCH(empty_kernel, dim3(1, 65535), 1, 0, nullptr);
  LAUNCH(empty_kernel, 1, 1, 227 << 10, nullptr);
  LAUNCH(empty_kernel, 1, dim3(4, 4, 64), 0, nullptr);
}

// ---- atomics, intrinsics, host threads ----

__global__ void atomics_kernel(int* sum, unsigned* most, float* total, int* least) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(sum, i);
  atomicMax(most, static_cast<unsigned>(i) * 7 % 101);
  atomicAdd(total, 0.5f);
  atomicMin(least, -i);
}

void test_atomics() {
  int sum = 0, least = 0;
  unsigned most = 0;
  float total = 0;
  LAUNCH(atomics_kernel, 5, 64, 0, nullptr, &sum, &most, &total, &least);
  CHECK(sum == 320 * 319 / 2 && most == 100 && total == 160.0f && least == -319);
}

// The usual last-block reduction: each block publishes its sum, the last one to arrive adds them up.
__global__ void last_block_kernel(int* partial, unsigned* arrived, int* total) {
  SHARED(int, last);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) *total += partial[i];
}

void test_last_block() {
  for (const char* order : {"forward", "reverse", "random:2"}) {
    set_order(order);
    int partial[9], total = 0;
    unsigned arrived = 0;
    LAUNCH(last_block_kernel, 9, 64, 0, nullptr, partial, &arrived, &total);
    CHECK(total == 45);
  }
  set_order("forward");
}

void test_intrinsics() {
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __clz(1) == 31 && __clz(0) == 32 && __clz(-1) == 0);
  CHECK(__ffs(0) == 0 && __ffs(8) == 4 && __brev(1u) == 0x80000000u);
  CHECK(__dp4a(0x7f80ff01, 0x7f80ff02, 10) == 127 * 127 + 128 * 128 + 1 + 2 + 10);
  CHECK(__dp4a(0x80808080u, 0x7f7f7f7f, 0) == -128 * 127 * 4 && __dp4a(1, 1, 0x7fffffff) == -0x7fffffff - 1);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u);
  CHECK(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f && __int_as_float(0) == 0.0f);
  CHECK(__fmaf_rd(1.0f, 0.5f, 0x1p24f) == 0x1p24f && __fmaf_rd(-1.0f, 0x1p-60f, 1.0f) == 1.0f - 0x1p-24f);
  CHECK(__fmaf_rd(15.9f, 1.0f, 16.0f) == 31.9f && __fmaf_rd(1.0f, 2.0f, -3.0f) == -1.0f);
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rn(NAN) == 0);
  CHECK(__float2int_rn(1e30f) == std::numeric_limits<int>::max() && __float2int_rn(-INFINITY) == -0x7fffffff - 1);
  CHECK(max(NAN, 1.0f) == 1.0f && min(1.0f, NAN) == 1.0f && max(-1, 2) == 2 && min(int64_t{-1}, 2) == -1);
  CHECK(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(int2) == 8 && alignof(char4) == 4);
}

void test_host_threads() {
  std::vector<std::thread> threads;
  int sums[4] = {};
  for (int& sum : sums)
    threads.emplace_back([&sum] {
      unsigned most = 0;
      float total = 0;
      int least = 0;
      for (int i = 0; i < 5; ++i) LAUNCH(atomics_kernel, 2, 96, 0, nullptr, &sum, &most, &total, &least);
    });
  for (std::thread& thread : threads) thread.join();
  for (const int sum : sums) CHECK(sum == 5 * (192 * 191 / 2));
}

}  // namespace
}  // namespace octavo::GPU_NS

int main() {
  using namespace octavo::simt;
  test_barrier();
  test_order();
  test_votes();
  test_poison();
  test_alignment();
  test_shuffles();
  test_typed_shuffles();
  test_masks();
  test_partial_warp();
  test_ptx();
  test_reports();
  test_launch_limits();
  test_atomics();
  test_last_block();
  test_intrinsics();
  test_host_threads();
  return test::finish();
}
