#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if OCTAVO_MAX_ISA >= 3
// AMX state is large, so Linux hands it out per process on request (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
bool amx_granted() {
#if defined(OCTAVO_AMX_EMULATE)
  return true;  // tiles in plain C++ (amx.h)
#elif defined(__linux__)
  unsigned eax = 7, ebx, ecx = 0, edx;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  if (!(edx & kAmxTile) || !(edx & kAmxInt8)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if OCTAVO_MAX_ISA >= 1
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::portable;
#endif
#if OCTAVO_MAX_ISA >= 2
  for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                         __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0,
                         __builtin_cpu_supports("avx512vnni") != 0})
    if (!has) return Isa::avx2;
#endif
#if OCTAVO_MAX_ISA >= 3
  if (amx_granted()) return Isa::amx;
#endif
  return static_cast<Isa>(OCTAVO_MAX_ISA < 2 ? OCTAVO_MAX_ISA : 2);
}

Isa best() {
  static const Isa value = detect();
  return value;
}

Isa checked(Isa level, const std::string& asked_by) {
  if (level > best())
    throw std::invalid_argument("octavo: " + asked_by + " asks for " + name_of(level) +
                                ", but this machine and build have " + name_of(best()) + " at most");
  return level;
}

Isa initial() {
  const char* asked = std::getenv("OCTAVO_CPU_ISA");
  return asked && *asked ? checked(isa_from_name(asked), "OCTAVO_CPU_ISA") : best();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{initial()};
  return value;
}

thread_local int kept = -1;  // the level of the op that runs in this thread; -1: none does

}  // namespace

Isa isa() {
  return kept >= 0 ? static_cast<Isa>(kept) : current().load(std::memory_order_relaxed);
}

OneIsa::OneIsa() : before_(kept) {
  kept = static_cast<int>(isa());
}

OneIsa::~OneIsa() {
  kept = before_;
}

void set_isa(Isa level) {
  current() = checked(level, "set_isa");
}

std::vector<Isa> available() {
  std::vector<Isa> levels;
  for (int i = 0; i <= static_cast<int>(best()); ++i) levels.push_back(static_cast<Isa>(i));
  return levels;
}

const char* name_of(Isa level) {
  return kNames[static_cast<int>(level)];
}

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Isa>(i);
  throw std::invalid_argument("octavo: unknown ISA '" + name + "': portable, avx2, avx512 or amx");
}

}  // namespace octavo::cpu
