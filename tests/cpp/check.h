#pragma once
// What the C++ tests share: a check that counts, random numbers, and buffers that end at an inaccessible page.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

inline int checks = 0, failures = 0;

// Reports at most 20 failures: the first ones tell.
inline void record(bool ok, const char* file, int line, const char* what, const std::string& detail = "") {
  ++checks;
  if (!ok && ++failures <= 20)
    std::printf("%s:%d: failed: %s%s%s\n", file, line, what, detail.empty() ? "" : ": ", detail.c_str());
}

#define CHECK(condition) ::test::record((condition), __FILE__, __LINE__, #condition)
#define CHECK_FOR(condition, detail)                                                                      \
  do {                                                                                                    \
    const bool passed = (condition);                                                                      \
    ::test::record(passed, __FILE__, __LINE__, #condition, passed ? std::string() : std::string(detail)); \
  } while (0)

// The message of the exception that f throws, which must be an E; empty, and a failure, when it throws nothing.
template <class E, class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  record(false, __FILE__, __LINE__, "an exception is thrown");
  return "";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int finish() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return checks == 0 || failures != 0;
}

inline std::mt19937& random() {
  static std::mt19937 generator(20240229);
  return generator;
}
inline int uniform(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random());
}

// n elements that end exactly where an inaccessible page begins: a read or write past the end is a crash, also of
// vector instructions that a sanitizer does not see. Starts filled with 0x7d, so that what a kernel leaves unwritten
// shows. With `unaligned` it ends an element earlier, so that no address is aligned better than an element must be.
inline bool unaligned = false;

// Of the many products, one in `share` runs, by a hash of its number, so that no loop around them is left out as a
// whole.
inline uint32_t share = 1, number = 0;
inline bool left_out() {
  return share > 1 && (number++ * 0x9e3779b1u >> 16) % share != 0;
}

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n, size_t element = sizeof(T)) : size_(n) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(n) * sizeof(T) + (unaligned ? element : 0);
    const size_t room = (bytes + page - 1) / page * page;
    mapped_ = room + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_ + room, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + room - bytes);
    std::memset(base_, 0x7d, room);
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) {
    if (!values.empty()) std::memcpy(data_, values.data(), values.size() * sizeof(T));
  }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    if (size_) std::memcpy(data_, other.data_, static_cast<size_t>(size_) * sizeof(T));
  }
  Buffer(Buffer&& other) : size_(other.size_), mapped_(other.mapped_), base_(other.base_), data_(other.data_) {
    other.base_ = nullptr;
  }
  ~Buffer() {
    if (base_) munmap(base_, mapped_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  int64_t size_;
  size_t mapped_;
  char* base_;
  T* data_;
};

}  // namespace test
