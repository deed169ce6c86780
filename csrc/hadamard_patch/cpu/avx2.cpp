#include "kernel_table.h"

#if defined(__x86_64__)
#include "../../common/cpu/avx2-inl.h"

#include "../orders.h"

namespace {

struct Vector : Words {
  static constexpr int pass_bits = 3;
  static constexpr int rows_together = 4;

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
  template <int negative>
  HOT Reg signs() {
    return _mm256_blend_ps(set1(1.0f), set1(-1.0f), negative);
  }
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::avx2_kernels() { return &table; }

#else

const linearpatch::KernelTable* linearpatch::avx2_kernels() { return nullptr; }

#endif
