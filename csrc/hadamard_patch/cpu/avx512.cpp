// The AVX-512 unit: Skylake-SP and later, Zen 4 and later.
#include "kernel_table.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../orders.h"

namespace {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

struct Vector {
  using Reg = __m512;
  static constexpr const char* isa = "avx512";
  static constexpr long lanes = 16;
  static constexpr int pass_bits = 4;
  static constexpr int rows_together = 8;

#define HOT static inline __attribute__((always_inline))
  HOT Reg set1(float a) { return _mm512_set1_ps(a); }
  HOT Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  HOT Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  HOT Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  HOT Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  HOT Reg multiply_subtract(Reg a, Reg b, Reg c) { return _mm512_fmsub_ps(a, b, c); }
  HOT Reg negated_multiply_add(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
  HOT void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  HOT void prefetch_second_level(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  HOT void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

  HOT Reg load(const float* p) { return _mm512_loadu_ps(p); }
  HOT Reg load(const Half* p) { return _mm512_cvtph_ps(half(p)); }
  // A word becomes the upper half of a float: one shuffle with zeros between.
  HOT Reg load(const BFloat16* p) {
    const __m512i spread = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                            3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread, _mm512_castsi256_si512(half(p))));
  }
  HOT Reg canonical(Reg v) {
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set1(__builtin_nanf("")));
  }
  HOT void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  HOT void store(Half* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Round to nearest even by adding 0x7fff and the last bit that stays: as a product of words, 0x7fff * 1 + bit * 1. The
  // NaNs that get here have no lower half (canonical ones in scale, pre and post, widened ones in x), so none overflows.
  HOT void store(BFloat16* p, Reg v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i words = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
    const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                           15, 13, 11, 9, 7, 5, 3, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded)));
  }

  // Butterflies of lane bit 0, and of bit 3 for values on their way from memory.
  HOT Reg load_low(const float* p) {
    return multiply_add(_mm512_movehdup_ps(load(p)), signs<0xaaaa>(), _mm512_moveldup_ps(load(p)));
  }
  HOT Reg low(Reg v) { return multiply_add(v, signs<0xaaaa>(), _mm512_permute_ps(v, 0xb1)); }
  HOT Reg load_high(const float* p) {
    return multiply_add(_mm512_broadcast_f32x8(_mm256_loadu_ps(p + 8)), signs<0xff00>(),
                        _mm512_broadcast_f32x8(_mm256_loadu_ps(p)));
  }

  // Bit 2, bit 1 with the scales folded into it, bit 2.
  HOT Reg turned(Reg v, const float* scale) {
    v = bit2(v);
    v = multiply_add(v, pairs(scale), mul(_mm512_permute_ps(v, 0x4e), pairs(scale + 2)));
    return bit2(v);
  }
  HOT Reg middle(Reg v) { return bit2(folded(v)); }
  HOT Reg folded(Reg v) { return multiply_add(v, signs<0xcccc>(), _mm512_permute_ps(v, 0x4e)); }

 private:
  HOT Reg bit2(Reg v) { return multiply_add(v, signs<0xf0f0>(), _mm512_shuffle_f32x4(v, v, 0xb1)); }
  // The first two of every four floats, twice.
  HOT Reg pairs(const float* p) { return _mm512_castpd_ps(_mm512_movedup_pd(_mm512_castps_pd(load(p)))); }
  HOT __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  template <unsigned negative>
  HOT Reg signs() {
    constexpr auto sign = [](int lane) { return negative >> lane & 1 ? -1.0f : 1.0f; };
    return Reg{sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
               sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
  }
#undef HOT
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::avx512_kernels() { return &table; }

#else

const linearpatch::KernelTable* linearpatch::avx512_kernels() { return nullptr; }

#endif
