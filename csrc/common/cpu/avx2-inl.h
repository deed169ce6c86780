// AVX2: Haswell and later, every Zen. What follows this in a unit is compiled for it.
#include "../dtype.h"

#pragma GCC target("avx2,fma,f16c,prfchw")
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace {

#include "simd-inl.h"

struct Words {
  using Reg = __m256;
  static constexpr long lanes = 8;

  HOT Reg load(const float* p) { return _mm256_loadu_ps(p); }
  HOT Reg load(const Half* p) { return _mm256_cvtph_ps(words(p)); }
  HOT Reg load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words(p)), 16));
  }
  HOT Reg canonical(Reg v) {
    return _mm256_blendv_ps(v, _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  HOT void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  HOT void store(Half* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounded as by AVX-512; the upper words are then packed within each half and the halves put together.
  HOT void store(BFloat16* p, Reg v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i words =
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x10000)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    const __m256i upper = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

 private:
  HOT __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

}  // namespace
