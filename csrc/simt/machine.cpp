#include "simt/machine.h"

#include <algorithm>
#include <charconv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "simt/fiber.h"
#include "simt/order.h"
#include "simt/sanitizers.h"

namespace octavo {

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt_machine {
namespace {

[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char text[512];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

// ---- thread order ----

struct Order {
  enum Kind { forward, reverse, random } kind = forward;
  uint32_t seed = 0;
};

Order parse_order(const std::string& text) {
  if (text == "forward") return {Order::forward};
  if (text == "reverse") return {Order::reverse};
  const std::string prefix = "random:";
  if (text.starts_with(prefix)) {
    Order order{Order::random};
    const char *begin = text.data() + prefix.size(), *end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(begin, end, order.seed);
    if (error == std::errc() && rest == end) return order;
  }
  throw std::invalid_argument("octavo: simt thread order must be forward, reverse or random:SEED, got '" + text + "'");
}

Order& current_order() {
  static Order order = [] {
    const char* text = std::getenv("OCTAVO_SIMT_ORDER");
    return text ? parse_order(text) : Order{};
  }();
  return order;
}

// ---- one CUDA thread ----

struct Thread {
  enum State { ready, at_barrier, at_collective, done };

  Fiber* fiber = nullptr;
  uint3 index{};
  unsigned linear = 0;
  State state = done;
  // What it waits for.
  Where where{};
  bool vote = false;
  Votes votes{};
  const char* name = nullptr;
  uint32_t mask = 0;
  void* operand = nullptr;
  Combine combine = nullptr;
  // cp.async copies on their way, oldest first, and the group now being filled.
  std::vector<AsyncCopy> copies;
  int64_t group = 0;
};

struct SharedBlock {
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(16)); }
  };
  const void* declaration;
  std::unique_ptr<char, Free> memory;
};

std::unique_ptr<char, SharedBlock::Free> poisoned_memory(size_t bytes) {
  auto* memory = static_cast<char*>(::operator new(bytes, std::align_val_t(16)));
  std::memset(memory, kPoison, bytes);
  return std::unique_ptr<char, SharedBlock::Free>(memory);
}

// What one block owns. Made anew for each, so that nothing in it orders two blocks.
struct Block {
  std::vector<SharedBlock> shared;
  std::unique_ptr<char, SharedBlock::Free> dynamic_shared;
  size_t static_bytes = 0;
  unsigned alive = 0, waiting = 0;
  unsigned barriers = 0;
  SyncPoint barrier_sync[2];  // alternating: a thread may reach the next barrier before all have left this one
  SyncPoint warp_sync[kMaxThreads / 32];
};

// ---- the machine ----

class Machine {
 public:
  void launch(const Launch& launch, const std::function<void()>& body);
  Votes barrier(bool vote, Where where);
  void collective(const char* name, uint32_t mask, void* operand, Combine combine, MemoryOrder order, Where where);
  void* shared_memory(const void* declaration, size_t bytes);
  [[noreturn]] void fail(const char* what);

  std::mutex mutex;
  Thread* running = nullptr;
  std::unique_ptr<Block> block;
  SyncPoint fence;

 private:
  static void fiber_body(void* machine);
  void run_block(uint64_t index, std::mt19937& random);
  bool run_warp(unsigned warp);
  void exit_thread(Thread& thread);
  void release_barrier();
  bool try_combine(unsigned warp, uint32_t mask, Combine combine);
  std::string deadlock_report() const;
  std::string location() const;

  const Launch* launch_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  unsigned count_ = 0;  // threads in a block
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;   // made when first needed, then kept
  std::vector<unsigned> warp_turn_, lane_turn_;  // the order in which warps, and lanes of a warp, run
  std::string error_;
  SyncPoint start_, end_;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

void check_launch(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const auto reject = [&](const char* why) {
    throw std::runtime_error(
        format("octavo: simt: launch of %s at %s:%u: %s; grid (%u, %u, %u), block (%u, %u, %u), "
               "%zu bytes of dynamic shared memory",
               launch.kernel, launch.where.file_name(), launch.where.line(), why, grid.x, grid.y, grid.z, block.x,
               block.y, block.z, launch.dynamic_shared));
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) reject("the grid has no blocks");
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) reject("the grid is too large");
  if (block.x == 0 || block.y == 0 || block.z == 0) reject("the block has no threads");
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > kMaxBlockZ ||
      uint64_t{block.x} * block.y * block.z > kMaxThreads)
    reject("the block is too large");
  if (launch.dynamic_shared > kMaxDynamicShared) reject("too much shared memory");
}

void Machine::launch(const Launch& launch, const std::function<void()>& body) {
  const std::lock_guard lock(mutex);
  check_launch(launch);
  launch_ = &launch;
  body_ = &body;
  gridDim = launch.grid;
  blockDim = launch.block;
  count_ = blockDim.x * blockDim.y * blockDim.z;
  if (fibers_.size() < count_) fibers_.resize(count_);
  for (unsigned i = 0; i < count_; ++i)
    if (!fibers_[i]) fibers_[i] = std::make_unique<Fiber>(fiber_body, this);
  threads_.resize(count_);
  for (unsigned i = 0; i < count_; ++i) {
    threads_[i].linear = i;
    threads_[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  const Order order = current_order();
  std::mt19937 random(order.seed);
  for (auto* turn : {&warp_turn_, &lane_turn_}) {
    turn->resize(turn == &warp_turn_ ? (count_ + 31) / 32 : 32);
    std::iota(turn->begin(), turn->end(), 0u);
    if (order.kind == Order::reverse) std::reverse(turn->begin(), turn->end());
  }

  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  std::vector<uint64_t> block_order;  // only random order needs one written out
  if (order.kind == Order::random) {
    block_order.resize(blocks);
    std::iota(block_order.begin(), block_order.end(), uint64_t{0});
    std::shuffle(block_order.begin(), block_order.end(), random);
  }
  start_.release();
  for (uint64_t i = 0; i < blocks; ++i)
    run_block(order.kind == Order::random ? block_order[i] : order.kind == Order::reverse ? blocks - 1 - i : i, random);
  end_.acquire();
}

void Machine::run_block(uint64_t index, std::mt19937& random) {
  {
    const UntrackedMemory untracked;
    block = std::make_unique<Block>();
    if (launch_->dynamic_shared) block->dynamic_shared = poisoned_memory(launch_->dynamic_shared);
  }
  block->alive = count_;
  blockIdx = {static_cast<unsigned>(index % gridDim.x), static_cast<unsigned>(index / gridDim.x % gridDim.y),
              static_cast<unsigned>(index / gridDim.x / gridDim.y)};
  for (unsigned i = 0; i < count_; ++i) {
    threads_[i].state = Thread::ready;
    threads_[i].name = nullptr;
    threads_[i].group = 0;
    // Turning with the block: else thread i of two blocks were one thread to ThreadSanitizer, and it saw no race
    // between them.
    threads_[i].fiber = fibers_[(i + index) % count_].get();
  }
  const bool shuffle = current_order().kind == Order::random;
  while (block->alive && error_.empty()) {
    if (shuffle) {
      std::shuffle(warp_turn_.begin(), warp_turn_.end(), random);
      std::shuffle(lane_turn_.begin(), lane_turn_.end(), random);
    }
    bool progress = false;
    for (const unsigned warp : warp_turn_) {
      // A warp goes on until all its lanes wait for other warps, past a barrier that it was the last to reach: as far
      // ahead of the others as it may be. In random order, sometimes.
      while (run_warp(warp)) {
        progress = true;
        if (!error_.empty() || (shuffle && random() % 2)) break;
      }
      if (!error_.empty()) break;
    }
    if (!progress) error_ = deadlock_report();
  }
  const UntrackedMemory untracked;
  block.reset();
  if (error_.empty()) return;
  for (unsigned i = 0; i < count_; ++i) {
    if (threads_[i].state == Thread::done) continue;
    threads_[i].fiber->release(end_);
    threads_[i].copies.clear();
    fibers_[(i + index) % count_].reset();  // stands in the middle of the kernel
  }
  end_.acquire();
  throw std::runtime_error(std::exchange(error_, {}));
}

// Runs each lane that is ready once, to where it waits next; false if there was none.
bool Machine::run_warp(unsigned warp) {
  bool any = false;
  for (const unsigned lane : lane_turn_) {
    const unsigned i = warp * 32 + lane;
    if (i >= count_ || threads_[i].state != Thread::ready) continue;
    any = true;
    running = &threads_[i];
    threadIdx = running->index;
    running->fiber->resume();
    running = nullptr;
    if (!error_.empty()) break;
  }
  return any;
}

// A fiber's whole life: one CUDA thread after another, of block after block and launch after launch.
void Machine::fiber_body(void* argument) {
  Machine& machine = *static_cast<Machine*>(argument);
  for (;;) {
    Thread& thread = *machine.running;
    machine.start_.acquire();
    (*machine.body_)();
    machine.end_.release();
    machine.exit_thread(thread);
    thread.fiber->suspend();
  }
}

void Machine::exit_thread(Thread& thread) {
  if (!thread.copies.empty()) fail("the thread exits with cp.async copies that nothing waited for");
  thread.state = Thread::done;
  --block->alive;
  // The others no longer wait for this one.
  if (block->waiting && block->waiting == block->alive) release_barrier();
  const unsigned first = thread.linear / 32 * 32, last = std::min(first + 32, count_);
  for (unsigned i = first; i < last; ++i)
    if (threads_[i].state == Thread::at_collective)
      try_combine(thread.linear / 32, threads_[i].mask, threads_[i].combine);
}

// ---- what a kernel calls ----

Votes Machine::barrier(bool vote, Where where) {
  Thread& thread = *running;
  SyncPoint& sync = block->barrier_sync[block->barriers % 2];
  thread.vote = vote;
  thread.where = where;
  thread.name = "__syncthreads";
  thread.state = Thread::at_barrier;
  sync.release();
  if (++block->waiting == block->alive)
    release_barrier();
  else
    thread.fiber->suspend();
  sync.acquire();
  return thread.votes;
}

void Machine::release_barrier() {
  Votes votes{0, static_cast<int>(block->waiting)};
  const Thread* first = nullptr;
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state != Thread::at_barrier) continue;
    votes.yes += thread.vote;
    if (!first) first = &thread;
    if (thread.where.line() != first->where.line() ||
        std::strcmp(thread.where.file_name(), first->where.file_name()) != 0)
      simt_machine::fail("threads %u and %u meet in different barriers, %s:%u and %s:%u", first->linear, thread.linear,
                         first->where.file_name(), first->where.line(), thread.where.file_name(), thread.where.line());
  }
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    if (thread.state != Thread::at_barrier) continue;
    thread.votes = votes;
    thread.state = Thread::ready;
  }
  block->waiting = 0;
  ++block->barriers;
}

void Machine::collective(const char* name, uint32_t mask, void* operand, Combine combine, MemoryOrder order,
                         Where where) {
  Thread& thread = *running;
  thread.name = name;
  thread.where = where;
  const unsigned warp = thread.linear / 32;
  if (!(mask >> thread.linear % 32 & 1)) simt_machine::fail("the calling lane is not in the mask %08x", mask);
  thread.mask = mask;
  thread.operand = operand;
  thread.combine = combine;
  thread.state = Thread::at_collective;
  SyncPoint& sync = block->warp_sync[warp];
  if (order == MemoryOrder::warp) sync.release();
  if (!try_combine(warp, mask, combine)) thread.fiber->suspend();
  if (order == MemoryOrder::warp) sync.acquire();
}

// Completes a collective once every lane of the mask that has not exited waits in it.
bool Machine::try_combine(unsigned warp, uint32_t mask, Combine combine) {
  void* operands[32] = {};
  uint32_t lanes = 0;
  const unsigned size = std::min(32u, count_ - warp * 32);
  for (unsigned lane = 0; lane < size; ++lane) {
    const Thread& thread = threads_[warp * 32 + lane];
    if (!(mask >> lane & 1) || thread.state == Thread::done) continue;
    if (thread.state != Thread::at_collective || thread.mask != mask || thread.combine != combine) return false;
    operands[lane] = thread.operand;
    lanes |= 1u << lane;
  }
  combine(operands, lanes);
  for (unsigned lane = 0; lane < size; ++lane)
    if (lanes >> lane & 1) threads_[warp * 32 + lane].state = Thread::ready;
  return true;
}

void* Machine::shared_memory(const void* declaration, size_t bytes) {
  for (const SharedBlock& shared : block->shared)
    if (shared.declaration == declaration) return shared.memory.get();
  block->static_bytes += bytes;
  if (block->static_bytes > kMaxStaticShared)
    simt_machine::fail("%zu bytes of static shared memory", block->static_bytes);
  const UntrackedMemory untracked;
  block->shared.push_back({declaration, poisoned_memory(bytes)});
  return block->shared.back().memory.get();
}

// ---- reports ----

std::string Machine::location() const {
  return format(" in %s launched at %s:%u, block (%u, %u, %u)", launch_->kernel, launch_->where.file_name(),
                launch_->where.line(), blockIdx.x, blockIdx.y, blockIdx.z);
}

void Machine::fail(const char* what) {
  {
    const UntrackedMemory untracked;
    error_ = std::string("octavo: simt: ") + what + location();
    if (running->name)
      error_ += format(", thread %u, last at %s, %s:%u", running->linear, running->name, running->where.file_name(),
                       running->where.line());
  }
  running->fiber->suspend();  // run_block sees error_ and never comes back
  std::abort();
}

std::string Machine::deadlock_report() const {
  std::map<std::string, std::vector<unsigned>> groups;
  unsigned exited = 0;
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state == Thread::done) {
      ++exited;
      continue;
    }
    const std::string mask = thread.state == Thread::at_collective ? format(" mask %08x", thread.mask) : "";
    groups[format("%s%s at %s:%u", thread.name, mask.c_str(), thread.where.file_name(), thread.where.line())].push_back(
        i);
  }
  std::string report = "octavo: simt: deadlock" + location() + format(": %u of %u threads have exited", exited, count_);
  for (const auto& [what, members] : groups)
    report += format("\n  %zu threads, the first is %u, wait in %s", members.size(), members.front(), what.c_str());
  return report;
}

}  // namespace

void launch(const Launch& launch, const std::function<void()>& thread) {
  machine().launch(launch, thread);
}

void* shared_memory(const void* declaration, size_t bytes) {
  return machine().shared_memory(declaration, bytes);
}

void* dynamic_shared_memory() {
  return machine().block->dynamic_shared.get();
}

Votes barrier(bool vote, Where where) {
  return machine().barrier(vote, where);
}

void collective(const char* name, uint32_t mask, void* operand, Combine combine, MemoryOrder order, Where where) {
  machine().collective(name, mask, operand, combine, order, where);
}

void memory_fence() {
  machine().fence.release();
  machine().fence.acquire();
}

void start_copy(void* to, const void* from, int bytes, int zero_bytes) {
  const UntrackedMemory untracked;
  Thread& thread = *machine().running;
  thread.copies.push_back({to, from, bytes, zero_bytes, thread.group});
}

void commit_copies() {
  ++machine().running->group;
}

bool next_copy(int pending_groups, AsyncCopy* copy) {
  Thread& thread = *machine().running;
  if (thread.copies.empty() || thread.copies.front().group >= thread.group - pending_groups) return false;
  const UntrackedMemory untracked;
  *copy = thread.copies.front();
  thread.copies.erase(thread.copies.begin());
  return true;
}

void fail(const char* pattern, ...) {
  char what[512];
  va_list values;
  va_start(values, pattern);
  std::vsnprintf(what, sizeof what, pattern, values);
  va_end(values);
  machine().fail(what);
}

}  // namespace simt_machine

namespace simt {
void set_order(const std::string& order) {
  const auto parsed = simt_machine::parse_order(order);
  const std::lock_guard lock(simt_machine::machine().mutex);
  simt_machine::current_order() = parsed;
}
}  // namespace simt

}  // namespace octavo
