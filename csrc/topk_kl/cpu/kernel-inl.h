// The kernels of a unit. It defines `isa`, `lanes`, `Half` and how to load and store halves, and includes this within its
// own anonymous namespace: nothing here may come from a header with inline functions of its own, because another unit's
// copy of them might be the one that is linked, compiled for instructions that the machine at hand does not have.
//
// The maths and its letters (p, z, m, s, S, t, T) are those of linearpatch_kernels/ops/topk_kl/reference.py.

#define INLINE __attribute__((always_inline))
#define HOT static inline INLINE
#define UNROLL _Pragma("GCC unroll 64")

using linearpatch::Dtype;
using linearpatch::topk_kl::Block;
using linearpatch::topk_kl::Call;
using linearpatch::topk_kl::Normalization;

#include "vector-inl.h"

#include "rows-inl.h"

#include "slots-inl.h"

#include "vocabulary-inl.h"

constexpr linearpatch::topk_kl::KernelTable table = {
    isa,       scratch_floats, widen_rows,     add_columns,  combine_tokens, linear_topk,
    add_block, finish_tokens,  block_gradient, given_logits, logits_gradient};
