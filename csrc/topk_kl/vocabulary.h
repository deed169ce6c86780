// Logits of the whole vocabulary, a part at a time: the normalisers of "full" and "tail", and the gradients.

// The running sums of a token: of the rest (what is no slot's id) and of the slots, each id once.
struct Running {
  float rest_max, rest_sum, slot_max, slot_sum;
};
// What they become when the token is finished: the rest's gradient is factor * exp(z - offset), the scale in it.
struct Finished {
  float factor, offset, unused[2];
};
static_assert(sizeof(Running) == 16 && sizeof(Finished) == 16);

HOT Running& running_of(const Call& call, long token) { return reinterpret_cast<Running*>(call.running)[token]; }
HOT Finished& finished_of(const Call& call, long token) { return reinterpret_cast<Finished*>(call.running)[token]; }

// action(k, i) for the token's slots k whose id stands at i in this part of the vocabulary.
template <class Action>
HOT void slots_within(const Call& call, long token, long first, long size, Action action) {
  const long slots = call.teacher.slots;
  const auto visit = [&](const auto* ids) INLINE {
    for (long k = 0; k < slots; ++k) {
      const int64_t i = ids[k] - first;
      if (ids[k] >= 0 && i >= 0 && i < size) action(k, i);
    }
  };
  if (call.teacher.long_ids)
    visit(static_cast<const int64_t*>(call.teacher.ids) + token * slots);
  else
    visit(static_cast<const int32_t*>(call.teacher.ids) + token * slots);
}

HOT bool has_slots(const Call& call, long token) {
  const long slots = call.teacher.slots;
  bool any = false;
  if (call.teacher.long_ids)
    for (long k = 0; k < slots; ++k) any |= static_cast<const int64_t*>(call.teacher.ids)[token * slots + k] >= 0;
  else
    for (long k = 0; k < slots; ++k) any |= static_cast<const int32_t*>(call.teacher.ids)[token * slots + k] >= 0;
  return any;
}

HOT Reg load_up_to(const float* p, long n) { return n >= lanes ? load(p) : load_part(p, n); }
HOT void store_up_to(float* p, Reg v, long n) {
  if (n >= lanes)
    store(p, v);
  else
    store_part(p, v, n);
}

// z = z + bias, soft-capped.
HOT void complete_row(const Call& call, long first, long size, float* z) {
  for (long c = 0; c < size; c += lanes) {
    const long n = size - c;
    Reg v = load_up_to(z + c, n);
    if (call.bias) v += load_up_to(call.bias + first + c, n);
    if (call.softcap != 0) v = capped(call, v);
    store_up_to(z + c, v, n);
  }
}
// A gradient by z as one by what was capped; 0 stays 0 where z is the -infinity of a slot.
HOT Reg with_slope(const Call& call, Reg z, Reg gradient) {
  if (call.softcap == 0) return gradient;
  return gradient == 0.0f ? gradient : gradient * cap_slope(call, z);
}

// A part of a token's logits, products without bias and temperature: their slots are noted, the rest joins the running
// sums, and with `keep` z becomes exp(z - m) over the rest, times the soft-cap's derivative. Returns what sums of earlier parts are to be multiplied with.
HOT float add_part(const Call& call, long token, long first, long size, float* z, bool keep) {
  const float inverse = 1.0f / call.temperature;
  const long slots = call.teacher.slots;
  Running& sums = running_of(call, token);
  // Before a slot becomes -infinity, which an infinite bias or the soft-cap would undo.
  if (call.bias || call.softcap != 0) complete_row(call, first, size, z);
  if (call.slot_logits)
    slots_within(call, token, first, size, [&](long k, long i) INLINE {
      call.slot_logits[token * slots + k] = z[i] * inverse;
    });
  slots_within(call, token, first, size, [&](long k, long i) INLINE {
    const float value = z[i] * inverse;
    const bool unseen = z[i] != -infinity;
    if (call.slot_first) call.slot_first[token * slots + k] = unseen;
    z[i] = -infinity;
    if (!unseen) return;
    if (value > sums.slot_max) {
      sums.slot_sum = sums.slot_sum * __builtin_expf(sums.slot_max - value) + 1;
      sums.slot_max = value;
    } else {
      sums.slot_sum += __builtin_expf(value - finite(sums.slot_max));
    }
  });
  Reg most = broadcast(-infinity);
  for (long c = 0; c < size; c += lanes) {
    const long n = size - c;
    const Reg v = load_up_to(z + c, n) * inverse;
    store_up_to(z + c, v, n);
    if (n < lanes)
      for (long i = 0; i < n; ++i) most[0] = v[i] > most[0] ? v[i] : most[0];
    else
      most = larger(v, most);
  }
  const float part_max = largest(most), before = sums.rest_max;
  if (part_max > before) sums.rest_max = part_max;
  const float shift = finite(sums.rest_max);
  const float earlier = part_max > before ? __builtin_expf(before - shift) : 1.0f;
  Reg total = {};
  long c = 0;
  for (; c + lanes <= size; c += lanes) {
    const Reg v = load(z + c), e = exp_of(v - shift);
    if (keep) store(z + c, with_slope(call, v, e));
    total += e;
  }
  float part_sum = sum(total);
  if (c < size) {
    const Reg v = load_part(z + c, size - c), e = exp_of(v - shift);
    if (keep) store_part(z + c, with_slope(call, v, e), size - c);
    for (long i = 0; i < size - c; ++i) part_sum += e[i];
  }
  sums.rest_sum = (sums.rest_sum == 0 ? 0 : sums.rest_sum * earlier) + part_sum;
  return earlier;
}

// log(exp(a) + exp(b)).
HOT float log_sum(float a, float b) {
  const float most = a > b ? a : b;
  return is_infinite(most) ? most : most + __builtin_logf(__builtin_expf(a - most) + __builtin_expf(b - most));
}

HOT void read_normalizers(const Call& call, long token, float& whole, float& rest) {
  const Running& sums = running_of(call, token);
  rest = __builtin_logf(sums.rest_sum) + finite(sums.rest_max);
  const float slots = sums.slot_sum == 0 ? -infinity : __builtin_logf(sums.slot_sum) + sums.slot_max;
  whole = log_sum(rest, slots);
  if (call.normalization == Normalization::full) rest = -infinity;
}

// t, what the teacher left out; 0 where the student has nothing left, or takes no account of it.
HOT float left_out(float total, float rest) {
  const float t = 1.0f - total;
  return rest == -infinity || t < 0 ? 0.0f : t;
}

HOT float rest_loss(float t, float whole, float rest) {
  return t == 0 ? 0.0f : t * (__builtin_logf(t) - (rest - whole));
}

HOT Finished rest_gradient(float total, float t, float whole, float rest, float scale) {
  if (rest == -infinity) return {scale * total, whole, {}};
  if (rest == infinity) return {scale * (total + t), rest, {}};  // NaN for the infinite z, 0 for the others
  return {scale * ((total + t) * __builtin_expf(rest - whole) - t), rest, {}};
}

// --- the linear loss ---

void add_block(const Call& call, const Block& block) {
  for (long r = 0; r < block.count; ++r) {
    const long token = block.token + r;
    float* const z = block.logits + r * block.size;
    if (!has_slots(call, token)) {
      fill(z, 0.0f, block.size);
      continue;
    }
    const float earlier = add_part(call, token, block.first, block.size, z, call.rest_sums);
    float* const sum = call.rest_sums ? call.rest_sums + token * call.width : nullptr;
    if (sum && earlier != 1.0f)
      for (long c = 0; c < call.width; ++c) sum[c] *= earlier;
  }
}

template <class W>
void finish_tokens_of(const Call& call, long begin, long end, float* scratch) {
  const Matrix<W> weight{static_cast<const W*>(call.weight), call.weight_stride, call.width};
  const long k_all = call.teacher.slots;
  Pieces pieces{scratch};
  float* const dh = pieces.floats(call.width);
  float* const z = pieces.floats(k_all);
  float* const dz = pieces.floats(k_all);
  float* const slope = pieces.floats(k_all);
  Slots slots(call, pieces);
  for (long n = begin; n < end; ++n) {
    slots.read(call, n);
    call.losses[n] = 0;
    if (!slots.count) {
      if (call.dhidden) clear_dhidden(call, n);
      if (call.slot_grads) fill(call.slot_grads + n * k_all, 0.0f, k_all);
      finished_of(call, n) = {};
      continue;
    }
    for (long k = 0; k < slots.count; ++k) z[k] = call.slot_logits[n * k_all + slots.position[k]];
    for (long k = slots.count; k < padded(slots.count); ++k) z[k] = -infinity;
    float whole, rest;
    read_normalizers(call, n, whole, rest);
    const float t = left_out(slots.total, rest);
    call.losses[n] = slots_loss(slots, z, whole) + rest_loss(t, whole, rest);
    const float reached = finite(running_of(call, n).rest_max);
    const Finished finished = rest_gradient(slots.total, t, whole, rest, call.gradient_scale);
    finished_of(call, n) = finished;
    if (!call.dhidden && !call.slot_grads) continue;
    fill(slope, 1.0f, slots.count);
    if (call.softcap != 0) scale_by_slope(call, z, slope, slots.count);
    for (long k = 0; k < slots.count; ++k)  // an id that stands twice has one logit
      if (!call.slot_first[n * k_all + slots.position[k]]) z[k] = -infinity;
    slots_gradient(slots, z, whole, slots.total + t, call.gradient_scale, dz);
    for (long k = 0; call.softcap != 0 && k < slots.count; ++k) dz[k] *= slope[k];
    if (call.slot_grads) store_slot_grads(call, n, slots, dz);
    if (!call.dhidden) continue;
    fill(dh, 0.0f, padded(call.width));
    add_rows_of<0>(weight, slots.id, slots.count, dz, dh, Next{});
    // An infinite logit: its product with the weight's row is in the sum, and 0 would hide it.
    const float factor = finished.offset == infinity ? __builtin_nanf("")
                                                     : finished.factor * __builtin_expf(reached - finished.offset);
    store_dhidden<W>(call, n, dh, factor, factor == 0.0f ? nullptr : call.rest_sums + n * call.width);
  }
}

void finish_tokens(const Call& call, int64_t begin, int64_t end, float* scratch) {
  with_type(call.weight_dtype, [&]<class W>(const W*) { finish_tokens_of<W>(call, begin, end, scratch); });
}

void block_gradient(const Call& call, const Block& block) {
  const float inverse = 1.0f / call.temperature;
  for (long r = 0; r < block.count; ++r) {
    const long token = block.token + r, slots = call.teacher.slots;
    const auto [factor, offset, unused] = finished_of(call, token);
    float* const z = block.logits + r * block.size;
    if (factor == 0) {
      fill(z, 0.0f, block.size);
    } else {
      for (long c = 0; c < block.size; c += lanes) {
        const long n = block.size - c;
        Reg v = load_up_to(z + c, n);
        if (call.bias) v += load_up_to(call.bias + block.first + c, n);
        if (call.softcap != 0) v = capped(call, v);
        v *= inverse;
        store_up_to(z + c, with_slope(call, v, exp_of(v - offset) * factor), n);
      }
    }
    slots_within(call, token, block.first, block.size, [&](long, long i) INLINE { z[i] = 0; });
    slots_within(call, token, block.first, block.size,
                 [&](long k, long i) INLINE { z[i] += call.slot_grads[token * slots + k]; });
  }
}

// --- given logits ---

// z of the token's slots from its row, -infinity behind them.
template <class T>
HOT void gather(const Call& call, const T* row, const Slots& slots, float* z) {
  for (long k = 0; k < slots.count; ++k) z[k] = number(row + slots.id[k]);
  for (long k = slots.count; k < padded(slots.count); ++k) z[k] = -infinity;
  for (long k = 0; k < slots.count; k += lanes) store(z + k, load(z + k) / call.temperature);
}

template <class T>
void given_logits_of(const Call& call, long begin, long end, float* scratch) {
  Pieces pieces{scratch};
  float* const part = pieces.floats(vocabulary_chunk);
  float* const z = pieces.floats(call.teacher.slots);
  Slots slots(call, pieces);
  for (long n = begin; n < end; ++n) {
    const T* const row = static_cast<const T*>(call.scores) + n * call.scores_stride;
    float* const normalizers = call.normalizers + 2 * n;
    slots.read(call, n);
    call.losses[n] = 0;
    normalizers[0] = normalizers[1] = -infinity;
    if (!slots.count) continue;
    gather(call, row, slots, z);
    if (call.normalization == Normalization::topk) {
      normalizers[0] = slots_normalizer(slots, z);
      call.losses[n] = slots_loss(slots, z, normalizers[0]);
      continue;
    }
    for (long first = 0; first < call.width; first += vocabulary_chunk) {
      const long size = call.width - first < vocabulary_chunk ? call.width - first : vocabulary_chunk;
      widen_row(row + first, size, part);
      add_part(call, n, first, size, part, false);
    }
    read_normalizers(call, n, normalizers[0], normalizers[1]);
    const float t = left_out(slots.total, normalizers[1]);
    call.losses[n] = slots_loss(slots, z, normalizers[0]) + rest_loss(t, normalizers[0], normalizers[1]);
  }
}

void given_logits(const Call& call, int64_t begin, int64_t end, float* scratch) {
  with_type(call.scores_dtype, [&]<class T>(const T*) { given_logits_of<T>(call, begin, end, scratch); });
}

HOT void narrow_part(const float* part, long size, float* out) { __builtin_memcpy(out, part, size * sizeof(float)); }
template <class T>
HOT void narrow_part(const float* part, long size, T* out) {
  long c = 0;
  for (; c + lanes <= size; c += lanes) store(out + c, load(part + c));
  if (c < size) store_part(out + c, load(part + c), size - c);
}

// Of a row that is 0 but at the slots. An id that stands twice is summed before it is rounded: the row itself remembers
// which slot was the last to name an id.
template <class T>
HOT void scatter(const Slots& slots, float* dz, T* row) {
  using Mark = decltype([] {
    if constexpr (sizeof(T) == 4) return uint32_t{};
    else return uint16_t{};
  }());
  const auto owner = [&](long k) INLINE {
    Mark mark;
    __builtin_memcpy(&mark, row + slots.id[k], sizeof mark);
    return static_cast<long>(mark);
  };
  for (long k = 0; k < slots.count; ++k) {
    const Mark mark = static_cast<Mark>(k);
    __builtin_memcpy(row + slots.id[k], &mark, sizeof mark);
  }
  for (long k = 0; k < slots.count; ++k)
    if (const long last = owner(k); last != k) dz[last] += dz[k];
  for (long k = 0; k < slots.count; ++k)
    if (owner(k) == k) store_part(row + slots.id[k], broadcast(dz[k]), 1);
}

template <class T>
void logits_gradient_of(const Call& call, long begin, long end, float* scratch) {
  Pieces pieces{scratch};
  float* const part = pieces.floats(vocabulary_chunk);
  float* const z = pieces.floats(call.teacher.slots);
  float* const dz = pieces.floats(call.teacher.slots);
  Slots slots(call, pieces);
  for (long n = begin; n < end; ++n) {
    const T* const row = static_cast<const T*>(call.scores) + n * call.scores_stride;
    T* const out = static_cast<T*>(call.dlogits) + n * call.width;
    const float whole = call.normalizers[2 * n], rest = call.normalizers[2 * n + 1];
    slots.read(call, n);
    if (!slots.count || call.normalization == Normalization::topk) __builtin_memset(out, 0, call.width * sizeof(T));
    if (!slots.count) continue;
    gather(call, row, slots, z);
    if (call.normalization == Normalization::topk) {
      slots_gradient(slots, z, whole, slots.total, call.gradient_scale, dz);
      scatter(slots, dz, out);
      continue;
    }
    const float t = left_out(slots.total, rest);
    const auto [factor, offset, unused] = rest_gradient(slots.total, t, whole, rest, call.gradient_scale);
    const float inverse = 1.0f / call.temperature;
    for (long k = 0; k < slots.count; k += lanes)
      store(dz + k, exp_of(load(z + k) - whole) * ((slots.total + t) * call.gradient_scale));
    for (long first = 0; first < call.width; first += vocabulary_chunk) {
      const long size = call.width - first < vocabulary_chunk ? call.width - first : vocabulary_chunk;
      widen_row(row + first, size, part);
      for (long c = 0; c < size; c += lanes) store(part + c, exp_of(load(part + c) * inverse - offset) * factor);
      for (long k = 0; k < slots.count; ++k)
        if (const long i = slots.id[k] - first; i >= 0 && i < size) part[i] = dz[k];
      for (long k = 0; k < slots.count; ++k)
        if (const long i = slots.id[k] - first; i >= 0 && i < size) part[i] -= slots.p[k] * call.gradient_scale;
      narrow_part(part, size, out + first);
    }
  }
}

void logits_gradient(const Call& call, int64_t begin, int64_t end, float* scratch) {
  with_type(call.scores_dtype, [&]<class T>(const T*) { logits_gradient_of<T>(call, begin, end, scratch); });
}
