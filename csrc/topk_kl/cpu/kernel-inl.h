// The kernels of a unit, which has `Words` (common/cpu/simd-inl.h) and says how many `lanes` a register has here.
//
// The maths and its letters (p, z, m, s, S, t, T) are those of linearpatch_kernels/ops/topk_kl/reference.py.

using linearpatch::topk_kl::Block;
using linearpatch::topk_kl::Call;
using linearpatch::topk_kl::Normalization;

#include "vector-inl.h"

#include "rows-inl.h"

#include "slots-inl.h"

#include "vocabulary-inl.h"

constexpr linearpatch::topk_kl::KernelTable table = {
    scratch_floats, widen_rows,    add_columns,    combine_tokens, linear_topk,
    add_block,      finish_tokens, block_gradient, given_logits,   logits_gradient};
