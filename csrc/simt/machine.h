#pragma once
// The host SIMT machine: runs a CUDA kernel as C++, one fiber per CUDA thread, one block after another.
//
// It is made to find mistakes, not to be fast. A warp runs until all its lanes wait for other warps, each lane until it
// reaches a collective, a barrier or its end, in the chosen order (order.h): threads are far apart. Warp collectives
// are computed by the last lane of the mask to arrive; cp.async data arrives only at the wait that covers it; shared
// memory starts poisoned; what can never go on is reported with kernel, block, threads, file and line. Every such
// report is a std::runtime_error out of the launch. One kernel runs at a time, from whichever host thread.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/vector_types.h"

namespace octavo {

// The machine sets these for the thread it is about to run; kernels read them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt_machine {

using Where = std::source_location;

// Limits of a real launch, so that a bad one fails here too.
constexpr unsigned kMaxThreads = 1024, kMaxBlockZ = 64, kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;
constexpr size_t kMaxDynamicShared = 227 << 10, kMaxStaticShared = 48 << 10;
// An uninitialised shared word is a huge positive number as float, half, int and index, and true as a flag: it wins
// every maximum and spoils every sum.
constexpr unsigned char kPoison = 0x7d;

struct Launch {
  const char* kernel;
  Where where;
  dim3 grid, block;
  size_t dynamic_shared;
};
void launch(const Launch& launch, const std::function<void()>& thread);

// Like kernel<<<grid, block, dynamic_shared>>>(arguments...): arguments are converted and copied at the launch.
template <class... Parameters, class... Arguments>
void launch_kernel(const Launch& what, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  launch(what, [&] { std::apply(kernel, copies); });
}

// The block's memory for one SHARED declaration, poisoned when the first thread of the block asks for it.
void* shared_memory(const void* declaration, size_t bytes);
void* dynamic_shared_memory();

struct Votes {
  int yes, threads;
};
Votes barrier(bool vote, Where where);

// One warp-wide operation: every lane of `mask` brings a pointer to its operand and waits; the last one calls
// combine(operands by lane, lanes that take part), which reads and writes them all.
using Combine = void (*)(void* const operands[32], uint32_t lanes);
enum class MemoryOrder { none, warp };  // __syncwarp orders memory between its lanes, shuffles and votes do not
void collective(const char* name, uint32_t mask, void* operand, Combine combine, MemoryOrder order, Where where);

void memory_fence();

// cp.async: the copy is only remembered. next_copy hands out those that a wait leaving `pending_groups` groups open
// must complete, one per call; the caller (compiled with the kernel, so that sanitizers see it) then copies.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, zero_bytes;  // copied, then filled with zero
  int64_t group;
};
void start_copy(void* to, const void* from, int bytes, int zero_bytes);
void commit_copies();
bool next_copy(int pending_groups, AsyncCopy* copy);

// From a kernel: ends the launch with this error. The fiber never goes on, so nothing on its stack is destroyed:
// callers hold nothing that must be, a std::string for one.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* pattern, ...);

}  // namespace simt_machine
}  // namespace octavo
