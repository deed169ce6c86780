// Rows of tensors through the transforms: the patch, alone or before a norm, and its gradients.

template <class T>
HOT T* row_of(const PatchCall& call, const Rows& rows, long r) {
  return static_cast<T*>(rows.data) + r / call.run * rows.outer + r % call.run * rows.inner;
}

// out = (a + b) * factor in float32; b and factor may be null, out may be a.
template <class T>
void stage_in(const T* a, const T* b, const float* factor, float* out, long n) {
  for (long c = 0; c < n; c += lanes) {
    Reg v = Vector::load(a + c);
    if (b) v = Vector::add(v, Vector::load(b + c));
    Vector::store(out + c, factor ? Vector::mul(v, Vector::load(factor + c)) : v);
  }
}

// y = w * factor. What is rounded to 16 bits must be free of NaNs with a full payload: down and up may have had them.
template <class T>
void stage_out(const float* w, const float* factor, T* y, long n) {
  for (long c = 0; c < n; c += lanes) {
    const Reg v = Vector::load(w + c);
    Vector::store(y + c, Vector::canonical(factor ? Vector::mul(v, Vector::load(factor + c)) : v));
  }
}

// sum += a * b
template <class T>
void accumulate(const float* a, const T* b, float* sum, long n) {
  for (long c = 0; c < n; c += lanes)
    Vector::store(sum + c, Vector::multiply_add(Vector::load(a + c), Vector::load(b + c), Vector::load(sum + c)));
}

// y = w * factor, and normed = y / sqrt(mean(y * y) + eps) * weight, of y before it is rounded.
template <class T>
void norm_out(float* w, const float* factor, float eps, const float* weight, T* y, T* normed, long d) {
  Reg squares[4];
  UNROLL for (int i = 0; i < 4; ++i) squares[i] = Vector::set1(0.0f);
  for (long c = 0; c < d; c += lanes) {
    Reg v = Vector::load(w + c);
    if (factor) v = Vector::mul(v, Vector::load(factor + c));
    v = Vector::canonical(v);
    Vector::store(w + c, v);
    Vector::store(y + c, v);
    squares[0] = Vector::multiply_add(v, v, squares[0]);
    const Reg first = squares[0];  // four sums in turn
    UNROLL for (int i = 0; i < 3; ++i) squares[i] = squares[i + 1];
    squares[3] = first;
  }
  float sums[4 * lanes];
  UNROLL for (int i = 0; i < 4; ++i) Vector::store(sums + i * lanes, squares[i]);
  double square = 0;
  for (float sum : sums) square += sum;
  const Reg inverse = Vector::set1(static_cast<float>(1 / __builtin_sqrt(square / static_cast<double>(d) + eps)));
  for (long c = 0; c < d; c += lanes)
    Vector::store(normed + c, Vector::mul(Vector::mul(Vector::load(w + c), inverse), Vector::load(weight + c)));
}

// Where the work happens: in y where it is float32, so that a row of the cache less is needed.
HOT float* work_row(float* y, float*) { return y; }
template <class T>
HOT float* work_row(T*, float* scratch) { return scratch; }

template <class T>
HOT Ahead ahead_of(const PatchCall& call, const Rows& y, long r, long end, const void* here) {
  if (r >= end) return {static_cast<const char*>(here), static_cast<const char*>(here)};  // nothing more to fetch
  return {reinterpret_cast<const char*>(row_of<T>(call, call.x, r)), reinterpret_cast<const char*>(row_of<T>(call, y, r))};
}

// --- the patch ---

// Nothing but the scale: each row goes straight from x to y.
template <class T>
void patch_plain_rows(const PatchCall& call, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner;
  const Outer<T> outer = outer_of<T>(h);
  float* const table = scratch + n;
  for (long r = begin; r < end; ++r) {
    const T* x = row_of<T>(call, call.x, r);
    T* y = row_of<T>(call, call.y, r);
    Ahead ahead = ahead_of<T>(call, call.y, r + 1, end, work_row(y, scratch));
    for (long b = 0; b < h.d; b += n) {
      const Ahead start = ahead;
      float* const w = work_row(y + b, scratch);
      outer.there(x + b, w, h, table, ahead);
      Patching work{w, call.scale + b};
      inner_there_and_back(work, 0, n, outer.inner, ahead);
      outer.back(w, y + b, h, table, start);
    }
  }
}

// The general case, a few rows at a time in float32.
template <class T>
void patch_staged_rows(const PatchCall& call, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner, group = call.low_rank.rank ? together : 1;
  const Outer<float> outer = outer_of<float>(h);
  float* const sums = scratch + group * h.d;
  float* const table = sums + group * call.low_rank.ranks;
  for (long r = begin; r < end; r += group) {
    const long count = end - r < group ? end - r : group;
    for (long i = 0; i < count; ++i)
      stage_in(row_of<T>(call, call.x, r + i), call.residual.data ? row_of<T>(call, call.residual, r + i) : nullptr,
               call.low_rank.rank ? nullptr : call.pre, scratch + i * h.d, h.d);
    if (call.low_rank.rank) project(scratch, count, call.low_rank, h.d, sums);
    for (long i = 0; i < count; ++i) {
      float* const row = scratch + i * h.d;
      if (call.low_rank.rank && call.pre) stage_in<float>(row, nullptr, call.pre, row, h.d);
      Ahead ahead = ahead_of<T>(call, call.y, r + i + group, end, row);
      for (long b = 0; b < h.d; b += n) {
        const Ahead start = ahead;
        outer.there(row + b, row + b, h, table, ahead);
        Patching work{row + b, call.scale + b};
        inner_there_and_back(work, 0, n, outer.inner, ahead);
        outer.back(row + b, row + b, h, table, start);
      }
    }
    if (call.low_rank.rank) lift(scratch, count, call.post, sums, call.low_rank, h.d);
    const float* const post = call.low_rank.rank ? nullptr : call.post;  // the low-rank term has seen to it
    for (long i = 0; i < count; ++i) {
      T* y = row_of<T>(call, call.y, r + i);
      if (call.normed.data)
        norm_out(scratch + i * h.d, post, call.eps, call.norm_weight, y, row_of<T>(call, call.normed, r + i), h.d);
      else
        stage_out(scratch + i * h.d, post, y, h.d);
    }
  }
}

int64_t patch_scratch(const PatchCall& call) {
  const Width& h = *call.width;
  const long group = call.low_rank.rank ? together : 1;
  return group * (h.d + call.low_rank.ranks) + (h.has_program || h.m == 1 ? 0 : table_floats(h.m));
}

void patch(const PatchCall& call, int64_t begin, int64_t end, float* scratch) {
  const bool plain = !call.pre && !call.post && !call.residual.data && !call.low_rank.rank && !call.normed.data;
  with_type(call.dtype, [&]<class T>(const T*) {
    plain ? patch_plain_rows<T>(call, begin, end, scratch) : patch_staged_rows<T>(call, begin, end, scratch);
  });
}

// --- its gradients ---

// A sum over many rows goes by way of sums over a few: fewer additions in a chain, and more digits kept.
constexpr long summed_together = 16;

// For call.x and the gradient of its patch: dx in call.y, and the sums over the rows added to what `into` points to.
// call.scale is plain here, not folded; call.low_rank is the term of the gradient: up transposed, down transposed.
template <class T>
void gradient_rows(const PatchCall& call, const GradientSums& into, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner, d = h.d, group = call.low_rank.rank ? together : 1;
  const Outer<T> direct = outer_of<T>(h);
  const Outer<float> staged = outer_of<float>(h);
  const bool want_dx = call.y.data, a_back = want_dx || into.pre, u_back = into.post, u_there = into.scale || into.post;
  const bool finish_dx = call.pre || into.pre || call.low_rank.rank;

  float* const a_rows = scratch;
  float* const u = a_rows + group * d;
  GradientSums few = into;  // the same, for the rows of a few
  float* place = u + d;
  const auto give = [&](float*& sum) {
    if (sum) sum = place, place += d;
  };
  give(few.scale);
  give(few.pre);
  give(few.post);
  float* const sums = place;
  float* const table = sums + group * call.low_rank.ranks;
  const auto each_sum = [&](auto visit) {
    if (into.scale) visit(few.scale, into.scale);
    if (into.pre) visit(few.pre, into.pre);
    if (into.post) visit(few.post, into.post);
  };
  const auto clear = [&](float* part, float*) {
    for (long c = 0; c < d; c += lanes) Vector::store(part + c, Vector::set1(0.0f));
  };
  const auto add = [&](float* part, float* whole) {
    for (long c = 0; c < d; c += lanes) Vector::store(whole + c, Vector::add(Vector::load(whole + c), Vector::load(part + c)));
  };

  each_sum(clear);
  for (long r = begin, summed = 0; r < end; r += group) {
    const long count = end - r < group ? end - r : group;
    if (call.low_rank.rank) {
      for (long i = 0; i < count; ++i) stage_in<T>(row_of<T>(call, call.grad, r + i), nullptr, nullptr, a_rows + i * d, d);
      project(a_rows, count, call.low_rank, d, sums);
    }
    for (long i = 0; i < count; ++i) {
      const T* x = row_of<T>(call, call.x, r + i);
      const T* dy = row_of<T>(call, call.grad, r + i);
      T* dx = want_dx ? row_of<T>(call, call.y, r + i) : nullptr;
      float* const a = a_rows + i * d;
      Ahead ahead = ahead_of<T>(call, call.grad, r + i + 1, end, u);
      if (call.low_rank.rank && call.post) stage_in<float>(a, nullptr, call.post, a, d);
      if (!call.low_rank.rank && call.post) stage_in<T>(dy, nullptr, call.post, a, d);
      if (u_there && call.pre) stage_in<T>(x, nullptr, call.pre, u, d);
      for (long b = 0; b < d; b += n) {
        const Ahead start = ahead;
        if (call.low_rank.rank || call.post) staged.there(a + b, a + b, h, table, ahead);
        else direct.there(dy + b, a + b, h, table, ahead);
        if (u_there && call.pre) staged.there(u + b, u + b, h, table, ahead);
        else if (u_there) direct.there(x + b, u + b, h, table, ahead);
        Differentiating work{u_there ? u + b : nullptr, a + b, call.scale + b, few.scale ? few.scale + b : nullptr, a_back,
                             u_back};
        inner_there_and_back(work, 0, n, direct.inner, ahead);
        if (a_back && finish_dx) staged.back(a + b, a + b, h, table, start);
        else if (a_back) direct.back(a + b, dx + b, h, table, start);
        if (u_back) staged.back(u + b, u + b, h, table, start);
      }
      if (few.pre) accumulate(a, x, few.pre, d);
      if (few.post) accumulate(u, dy, few.post, d);
    }
    if (want_dx && call.low_rank.rank) lift(a_rows, count, call.pre, sums, call.low_rank, d);
    if (want_dx && finish_dx)
      for (long i = 0; i < count; ++i)
        stage_out(a_rows + i * d, call.low_rank.rank ? nullptr : call.pre, row_of<T>(call, call.y, r + i), d);
    summed += count;
    if (summed >= summed_together || r + group >= end) {
      each_sum(add);
      each_sum(clear);
      summed = 0;
    }
  }
}

int64_t gradient_scratch(const PatchCall& call, const GradientSums& into) {
  const Width& h = *call.width;
  const long group = call.low_rank.rank ? together : 1, sums = (into.scale != nullptr) + (into.pre != nullptr) + (into.post != nullptr);
  return group * (h.d + call.low_rank.ranks) + (1 + sums) * h.d + (h.has_program || h.m == 1 ? 0 : table_floats(h.m));
}

void gradients(const PatchCall& call, const GradientSums& into, int64_t begin, int64_t end, float* scratch) {
  with_type(call.dtype, [&]<class T>(const T*) { gradient_rows<T>(call, into, begin, end, scratch); });
}

// --- operands ---

void widen(const void* values, Dtype dtype, float factor, bool fold, float* out, int64_t count) {
  with_type(dtype, [&]<class T>(const T*) {
    for (long c = 0; c < count; c += lanes) {
      const Reg v = Vector::mul(Vector::load(static_cast<const T*>(values) + c), Vector::set1(factor));
      Vector::store(out + c, Vector::canonical(fold ? Vector::folded(v) : v));
    }
  });
}
