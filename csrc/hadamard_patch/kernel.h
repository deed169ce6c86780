// The patch of a row, y = H (scale (H^T x)), for any vector width. An instruction-set unit defines `Vector` and includes
// this file within its own anonymous namespace; nothing here may come from another header than the two below.
//
// H = kron(H_m, S_inner), and S_inner is a product of butterflies, one for each bit of the index. All of them commute, so
// they are done in the order that suits the machine, and undone in the opposite one:
//
//   outer    x -> w    H_m, or for m = 1 the butterflies of the highest index bits, across registers
//   pass     w -> w    butterflies of the next bits across registers, the lowest lane bit while loading
//   turn     w -> w    the remaining bits, the highest lane bit while loading; scale; the remaining bits back
//   pass     w -> w
//   outer    w -> y
//
// A lane bit costs one fused multiply-add and no shuffle where the two halves of the butterfly are loaded from memory
// twice over ("low", "high"); nothing is ever permuted, so scale, x and y keep their natural order. One bit in the middle
// needs no butterflies at all: with the two scales s, t of its pairs, [1 1; 1 -1] diag(s, t) [1 1; 1 -1] is
// [s + t, s - t; s - t, s + t], a product and a multiply-add with sums of scales that are prepared once for all rows.
// w is a row of float32: y itself where y is float32, else scratch.

#define INLINE __attribute__((always_inline))
#define HOT static inline INLINE
#define UNROLL _Pragma("GCC unroll 512")

using linearpatch::Dtype;
using linearpatch::PatchCall;
using linearpatch::Rows;
using linearpatch::Width;
using Reg = Vector::Reg;

constexpr long lanes = Vector::lanes;
constexpr int widest = Vector::pass_bits;  // a pass holds 1 << widest registers

// The next row comes near while this one is worked on: into the second-level cache, a line for every four vectors in each
// of the first four steps, and into the first-level cache during the last one, when most of what that holds has been used.
// A row of 16-bit numbers has half as many lines: the second half of the first four steps is for the row after it.
struct Ahead {
  const char* x;
  const char* y;

  template <int vectors>
  inline INLINE void to_second_level() {
    UNROLL for (int i = 0; i < (vectors + 3) / 4; ++i) {
      Vector::prefetch_second_level(x + 64 * i);
      Vector::prefetch_second_level(y + 64 * i);
    }
    x += 64 * ((vectors + 3) / 4);
    y += 64 * ((vectors + 3) / 4);
  }

  // From vector c on, whose bytes these are.
  template <int vectors, int bytes>
  inline INLINE void to_first_level(long c) const {
    constexpr int step = bytes < 64 ? 64 / bytes : 1;
    const char *from = x + c * bytes, *to = y + c * bytes;
    asm("" : "+r"(from), "+r"(to));
    UNROLL for (int i = 0; i < vectors; i += step) {
      Vector::prefetch(from + i * bytes);
      Vector::prefetch_write(to + i * bytes);
    }
  }
};

// --- butterflies across registers ---

// Four points in 3 additions and 4 fused multiply-adds instead of 8 additions: with t = b + c + d - a, the outputs are
// 2 a + t, 2 c - t, 2 b - t and 2 d - t (J. Alman, K. Rao, STOC 2023: H_4 is of rank one but for a signed permutation).
HOT void butterfly4(Reg& a, Reg& b, Reg& c, Reg& d) {
  const Reg two = Vector::set1(2.0f);
  const Reg t = Vector::add(Vector::sub(b, a), Vector::add(c, d));
  const Reg second = Vector::multiply_subtract(two, c, t);
  a = Vector::multiply_add(two, a, t);
  c = Vector::multiply_subtract(two, b, t);
  b = second;
  d = Vector::multiply_subtract(two, d, t);
}

HOT void butterfly2(Reg& a, Reg& b) {
  const Reg sum = Vector::add(a, b);
  b = Vector::sub(a, b);
  a = sum;
}

template <int bits>
HOT void butterflies(Reg (&v)[1 << bits]) {
  constexpr int n = 1 << bits;
  if constexpr (bits == 1) butterfly2(v[0], v[1]);
  if constexpr (bits == 3) UNROLL for (int i = 0; i < 4; ++i) butterfly2(v[i], v[i + 4]);
  if constexpr (bits == 4) UNROLL for (int i = 0; i < 4; ++i) butterfly4(v[i], v[i + 4], v[i + 8], v[i + 12]);
  if constexpr (bits >= 2) UNROLL for (int i = 0; i < n; i += 4) butterfly4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

// --- outer: the factor H_m, or the highest bits ---

template <int bits>
struct HighestBits {
  static constexpr int count = 1 << bits;
  HOT void multiply(Reg (&v)[count], Reg (&out)[count]) {
    butterflies<bits>(v);
    UNROLL for (int i = 0; i < count; ++i) out[i] = v[i];
  }
};

template <int M, bool transposed>
struct Paley {
  static constexpr int count = M;
  using Program = Order<M, transposed>;
  HOT void multiply(Reg (&v)[count], Reg (&out)[count]) {
    constexpr int steps = sizeof(Program::steps) / sizeof(Step);
    const Reg half = Vector::set1(0.5f), minus = Vector::set1(-1.0f);
    Reg value[M + steps];
    UNROLL for (int i = 0; i < M; ++i) value[i] = v[i];
    UNROLL for (int i = 0; i < steps; ++i) {
      constexpr auto& all = Program::steps;
      const Reg a = value[all[i].a], b = value[all[i].b];
      value[M + i] = all[i].kind == sum             ? Vector::add(a, b)
                     : all[i].kind == difference    ? Vector::sub(a, b)
                     : all[i].kind == negated_sum   ? Vector::multiply_subtract(minus, a, b)
                     : all[i].kind == plus_half     ? Vector::multiply_add(half, b, a)
                                                    : Vector::negated_multiply_add(half, b, a);
    }
    UNROLL for (int i = 0; i < M; ++i) out[i] = value[Program::outputs[i]];
  }
};

// For every i below count: visit(i, p + i * stride). Four at a time are reached from one pointer that the compiler may not
// take apart: left to itself it keeps every multiple of the stride, and more of them than there are registers.
template <int count, class T, class Visit>
HOT void strided(T* p, long stride, Visit visit) {
  UNROLL for (int i = 0; i < count; ++i) {
    visit(i, p + i % 4 * stride);
    if (i % 4 == 3) {
      p += 4 * stride;
      asm("" : "+r"(p));
    }
  }
}

template <class Outer, class T>
void outer_there(const T* x, float* w, long inner, Ahead& next) {
  Ahead ahead = next;
  for (long c = 0; c < inner; c += lanes) {
    Reg v[Outer::count], out[Outer::count];
    strided<Outer::count>(x + c, inner, [&](int i, const T* p) INLINE { v[i] = Vector::load(p); });
    ahead.to_second_level<Outer::count>();
    Outer::multiply(v, out);
    strided<Outer::count>(w + c, inner, [&](int i, float* p) INLINE { Vector::store(p, out[i]); });
  }
  next = ahead;
}

template <class Outer, class T>
void outer_back(const float* w, T* y, long inner, const Ahead ahead) {
  for (long c = 0; c < inner; c += lanes) {
    Reg v[Outer::count], out[Outer::count];
    strided<Outer::count>(w + c, inner, [&](int i, const float* p) INLINE { v[i] = Vector::load_high(p); });
    ahead.to_first_level<Outer::count, lanes * sizeof(T)>(c / lanes * Outer::count);
    Outer::multiply(v, out);
    strided<Outer::count>(y + c, inner, [&](int i, T* p) INLINE { Vector::store(p, out[i]); });
  }
}

// --- inner: S_inner on each of the contiguous blocks of a row ---

template <int bits, bool low>
void pass(float* w, long floats, long stride, Ahead& next) {
  Ahead ahead = next;
  for (long block = 0; block < floats; block += stride << bits)
    for (long c = block; c < block + stride; c += lanes) {
      Reg v[1 << bits];
      UNROLL for (int i = 0; i < 1 << bits; ++i)
        v[i] = low ? Vector::load_low(w + c + i * stride) : Vector::load(w + c + i * stride);
      ahead.to_second_level<1 << bits>();
      butterflies<bits>(v);
      UNROLL for (int i = 0; i < 1 << bits; ++i) Vector::store(w + c + i * stride, v[i]);
    }
  next = ahead;
}

template <int bits, bool low>
void turn(float* w, const float* scale, long floats, Ahead& next) {
  constexpr int count = 1 << bits;
  Ahead ahead = next;
  for (long c = 0; c < floats; c += lanes << bits) {
    if (c % (4 * lanes) == 0) ahead.to_second_level<count>();
    Reg v[count];
    UNROLL for (int i = 0; i < count; ++i) {
      v[i] = Vector::load_high(w + c + i * lanes);
      if (low) v[i] = Vector::low(v[i]);
    }
    butterflies<bits>(v);
    UNROLL for (int i = 0; i < count; ++i) v[i] = Vector::turned(v[i], scale + c + i * lanes);
    butterflies<bits>(v);
    UNROLL for (int i = 0; i < count; ++i) Vector::store(w + c + i * lanes, low ? Vector::low(v[i]) : v[i]);
  }
  next = ahead;
}

// A block of 1 << bits registers: `across` bits in a pass, the others in the turn. A few thousand floats at a time, so
// that they stay in the first-level cache and no load waits for the store before it.
template <int across, int bits>
void pass_turn_pass(float* w, const float* scale, long floats, Ahead& ahead) {
  constexpr long block = lanes << bits, stride = block >> across;
  constexpr long chunk = block > 4096 ? block : 4096;
  for (long c = 0; c < floats; c += chunk) {
    const long n = floats - c < chunk ? floats - c : chunk;
    pass<across, true>(w + c, n, stride, ahead);
    turn<bits - across, false>(w + c, scale + c, n, ahead);
    pass<across, true>(w + c, n, stride, ahead);
  }
}

void inner_there_and_back(float* w, const float* scale, long floats, long inner, Ahead& ahead) {
  constexpr int P = widest;
  switch (inner / lanes) {
    case 1: return turn<0, true>(w, scale, floats, ahead);
    case 2: return turn<1, true>(w, scale, floats, ahead);
    case 4: return pass_turn_pass<2, 2>(w, scale, floats, ahead);
    case 8: return pass_turn_pass<3, 3>(w, scale, floats, ahead);
    case 16: return pass_turn_pass<P, 4>(w, scale, floats, ahead);
    case 32: return pass_turn_pass<P, 5>(w, scale, floats, ahead);
  }
  if (P == 4 && inner / lanes == 64) return pass_turn_pass<P, P + 2>(w, scale, floats, ahead);
  for (long c = 0; c < floats; c += inner) {
    pass<P, false>(w + c, inner, inner >> P, ahead);
    inner_there_and_back(w + c, scale + c, inner, inner >> P, ahead);
    pass<P, false>(w + c, inner, inner >> P, ahead);
  }
}

// a + b, b - a, a - b and -a - b: bit 0 of the number negates a, bit 1 negates b.
HOT void sums_of_two(Reg a, Reg b, Reg (&sums)[4]) {
  sums[0] = Vector::add(a, b);
  sums[1] = Vector::sub(b, a);
  sums[2] = Vector::sub(a, b);
  sums[3] = Vector::multiply_subtract(Vector::set1(-1.0f), a, b);
}

// H_m for an m without a program: every signed sum of four inputs once, then m / 4 additions for each output.
template <bool high>
void outer_by_table(float* w, long m, long inner, const uint32_t* codes, float* scratch) {
  constexpr long together = 24;  // groups of four whose sums stay in the first-level cache
  const long groups = m / 4;
  float* sums = scratch;
  float* results = scratch + together * 16 * lanes;
  for (long c = 0; c < inner; c += lanes) {
    for (long first = 0; first < groups; first += together) {
      const long last = first + together < groups ? first + together : groups;
      for (long g = first; g < last; ++g) {
        Reg v[4], left[4], right[4];
        UNROLL for (int i = 0; i < 4; ++i) {
          const float* p = w + (4 * g + i) * inner + c;
          v[i] = high ? Vector::load_high(p) : Vector::load(p);
        }
        sums_of_two(v[0], v[1], left);
        sums_of_two(v[2], v[3], right);
        float* group = sums + (g - first) * 16 * lanes;
        UNROLL for (int i = 0; i < 16; ++i) Vector::store(group + i * lanes, Vector::add(left[i % 4], right[i / 4]));
      }
      for (long j = 0; j < m; j += 4) {
        Reg total[4];
        UNROLL for (int i = 0; i < 4; ++i)
          total[i] = first == 0 ? Vector::set1(0.0f) : Vector::load(results + (j + i) * lanes);
        for (long g = first; g < last; ++g)
          UNROLL for (int i = 0; i < 4; ++i) {
            const long sum = codes[(j + i) * groups + g] - 16 * first;
            total[i] = Vector::add(total[i], Vector::load(sums + sum * lanes));
          }
        UNROLL for (int i = 0; i < 4; ++i) Vector::store(results + (j + i) * lanes, total[i]);
      }
    }
    for (long j = 0; j < m; ++j) Vector::store(w + j * inner + c, Vector::load(results + j * lanes));
  }
}

// --- a row ---


template <class T>
using RowFunction = void (*)(const T* x, float* w, T* y, const Width& h, const float* scale, float* scratch, Ahead&);

template <class T, class There, class Back>
void patch_row(const T* x, float* w, T* y, const Width& h, const float* scale, float*, Ahead& ahead) {
  const long inner = h.m * h.inner / There::count;
  const Ahead start = ahead;
  outer_there<There>(x, w, inner, ahead);
  inner_there_and_back(w, scale, h.m * h.inner, inner, ahead);
  outer_back<Back>(w, y, inner, start);
}

void patch_row_by_table(const float*, float* w, float*, const Width& h, const float* scale, float* scratch, Ahead& ahead) {
  outer_by_table<false>(w, h.m, h.inner, h.codes_transposed, scratch);
  inner_there_and_back(w, scale, h.m * h.inner, h.inner, ahead);
  outer_by_table<true>(w, h.m, h.inner, h.codes, scratch);
}

template <class T>
RowFunction<T> row_function(const Width& h) {
  if (h.m == 1 && h.inner < lanes << widest) return patch_row<T, HighestBits<0>, HighestBits<0>>;
  if (h.m == 1) return patch_row<T, HighestBits<widest>, HighestBits<widest>>;
  if (h.has_program) switch (h.m) {
      case 12: return patch_row<T, Paley<12, true>, Paley<12, false>>;
      case 20: return patch_row<T, Paley<20, true>, Paley<20, false>>;
      case 28: return patch_row<T, Paley<28, true>, Paley<28, false>>;
      case 36: return patch_row<T, Paley<36, true>, Paley<36, false>>;
    }
  return nullptr;
}

// w = x * pre in float32.
template <class T>
void stage_in(const T* x, const float* pre, float* w, long n) {
  for (long c = 0; c < n; c += lanes) {
    const Reg v = Vector::load(x + c);
    Vector::store(w + c, pre ? Vector::mul(v, Vector::load(pre + c)) : v);
  }
}

// y = w * post in y's type.
template <class T>
void stage_out(const float* w, const float* post, T* y, long n) {
  for (long c = 0; c < n; c += lanes) {
    const Reg v = Vector::load(w + c);
    Vector::store(y + c, post ? Vector::mul(v, Vector::load(post + c)) : v);
  }
}

constexpr long table_floats(long m) { return (24 * 16 + m) * lanes; }

int64_t scratch_floats(const PatchCall& call) {
  const Width& h = *call.width;
  return h.m * h.inner + (h.has_program || h.m == 1 ? 0 : table_floats(h.m));
}

// Where the work happens: in y where it is float32, so that a row of the cache less is needed.
HOT float* work_row(float* y, float*) { return y; }
template <class T>
HOT float* work_row(T*, float* scratch) { return scratch; }

template <class T>
void patch_rows(const PatchCall& call, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner;
  const auto direct = call.pre || call.post ? nullptr : row_function<T>(h);
  const auto staged = row_function<float>(h) ? row_function<float>(h) : patch_row_by_table;
  const auto row = [&](const Rows& rows, long r) {
    return static_cast<T*>(rows.data) + r / call.run * rows.outer + r % call.run * rows.inner;
  };
  for (long r = begin; r < end; ++r) {
    const bool more = r + 1 < end;
    const T* x = row(call.x, r);
    T* y = row(call.y, r);
    const void* const here = work_row(y, scratch);  // the last row has nothing to wait for
    Ahead ahead{static_cast<const char*>(more ? row(call.x, r + 1) : here),
                static_cast<const char*>(more ? row(call.y, r + 1) : here)};
    for (long b = 0; b < h.d; b += n) {
      if (direct) {
        direct(x + b, work_row(y + b, scratch), y + b, h, call.scale + b, nullptr, ahead);
        continue;
      }
      stage_in(x + b, call.pre ? call.pre + b : nullptr, scratch, n);
      staged(scratch, scratch, scratch, h, call.scale + b, scratch + n, ahead);
      stage_out(scratch, call.post ? call.post + b : nullptr, y + b, n);
    }
  }
}

template <class T>
void widen_as(const T* v, float factor, bool fold, float* out, long count) {
  for (long c = 0; c < count; c += lanes) {
    const Reg value = Vector::mul(Vector::load(v + c), Vector::set1(factor));
    Vector::store(out + c, Vector::canonical(fold ? Vector::folded(value) : value));
  }
}

void widen(const void* v, Dtype dtype, float factor, bool fold, float* out, int64_t count) {
  switch (dtype) {
    case Dtype::float32: return widen_as(static_cast<const float*>(v), factor, fold, out, count);
    case Dtype::float16: return widen_as(static_cast<const Half*>(v), factor, fold, out, count);
    case Dtype::bfloat16: return widen_as(static_cast<const BFloat16*>(v), factor, fold, out, count);
  }
}

void patch(const PatchCall& call, int64_t begin, int64_t end, float* scratch) {
  switch (call.dtype) {
    case Dtype::float32: return patch_rows<float>(call, begin, end, scratch);
    case Dtype::float16: return patch_rows<Half>(call, begin, end, scratch);
    case Dtype::bfloat16: return patch_rows<BFloat16>(call, begin, end, scratch);
  }
}

constexpr linearpatch::KernelTable table = {Vector::isa, lanes, scratch_floats, widen, patch};
