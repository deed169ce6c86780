// The AVX2 unit: Haswell and later, every Zen.
#include "kernel_table.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

namespace {

constexpr const char* isa = "avx2";
constexpr long lanes = 8;

struct Half { uint16_t bits; };

static inline __attribute__((always_inline)) __m256 load_half(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline __attribute__((always_inline)) void store_half(Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "kernel-inl.h"

}  // namespace

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx2_kernels() { return &table; }

#else

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx2_kernels() { return nullptr; }

#endif
