// Logits of the whole vocabulary, a part at a time: the normalisers of "full" and "tail", and the gradients.

// What a token has come to: the rest (what is no slot's id) and the slots, each id once.
struct Running {
  Normalizer rest, slots;
};
// What that becomes when the token is finished: the rest's gradient is factor * exp((z - offset) / T), the scale in it.
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

// A part of a token's logits, products without bias: their slots are noted, the rest joins the running sums, and with
// `keep` z becomes exp((z - m') / T) over the rest, times the soft-cap's derivative. Returns what sums of earlier parts
// are to be multiplied with.
HOT float add_part(const Call& call, long token, long first, long size, float* z, bool keep) {
  const long slots = call.teacher.slots;
  Running& sums = running_of(call, token);
  // Before a slot becomes -infinity, which an infinite bias or the soft-cap would undo.
  if (call.bias || call.softcap != 0) complete_row(call, first, size, z);
  if (call.slot_logits)
    slots_within(call, token, first, size, [&](long k, long i) INLINE {
      call.slot_logits[token * slots + k] = z[i];
    });
  slots_within(call, token, first, size, [&](long k, long i) INLINE {
    const float value = z[i];
    const bool unseen = value != -infinity;
    if (call.slot_first) call.slot_first[token * slots + k] = unseen;
    z[i] = -infinity;
    if (!unseen) return;
    if (value > sums.slots.largest) {
      sums.slots.sum = sums.slots.sum * __builtin_expf(relative(call, sums.slots.largest, value)) + 1;
      sums.slots.largest = value;
    } else {
      sums.slots.sum += __builtin_expf(relative(call, value, finite(sums.slots.largest)));
    }
  });
  Reg most = broadcast(-infinity);
  long c = 0;
  for (; c + lanes <= size; c += lanes) most = larger(load(z + c), most);
  float part_max = largest(most);
  for (; c < size; ++c) part_max = z[c] > part_max ? z[c] : part_max;
  const float before = sums.rest.largest;
  if (part_max > before) sums.rest.largest = part_max;
  const float shift = finite(sums.rest.largest);
  const float earlier = part_max > before ? __builtin_expf(relative(call, before, shift)) : 1.0f;
  Reg total = {};
  for (c = 0; c + lanes <= size; c += lanes) {
    const Reg v = load(z + c), e = exp_of(relative(call, v, shift));
    if (keep) store(z + c, with_slope(call, v, e));
    total += e;
  }
  float part_sum = sum(total);
  if (c < size) {
    const Reg v = load_part(z + c, size - c), e = exp_of(relative(call, v, shift));
    if (keep) store_part(z + c, with_slope(call, v, e), size - c);
    for (long i = 0; i < size - c; ++i) part_sum += e[i];
  }
  sums.rest.sum = (sums.rest.sum == 0 ? 0 : sums.rest.sum * earlier) + part_sum;
  return earlier;
}

// A sum relative to another largest logit. What sums up nothing is nothing beside any.
HOT float sum_beside(const Call& call, Normalizer of, float largest) {
  return of.sum == 0 ? 0.0f : of.sum * __builtin_expf(relative(call, finite(of.largest), largest));
}

HOT Normalizer joined(const Call& call, Normalizer a, Normalizer b) {
  const float most = a.largest > b.largest ? a.largest : b.largest;
  if (most == infinity) return {most, most + a.sum + b.sum};
  return {most, sum_beside(call, a, finite(most)) + sum_beside(call, b, finite(most))};
}

// t, what the teacher left out; 0 where the student has nothing left.
HOT float left_out(float total, Normalizer rest) {
  const float t = 1.0f - total;
  return rest.sum == 0 || t < 0 ? 0.0f : t;
}

HOT float rest_loss(const Call& call, float t, Normalizer whole, Normalizer rest) {
  if (t == 0) return 0.0f;
  const float log_r = relative(call, rest.largest, whole.largest) + (__builtin_logf(rest.sum) - __builtin_logf(whole.sum));
  return t * (__builtin_logf(t) - log_r);
}

HOT Finished rest_gradient(const Call& call, float total, float t, Normalizer whole, Normalizer rest) {
  if (rest.sum == 0) return {0, whole.largest, {}};
  if (rest.largest == infinity) return {total + t, infinity, {}};  // NaN for the infinite z, 0 for the others
  const float student = (total + t) * __builtin_expf(relative(call, rest.largest, whole.largest)) / whole.sum;
  return {call.gradient_scale * (student - t / rest.sum), rest.largest, {}};
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
    const auto [rest, seen] = running_of(call, n);
    const Normalizer whole = joined(call, rest, seen);
    const float t = call.normalization == Normalization::tail ? left_out(slots.total, rest) : 0.0f;
    call.losses[n] = slots_loss(call, slots, z, whole) + rest_loss(call, t, whole, rest);
    const Finished finished = rest_gradient(call, slots.total, t, whole, rest);
    finished_of(call, n) = finished;
    if (!call.dhidden && !call.slot_grads) continue;
    fill(slope, 1.0f, slots.count);
    if (call.softcap != 0) scale_by_slope(call, z, slope, slots.count);
    for (long k = 0; k < slots.count; ++k)  // an id that stands twice has one logit
      if (!call.slot_first[n * k_all + slots.position[k]]) z[k] = -infinity;
    slots_gradient(call, slots, z, whole, slots.total + t, call.gradient_scale, dz);
    for (long k = 0; call.softcap != 0 && k < slots.count; ++k) dz[k] *= slope[k];
    if (call.slot_grads) store_slot_grads(call, n, slots, dz);
    if (!call.dhidden) continue;
    fill(dh, 0.0f, padded(call.width));
    add_rows_of<0>(weight, slots.id, slots.count, dz, dh, Next{});
    // An infinite logit: its product with the weight's row is in the sum, and 0 would hide it.
    const float factor = finished.offset == infinity ? __builtin_nanf("") : finished.factor;
    store_dhidden<W>(call, n, dh, factor, factor == 0.0f ? nullptr : call.rest_sums + n * call.width);
  }
}

void finish_tokens(const Call& call, int64_t begin, int64_t end, float* scratch) {
  with_type(call.weight_dtype, [&]<class W>(const W*) { finish_tokens_of<W>(call, begin, end, scratch); });
}

void block_gradient(const Call& call, const Block& block) {
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
        store_up_to(z + c, with_slope(call, v, exp_of(relative(call, v, offset)) * factor), n);
      }
    }
    slots_within(call, token, block.first, block.size, [&](long, long i) INLINE { z[i] = 0; });
    slots_within(call, token, block.first, block.size,
                 [&](long k, long i) INLINE { z[i] += call.slot_grads[token * slots + k]; });
  }
}

// --- given logits ---

HOT Normalizer* normalizers_of(const Call& call, long token) {
  return reinterpret_cast<Normalizer*>(call.normalizers) + 2 * token;
}

// z of the token's slots from its row, -infinity behind them.
template <class T>
HOT void gather(const T* row, const Slots& slots, float* z) {
  for (long k = 0; k < slots.count; ++k) z[k] = number(row + slots.id[k]);
  for (long k = slots.count; k < padded(slots.count); ++k) z[k] = -infinity;
}

template <class T>
void given_logits_of(const Call& call, long begin, long end, float* scratch) {
  Pieces pieces{scratch};
  float* const part = pieces.floats(vocabulary_chunk);
  float* const z = pieces.floats(call.teacher.slots);
  Slots slots(call, pieces);
  for (long n = begin; n < end; ++n) {
    const T* const row = static_cast<const T*>(call.scores) + n * call.scores_stride;
    Normalizer &whole = normalizers_of(call, n)[0], &rest = normalizers_of(call, n)[1];
    slots.read(call, n);
    call.losses[n] = 0;
    whole = rest = {-infinity, 0};
    if (!slots.count) continue;
    gather(row, slots, z);
    if (call.normalization == Normalization::topk) {
      whole = slots_normalizer(call, slots, z);
      call.losses[n] = slots_loss(call, slots, z, whole);
      continue;
    }
    for (long first = 0; first < call.width; first += vocabulary_chunk) {
      const long size = call.width - first < vocabulary_chunk ? call.width - first : vocabulary_chunk;
      widen_row(row + first, size, part);
      add_part(call, n, first, size, part, false);
    }
    const Running& sums = running_of(call, n);
    whole = joined(call, sums.rest, sums.slots);
    if (call.normalization == Normalization::tail) rest = sums.rest;
    const float t = left_out(slots.total, rest);
    call.losses[n] = slots_loss(call, slots, z, whole) + rest_loss(call, t, whole, rest);
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
    const Normalizer whole = normalizers_of(call, n)[0], rest = normalizers_of(call, n)[1];
    slots.read(call, n);
    if (!slots.count || call.normalization == Normalization::topk) __builtin_memset(out, 0, call.width * sizeof(T));
    if (!slots.count) continue;
    gather(row, slots, z);
    if (call.normalization == Normalization::topk) {
      slots_gradient(call, slots, z, whole, slots.total, call.gradient_scale, dz);
      scatter(slots, dz, out);
      continue;
    }
    const float t = left_out(slots.total, rest);
    const bool tail = call.normalization == Normalization::tail;
    const auto [factor, offset, unused] = rest_gradient(call, slots.total, t, whole, tail ? rest : whole);
    const float of_slots = (slots.total + t) / whole.sum * call.gradient_scale;
    for (long k = 0; k < slots.count; k += lanes)
      store(dz + k, exp_of(relative(call, load(z + k), whole.largest)) * of_slots);
    for (long first = 0; first < call.width; first += vocabulary_chunk) {
      const long size = call.width - first < vocabulary_chunk ? call.width - first : vocabulary_chunk;
      widen_row(row + first, size, part);
      for (long c = 0; c < size; c += lanes) store(part + c, exp_of(relative(call, load(part + c), offset)) * factor);
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
