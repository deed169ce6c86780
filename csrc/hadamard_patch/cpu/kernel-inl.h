// The kernels of a unit, which defines `Vector`: `Words` (common/cpu/simd-inl.h), arithmetic, and
//   load_low, low      the butterflies of lane bit 0, while loading or of a register
//   load_high          those of the highest lane bit, while loading
//   middle             those of the bits between
//   folded, turned     scales s to what turned(v, scale) wants so as to be middle(s * middle(v))

using linearpatch::GradientSums;
using linearpatch::LowRank;
using linearpatch::PatchCall;
using linearpatch::Rows;
using linearpatch::Unfolded;
using linearpatch::Width;
using Reg = Vector::Reg;

constexpr long lanes = Vector::lanes;
constexpr int widest = Vector::pass_bits;  // a pass holds 1 << widest registers

// out = factor * values in float32, with one NaN for all of them; folded if Vector::turned is to use it.
template <class T>
void widen_values(const T* values, float factor, bool folded, float* out, long count) {
  for (long c = 0; c < count; c += lanes) {
    const Reg v = Vector::mul(Vector::load(values + c), Vector::set1(factor));
    Vector::store(out + c, Vector::canonical(folded ? Vector::folded(v) : v));
  }
}

#include "transform-inl.h"

#include "low_rank-inl.h"

#include "rows-inl.h"

constexpr linearpatch::KernelTable table = {lanes, widen, patch_scratch, patch, gradient_scratch, gradients};
