// AVX-512: Skylake-SP and later, Zen 4 and later. What follows this in a unit is compiled for it.
#include "../dtype.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace {

#include "simd-inl.h"

struct Words {
  using Reg = __m512;
  static constexpr long lanes = 16;

  HOT Reg load(const float* p) { return _mm512_loadu_ps(p); }
  HOT Reg load(const Half* p) { return _mm512_cvtph_ps(half(p)); }
  HOT Reg load(const BFloat16* p) { return from_bfloat16(half(p)); }
  // A word becomes the upper half of a float: one shuffle with zeros between.
  HOT Reg from_bfloat16(__m256i words) {
    const __m512i spread = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0,
                                            3, 0, 2, 0, 1, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, spread, _mm512_castsi256_si512(words)));
  }
  HOT Reg canonical(Reg v) {
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
  }
  HOT void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  HOT void store(Half* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // By adding 0x7fff and the last bit that stays: as a product of words, 0x7fff * 1 + bit * 1.
  HOT void store(BFloat16* p, Reg v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i words = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(0x10000), _mm512_set1_epi32(0x7fff), 0xea);
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
    const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                           15, 13, 11, 9, 7, 5, 3, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded)));
  }

 private:
  HOT __m256i half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
};

}  // namespace
