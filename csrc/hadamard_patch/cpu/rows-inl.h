// Rows of tensors through the transforms: the patch, alone or before a norm, and its gradients.

template <class T>
HOT T* row_of(const PatchCall& call, const Rows& rows, long r) {
  return static_cast<T*>(rows.data) + r / call.run * rows.outer + r % call.run * rows.inner;
}

template <class T>
void add_rows(const T* a, const T* b, float* sum, long n) {
  for (long c = 0; c < n; c += lanes) Vector::store(sum + c, Vector::add(Vector::load(a + c), Vector::load(b + c)));
}

// y = w, which must be free of NaNs with a full payload before it is rounded to 16 bits: down and up may have had them.
template <class T>
void round_out(const float* w, T* y, long n) {
  for (long c = 0; c < n; c += lanes) Vector::store(y + c, Vector::canonical(Vector::load(w + c)));
}

// y = w, and normed = w / sqrt(mean(w * w) + eps) * weight.
template <class T>
void norm_out(const float* w, float eps, const float* weight, T* y, T* normed, long d) {
  Reg squares[4];
  UNROLL for (int i = 0; i < 4; ++i) squares[i] = Vector::set1(0.0f);
  for (long c = 0; c < d; c += lanes) {
    const Reg v = Vector::canonical(Vector::load(w + c));
    Vector::store(y + c, v);
    const Reg sum = Vector::multiply_add(v, v, squares[0]);  // four sums in turn
    UNROLL for (int i = 0; i < 3; ++i) squares[i] = squares[i + 1];
    squares[3] = sum;
  }
  float sums[4 * lanes];
  UNROLL for (int i = 0; i < 4; ++i) Vector::store(sums + i * lanes, squares[i]);
  double square = 0;
  for (float sum : sums) square += sum;
  const Reg inverse = Vector::set1(static_cast<float>(1 / __builtin_sqrt(square / static_cast<double>(d) + eps)));
  for (long c = 0; c < d; c += lanes) {
    const Reg v = Vector::mul(Vector::mul(Vector::load(w + c), inverse), Vector::load(weight + c));
    Vector::store(normed + c, Vector::canonical(v));
  }
}

// sum += b * x, then b *= factor: what the way back does on the fly where no low-rank term is still to be added.
template <class T>
void multiply_twice(float* b, const T* x, const float* factor, float* sum, long n) {
  for (long c = 0; c < n; c += lanes) {
    const Reg v = Vector::load(b + c);
    Vector::store(sum + c, Vector::multiply_add(v, Vector::load(x + c), Vector::load(sum + c)));
    Vector::store(b + c, Vector::mul(v, Vector::load(factor + c)));
  }
}

// Where the work happens: in y where it is float32, so that a row of the cache less is needed.
HOT float* work_row(float* y, float*) { return y; }
template <class T>
HOT float* work_row(T*, float* scratch) { return scratch; }

// To fetch row r of two tensors; after the last row, what is in the cache already.
template <class T>
HOT Ahead ahead_of(const PatchCall& call, const Rows& x, const Rows& y, long r, long end, const float* here) {
  const char* const nothing = reinterpret_cast<const char*>(here);
  if (r >= end) return {nothing, nothing};
  return {reinterpret_cast<const char*>(row_of<T>(call, x, r)), reinterpret_cast<const char*>(row_of<T>(call, y, r))};
}

// --- the patch ---

// Each row straight from x to y.
template <class T>
void patch_single_rows(const PatchCall& call, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner;
  const Outer<T> outer = outer_of<T>(h);
  float* const table = scratch + n;
  for (long r = begin; r < end; ++r) {
    const T* x = row_of<T>(call, call.x, r);
    T* y = row_of<T>(call, call.y, r);
    Ahead ahead = ahead_of<T>(call, call.x, call.y, r + 1, end, work_row(y, scratch));
    for (long b = 0; b < h.d; b += n) {
      const Ahead start = ahead;
      float* const w = work_row(y + b, scratch);
      outer.there(x + b, call.pre ? call.pre + b : nullptr, w, h, table, ahead);
      Patching work{w, call, b};
      inner_there_and_back(work, 0, n, outer.inner, ahead);
      outer.back(w, call.post ? call.post + b : nullptr, y + b, {}, h, table, start);
    }
  }
}

// With a residual, a low-rank term or a norm: a few rows at a time in float32.
template <class T>
void patch_staged_rows(const PatchCall& call, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner, d = h.d, rank = call.low_rank.rank, group = rows_at_once(call.low_rank, d);
  const Outer<float> outer = outer_of<float>(h);
  float* const sums = scratch + group * d;
  float* const panel = sums + group * call.low_rank.ranks;
  float* const table = panel + panel_floats(call.low_rank);
  for (long r = begin; r < end; r += group) {
    const long count = end - r < group ? end - r : group;
    for (long i = 0; i < count; ++i) {
      const T* x = row_of<T>(call, call.x, r + i);
      float* const row = scratch + i * d;
      call.residual.data ? add_rows(x, row_of<T>(call, call.residual, r + i), row, d) : multiply_row(x, nullptr, row, d);
    }
    if (rank) project(scratch, count, call.low_rank, d, sums, panel);
    for (long i = 0; i < count; ++i) {
      float* const row = scratch + i * d;
      Ahead ahead = ahead_of<T>(call, call.x, call.residual.data ? call.residual : call.y, r + i + group, end, row);
      for (long b = 0; b < d; b += n) {
        const Ahead start = ahead;
        outer.there(row + b, call.pre ? call.pre + b : nullptr, row + b, h, table, ahead);
        Patching work{row + b, call, b};
        inner_there_and_back(work, 0, n, outer.inner, ahead);
        outer.back(row + b, call.post ? call.post + b : nullptr, row + b, {}, h, table, start);
      }
    }
    if (rank) lift(scratch, count, sums, call.low_rank, d, panel);
    for (long i = 0; i < count; ++i) {
      T* y = row_of<T>(call, call.y, r + i);
      if (call.normed.data)
        norm_out(scratch + i * d, call.eps, call.norm_weight, y, row_of<T>(call, call.normed, r + i), d);
      else
        round_out(scratch + i * d, y, d);
    }
  }
}

int64_t patch_scratch(const PatchCall& call) {
  const Width& h = *call.width;
  const long table = h.has_program || h.m == 1 ? 0 : table_floats(h.m);
  return rows_at_once(call.low_rank, h.d) * (h.d + call.low_rank.ranks) + panel_floats(call.low_rank) + table;
}

void patch(const PatchCall& call, int64_t begin, int64_t end, float* scratch) {
  const bool staged = call.residual.data || call.low_rank.rank || call.normed.data;
  with_type(call.dtype, [&]<class T>(const T*) {
    staged ? patch_staged_rows<T>(call, begin, end, scratch) : patch_single_rows<T>(call, begin, end, scratch);
  });
}

// --- its gradients ---

// A sum over many rows goes by way of sums over a few: fewer additions in a chain, and more digits kept.
constexpr long summed_together = 16;

// For call.x and the gradient of its patch, call.grad: dx in call.y, and sums over the rows added to what `into` points
// to. call.scale is plain here, not folded; call.low_rank is the gradient's own: up transposed, down transposed.
template <class T>
void gradient_rows(const PatchCall& call, const GradientSums& into, long begin, long end, float* scratch) {
  const Width& h = *call.width;
  const long n = h.m * h.inner, d = h.d, rank = call.low_rank.rank, group = rows_at_once(call.low_rank, d);
  const Outer<T> direct = outer_of<T>(h);
  const Outer<float> staged = outer_of<float>(h);
  const bool want_dx = call.y.data, a_back = want_dx || into.pre, u_back = into.post, u_there = into.scale || into.post;
  float* const a_rows = scratch;
  float* const u_row = a_rows + group * d;
  float* place = u_row + d;
  GradientSums few = into;  // sums over a few rows
  const auto give = [&](float*& sum) {
    if (sum) sum = place, place += d;
  };
  give(few.scale);
  give(few.pre);
  give(few.post);
  float* const sums = place;
  float* const panel = sums + group * call.low_rank.ranks;
  float* const table = panel + panel_floats(call.low_rank);
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
  const auto at = [](auto* p, long offset) { return p ? p + offset : nullptr; };

  each_sum(clear);
  for (long r = begin, summed = 0; r < end; r += group) {
    const long count = end - r < group ? end - r : group;
    if (rank) {
      for (long i = 0; i < count; ++i) multiply_row(row_of<T>(call, call.grad, r + i), nullptr, a_rows + i * d, d);
      project(a_rows, count, call.low_rank, d, sums, panel);
    }
    for (long i = 0; i < count; ++i) {
      const T* x = row_of<T>(call, call.x, r + i);
      const T* dy = row_of<T>(call, call.grad, r + i);
      T* dx = want_dx ? row_of<T>(call, call.y, r + i) : nullptr;
      float* const a_row = rank || !want_dx ? a_rows + i * d : work_row(dx, a_rows);
      Aheads ahead{ahead_of<T>(call, call.x, call.x, r + i + 1, end, u_row),
                   ahead_of<T>(call, call.grad, want_dx ? call.y : call.grad, r + i + 1, end, u_row)};
      for (long b = 0; b < d; b += n) {
        const Aheads start = ahead;
        float *const a = a_row + b, *const u = u_row + b;
        if (u_there) direct.there(x + b, at(call.pre, b), u, h, table, ahead.u);
        if (rank) staged.there(a, at(call.post, b), a, h, table, ahead.a);
        else direct.there(dy + b, at(call.post, b), a, h, table, ahead.a);
        Differentiating work{u_there ? u : nullptr, a, call.scale + b, at(few.scale, b), a_back, u_back};
        inner_there_and_back(work, 0, n, direct.inner, ahead);
        if (u_back) direct.back(u, nullptr, nullptr, {dy + b, few.post + b}, h, table, start.u);
        if (!a_back) continue;
        if (rank) staged.back(a, few.pre ? nullptr : at(call.pre, b), a, {}, h, table, start.a);
        else direct.back(a, at(call.pre, b), at(dx, b), {x + b, at(few.pre, b)}, h, table, start.a);
      }
      if (rank && few.pre) multiply_twice(a_row, x, call.pre, few.pre, d);
    }
    if (want_dx && rank) {
      lift(a_rows, count, sums, call.low_rank, d, panel);
      for (long i = 0; i < count; ++i) round_out(a_rows + i * d, row_of<T>(call, call.y, r + i), d);
    }
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
  const long sums = (into.scale != nullptr) + (into.pre != nullptr) + (into.post != nullptr);
  const long table = h.has_program || h.m == 1 ? 0 : table_floats(h.m);
  const long rows = rows_at_once(call.low_rank, h.d);
  return rows * (h.d + call.low_rank.ranks) + (1 + sums) * h.d + panel_floats(call.low_rank) + table;
}

void gradients(const PatchCall& call, const GradientSums& into, int64_t begin, int64_t end, float* scratch) {
  with_type(call.dtype, [&]<class T>(const T*) { gradient_rows<T>(call, into, begin, end, scratch); });
}

// --- operands ---

void widen(const void* values, Dtype dtype, float factor, bool folded, float* out, int64_t count) {
  with_type(dtype, [&]<class T>(const T*) { widen_values(static_cast<const T*>(values), factor, folded, out, count); });
}
