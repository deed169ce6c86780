#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace linearpatch {
namespace {

const char* name_of(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar"; }

std::vector<Isa> asked_for() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isas.push_back(Isa::avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    isas.push_back(Isa::avx2);
#endif
  isas.push_back(Isa::scalar);
  const char* const asked = std::getenv("LINEARPATCH_CPU_ISA");
  if (!asked || !*asked) return isas;
  std::string names;
  for (size_t i = 0; i < isas.size(); ++i) {
    if (asked == std::string(name_of(isas[i]))) return {isas.begin() + i, isas.end()};
    names += (i ? ", " : "") + std::string(name_of(isas[i]));
  }
  throw std::runtime_error("LINEARPATCH_CPU_ISA=" + std::string(asked) + " is none of what this machine has: " + names);
}

}  // namespace

const std::vector<Isa>& usable_isas() {
  static const std::vector<Isa> isas = asked_for();
  return isas;
}

bool vnni_is_usable() {
#if defined(__x86_64__)
  return usable_isas().front() == Isa::avx512 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace linearpatch
