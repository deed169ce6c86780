// A row's way to the basis of H and back, y = H (scale (H^T x)), for any vector width.
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

// For two rows that are worked on side by side.
struct Aheads {
  Ahead u, a;
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

// w = H_m (or the highest bits of S) x, of x * factor where there is one.
template <class Outer, class T>
void outer_there(const T* x, const float* factor, float* w, long inner, Ahead& next) {
  Ahead ahead = next;
  for (long c = 0; c < inner; c += lanes) {
    Reg v[Outer::count], out[Outer::count];
    strided<Outer::count>(x + c, inner, [&](int i, const T* p) INLINE { v[i] = Vector::load(p); });
    if (factor)
      strided<Outer::count>(factor + c, inner, [&](int i, const float* p) INLINE { v[i] = Vector::mul(v[i], Vector::load(p)); });
    ahead.to_second_level<Outer::count>();
    Outer::multiply(v, out);
    strided<Outer::count>(w + c, inner, [&](int i, float* p) INLINE { Vector::store(p, out[i]); });
  }
  next = ahead;
}

// The sum over the rows of what a row comes back as, times a row of a tensor.
template <class T>
struct Product {
  const T* other;
  float* sum;  // or null: not wanted
};

// y = H_m^T w, times factor where there is one, or nothing where there is no y.
template <class Outer, class T>
void outer_back(const float* w, const float* factor, T* y, Product<T> product, long inner, const Ahead ahead) {
  for (long c = 0; c < inner; c += lanes) {
    Reg v[Outer::count], out[Outer::count];
    strided<Outer::count>(w + c, inner, [&](int i, const float* p) INLINE { v[i] = Vector::load_high(p); });
    ahead.to_first_level<Outer::count, lanes * sizeof(T)>(c / lanes * Outer::count);
    Outer::multiply(v, out);
    if (product.sum) {
      strided<Outer::count>(product.other + c, inner, [&](int i, const T* p) INLINE { v[i] = Vector::mul(out[i], Vector::load(p)); });
      strided<Outer::count>(product.sum + c, inner,
                            [&](int i, float* p) INLINE { Vector::store(p, Vector::add(Vector::load(p), v[i])); });
      if (!y) continue;
    }
    if (factor)
      strided<Outer::count>(factor + c, inner,
                            [&](int i, const float* p) INLINE { out[i] = Vector::mul(out[i], Vector::load(p)); });
    strided<Outer::count>(y + c, inner, [&](int i, T* p) INLINE { Vector::store(p, out[i]); });
  }
}

// --- inner: S_inner on each of the contiguous blocks of a row ---

// n scales from c on, as Vector::turned wants them.
void fold(const Unfolded& scale, long c, long n, float* out) {
  with_type(scale.dtype, [&]<class S>(const S*) { widen_values(static_cast<const S*>(scale.values) + c, scale.factor, true, out, n); });
}

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

// What is done to a row once it is in the basis of H. A work says which rows of float32 take part, and has the turn.
//
// The patch itself, for a part of a row that begins at `offset` of the scale.
struct Patching {
  float* w;
  const PatchCall& call;
  long offset;

  template <int bits, bool low>
  void there(long begin, long floats, long stride, Ahead& ahead) {
    pass<bits, low>(w + begin, floats, stride, ahead);
  }
  template <int bits, bool low>
  void back(long begin, long floats, long stride, Ahead& ahead) {
    pass<bits, low>(w + begin, floats, stride, ahead);
  }

  template <int bits, bool low>
  void turn(long begin, long floats, Ahead& next) {
    if (call.scale) return turn_with<bits, low>(w + begin, call.scale + offset + begin, floats, next);
    alignas(64) float folded[folded_together + lanes];
    for (long c = begin; c < begin + floats; c += folded_together) {
      const long n = begin + floats - c < folded_together ? begin + floats - c : folded_together;
      fold(call.unfolded, offset + c, n, folded);
      turn_with<bits, low>(w + c, folded, n, next);
    }
  }

 private:
  static constexpr long folded_together = 1024;

  template <int bits, bool low>
  HOT void turn_with(float* const row, const float* const scales, long floats, Ahead& next) {
    constexpr int count = 1 << bits;
    Ahead ahead = next;
    for (long c = 0; c < floats; c += lanes << bits) {
      if (c % (4 * lanes) == 0) ahead.to_second_level<count>();
      Reg v[count];
      UNROLL for (int i = 0; i < count; ++i) {
        v[i] = Vector::load_high(row + c + i * lanes);
        if (low) v[i] = Vector::low(v[i]);
      }
      butterflies<bits>(v);
      UNROLL for (int i = 0; i < count; ++i) v[i] = Vector::turned(v[i], scales + c + i * lanes);
      butterflies<bits>(v);
      UNROLL for (int i = 0; i < count; ++i) Vector::store(row + c + i * lanes, low ? Vector::low(v[i]) : v[i]);
    }
    next = ahead;
  }
};

// Its gradients. u is the row x on its way, a the gradient dy; in the basis, dscale += a * u, and a * scale goes back to
// become dx, u * scale to become what the gradient of post needs.
struct Differentiating {
  float* u;  // or null: no gradient of scale or post is wanted
  float* a;
  const float* scale;
  float* dscale;  // or null
  bool a_back, u_back;

  template <int bits, bool low>
  void there(long begin, long floats, long stride, Aheads& ahead) {
    if (u) pass<bits, low>(u + begin, floats, stride, ahead.u);
    pass<bits, low>(a + begin, floats, stride, ahead.a);
  }
  template <int bits, bool low>
  void back(long begin, long floats, long stride, Aheads& ahead) {
    if (a_back) pass<bits, low>(a + begin, floats, stride, ahead.a);
    if (u_back) pass<bits, low>(u + begin, floats, stride, ahead.u);
  }

  template <int bits, bool low>
  void turn(long begin, long floats, Aheads& next) {
    constexpr int count = 1 << bits;
    const auto [u, a, scale, dscale, a_back, u_back] = *this;  // which the stores below cannot change
    Aheads ahead = next;
    for (long c = begin; c < begin + floats; c += lanes << bits) {
      if (c % (4 * lanes) == 0) {
        ahead.u.template to_second_level<count>();
        ahead.a.template to_second_level<count>();
      }
      Reg a_there[count], u_there[count] = {};
      in_basis<bits, low>(a + c, a_there);
      if (u) in_basis<bits, low>(u + c, u_there);
      if (dscale)
        UNROLL for (int i = 0; i < count; ++i) {
          float* sum = dscale + c + i * lanes;
          Vector::store(sum, Vector::multiply_add(a_there[i], u_there[i], Vector::load(sum)));
        }
      if (a_back) scaled_back<bits, low>(a_there, scale + c, a + c);
      if (u_back) scaled_back<bits, low>(u_there, scale + c, u + c);
    }
    next = ahead;
  }

 private:
  template <int bits, bool low>
  HOT void in_basis(const float* w, Reg (&v)[1 << bits]) {
    UNROLL for (int i = 0; i < 1 << bits; ++i) {
      v[i] = Vector::middle(Vector::load_high(w + i * lanes));
      if (low) v[i] = Vector::low(v[i]);
    }
    butterflies<bits>(v);
  }
  template <int bits, bool low>
  HOT void scaled_back(Reg (&v)[1 << bits], const float* scale, float* w) {
    UNROLL for (int i = 0; i < 1 << bits; ++i) v[i] = Vector::mul(v[i], Vector::load(scale + i * lanes));
    butterflies<bits>(v);
    UNROLL for (int i = 0; i < 1 << bits; ++i) {
      v[i] = Vector::middle(v[i]);
      Vector::store(w + i * lanes, low ? Vector::low(v[i]) : v[i]);
    }
  }
};

// A block of 1 << bits registers: `across` bits in a pass, the others in the turn. A few
// thousand floats at a time, so that they stay in the first-level cache and no load waits for the store before it.
template <int across, int bits, class Work, class Fetch>
void pass_turn_pass(Work& work, long begin, long floats, Fetch& ahead) {
  constexpr long block = lanes << bits, stride = block >> across;
  constexpr long chunk = block > 4096 ? block : 4096;
  for (long c = begin; c < begin + floats; c += chunk) {
    const long n = begin + floats - c < chunk ? begin + floats - c : chunk;
    work.template there<across, true>(c, n, stride, ahead);
    work.template turn<bits - across, false>(c, n, ahead);
    work.template back<across, true>(c, n, stride, ahead);
  }
}

// S_inner there, the work, S_inner back, on every block of `inner` of the floats from `begin` on.
template <class Work, class Fetch>
void inner_there_and_back(Work& work, long begin, long floats, long inner, Fetch& ahead) {
  constexpr int P = widest;
  switch (inner / lanes) {
    case 1: return work.template turn<0, true>(begin, floats, ahead);
    case 2: return work.template turn<1, true>(begin, floats, ahead);
    case 4: return pass_turn_pass<2, 2>(work, begin, floats, ahead);
    case 8: return pass_turn_pass<3, 3>(work, begin, floats, ahead);
    case 16: return pass_turn_pass<P, 4>(work, begin, floats, ahead);
    case 32: return pass_turn_pass<P, 5>(work, begin, floats, ahead);
  }
  if (P == 4 && inner / lanes == 64) return pass_turn_pass<P, P + 2>(work, begin, floats, ahead);
  for (long c = begin; c < begin + floats; c += inner) {
    work.template there<P, false>(c, inner, inner >> P, ahead);
    inner_there_and_back(work, c, inner, inner >> P, ahead);
    work.template back<P, false>(c, inner, inner >> P, ahead);
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

// --- the outer step of a width ---

// out = v * factor, if there is one; out may be v.
template <class From, class To>
void multiply_row(const From* v, const float* factor, To* out, long n) {
  if (!factor && static_cast<const void*>(v) == out) return;
  for (long c = 0; c < n; c += lanes) {
    const Reg a = Vector::load(v + c);
    Vector::store(out + c, factor ? Vector::mul(a, Vector::load(factor + c)) : a);
  }
}

constexpr long table_floats(long m) { return (24 * 16 + m) * lanes; }

template <class T>
struct Outer {
  void (*there)(const T* x, const float* factor, float* w, const Width&, float* table, Ahead&);
  void (*back)(float* w, const float* factor, T* y, Product<T>, const Width&, float* table, const Ahead&);
  long inner;  // what is left to the passes and the turn
};

template <class T, class There, class Back>
Outer<T> across_registers(const Width& h) {
  return {[](const T* x, const float* factor, float* w, const Width& h, float*, Ahead& ahead) {
            outer_there<There>(x, factor, w, h.m * h.inner / There::count, ahead);
          },
          [](float* w, const float* factor, T* y, Product<T> product, const Width& h, float*, const Ahead& ahead) {
            outer_back<Back>(w, factor, y, product, h.m * h.inner / Back::count, ahead);
          },
          static_cast<long>(h.m * h.inner / There::count)};
}

template <class T>
Outer<T> outer_of(const Width& h) {
  if (h.m == 1 && h.inner < lanes << widest) return across_registers<T, HighestBits<0>, HighestBits<0>>(h);
  if (h.m == 1) return across_registers<T, HighestBits<widest>, HighestBits<widest>>(h);
  if (h.has_program) switch (h.m) {
      case 12: return across_registers<T, Paley<12, true>, Paley<12, false>>(h);
      case 20: return across_registers<T, Paley<20, true>, Paley<20, false>>(h);
      case 28: return across_registers<T, Paley<28, true>, Paley<28, false>>(h);
      case 36: return across_registers<T, Paley<36, true>, Paley<36, false>>(h);
    }
  return {[](const T* x, const float* factor, float* w, const Width& h, float* table, Ahead&) {
            multiply_row(x, factor, w, h.m * h.inner);
            outer_by_table<false>(w, h.m, h.inner, h.codes_transposed, table);
          },
          [](float* w, const float* factor, T* y, Product<T> product, const Width& h, float* table, const Ahead&) {
            const long n = h.m * h.inner;
            outer_by_table<true>(w, h.m, h.inner, h.codes, table);
            for (long c = 0; product.sum && c < n; c += lanes) {
              float* const sum = product.sum + c;
              const Reg other = Vector::load(product.other + c);
              Vector::store(sum, Vector::add(Vector::load(sum), Vector::mul(Vector::load(w + c), other)));
            }
            if (y) multiply_row(w, factor, y, n);
          },
          static_cast<long>(h.inner)};
}
