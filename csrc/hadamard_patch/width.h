// The Hadamard matrices of the widths in use, and which instruction-set unit works on them.
#pragma once

#include "cpu/kernel_table.h"

namespace linearpatch {

// The matrix of width d, or null before it was added.
const Width* find_width(int64_t d);

// d = blocks * m * inner with the signs h [m, m] of H_m, row by row. What is added stays; a second time changes nothing.
const Width& add_width(int64_t d, int64_t m, int64_t inner, const int8_t* h);

// The widest unit that this machine has, or that LINEARPATCH_CPU_ISA asked for; a narrower one where a row's Sylvester
// part is shorter than a vector. Throws std::runtime_error where the one asked for is not there.
const KernelTable& kernels(const Width& width);

}  // namespace linearpatch
