// What an instruction-set unit offers to the rest: plain data only, so that nothing inline is shared between units.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../width.h"

namespace linearpatch {

// Row r of a tensor [..., d] whose leading dimensions are two strides: element (r / run) * outer + (r % run) * inner.
struct Rows {
  void* data;
  int64_t outer, inner;
};

// (x @ down) @ up, or none with a rank of 0.
struct LowRank {
  int64_t rank, ranks;  // ranks: the rank, rounded up to whole vectors
  const void* down;     // [d, ranks], zeros beyond the rank
  const void* up;       // [rank, d]
  Dtype down_dtype, up_dtype;
};

// A scale as it was given, and what it is to be multiplied by.
struct Unfolded {
  const void* values;
  Dtype dtype;
  float factor;
};

struct PatchCall {
  const Width* width;
  Dtype dtype;  // of all rows
  int64_t run;
  Rows x, y;
  // Times the norm of H, squared; readable a vector beyond its end. For the patch folded; or null where `unfolded` is to be
  // folded on the way, as it suits a single row: the folded scale is one row less in the first-level cache.
  const float* scale;
  Unfolded unfolded;
  const float* pre;    // or null
  const float* post;   // or null
  LowRank low_rank;

  Rows residual;             // added to x first, if it is there
  Rows normed;               // the norm of y, if it is there
  const float* norm_weight;  // for that
  float eps;

  Rows grad;  // for gradients: dy; y is dx then
};

// Sums over rows, [d] each, or null where one is not wanted.
struct GradientSums {
  float *scale, *pre, *post;
};

// A range of rows, with scratch for one thread of as many floats as it says, aligned to 64 bytes.
struct KernelTable {
  int64_t lanes;
  // out = factor * v in float32, every NaN the canonical one; a multiple of `lanes` values. With `fold`, as the patch wants
  // its scale: the sums and differences of pairs that its turn needs.
  void (*widen)(const void* v, Dtype, float factor, bool fold, float* out, int64_t count);
  int64_t (*patch_scratch)(const PatchCall&);
  void (*patch)(const PatchCall&, int64_t begin, int64_t end, float* scratch);
  int64_t (*gradient_scratch)(const PatchCall&, const GradientSums&);
  void (*gradients)(const PatchCall&, const GradientSums&, int64_t begin, int64_t end, float* scratch);
};

const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();

// Of the instruction sets that may be used, the widest; a narrower one where a row's Sylvester part is shorter than a vector.
const KernelTable& kernels(const Width& width);

}  // namespace linearpatch
