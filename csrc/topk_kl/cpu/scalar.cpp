// Any machine: four floats at a time, which the compiler turns into whatever its target has.
#include "kernel_table.h"

namespace {

constexpr const char* isa = "scalar";
constexpr long lanes = 4;

struct Half { uint16_t bits; };
typedef float Four __attribute__((vector_size(16)));

static inline float real(uint32_t bits) {
  float a;
  __builtin_memcpy(&a, &bits, 4);
  return a;
}
static inline uint32_t raw(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}

// The exponent is moved by a product, which also makes subnormal halves right; infinity and NaN are told apart.
static inline float from_half(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u << 13) return real(sign | magnitude | 0x70000000u);
  return real(sign | raw(real(magnitude) * 0x1p112f));
}
// Round to nearest even; below the first normal half by the addition of a number whose last place is that of the half.
static inline uint16_t to_half(float v) {
  const uint32_t bits = raw(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;  // 65520, the first that rounds to infinity
  else if (magnitude < 0x38800000u) half = raw(real(magnitude) + 0.5f) - raw(0.5f);
  return static_cast<uint16_t>(sign | half);
}
static inline Four load_half(const Half* p) {
  return Four{from_half(p[0].bits), from_half(p[1].bits), from_half(p[2].bits), from_half(p[3].bits)};
}
static inline void store_half(Half* p, Four v) {
  for (int i = 0; i < 4; ++i) p[i].bits = to_half(v[i]);
}

#include "kernel-inl.h"

}  // namespace

const linearpatch::topk_kl::KernelTable* linearpatch::topk_kl::scalar_kernels() { return &table; }
