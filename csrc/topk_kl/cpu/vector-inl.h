// A register of `lanes` floats, as the compiler's own vectors, and what moves to and from it.

typedef float Reg __attribute__((vector_size(4 * lanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * lanes)));
typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

constexpr float infinity = __builtin_inff();

HOT Reg broadcast(float a) { return a - Reg{}; }
HOT bool is_infinite(float a) { return __builtin_fabsf(a) == infinity; }

HOT Reg load(const float* p) {
  Reg v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// 16-bit numbers: all of a register at once, or one by one where the unit's words are.
template <class T>
HOT Reg load(const T* p) {
  if constexpr (lanes == Words::lanes) {
    return Words::load(p);
  } else {
    Reg v;
    UNROLL for (int i = 0; i < lanes; ++i) v[i] = Words::load(p + i);
    return v;
  }
}

HOT void store(float* p, Reg v) { __builtin_memcpy(p, &v, sizeof v); }
// As Words::store wants it: only a BFloat16 must not be a NaN with a lower half.
template <class V>
HOT V storable(const Half*, V v) { return v; }
template <class V>
HOT V storable(const BFloat16*, V v) { return Words::canonical(v); }
template <class T>
HOT void store(T* p, Reg v) {
  if constexpr (lanes == Words::lanes)
    Words::store(p, storable(p, v));
  else
    UNROLL for (int i = 0; i < lanes; ++i) Words::store(p + i, storable(p, static_cast<float>(v[i])));
}

// The first n of a register's numbers, zeros behind them.
template <class T>
HOT Reg load_part(const T* p, long n) {
  T part[lanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
HOT void store_part(T* p, Reg v, long n) {
  T part[lanes];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}

HOT float number(const float* p) { return *p; }
template <class T>
HOT float number(const T* p) {
  return load_part(p, 1)[0];
}

// Two registers at once, in the order in which it is cheapest: 16-bit brain floats as the even and the odd ones, because
// a pair of them is two float32 but for a shift and a mask.
template <class T>
HOT void load_pair(const T* p, Reg& a, Reg& b) {
  a = load(p);
  b = load(p + lanes);
}
HOT void load_pair(const BFloat16* p, Reg& a, Reg& b) {
  Bits pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  a = (Reg)(pairs << 16);
  b = (Reg)(pairs & 0xffff0000u);
}
template <class T>
HOT void load_pair_part(const T* p, long n, Reg& a, Reg& b) {
  T part[2 * lanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  load_pair(part, a, b);
}

// Lanes in another order. Written as a table: of a loop that fills a register the compiler makes code that fills it lane
// by lane, every time.
struct Order {
  int32_t lane[lanes];
  template <class Rule>
  constexpr explicit Order(Rule rule) : lane{} {
    for (int i = 0; i < lanes; ++i) lane[i] = rule(i);
  }
  static INLINE Ints get(const Order& order) {
    Ints v;
    __builtin_memcpy(&v, order.lane, sizeof v);
    return v;
  }
};
constexpr Order even([](int i) { return 2 * i; }), odd([](int i) { return 2 * i + 1; });
constexpr Order low([](int i) { return i / 2 + i % 2 * lanes; }), high([](int i) { return (i + lanes) / 2 + i % 2 * lanes; });

// Registers of consecutive numbers to that order, and back.
template <class T>
HOT void to_order(const T*, Reg&, Reg&) {}
template <class T>
HOT void from_order(const T*, Reg&, Reg&) {}
HOT void to_order(const BFloat16*, Reg& a, Reg& b) {
  const Reg first = a;
  a = __builtin_shuffle(first, b, Order::get(even));
  b = __builtin_shuffle(first, b, Order::get(odd));
}
HOT void from_order(const BFloat16*, Reg& a, Reg& b) {
  const Reg first = a;
  a = __builtin_shuffle(first, b, Order::get(low));
  b = __builtin_shuffle(first, b, Order::get(high));
}

template <int half = lanes / 2>
HOT float sum(Reg v) {
  static constexpr Order other([](int i) { return i ^ half; });
  v += __builtin_shuffle(v, Order::get(other));
  if constexpr (half > 1) return sum<half / 2>(v);
  return v[0];
}
HOT Reg larger(Reg a, Reg b) { return a > b ? a : b; }  // b where one is NaN
HOT float largest(Reg v) {
  float most = v[0];
  UNROLL for (int i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

HOT void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }  // to the second-level cache

// exp and log to a unit in the last place or two, by Cephes' polynomials (S. L. Moshier, expf and logf). exp is 0 below
// -87.3, where it would be subnormal.
HOT Reg exp_of(Reg x) {
  const Reg round = broadcast(0x1.8p23f);
  const Reg n = x * 0x1.715476p0f + round;
  const Ints exponent = (Ints)n << 23;
  const Reg r = x - (n - round) * 0.693359375f - (n - round) * -2.12194440e-4f;
  Reg y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  y = (Reg)((Ints)y + exponent);
  y = x < -87.3f ? Reg{} : y;
  return x > 88.7f ? broadcast(infinity) : x == x ? y : x;
}

HOT Reg log_of(Reg x) {
  const Ints subnormal = x < 0x1p-126f;
  const Reg scaled = subnormal ? x * 0x1p23f : x;
  const Ints bits = (Ints)scaled;
  // The mantissa in [sqrt(1/2), sqrt(2)).
  const Ints shift = (bits - 0x3f3504f3) >> 23;
  const Reg m = (Reg)(bits - (shift << 23)) - 1.0f;
  const Reg e = __builtin_convertvector(subnormal ? shift - 23 : shift, Reg);
  Reg y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * (m * m) + e * -2.12194440e-4f - m * m * 0.5f;
  y = m + y + e * 0.693359375f;
  y = x == 0.0f ? broadcast(-infinity) : x < 0.0f ? broadcast(__builtin_nanf("")) : y;
  return x < infinity ? y : x;  // infinity, and NaN
}

// tanh, by Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
HOT Reg tanh_of(Reg x) {
  const Reg s = x * x;
  Reg y = s * -5.70498872745e-3f + 2.06390887954e-2f;
  y = y * s - 5.37397155531e-2f;
  y = y * s + 1.33314422036e-1f;
  y = y * s - 3.33332819422e-1f;
  y = y * s * x + x;
  const Reg magnitude = x < 0.0f ? -x : x;
  const Reg far = 1.0f - 2.0f / (exp_of(magnitude * 2.0f) + 1.0f);
  return magnitude < 0.625f ? y : x < 0.0f ? -far : far;
}

// out = row in float32, zeros up to a multiple of two registers.
template <class T>
HOT void widen_row(const T* row, long n, float* out) {
  long c = 0;
  for (; c + lanes <= n; c += lanes) store(out + c, load(row + c));
  for (; c < (n + 2 * lanes - 1) / (2 * lanes) * 2 * lanes; c += lanes)
    store(out + c, c < n ? load_part(row + c, n - c) : Reg{});
}
