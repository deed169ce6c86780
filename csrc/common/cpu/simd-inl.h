// The beginning of every instruction-set unit. A unit has all that is in files named *-inl.h in its own anonymous namespace:
// nothing in them may come from a header with inline functions, because another unit's copy of such a function might be the
// one that is linked, compiled for instructions that the machine at hand does not have.
//
// scalar-inl.h, avx2-inl.h or avx512-inl.h includes this and defines `Words`: a register `Reg` of `lanes` floats, and what
// moves between it and memory.
//   load, store   float32, Half and BFloat16, rounded to nearest even. A NaN that is stored as BFloat16 must have a lower half
//                 that is zero: rounding would else carry its payload into the exponent
//   canonical     NaN with any payload to the one that can be stored

#define INLINE __attribute__((always_inline))
#define HOT static inline INLINE
#define UNROLL _Pragma("GCC unroll 512")

using linearpatch::Dtype;

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

// function(a null pointer to the type).
template <class Function>
HOT void with_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::float32: return function(static_cast<const float*>(nullptr));
    case Dtype::float16: return function(static_cast<const Half*>(nullptr));
    case Dtype::bfloat16: return function(static_cast<const BFloat16*>(nullptr));
  }
}
