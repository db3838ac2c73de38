#pragma once
#include <cstddef>

#include "simt/sanitizers.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace octavo::simt_machine {

// A stack of its own that runs `body(argument)`; the body never returns. One thread drives it: resume() runs the body
// until it calls suspend(), suspend() goes back to where resume() was called. A guard page ends the stack. To
// ThreadSanitizer it is a thread (and costs milliseconds to make).
class Fiber {
 public:
  Fiber(void (*body)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();
  void suspend();
  // Tells ThreadSanitizer, as if the fiber did it where it stands: what it did so far comes before point.acquire().
  void release(SyncPoint& point);

 private:
#if defined(__x86_64__)
  using Context = void*;  // the stack pointer; everything else is on the stack
#else
  using Context = ucontext_t;
#endif
  [[noreturn]] static void enter(Fiber* self);
  static void switch_context(Context& from, Context& to);

  void (*body_)(void*);
  void* argument_;
  char* stack_;
  Context own_{}, driver_{};
  // Sanitizer state, unused without one; always there so that the layout does not depend on flags.
  void *own_fake_stack_ = nullptr, *driver_fake_stack_ = nullptr;
  const void* driver_stack_ = nullptr;
  size_t driver_stack_bytes_ = 0;
  void *own_thread_ = nullptr, *driver_thread_ = nullptr;
};

}  // namespace octavo::simt_machine
