#include "kernel_table.h"

#if defined(__x86_64__)
#include "../../common/cpu/avx512-inl.h"

#include "../orders.h"

namespace {

struct Vector : Words {
  static constexpr int pass_bits = 4;
  static constexpr int rows_together = 8;

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
  template <unsigned negative>
  HOT Reg signs() {
    constexpr auto sign = [](int lane) { return negative >> lane & 1 ? -1.0f : 1.0f; };
    return Reg{sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
               sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
  }
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::avx512_kernels() { return &table; }

#else

const linearpatch::KernelTable* linearpatch::avx512_kernels() { return nullptr; }

#endif
