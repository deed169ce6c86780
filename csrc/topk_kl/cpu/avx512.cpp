// The AVX-512 unit: Skylake-SP and later, Zen 4 and later.
#include "kernel_table.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wuninitialized"  // in GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace {

constexpr const char* isa = "avx512";
constexpr long lanes = 16;

struct Half { uint16_t bits; };

static inline __attribute__((always_inline)) __m512 load_half(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __attribute__((always_inline)) void store_half(Half* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#include "kernel-inl.h"

}  // namespace

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx512_kernels() { return &table; }

#else

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::avx512_kernels() { return nullptr; }

#endif
