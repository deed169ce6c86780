// A token's slots: the loss over them alone, for the linear loss and for given logits.

// Cuts a thread's scratch into pieces.
struct Pieces {
  float* at;
  float* floats(long n) { return take<float>(n); }
  template <class T>
  T* take(long n) {
    T* const piece = reinterpret_cast<T*>(at);
    at += padded(n);
    return piece;
  }
};

constexpr long vocabulary_chunk = 1024;  // given logits that are looked at together

// The slots of a token that are there.
struct Slots {
  long count = 0;
  float total = 0;  // S
  float* p;
  int32_t *id, *position;
  float* row;

  Slots(const Call& call, Pieces& pieces) {
    const long k = call.teacher.slots;
    p = pieces.floats(k);
    id = pieces.take<int32_t>(k);
    position = pieces.take<int32_t>(k);
    row = pieces.floats(k);
  }

  void read(const Call& call, long token) {
    const auto& teacher = call.teacher;
    with_type(teacher.probs_dtype, [&]<class T>(const T*) {
      widen_row(static_cast<const T*>(teacher.probs) + token * teacher.slots, teacher.slots, row);
    });
    if (teacher.long_ids)
      keep(static_cast<const int64_t*>(teacher.ids) + token * teacher.slots, teacher.slots);
    else
      keep(static_cast<const int32_t*>(teacher.ids) + token * teacher.slots, teacher.slots);
    for (long k = count; k < padded(count); ++k) p[k] = 0;
    Reg sums = {};
    for (long k = 0; k < count; k += lanes) sums += load(p + k);
    total = sum(sums);
  }

 private:
  template <class Id>
  HOT void keep_one(Slots& slots, Id number, long k) {
    slots.p[slots.count] = slots.row[k];
    slots.id[slots.count] = static_cast<int32_t>(number);
    slots.position[slots.count] = static_cast<int32_t>(k);
    slots.count += number >= 0;
  }
  template <class Id>
  void keep(const Id* ids, long slots) {
    count = 0;
    for (long k = 0; k < slots; ++k) keep_one(*this, ids[k], k);
  }
};

// The largest logit m, -infinity where there is none, and s, the sum of exp((z - m) / T).
struct Normalizer {
  float largest, sum;
};

// What is taken off before exp while numbers are summed up: their largest, or 0 where that is infinite.
HOT float finite(float largest) { return is_infinite(largest) ? 0.0f : largest; }

// (z - m) / T, the difference first: it is exact where z and m are near, however large they are.
HOT Reg relative(const Call& call, Reg z, float largest) { return (z - largest) * call.inverse_temperature; }
HOT float relative(const Call& call, float z, float largest) { return (z - largest) * call.inverse_temperature; }

// Over the slots; z is filled up with -infinity to whole registers.
HOT Normalizer slots_normalizer(const Call& call, const Slots& slots, float* z) {
  for (long k = slots.count; k < padded(slots.count); ++k) z[k] = -infinity;
  Reg most = broadcast(-infinity), sums = {};
  for (long k = 0; k < slots.count; k += lanes) most = larger(load(z + k), most);
  const float reached = largest(most);
  for (long k = 0; k < slots.count; k += lanes) sums += exp_of(relative(call, load(z + k), finite(reached)));
  return {reached, sum(sums)};
}

// sum p (log p - log q).
HOT float slots_loss(const Call& call, const Slots& slots, const float* z, Normalizer whole) {
  const float log_sum = __builtin_logf(whole.sum);
  Reg sums = {};
  for (long k = 0; k < slots.count; k += lanes) {
    const Reg p = load(slots.p + k);
    const Reg term = p * (log_of(p) - (relative(call, load(z + k), whole.largest) - log_sum));
    sums += p == 0.0f ? Reg{} : term;
  }
  return sum(sums);
}

// dz = scale * (weight * q - p).
HOT void slots_gradient(const Call& call, const Slots& slots, const float* z, Normalizer whole, float weight, float scale,
                        float* dz) {
  const float factor = weight / whole.sum;
  for (long k = 0; k < slots.count; k += lanes)
    store(dz + k, (exp_of(relative(call, load(z + k), whole.largest)) * factor - load(slots.p + k)) * scale);
}

HOT void store_slot_grads(const Call& call, long token, const Slots& slots, const float* dz) {
  float* const grads = call.slot_grads + token * call.teacher.slots;
  fill(grads, 0.0f, call.teacher.slots);
  for (long k = 0; k < slots.count; ++k) grads[slots.position[k]] = dz[k];
}

// A token's dhidden: the sum of rows of W in `total`, + factor * more where there is more.
template <class W>
HOT void store_dhidden(const Call& call, long token, const float* total, float factor, const float* more) {
  with_type(call.dhidden_dtype, [&]<class D>(const D*) {
    row_from_order<W>(total, call.width, factor, more, static_cast<D*>(call.dhidden) + token * call.width);
  });
}
HOT void clear_dhidden(const Call& call, long token) {
  const long row = call.width * linearpatch::bytes_of(call.dhidden_dtype);
  __builtin_memset(static_cast<char*>(call.dhidden) + token * row, 0, row);
}

// The soft-cap of logits that nothing else was done to, and its derivative by the logits that came of it.
HOT Reg capped(const Call& call, Reg logits) { return tanh_of(logits / call.softcap) * call.softcap; }
HOT Reg cap_slope(const Call& call, Reg z) {
  const Reg u = z / call.softcap;
  return 1.0f - u * u;
}
void scale_by_slope(const Call& call, const float* z, float* dz, long count) {
  for (long k = 0; k < count; k += lanes) store(dz + k, load(dz + k) * cap_slope(call, load(z + k)));
}

// z = z + bias, soft-capped.
HOT void finish_slot_logits(const Call& call, const Slots& slots, float* z) {
  for (long k = 0; call.bias && k < slots.count; ++k) z[k] += call.bias[slots.id[k]];
  for (long k = 0; call.softcap != 0 && k < slots.count; k += lanes) store(z + k, capped(call, load(z + k)));
}

template <class W>
void linear_topk_of(const Call& call, long begin, long end, float* scratch) {
  const Matrix<W> weight{static_cast<const W*>(call.weight), call.weight_stride, call.width};
  Pieces pieces{scratch};
  float* const h = pieces.floats(call.width);
  float* const dh = pieces.floats(call.width);
  float* const z = pieces.floats(call.teacher.slots);
  float* const dz = pieces.floats(call.teacher.slots);
  Slots these(call, pieces), those(call, pieces);
  Slots *now = &these, *next = &those;
  const bool gradient = call.dhidden || call.slot_grads;
  next->read(call, begin);
  for (long n = begin; n < end; ++n) {
    Slots* const other = now;
    now = next;
    next = other;
    next->count = 0;
    if (n + 1 < end) next->read(call, n + 1);
    call.losses[n] = 0;
    if (!now->count) {
      if (call.dhidden) clear_dhidden(call, n);
      if (call.slot_grads) fill(call.slot_grads + n * call.teacher.slots, 0.0f, call.teacher.slots);
      continue;
    }
    with_type(call.scores_dtype, [&]<class H>(const H*) {
      widen_row(static_cast<const H*>(call.scores) + n * call.scores_stride, call.width, h);
    });
    row_to_order<W>(h, call.width);
    // The rows are met twice. On the way there the next few of them are fetched, on the way back the next token's first.
    const long ahead = now->count > call.rows_ahead ? call.rows_ahead : now->count - 1;
    const Next there{now->id + ahead, now->count - ahead};
    const Next back{next->count ? next->id : now->id, next->count > call.rows_ahead ? call.rows_ahead : next->count ? next->count : 1};
    dots_of<2>(weight, now->id, now->count, h, z, there);
    finish_slot_logits(call, *now, z);
    const Normalizer whole = slots_normalizer(call, *now, z);
    call.losses[n] = slots_loss(call, *now, z, whole);
    if (!gradient) continue;
    slots_gradient(call, *now, z, whole, now->total, call.gradient_scale, dz);
    if (call.softcap != 0) scale_by_slope(call, z, dz, now->count);
    if (call.slot_grads) store_slot_grads(call, n, *now, dz);
    if (!call.dhidden) continue;
    fill(dh, 0.0f, padded(call.width));
    add_rows_of<2>(weight, now->id, now->count, dz, dh, back);
    store_dhidden<W>(call, n, dh, 0.0f, nullptr);
  }
}

void linear_topk(const Call& call, int64_t begin, int64_t end, float* scratch) {
  with_type(call.weight_dtype, [&]<class W>(const W*) { linear_topk_of<W>(call, begin, end, scratch); });
}

int64_t scratch_floats(const Call& call) {
  const long width = call.weight ? padded(call.width) : vocabulary_chunk;
  return 2 * width + 12 * padded(call.teacher.slots);
}
