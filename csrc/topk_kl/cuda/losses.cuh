// The losses' kernels. The includer has device.cuh or tests/simt/simt.h before it; nothing here knows which.
//
// What is added up is added up in one order, each number by one block, without atomics: the same call, the same bits.
#pragma once

#include <type_traits>

#include "../../common/cuda/elements.cuh"
#include "calls.h"

namespace linearpatch::cuda {

DEVICE int read_int(const int32_t* p) { return static_cast<int>(__float_as_uint(read(reinterpret_cast<const float*>(p)))); }
DEVICE void write_int(int32_t* p, int v) { write(reinterpret_cast<float*>(p), __uint_as_float(static_cast<uint32_t>(v))); }
DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// What is taken off before exp while numbers are summed up: the largest one, or 0 where that is infinite.
DEVICE float finite(float largest) { return fabsf(largest) == infinity() ? 0.0f : largest; }
// By what sums of exp((z - before) / T) become sums relative to `after`; both are largest numbers.
DEVICE float weight_of(float before, float after, float inverse) {
  return before == -infinity() ? 0.0f : expf((finite(before) - finite(after)) * inverse);
}

// Eight numbers as they lie in memory. A load that is unpacked where it is asked for is waited for before the next one is
// sent; those that are fetched first travel together.
template <int pieces>
struct Fetched {
  uint4 bits[pieces];
};
template <class Type>
constexpr int kPieces = Type::bytes / 2;
template <>
constexpr int kPieces<Any> = 2;

template <class T>
DEVICE Fetched<kPieces<Known<T>>> fetched(const Known<T>&, const char* row, int i, bool there) {
  Fetched<kPieces<Known<T>>> eight{};
#pragma unroll
  for (int piece = 0; piece < kPieces<Known<T>>; ++piece)
    if (there) eight.bits[piece] = load16(row + i * Known<T>::bytes + 16 * piece);
  return eight;
}
DEVICE Fetched<2> fetched(const Any& type, const char* row, int i, bool there) {
  Fetched<2> eight{};
  const bool single = type.dtype == Dtype::float32;
  row += i * bytes_of(type.dtype);
  if (there) eight.bits[0] = load16(row);
  if (there && single) eight.bits[1] = load16(row + 16);
  return eight;
}

DEVICE void unpacked(float, const uint4* bits, float* v) {
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    v[4 * piece] = __uint_as_float(bits[piece].x), v[4 * piece + 1] = __uint_as_float(bits[piece].y);
    v[4 * piece + 2] = __uint_as_float(bits[piece].z), v[4 * piece + 3] = __uint_as_float(bits[piece].w);
  }
}
template <class T>
DEVICE void unpacked(T type, const uint4* bits, float* v) {
  const uint32_t words[] = {bits->x, bits->y, bits->z, bits->w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(type, words[i]);
    v[2 * i] = two.x, v[2 * i + 1] = two.y;
  }
}
template <class T>
DEVICE void unpacked(const Known<T>&, const Fetched<kPieces<Known<T>>>& eight, float* v) { unpacked(T{}, eight.bits, v); }
DEVICE void unpacked(const Any& type, const Fetched<2>& eight, float* v) {
  if (type.dtype == Dtype::float32) return unpacked(float{}, eight.bits, v);
  if (type.dtype == Dtype::float16) return unpacked(Half{}, eight.bits, v);
  unpacked(BFloat16{}, eight.bits, v);
}

struct Add {
  DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of a lane, for all of its warp.
DEVICE float of_lane(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE int of_lane(int v, int lane) { return static_cast<int>(__float_as_uint(of_lane(__uint_as_float(v), lane))); }

// Of every `lanes` lanes that lie together.
template <int lanes_ = 32, class Operation>
DEVICE float over_warp(float v, Operation operation) {
#pragma unroll
  for (int lanes = lanes_ / 2; lanes; lanes /= 2) v = operation(v, __shfl_xor_sync(0xffffffffu, v, lanes));
  return v;
}

// The sums of n numbers a lane: lane l has that of v[l / (32 / n)]. Lanes halve what they add up as long as it is several
// numbers, which takes n + 3 shuffles or fewer, where each number by itself takes five.
template <int n>
DEVICE float sums_over_warp(float (&v)[n]) {
  int lanes = 16;
#pragma unroll
  for (int half = n / 2; half; half /= 2, lanes /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = threadIdx.x & lanes;
      const float kept = upper ? v[i + half] : v[i], given = upper ? v[i] : v[i + half];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, lanes);
    }
#pragma unroll
  for (; lanes; lanes /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], lanes);
  return v[0];
}

// Of all threads' v, for all of them. Shared memory has a float for every warp.
template <class Operation>
DEVICE float over_block(float v, Operation operation) {
  float* const shared = shared_memory();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  v = over_warp(v, operation);
  if (threadIdx.x % 32 == 0) write(shared + warp, v);
  __syncthreads();
  v = read(shared);
  for (int w = 1; w < warps; ++w) v = operation(v, read(shared + w));
  __syncthreads();
  return v;
}

// --- the teacher's slots ---

// A block has one token.
__global__ void __launch_bounds__(kTokenThreads) teacher_ids(const TeacherIds call) {
  const int64_t token = blockIdx.x, place = token * call.slots;
  float present = 0;
  for (int k = threadIdx.x; k < call.slots; k += blockDim.x) {
    const int32_t* const given = call.given + (place + k) * (call.wide ? 2 : 1);
    int id = read_int(given);
    const int above = call.wide ? read_int(given + 1) : id >> 31;
    if (above != id >> 31 || id < -1) id = INT32_MAX;
    if (id >= 0) present = 1;
    write_int(call.ids + place + k, id);
  }
  present = over_block(present, Larger{});
  if (!threadIdx.x) write(call.present + token, present);
}

// One block.
__global__ void __launch_bounds__(kSumThreads) sum_tokens(const TokenSum call) {
  float sum = 0;
  for (int token = threadIdx.x; token < call.tokens; token += blockDim.x) sum += read(call.values + token);
  sum = over_block(sum, Add{});
  if (threadIdx.x) return;
  if (call.count) return write(call.out, sum / read(call.count));
  sum = fmaxf(sum, 1.0f);
  write(call.out, sum);
  write(call.out + 1, call.inverse_temperature / sum);
}

// --- the slots of the linear loss ---

// A block has one token: every slot's z, and with dhidden the gradient for "topk". A slot's row is read once: the sums of
// exp((z - m) / T) w and of p w are carried along, m the largest z so far, `together` slots between two barriers. Their
// rows travel together, and so do the next slots' ids, without which no row can be asked for. What there is of a slot, but
// its row, has one of `together` lanes.
template <class Weight, int vectors, int together>
__global__ void __launch_bounds__(vectors == 1 ? 256 : 512) slot_rows(const SlotRows call) {
  const Weight weight(call.weight_dtype);
  const Any hidden(call.hidden_dtype);
  float* const shared = shared_memory();
  const int thread = threadIdx.x, warps = blockDim.x / 32, count = call.width / kVectorOfRow;
  const int slot = thread % together;
  const int64_t token = blockIdx.x, place = token * call.slots + slot;
  const auto vector = [&](int v) { return thread + v * static_cast<int>(blockDim.x); };
  const auto inside = [&](int id) { return static_cast<unsigned>(id) < static_cast<unsigned>(call.vocabulary); };
  int next = -1;
  float next_p = 0;
  const auto ask = [&](int first) {
    next = -1;
    if (first + slot >= call.slots) return;
    next = read_int(call.ids + place + first);
    if (call.dhidden) next_p = read(call.probs + place + first);
  };
  ask(0);
  float h[vectors][8], student[vectors][8], teacher[vectors][8];
  Fetched<2> of_hidden[vectors];
#pragma unroll
  for (int v = 0; v < vectors; ++v)
    of_hidden[v] = fetched(hidden, call.hidden + token * call.hidden_stride, 8 * vector(v), vector(v) < count);
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    unpacked(hidden, of_hidden[v], h[v]);
#pragma unroll
    for (int e = 0; e < 8; ++e) student[v][e] = teacher[v][e] = 0;
  }
  float largest = -infinity(), sum = 0, total = 0, present = 0;
  int turn = 0;
  for (int first = 0; first < call.slots; first += together, turn ^= 1) {
    const int id = next;
    const float p = id >= 0 ? next_p : 0.0f;
    Fetched<kPieces<Weight>> rows[together][vectors];
#pragma unroll
    for (int g = 0; g < together; ++g) {
      const int row = of_lane(id, g);
      const char* const start = call.weight + uint64_t{static_cast<uint32_t>(row)} * call.weight_stride;
#pragma unroll
      for (int v = 0; v < vectors; ++v) rows[g][v] = fetched(weight, start, 8 * vector(v), inside(row) && vector(v) < count);
    }
    float z = call.bias && inside(id) ? read(call.bias + id) : 0.0f, dots[together];
    ask(first + together);
#pragma unroll
    for (int g = 0; g < together; ++g) {
      dots[g] = 0;
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        float row[8];
        unpacked(weight, rows[g][v], row);
#pragma unroll
        for (int e = 0; e < 8; ++e) dots[g] += row[e] * h[v][e];
      }
    }
    const float of_warp = sums_over_warp(dots);
    if (thread % (32 / together) == 0) write(shared + turn * warps * together + thread / (32 / together), of_warp);
    __syncthreads();  // the other turn's dots are read before the next one: one barrier is enough
#pragma unroll 4
    for (int w = 0; w < warps; ++w) z += read(shared + (turn * warps + w) * together + slot);
    if (id >= call.vocabulary) z = not_a_number();
    if (id < 0) z = -infinity();  // so that an absent slot adds nothing to any sum
    if (thread < together && first + slot < call.slots) write(call.z + place + first, z);
    if (!call.dhidden) continue;
    const float now = fmaxf(largest, over_warp<together>(z, Larger{}));
    const float kept = weight_of(largest, now, call.inverse_temperature);
    const float e_of_z = expf((z - finite(now)) * call.inverse_temperature);
    sum = sum * kept + e_of_z;
    total += p;
    present = id >= 0 ? 1.0f : present;
    largest = now;
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int e = 0; e < 8; ++e) student[v][e] *= kept;
#pragma unroll
    for (int g = 0; g < together; ++g) {
      const float of_student = of_lane(e_of_z, g), of_teacher = of_lane(p, g);
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        float row[8];
        unpacked(weight, rows[g][v], row);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          student[v][e] += of_student * row[e];
          teacher[v][e] += of_teacher * row[e];
        }
      }
    }
  }
  if (!call.dhidden) return;
  sum = over_warp<together>(sum, Add{});
  total = over_warp<together>(total, Add{});
  const bool counted = over_warp<together>(present, Larger{}) != 0.0f;
  const float scale = counted ? read(call.scale) : 0.0f, factor = counted ? total / sum : 0.0f;
  const Any type(call.dhidden_dtype);
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    if (vector(v) >= count) continue;
    float gradient[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) gradient[e] = (factor * student[v][e] - teacher[v][e]) * scale;
    type.store(call.dhidden + token * call.width * bytes_of(call.dhidden_dtype), 8 * vector(v), gradient);
  }
}

// run(the type of a tensor's elements, as the kernels take it).
template <class Run>
void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32: return run(std::type_identity<Known<float>>{});
    case Dtype::float16: return run(std::type_identity<Known<Half>>{});
    case Dtype::bfloat16: return run(std::type_identity<Known<BFloat16>>{});
  }
}

template <class Run>
void with_slots_kernel(const SlotRows& call, Run run) {
  with_type(call.weight_dtype, [&](auto type) {
    using Weight = typename decltype(type)::type;
    if (vectors_of(call) == 1) return run(slot_rows<Weight, 1, kSlotsTogether>);
    run(slot_rows<Weight, 2, kSlotsTogetherOfTwo>);
  });
}

// --- a token's loss ---

// A block has one token: normalisers, loss, the slots' gradients, from z and the rest of the vocabulary.
__global__ void __launch_bounds__(kTokenThreads) token_slots(const TokenSlots call) {
  const int64_t token = blockIdx.x, place = token * call.slots;
  const auto each_slot = [&](auto visit) {
    for (int k = threadIdx.x; k < call.slots; k += blockDim.x) {
      const int id = read_int(call.ids + place + k);
      // An id that stands twice is two slots, and one of the vocabulary.
      if (id >= 0) visit(k, read(call.z + place + k), read(call.probs + place + k), !call.rest || !k || read_int(call.ids + place + k - 1) != id);
    }
  };
  float largest = -infinity(), total = 0, present = 0;
  each_slot([&](int, float z, float p, bool) {
    largest = fmaxf(largest, z);
    total += p;
    present = 1;
  });
  largest = over_block(largest, Larger{});
  total = over_block(total, Add{});
  present = over_block(present, Larger{});
  const float inverse = call.inverse_temperature;
  float sum = 0, rest_sum = 0, rest_largest = -infinity();
  each_slot([&](int, float z, float, bool first) { sum += first ? expf((z - finite(largest)) * inverse) : 0.0f; });
  sum = over_block(sum, Add{});
  if (call.rest) {
    rest_largest = read(call.rest + 2 * token);
    rest_sum = read(call.rest + 2 * token + 1);
    const float now = fmaxf(largest, rest_largest);
    sum = sum * weight_of(largest, now, inverse) + rest_sum * weight_of(rest_largest, now, inverse);
    largest = now;
  }
  const float log_sum = logf(sum), scale = read(call.scale);
  const float t = call.tail && rest_sum != 0.0f ? fmaxf(1.0f - total, 0.0f) : 0.0f, student = (total + t) / sum;
  float loss = 0;
  each_slot([&](int k, float z, float p, bool first) {
    z = (z - largest) * inverse;
    if (p != 0.0f) loss += p * (logf(p) - (z - log_sum));
    if (call.dz) write(call.dz + place + k, ((first ? student * expf(z) : 0.0f) - p) * scale);
  });
  for (int k = threadIdx.x; call.dz && k < call.slots; k += blockDim.x)
    if (read_int(call.ids + place + k) < 0) write(call.dz + place + k, 0.0f);
  loss = over_block(loss, Add{});
  if (threadIdx.x) return;
  const float of_rest = (rest_largest - largest) * inverse;
  if (t != 0.0f) loss += t * (logf(t) - (of_rest + (logf(rest_sum) - log_sum)));
  write(call.losses + token, present != 0.0f ? loss : 0.0f);
  write(call.normalizers + 4 * token, largest);
  write(call.normalizers + 4 * token + 1, sum);
  write(call.normalizers + 4 * token + 2, call.tail ? rest_largest : -infinity());
  write(call.normalizers + 4 * token + 3, call.tail ? rest_sum : 0.0f);
  if (!call.factors) return;
  const float factor = student * expf(of_rest) - t / rest_sum;
  write(call.factors + token, present == 0.0f || rest_sum == 0.0f ? 0.0f : factor * scale);
}

// --- sums of rows ---

// out[r] = the sum of factors[i] * rows[index[i]] over starts[r] <= i < starts[r + 1], plus old_factors[r] * out[r]. Some
// rows travel together; they are added one by one.
template <class Rows>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks) combine_rows(const RowSums call) {
  const Rows type(call.dtype);
  const int64_t result = blockIdx.x;
  const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
  const int end = read_int(call.starts + result + 1);
  const bool mine = call.out && column < call.width;
  float total[8] = {}, sum = 0;
  float* const out = call.out + result * call.width + column;
  if (mine && call.old_factors) {
    const float old = read(call.old_factors + result);
    if (old != 0.0f) {  // else it is not read: an ignored token may hold anything
      load8(float{}, reinterpret_cast<const char*>(out), total);
#pragma unroll
      for (int e = 0; e < 8; ++e) total[e] *= old;
    }
  }
  for (int first = read_int(call.starts + result); first < end; first += kRowsTogether) {
    float factors[kRowsTogether];
    int index[kRowsTogether];
#pragma unroll
    for (int g = 0; g < kRowsTogether; ++g) {
      const bool there = first + g < end;
      factors[g] = there ? read(call.factors + first + g) : 0.0f;
      index[g] = there && mine ? read_int(call.index + first + g) : -1;
    }
    Fetched<kPieces<Rows>> rows[kRowsTogether];
#pragma unroll
    for (int g = 0; g < kRowsTogether; ++g) {
      const bool there = index[g] >= 0 && index[g] < call.count;
      rows[g] = fetched(type, call.rows + index[g] * call.stride, column, there);
      sum += factors[g];
      if (!there) factors[g] = 0;
    }
#pragma unroll
    for (int g = 0; g < kRowsTogether; ++g) {
      float row[8];
      unpacked(type, rows[g], row);
#pragma unroll
      for (int e = 0; e < 8; ++e) total[e] += factors[g] * row[e];
    }
  }
  if (mine) store8(float{}, reinterpret_cast<char*>(out), total);
  if (call.sums && !threadIdx.x && !blockIdx.y) write(call.sums + result, sum);
}

template <class Run>
void with_sums_kernel(const RowSums& call, Run run) {
  with_type(call.dtype, [&](auto type) { run(combine_rows<typename decltype(type)::type>); });
}

// --- a part of the vocabulary ---

// Eight logits of each column, in a row that is padded to whole vectors, become z: with the bias, -infinity beyond the last.
template <int vectors, class Column>
DEVICE void finish_logits(const VocabularyPart& call, Column column, float (&z)[vectors][8]) {
  if (call.bias)
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (column(v) + e < call.size) z[v][e] += read(call.bias + call.first + column(v) + e);
#pragma unroll
  for (int v = 0; v < vectors; ++v)
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column(v) + e >= call.size) z[v][e] = -infinity();
}

// A block has one token: its slots' z go out, the rest into (m', s'); with `out` exp((z - m') / T) of the rest goes there,
// and dhidden is made relative to the new m'. The slots' logits are overwritten. A thread holds all of its logits, so that
// they are read once, and exp is taken once.
__global__ void __launch_bounds__(kMostThreadsOfPart) carry_part(const VocabularyPart call) {
  const int64_t token = blockIdx.x;
  float* const row = call.overwritten + token * call.stride;
  const int32_t* const ids = call.ids + token * call.slots;
  const int32_t* const bounds = call.bounds + token * (call.blocks + 1) + call.first / kVocabularyBlock;
  const int begin = read_int(bounds), end = read_int(bounds + (call.size + kVocabularyBlock - 1) / kVocabularyBlock);
  const float before = read(call.rest + 2 * token), sum_before = read(call.rest + 2 * token + 1);
  for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
    const int id = read_int(ids + k);
    const float z = read(row + id - call.first) + (call.bias ? read(call.bias + id) : 0.0f);
    write(call.z + token * call.slots + k, z);
  }
  __syncthreads();
  for (int k = begin + threadIdx.x; k < end; k += blockDim.x) {
    const int id = read_int(ids + k);
    if (k == begin || read_int(ids + k - 1) != id) write(row + id - call.first, -infinity());
  }
  __syncthreads();
  const Known<float> single(Dtype::float32);
  const auto column = [&](int v) { return 8 * static_cast<int>(threadIdx.x + v * blockDim.x); };
  Fetched<2> logits[kVectorsOfPart];
#pragma unroll
  for (int v = 0; v < kVectorsOfPart; ++v)
    logits[v] = fetched(single, reinterpret_cast<const char*>(row), column(v), column(v) < call.size);
  const float inverse = call.inverse_temperature;
  float largest = before, sum = 0, z[kVectorsOfPart][8];
#pragma unroll
  for (int v = 0; v < kVectorsOfPart; ++v) unpacked(single, logits[v], z[v]);
  finish_logits(call, column, z);
#pragma unroll
  for (int v = 0; v < kVectorsOfPart; ++v)
#pragma unroll
    for (int e = 0; e < 8; ++e) largest = fmaxf(largest, z[v][e]);
  const float most = over_block(largest, Larger{});
#pragma unroll
  for (int v = 0; v < kVectorsOfPart; ++v)
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      z[v][e] = expf((z[v][e] - finite(most)) * inverse);
      sum += z[v][e];
    }
  sum = over_block(sum, Add{});
  const float kept = weight_of(before, most, inverse);
  if (!threadIdx.x) {
    write(call.rest + 2 * token, most);
    write(call.rest + 2 * token + 1, sum_before * kept + sum);
  }
  if (!call.out) return;
  const Any type(call.out_dtype);
#pragma unroll
  for (int v = 0; v < kVectorsOfPart; ++v)
    if (column(v) < call.size) type.store(call.out + token * call.stride * bytes_of(call.out_dtype), column(v), z[v]);
  if (kept == 1.0f || before == -infinity()) return;  // of nothing dhidden is nothing yet
  float* const dhidden = call.dhidden + token * call.width;
  for (int i = 4 * threadIdx.x; i < call.width; i += 4 * blockDim.x) {
    const float4 four = read4(dhidden + i);
    write4(dhidden + i, make_float4(kept * four.x, kept * four.y, kept * four.z, kept * four.w));
  }
}

// A block has some columns of one token: the gradient of their logits from (m, s, m', s'), times scale.
__global__ void __launch_bounds__(kVocabularyThreads) differentiate_part(const VocabularyPart call) {
  const int64_t token = blockIdx.x;
  const int32_t* const ids = call.ids + token * call.slots;
  float total = 0, present = 0;
  for (int k = threadIdx.x; k < call.slots; k += blockDim.x)
    if (read_int(ids + k) >= 0) {
      total += read(call.probs + token * call.slots + k);
      present = 1;
    }
  total = over_block(total, Add{});
  present = over_block(present, Larger{});
  const int column = 8 * (blockIdx.y * blockDim.x + threadIdx.x);
  if (column >= call.size) return;
  const float* const of = call.normalizers + 4 * token;
  const float largest = read(of), sum = read(of + 1), rest_largest = read(of + 2), rest_sum = read(of + 3);
  const float t = call.tail && rest_sum != 0.0f ? fmaxf(1.0f - total, 0.0f) : 0.0f, inverse = call.inverse_temperature;
  const float of_whole = (total + t) / sum, of_rest = t != 0.0f ? t / rest_sum : 0.0f;
  float z[1][8], gradient[8], student[8];
  load8(float{}, reinterpret_cast<const char*>(call.logits + token * call.stride + column), z[0]);
  finish_logits(call, [&](int) { return column; }, z);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    student[e] = of_whole * expf((z[0][e] - largest) * inverse);
    gradient[e] = t != 0.0f ? student[e] - of_rest * expf((z[0][e] - rest_largest) * inverse) : student[e];
  }
  const int32_t* const bounds = call.bounds + token * (call.blocks + 1) + call.first / kVocabularyBlock + blockIdx.y;
  const int begin = read_int(bounds), end = read_int(bounds + 1);
  for (int k = begin; k < end; ++k) {
    const int id = read_int(ids + k), here = id - call.first - column;
    if (here < 0 || here >= 8) continue;
    const bool again = k > begin && read_int(ids + k - 1) == id;
    const float p = read(call.probs + token * call.slots + k);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e == here) gradient[e] = (again ? gradient[e] : student[e]) - p;
  }
  const float scale = read(call.scale);
#pragma unroll
  for (int e = 0; e < 8; ++e) gradient[e] = present != 0.0f ? gradient[e] * scale : 0.0f;
  Any(call.out_dtype).store(call.out + token * call.stride * bytes_of(call.out_dtype), column, gradient);
}

}  // namespace linearpatch::cuda
