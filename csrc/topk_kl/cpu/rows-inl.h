// Dot products with rows of a matrix, and sums of them: a few rows at a time, while the next ones are fetched.

constexpr long padded(long n) { return (n + 2 * lanes - 1) / (2 * lanes) * 2 * lanes; }

constexpr int together = 4;

// What will be wanted: beside every 128 bytes of row r, `lines` cache lines from here on are asked for.
struct Ahead {
  const char* from[together];
};

template <class T>
constexpr long chunk = 128 / sizeof(T);

template <int count, int lines>
HOT void fetch(const Ahead& ahead, long lines_done) {
  UNROLL for (int r = 0; r < count; ++r)
    UNROLL for (int i = 0; i < lines; ++i) prefetch(ahead.from[r] + 64 * (lines * lines_done + i));
}

// z[r] = h . row[r]; h is in the rows' order and zero from d on.
template <int count, int lines, class T>
HOT void dot_rows(const float* h, const T* const* row, long d, float* z, const Ahead& ahead) {
  Reg sums[count][2] = {};
  const auto add = [&](long c, int r, Reg a, Reg b) INLINE {
    sums[r][0] += a * load(h + c);
    sums[r][1] += b * load(h + c + lanes);
  };
  long c = 0;
  for (; c + chunk<T> <= d; c += chunk<T>) {
    fetch<count, lines>(ahead, c / chunk<T>);
    UNROLL for (long i = 0; i < chunk<T>; i += 2 * lanes)
      UNROLL for (int r = 0; r < count; ++r) {
        Reg a, b;
        load_pair(row[r] + c + i, a, b);
        add(c + i, r, a, b);
      }
  }
  for (; c < d; c += 2 * lanes)
    for (int r = 0; r < count; ++r) {
      Reg a, b;
      load_pair_part(row[r] + c, d - c < 2 * lanes ? d - c : 2 * lanes, a, b);
      add(c, r, a, b);
    }
  UNROLL for (int r = 0; r < count; ++r) z[r] = sum(sums[r][0] + sums[r][1]);
}

// total += the sum of factors[r] * row[r], in the rows' order.
template <int count, int lines, class T>
HOT void add_rows(const float* factors, const T* const* row, long d, float* total, const Ahead& ahead) {
  Reg factor[count];
  UNROLL for (int r = 0; r < count; ++r) factor[r] = broadcast(factors[r]);
  const auto add = [&](long c, auto load_rows) INLINE {
    Reg first = load(total + c), second = load(total + c + lanes);
    UNROLL for (int r = 0; r < count; ++r) {
      Reg a, b;
      load_rows(r, a, b);
      first += a * factor[r];
      second += b * factor[r];
    }
    store(total + c, first);
    store(total + c + lanes, second);
  };
  long c = 0;
  for (; c + chunk<T> <= d; c += chunk<T>) {
    fetch<count, lines>(ahead, c / chunk<T>);
    UNROLL for (long i = 0; i < chunk<T>; i += 2 * lanes)
      add(c + i, [&](int r, Reg& a, Reg& b) INLINE { load_pair(row[r] + c + i, a, b); });
  }
  for (; c < d; c += 2 * lanes)
    add(c, [&](int r, Reg& a, Reg& b) INLINE {
      load_pair_part(row[r] + c, d - c < 2 * lanes ? d - c : 2 * lanes, a, b);
    });
}

// Rows of a matrix by number.
template <class T>
struct Matrix {
  const T* data;
  long stride, d;
  const T* operator[](long i) const { return data + i * stride; }
};

// What to fetch while the rows of a list are met: row rows[i] of the same matrix beside row i of the list; past the end,
// the last one again.
struct Next {
  const int32_t* rows = nullptr;
  long count = 0;

  template <int met, class T>
  INLINE Ahead beside(const Matrix<T>& m, long i) const {
    Ahead ahead;
    UNROLL for (int r = 0; r < met; ++r)
      ahead.from[r] = reinterpret_cast<const char*>(m[rows[i + r < count ? i + r : count - 1]]);
    return ahead;
  }
};

template <int count, class T, class Work>
HOT void some_rows(const Matrix<T>& m, const int32_t* list, long i, Work work) {
  const T* row[count];
  UNROLL for (int r = 0; r < count; ++r) row[r] = m[list[i + r]];
  work(row);
}

template <int lines, class T>
void dots_of(const Matrix<T>& m, const int32_t* list, long count, const float* h, float* z, const Next& next) {
  long i = 0;
  for (; i + together <= count; i += together)
    some_rows<together>(m, list, i, [&](const T* const* row) INLINE {
      dot_rows<together, lines>(h, row, m.d, z + i, lines ? next.beside<together>(m, i) : Ahead{});
    });
  for (; i < count; ++i)
    some_rows<1>(m, list, i, [&](const T* const* row) INLINE {
      dot_rows<1, lines>(h, row, m.d, z + i, lines ? next.beside<1>(m, i) : Ahead{});
    });
}

template <int lines, class T>
void add_rows_of(const Matrix<T>& m, const int32_t* list, long count, const float* factors, float* total, const Next& next) {
  long i = 0;
  for (; i + together <= count; i += together)
    some_rows<together>(m, list, i, [&](const T* const* row) INLINE {
      add_rows<together, lines>(factors + i, row, m.d, total, lines ? next.beside<together>(m, i) : Ahead{});
    });
  for (; i < count; ++i)
    some_rows<1>(m, list, i, [&](const T* const* row) INLINE {
      add_rows<1, lines>(factors + i, row, m.d, total, lines ? next.beside<1>(m, i) : Ahead{});
    });
}

// A row of d numbers in float32 to the order of rows of T, in place.
template <class T>
HOT void row_to_order(float* row, long d) {
  for (long c = 0; c < d; c += 2 * lanes) {
    Reg a = load(row + c), b = load(row + c + lanes);
    to_order(static_cast<const T*>(nullptr), a, b);
    store(row + c, a);
    store(row + c + lanes, b);
  }
}

// out = total, back in order, + factor * more where there is more; that may be out.
template <class T, class Out>
HOT void row_from_order(const float* total, long d, float factor, const float* more, Out* out) {
  for (long c = 0; c < d; c += 2 * lanes) {
    Reg v[2] = {load(total + c), load(total + c + lanes)};
    from_order(static_cast<const T*>(nullptr), v[0], v[1]);
    UNROLL for (int i = 0; i < 2; ++i) {
      const long at = c + i * lanes, n = d - at;
      if (n >= lanes) {
        store(out + at, more ? v[i] + load(more + at) * factor : v[i]);
      } else if (n > 0) {
        store_part(out + at, more ? v[i] + load_part(more + at, n) * factor : v[i], n);
      }
    }
  }
}

void fill(float* out, float value, long n) {
  for (long c = 0; c < n; ++c) out[c] = value;
}

// --- what the table offers of this ---

void widen_rows(const void* rows, Dtype dtype, int64_t stride, int64_t count, int64_t d, float* out) {
  with_type(dtype, [&]<class T>(const T*) {
    const T* const from = static_cast<const T*>(rows);
    for (long r = 0; r < count; ++r) {
      long c = 0;
      for (; c + lanes <= d; c += lanes) store(out + r * d + c, load(from + r * stride + c));
      if (c < d) store_part(out + r * d + c, load_part(from + r * stride + c, d - c), d - c);
    }
  });
}

void add_columns(const float* rows, int64_t count, int64_t d, float* sums) {
  for (long r = 0; r < count; ++r)
    for (long c = 0; c < d; ++c) sums[c] += rows[r * d + c];
}

void combine_tokens(const Call& call, const int32_t* tokens, const float* factors, int64_t count, float* out, float* total) {
  with_type(call.scores_dtype, [&]<class T>(const T*) {
    const Matrix<T> hidden{static_cast<const T*>(call.scores), call.scores_stride, call.width};
    fill(total, 0.0f, padded(call.width));
    add_rows_of<0>(hidden, tokens, count, factors, total, Next{});
    row_from_order<T>(total, call.width, 0.0f, nullptr, out);
  });
}
