#pragma once
// What AddressSanitizer and ThreadSanitizer must be told about fibers, in one place; empty without them.
//
// Under ThreadSanitizer the kernels are instrumented and the machine is not: csrc/simt/*.cpp are compiled with
// -fno-sanitize=thread -DOCTAVO_SIMT_TSAN. Then the machine's own state never looks like a race between CUDA threads,
// and what remains is exactly the kernel's accesses, ordered only by what CUDA orders: barriers, __syncwarp, launches.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(OCTAVO_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#elif defined(__SANITIZE_THREAD__)
#error "compile csrc/simt/*.cpp with -fno-sanitize=thread -DOCTAVO_SIMT_TSAN"
#endif

namespace octavo::simt_machine {

// A point that orders memory for ThreadSanitizer: what was written before release() is visible after acquire().
class SyncPoint {
 public:
  void release() {
#if defined(OCTAVO_SIMT_TSAN)
    __tsan_release(this);
#endif
  }
  void acquire() {
#if defined(OCTAVO_SIMT_TSAN)
    __tsan_acquire(this);
#endif
  }

 private:
  char address_ = 0;
};

// Memory allocated, filled or freed under it is new to ThreadSanitizer: no access of an earlier block counts.
struct UntrackedMemory {
#if defined(OCTAVO_SIMT_TSAN)
  UntrackedMemory() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~UntrackedMemory() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  UntrackedMemory() {}
#endif
  UntrackedMemory(const UntrackedMemory&) = delete;
  UntrackedMemory& operator=(const UntrackedMemory&) = delete;
};

}  // namespace octavo::simt_machine
