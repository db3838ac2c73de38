#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
// octavo_simt_switch(void** save, void* load): pushes what the ABI lets a call change nothing of, swaps stacks, pops.
// octavo_simt_start: first frame of a fiber; the constructor left the function in r13 and its argument in r12.
extern "C" {
void octavo_simt_switch(void** save, void* load);
void octavo_simt_start();
}
asm(R"(
.text
.globl octavo_simt_switch
.hidden octavo_simt_switch
.type octavo_simt_switch,@function
octavo_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
.size octavo_simt_switch,.-octavo_simt_switch
.globl octavo_simt_start
.hidden octavo_simt_start
.type octavo_simt_start,@function
octavo_simt_start:
  movq %r12, %rdi
  callq *%r13
  ud2
.size octavo_simt_start,.-octavo_simt_start
)");
#endif

namespace octavo::simt_machine {
namespace {

constexpr size_t kGuardBytes = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(OCTAVO_SIMT_TSAN)
constexpr size_t kStackBytes = 256 << 10;  // red zones and the runtimes' own frames
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

}  // namespace

Fiber::Fiber(void (*body)(void*), void* argument) : body_(body), argument_(argument) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
#if defined(__x86_64__)
  // As octavo_simt_switch would have left it. 16-byte aligned after `ret`, as at any call instruction.
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
  *--top = reinterpret_cast<void*>(octavo_simt_start);
  *--top = nullptr;                          // rbp
  *--top = nullptr;                          // rbx
  *--top = this;                             // r12
  *--top = reinterpret_cast<void*>(&enter);  // r13
  *--top = nullptr;                          // r14
  *--top = nullptr;                          // r15
  own_ = top;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  // makecontext passes ints: the pointer travels as two halves.
  const auto self = reinterpret_cast<uintptr_t>(this);
  void (*start)(unsigned, unsigned) = [](unsigned high, unsigned low) {
    enter(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(uint64_t{high} << 32 | low)));
  };
  makecontext(&own_, reinterpret_cast<void (*)()>(start), 2, static_cast<unsigned>(uint64_t{self} >> 32),
              static_cast<unsigned>(self));
#endif
#if defined(OCTAVO_SIMT_TSAN)
  own_thread_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(OCTAVO_SIMT_TSAN)
  __tsan_destroy_fiber(own_thread_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // frames that never returned leave red zones behind
#endif
  munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::release([[maybe_unused]] SyncPoint& point) {
#if defined(OCTAVO_SIMT_TSAN)
  void* const caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(own_thread_, __tsan_switch_to_fiber_no_sync);
  point.release();
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#endif
}

void Fiber::switch_context(Context& from, Context& to) {
#if defined(__x86_64__)
  octavo_simt_switch(&from, to);
#else
  swapcontext(&from, &to);
#endif
}

void Fiber::enter(Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->driver_stack_, &self->driver_stack_bytes_);
#endif
  self->body_(self->argument_);
  std::abort();
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&driver_fake_stack_, stack_, kStackBytes);
#endif
#if defined(OCTAVO_SIMT_TSAN)
  driver_thread_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(own_thread_, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(driver_, own_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(driver_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&own_fake_stack_, driver_stack_, driver_stack_bytes_);
#endif
#if defined(OCTAVO_SIMT_TSAN)
  __tsan_switch_to_fiber(driver_thread_, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(own_, driver_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own_fake_stack_, &driver_stack_, &driver_stack_bytes_);
#endif
}

}  // namespace octavo::simt_machine
