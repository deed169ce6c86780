// One float at a time, on any machine; also for rows that are too short for a vector unit.
#include "kernel_table.h"
#include "../orders.h"

namespace {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

struct Vector {
  using Reg = float;
  static constexpr const char* isa = "scalar";
  static constexpr long lanes = 1;
  static constexpr int pass_bits = 3;
  static constexpr int rows_together = 4;

#define HOT static inline __attribute__((always_inline))
  HOT Reg set1(float a) { return a; }
  HOT Reg add(Reg a, Reg b) { return a + b; }
  HOT Reg sub(Reg a, Reg b) { return a - b; }
  HOT Reg mul(Reg a, Reg b) { return a * b; }
  HOT Reg multiply_add(Reg a, Reg b, Reg c) { return a * b + c; }
  HOT Reg multiply_subtract(Reg a, Reg b, Reg c) { return a * b - c; }
  HOT Reg negated_multiply_add(Reg a, Reg b, Reg c) { return c - a * b; }
  HOT void prefetch(const void*) {}  // by the line, not by the float: left to the machine
  HOT void prefetch_second_level(const void*) {}
  HOT void prefetch_write(const void*) {}

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
  // Round to nearest even by the addition of a power of two whose last place is that of the half.
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

  // No lanes, no butterflies between them.
  HOT Reg load_low(const float* p) { return *p; }
  HOT Reg low(Reg v) { return v; }
  HOT Reg load_high(const float* p) { return *p; }
  HOT Reg turned(Reg v, const float* scale) { return v * *scale; }
  HOT Reg middle(Reg v) { return v; }
  HOT Reg folded(Reg v) { return v; }

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
#undef HOT
};

#include "kernel-inl.h"

}  // namespace

const linearpatch::KernelTable* linearpatch::scalar_kernels() { return &table; }
