#pragma once
#include <string>
#include <vector>

// The levels that this build has: all four on x86-64, one elsewhere. OCTAVO_MAX_ISA (0 to 3) leaves the upper ones out.
#ifndef OCTAVO_MAX_ISA
#if defined(__x86_64__) && defined(__GNUC__)
#define OCTAVO_MAX_ISA 3
#else
#define OCTAVO_MAX_ISA 0
#endif
#endif

namespace octavo::cpu {

// Instruction set levels, in order: each includes the ones before it. avx2 means AVX2 + FMA + F16C; avx512 means
// AVX-512 F/BW/DQ/VL + VNNI; amx means AMX int8 tiles, with the kernel's permission to use them.
enum class Isa { portable, avx2, avx512, amx };

Isa isa();  // what the kernels use: the best there is, lowered by OCTAVO_CPU_ISA or set_isa()
// For calls that begin later; throws std::invalid_argument when this machine or build lacks the level.
void set_isa(Isa);
std::vector<Isa> available();  // levels that this build has and this machine can run
const char* name_of(Isa);
Isa isa_from_name(const std::string&);  // throws std::invalid_argument

// While it lives, isa() stays what it was in this thread, whatever another sets: an op asks one level for the size of a
// workspace and later for the loops that fill it.
class OneIsa {
 public:
  OneIsa();
  ~OneIsa();
  OneIsa(const OneIsa&) = delete;
  OneIsa& operator=(const OneIsa&) = delete;

 private:
  int before_;
};

}  // namespace octavo::cpu
