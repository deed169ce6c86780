// What an instruction-set unit offers to the rest: plain data only, so that nothing inline is shared between units.
#pragma once

#include <cstdint>

namespace linearpatch {

enum class Dtype : int { float32, float16, bfloat16 };

// H of one width, `blocks` times kron(H_m, S_inner) along the diagonal, without its norm: entries +-1.
struct Width {
  int64_t d, m, inner, blocks;
  bool has_program;  // orders.h knows how to multiply by H_m
  // Else code[j * m / 4 + g] is the number of the signed sum of inputs 4 g .. 4 g + 3 that output j contains: 16 g + the
  // signs as bits, set where negative. For H_m and for its transpose.
  const uint32_t* codes;
  const uint32_t* codes_transposed;
};

// Row r of a tensor [..., d] whose leading dimensions are two strides: element (r / run) * outer + (r % run) * inner.
struct Rows {
  void* data;
  int64_t outer, inner;
};

struct PatchCall {
  const Width* width;
  Dtype dtype;
  int64_t run;
  Rows x, y;
  const float* scale;  // folded, times the norm of H, squared; readable a vector beyond its end
  const float* pre;    // or null
  const float* post;   // or null
};

struct KernelTable {
  const char* isa;
  int64_t lanes;
  int64_t (*scratch_floats)(const PatchCall&);
  // out = factor * v in float32, every NaN the canonical one; a multiple of `lanes` values. With `fold`, scales as the
  // kernel wants them: the sums and differences of pairs that its turn needs.
  void (*widen)(const void* v, Dtype, float factor, bool fold, float* out, int64_t count);
  void (*patch)(const PatchCall&, int64_t begin, int64_t end, float* scratch);
};

const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();

}  // namespace linearpatch
