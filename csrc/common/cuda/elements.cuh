// Eight elements of a tensor at a time. The includer has device.cuh or tests/simt/simt.h before it; nothing here knows which.
#pragma once

#include "../dtype.h"

#define DEVICE __device__ __forceinline__

namespace linearpatch::cuda {

// Eight consecutive elements as they lie in memory, the upper half only of float32.
struct Raw {
  uint4 low, high;
};

template <class Visit>
DEVICE void unpack8(float, const Raw& raw, int first, Visit visit) {
  const uint32_t words[] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w, raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) visit(first + i, __uint_as_float(words[i]));
}
template <class T, class Visit>
DEVICE void unpack8(T type, const Raw& raw, int first, Visit visit) {
  const uint32_t words[] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(type, words[i]);
    visit(first + 2 * i, two.x), visit(first + 2 * i + 1, two.y);
  }
}
DEVICE void store8(float, char* p, const float* v) {
#pragma unroll
  for (int i = 0; i < 8; i += 4)
    store16(p + 4 * i, make_uint4(__float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]),
                                  __float_as_uint(v[i + 3])));
}
template <class T>
DEVICE void store8(T type, char* p, const float* v) {
  store16(p, make_uint4(pack(type, v[0], v[1]), pack(type, v[2], v[3]), pack(type, v[4], v[5]), pack(type, v[6], v[7])));
}

// The type of a tensor's elements where the compiler knows it, and where it doesn't: one kernel for all three then. What
// is done to several vectors is asked of `with`: a load behind a branch of its own waits for the load before it.
template <class T>
struct Known {
  static constexpr int bytes = sizeof(T) == 4 ? 4 : 2;
  DEVICE explicit Known(Dtype) {}
  DEVICE Raw fetch(const char* row, int i) const {
    const char* const p = row + i * bytes;
    Raw raw;
    raw.low = load16(p);
    if constexpr (bytes == 4) raw.high = load16(p + 16);
    return raw;
  }
  template <class Function>
  DEVICE void with(Function f) const { f(*this); }
  // visit(i, element i of n vectors)
  template <int n, class Visit>
  DEVICE void each(const Raw (&raw)[n], Visit visit) const {
#pragma unroll
    for (int h = 0; h < n; ++h) unpack8(T{}, raw[h], 8 * h, visit);
  }
  DEVICE float one(const char* row, int i) const {
    if constexpr (bytes == 4)
      return read(reinterpret_cast<const float*>(row) + i);
    else
      return unpack(T{}, load2(row + i * bytes)).x;
  }
  DEVICE void load(const char* row, int i, float* v) const {
    unpack8(T{}, fetch(row, i), 0, [&](int e, float value) { v[e] = value; });
  }
  DEVICE void store(char* row, int i, const float* v) const { store8(T{}, row + i * bytes, v); }
};

template <class T>
DEVICE void load8(T, const char* p, float* v) {
  Known<T>(Dtype{}).load(p, 0, v);
}

// f(Known<...>) of a type.
template <class Function>
DEVICE void with_known_type(Dtype dtype, Function f) {
  if (dtype == Dtype::float32) return f(Known<float>(dtype));
  if (dtype == Dtype::float16) return f(Known<Half>(dtype));
  f(Known<BFloat16>(dtype));
}

struct Any {
  Dtype dtype;
  DEVICE explicit Any(Dtype dtype) : dtype(dtype) {}
  template <class Function>
  DEVICE void with(Function f) const { with_known_type(dtype, f); }
  DEVICE float one(const char* row, int i) const {
    float v = 0;
    with([&](auto type) { v = type.one(row, i); });
    return v;
  }
  DEVICE void load(const char* row, int i, float* v) const {
    with([&](auto type) { type.load(row, i, v); });
  }
  DEVICE void store(char* row, int i, const float* v) const {
    with([&](auto type) { type.store(row, i, v); });
  }
};

}  // namespace linearpatch::cuda
