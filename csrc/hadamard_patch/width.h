// The Hadamard matrices of the widths in use.
#pragma once

#include <cstdint>

namespace linearpatch {

// H of one width, `blocks` times kron(H_m, S_inner) along the diagonal, without its norm: entries +-1.
struct Width {
  int64_t d, m, inner, blocks;
  bool has_program;  // orders.h knows how to multiply by H_m
  // Else code[j * m / 4 + g] is the number of the signed sum of inputs 4 g .. 4 g + 3 that output j contains: 16 g + the
  // signs as bits, set where negative. For H_m and for its transpose.
  const uint32_t* codes;
  const uint32_t* codes_transposed;
};

// The matrix of width d, or null before it was added.
const Width* find_width(int64_t d);

// d = blocks * m * inner with the signs h [m, m] of H_m, row by row. What is added stays; a second time changes nothing.
const Width& add_width(int64_t d, int64_t m, int64_t inner, const int8_t* h);

}  // namespace linearpatch
