// The AVX2 unit: Haswell and later, every Zen.
#include "kernel_table.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,prfchw")
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "../orders.h"

namespace {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

struct Vector {
  using Reg = __m256;
  static constexpr const char* isa = "avx2";
  static constexpr long lanes = 8;
  static constexpr int pass_bits = 3;
  static constexpr int rows_together = 4;

#define HOT static inline __attribute__((always_inline))
  HOT Reg set1(float a) { return _mm256_set1_ps(a); }
  HOT Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  HOT Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  HOT Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  HOT Reg multiply_add(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  HOT Reg multiply_subtract(Reg a, Reg b, Reg c) { return _mm256_fmsub_ps(a, b, c); }
  HOT Reg negated_multiply_add(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
  HOT void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  HOT void prefetch_second_level(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  HOT void prefetch_write(const void* p) { __builtin_prefetch(p, 1, 3); }

  HOT Reg load(const float* p) { return _mm256_loadu_ps(p); }
  HOT Reg load(const Half* p) { return _mm256_cvtph_ps(words(p)); }
  HOT Reg load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words(p)), 16));
  }
  HOT Reg canonical(Reg v) {
    return _mm256_blendv_ps(v, set1(__builtin_nanf("")), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  HOT void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  HOT void store(Half* p, Reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Rounded as in the AVX-512 unit; the upper words are then packed within each half and the halves put together.
  HOT void store(BFloat16* p, Reg v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i words =
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x10000)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    const __m256i upper = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  // Butterflies of lane bit 0, and of bit 2 for values on their way from memory.
  HOT Reg load_low(const float* p) {
    return multiply_add(_mm256_movehdup_ps(load(p)), signs<0xaa>(), _mm256_moveldup_ps(load(p)));
  }
  HOT Reg low(Reg v) { return multiply_add(v, signs<0xaa>(), _mm256_permute_ps(v, 0xb1)); }
  HOT Reg load_high(const float* p) {
    return multiply_add(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p + 4)), signs<0xf0>(),
                        _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
  }

  // Bit 1 with the scales folded into it.
  HOT Reg turned(Reg v, const float* scale) {
    return multiply_add(v, pairs(scale), mul(_mm256_permute_ps(v, 0x4e), pairs(scale + 2)));
  }
  HOT Reg middle(Reg v) { return folded(v); }
  HOT Reg folded(Reg v) { return multiply_add(v, signs<0xcc>(), _mm256_permute_ps(v, 0x4e)); }

 private:
  // The first two of every four floats, twice.
  HOT Reg pairs(const float* p) { return _mm256_castpd_ps(_mm256_movedup_pd(_mm256_castps_pd(load(p)))); }
  HOT __m128i words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  template <int negative>
  HOT Reg signs() {
    return _mm256_blend_ps(set1(1.0f), set1(-1.0f), negative);
  }
#undef HOT
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::avx2_kernels() { return &table; }

#else

const linearpatch::KernelTable* linearpatch::avx2_kernels() { return nullptr; }

#endif
