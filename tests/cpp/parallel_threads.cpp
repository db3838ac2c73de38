// cpu/parallel.h without torch, for the C++ tests: every call, however small, runs on real threads, so that small cases
// cross the seams between ranges and ThreadSanitizer sees two threads wherever the product may have two.
#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace octavo::cpu {

void parallel_ranges(int64_t count, int64_t /*grain*/, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 3;
  const int64_t size = (count + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t begin = size; begin < count; begin += size)
    threads.emplace_back(body, begin, std::min(begin + size, count), context);
  body(0, std::min(size, count), context);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace octavo::cpu
