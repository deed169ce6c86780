#include <stdexcept>

#include "../../common/cpu/isa.h"
#include "kernel_table.h"

namespace linearpatch {

const KernelTable& kernels(const Width& width) {
  static const auto units = usable_units(scalar_kernels(), avx2_kernels(), avx512_kernels());
  for (const KernelTable* unit : units)
    if (width.inner % unit->lanes == 0) return *unit;
  throw std::logic_error("the scalar unit takes every width");
}

}  // namespace linearpatch
