#pragma once
// cp.async on the host SIMT machine: checked when it starts, made when a wait covers it.
#include <cstring>

#include "simt/machine.h"

namespace octavo::simt_machine {

inline void start_copy_16(void* shared, const void* global, int bytes) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    fail("cp.async of 16 bytes between addresses that are not 16-byte aligned");
  if (bytes < 0 || bytes > 16) fail("cp.async reads %d of 16 bytes", bytes);
  start_copy(shared, global, bytes, 16 - bytes);
}

inline void finish_copies(int pending_groups) {
  for (AsyncCopy copy; next_copy(pending_groups, &copy);) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, static_cast<size_t>(copy.zero_bytes));
  }
}

}  // namespace octavo::simt_machine
