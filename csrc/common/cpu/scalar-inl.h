// Any machine: one float at a time.
#include "../dtype.h"

namespace {

#include "simd-inl.h"

struct Words {
  using Reg = float;
  static constexpr long lanes = 1;

  HOT Reg load(const float* p) { return *p; }
  // The exponent is moved by a product, which also makes subnormal halves right; infinity and NaN are told apart.
  HOT Reg load(const Half* p) {
    const uint32_t magnitude = (p->bits & 0x7fffu) << 13, sign = (p->bits & 0x8000u) << 16;
    if (magnitude >= 0x7c00u << 13) return real(sign | magnitude | 0x70000000u);
    return real(sign | raw(real(magnitude) * 0x1p112f));
  }
  HOT Reg load(const BFloat16* p) { return real(static_cast<uint32_t>(p->bits) << 16); }
  HOT Reg canonical(Reg v) { return v == v ? v : __builtin_nanf(""); }
  HOT void store(float* p, Reg v) { *p = v; }
  // Below the first normal half by the addition of a number whose last place is that of the half.
  HOT void store(Half* p, Reg v) {
    const uint32_t bits = raw(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u)
      half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
    else if (magnitude >= 0x477ff000u)  // 65520, the first that rounds to infinity
      half = 0x7c00u;
    else if (magnitude < 0x38800000u)  // 2^-14, the first normal half
      half = raw(real(magnitude) + 0.5f) - raw(0.5f);
    else
      half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
    p->bits = static_cast<uint16_t>(sign | half);
  }
  HOT void store(BFloat16* p, Reg v) {
    const uint32_t bits = raw(v);
    p->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }

 private:
  HOT uint32_t raw(float a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    return bits;
  }
  HOT float real(uint32_t bits) {
    float a;
    __builtin_memcpy(&a, &bits, 4);
    return a;
  }
};

}  // namespace
