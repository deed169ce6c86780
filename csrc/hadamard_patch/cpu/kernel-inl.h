// The kernels of a unit. It defines `Vector`, the two 16-bit types, and includes this within its own anonymous namespace:
// nothing here may come from a header with inline functions of its own, because another unit's copy of them might be the
// one that is linked, compiled for instructions that the machine at hand does not have.
//
// Vector: a register of `lanes` floats and what can be done with it. Beside loads, stores and arithmetic:
//   load_low, low      the butterflies of lane bit 0, while loading or of a register
//   load_high          those of the highest lane bit, while loading
//   middle             those of the bits between
//   folded, turned     scales s to what turned(v, scale) wants so as to be middle(s * middle(v))
//   canonical          NaN with any payload to the one whose lower half is zero, which survives rounding to 16 bits

#define INLINE __attribute__((always_inline))
#define HOT static inline INLINE
#define UNROLL _Pragma("GCC unroll 512")

using linearpatch::Dtype;
using linearpatch::GradientSums;
using linearpatch::LowRank;
using linearpatch::PatchCall;
using linearpatch::Rows;
using linearpatch::Unfolded;
using linearpatch::Width;
using Reg = Vector::Reg;

constexpr long lanes = Vector::lanes;
constexpr int widest = Vector::pass_bits;  // a pass holds 1 << widest registers

template <class Function>
HOT void with_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::float32: return function(static_cast<const float*>(nullptr));
    case Dtype::float16: return function(static_cast<const Half*>(nullptr));
    case Dtype::bfloat16: return function(static_cast<const BFloat16*>(nullptr));
  }
}

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

constexpr linearpatch::KernelTable table = {Vector::isa, lanes, widen, patch_scratch, patch, gradient_scratch, gradients};
