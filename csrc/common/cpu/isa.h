// Which instruction sets the CPU kernels may use on this machine.
#pragma once

#include <vector>

namespace linearpatch {

enum class Isa { scalar, avx2, avx512 };

// What this machine has, the widest first, from the one that LINEARPATCH_CPU_ISA asked for downwards. Throws
// std::runtime_error where the one asked for is not there.
const std::vector<Isa>& usable_isas();

// Whether AVX-512 is usable, and multiplies 16-bit integers too.
bool vnni_is_usable();

// An operator's kernels, one table for each instruction set: those of the usable ones, in their order.
template <class Table>
std::vector<const Table*> usable_units(const Table* scalar, const Table* avx2, const Table* avx512) {
  std::vector<const Table*> units;
  for (const Isa isa : usable_isas()) units.push_back(isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : scalar);
  return units;
}

}  // namespace linearpatch
