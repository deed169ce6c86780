#include "operators.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <limits>
#include <memory>

#include "../../common/cpu/isa.h"
#include "../../common/tensors.h"
#include "integer_table.h"
#include "kernel_table.h"

namespace linearpatch::cpu {
namespace {

using topk_kl::Block;
using topk_kl::Call;
using topk_kl::NarrowRows;
using topk_kl::Normalization;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;
using torch::stable::detail::from;

constexpr int64_t kElementsPerThread = 65536;  // about 20 us: less is not worth waking a thread for
constexpr int64_t kBytesAhead = 65536;  // what is fetched before its turn: further gains nothing, and the cache loses
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kBlockIds = 2016;  // panels of integers, whole
constexpr int64_t kFewestForIntegers = 32;  // tokens: for fewer, the weight's rows are not worth packing
constexpr int64_t kBlockWeights = 1 << 22;  // float32 numbers of the weight in a block of the vocabulary: 16 MiB

thread_local Buffer scratch;

const topk_kl::KernelTable& kernels() {
  static const topk_kl::KernelTable& widest =
      *usable_units(topk_kl::scalar_kernels(), topk_kl::avx2_kernels(), topk_kl::avx512_kernels()).front();
  return widest;
}

const topk_kl::IntegerTable* integer_products() {
  static const bool usable = vnni_is_usable();
  return usable ? topk_kl::avx512_vnni_products() : nullptr;
}

// --- what a call works on ---

// linearpatch_kernels/ops/topk_kl/reference.py asks the same in words: the Python functions call it where an operator has
// raised.
void check_scale(const char* name, double scale) {
  if (!(scale >= 1e-30 && scale <= 1e30)) refuse(std::string(name) + " is out of range: " + std::to_string(scale));
}

void check_operands(const Tensor& scores, const Tensor& probs, const Tensor& ids, const std::string& normalization,
                    double temperature, const Tensor* weight, const Optional& bias) {
  const auto check = [&](bool fits, const char* name, const Tensor& t) { check_operand(fits && t.is_cpu(), name, t); };
  check(scores.dim() == 2 && floating(scores), weight ? "hidden" : "logits", scores);
  if (weight) check(weight->dim() == 2 && weight->size(1) == scores.size(1) && floating(*weight), "weight", *weight);
  if (bias) check(weight && bias->dim() == 1 && bias->size(0) == weight->size(0) && floating(*bias), "bias", *bias);
  check(probs.dim() == 2 && probs.size(0) == scores.size(0) && floating(probs), "teacher_probs", probs);
  const bool integers = ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long;
  check(integers && ids.dim() == 2 && ids.size(0) == probs.size(0) && ids.size(1) == probs.size(1), "teacher_ids", ids);
  if (normalization != "topk" && normalization != "full" && normalization != "tail")
    refuse("there is no normalization " + normalization);
  check_scale("temperature", temperature);
}

Tensor with_plain_rows(const Tensor& t) { return t.size(1) < 2 || t.stride(1) == 1 ? t : contiguous(t); }

template <class Id>
std::vector<uint8_t> counted_tokens(const Id* ids, int64_t tokens, int64_t slots, int64_t vocabulary) {
  std::vector<uint8_t> counted(tokens);
  uint64_t furthest = 0;  // of id + 1, as an unsigned number: what is below -1 lies far beyond the vocabulary
  for (int64_t n = 0; n < tokens; ++n) {
    uint64_t any = 0;
    for (int64_t k = 0; k < slots; ++k) {
      const uint64_t place = static_cast<uint64_t>(static_cast<int64_t>(ids[n * slots + k])) + 1;
      any |= place;
      furthest = std::max(furthest, place);
    }
    counted[n] = any != 0;
  }
  if (furthest > static_cast<uint64_t>(vocabulary))
    refuse("teacher_ids has one outside the vocabulary of " + std::to_string(vocabulary));
  return counted;
}

// A call's tensors as the kernels want them, and the call that points to them.
struct Operands {
  Tensor scores, probs, ids;
  Optional weight, bias;
  std::vector<uint8_t> counted;  // per token: whether it has a slot
  std::vector<float> losses;
  int64_t tokens, vocabulary, count;
  Call call{};

  Operands(const Tensor& given_scores, const Tensor& given_probs, const Tensor& given_ids, const std::string& normalization,
           double temperature, const Tensor* given_weight, const Optional& given_bias)
      : scores(with_plain_rows(given_scores)),
        probs(contiguous(kernel_dtype(given_probs) ? given_probs : torch::stable::to(given_probs, ScalarType::Float))),
        ids(contiguous(given_ids)),
        losses(given_scores.size(0)),
        tokens(given_scores.size(0)),
        vocabulary(given_weight ? given_weight->size(0) : given_scores.size(1)) {
    call.normalization = normalization == "topk"   ? Normalization::topk
                         : normalization == "full" ? Normalization::full
                                                   : Normalization::tail;
    call.inverse_temperature = static_cast<float>(1 / temperature);
    const bool long_ids = ids.scalar_type() == ScalarType::Long;
    call.teacher = {ids.size(1), probs.const_data_ptr(), *kernel_dtype(probs), ids.const_data_ptr(), long_ids};
    counted = long_ids ? counted_tokens(static_cast<const int64_t*>(call.teacher.ids), tokens, ids.size(1), vocabulary)
                       : counted_tokens(static_cast<const int32_t*>(call.teacher.ids), tokens, ids.size(1), vocabulary);
    count = std::count(counted.begin(), counted.end(), 1);
    call.gradient_scale = static_cast<float>(1.0 / (std::max<int64_t>(count, 1) * temperature));
    call.scores = scores.const_data_ptr();
    call.scores_dtype = *kernel_dtype(scores);
    call.scores_stride = scores.stride(0);
    call.width = scores.size(1);
    call.losses = losses.data();
    if (!given_weight) return;
    weight = with_plain_rows(*given_weight);
    call.weight = weight->const_data_ptr();
    call.weight_dtype = *kernel_dtype(*weight);
    call.weight_stride = weight->stride(0);
    const int64_t row = std::max<int64_t>(call.width * weight->element_size(), 1);
    call.rows_ahead = std::clamp<int64_t>(kBytesAhead / row, 4, 16);
    if (!given_bias) return;
    bias = contiguous(torch::stable::to(*given_bias, ScalarType::Float));
    call.bias = static_cast<const float*>(bias->const_data_ptr());
  }

  // The same for any number of threads: summed up in the tokens' order.
  Tensor mean_loss() const {
    double total = 0;
    for (const float loss : losses) total += loss;
    const Tensor mean = new_empty(scores, {}, ScalarType::Float);
    *static_cast<float*>(mean.mutable_data_ptr()) = static_cast<float>(total / std::max<int64_t>(count, 1));
    return mean;
  }

  template <class Work>
  void over_tokens(int64_t numbers_per_token, const Work& work) const {
    const int64_t floats = kernels().scratch(call);
    const int64_t least = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(numbers_per_token, 1));
    parallel_for(0, tokens, least, [&](int64_t begin, int64_t end) { work(begin, end, scratch.at_least(floats)); });
  }
};

float* numbers(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

// --- the linear loss over the slots ---

// dweight and dbias: the slots of all tokens sorted by their id, so that each row is one sum, in the tokens' order.
template <class Id>
void sum_by_id(const Operands& given, const Id* ids, float* dweight, float* dbias) {
  const int64_t slots = given.call.teacher.slots;
  std::vector<int64_t> end(given.vocabulary + 1);
  for (int64_t i = 0; i < given.tokens * slots; ++i)
    if (ids[i] >= 0) ++end[ids[i] + 1];
  for (int64_t v = 0; v < given.vocabulary; ++v) end[v + 1] += end[v];
  std::vector<int32_t> tokens(end.back());
  std::vector<float> factors(end.back());
  for (int64_t i = 0; i < given.tokens * slots; ++i)
    if (ids[i] >= 0) {
      const int64_t place = end[ids[i]]++;
      tokens[place] = static_cast<int32_t>(i / slots);
      factors[place] = given.call.slot_grads[i];
    }
  const int64_t width = given.call.width;
  parallel_for(0, given.vocabulary, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(width, 1)), [&](int64_t first, int64_t last) {
    float* const total = scratch.at_least(kernels().scratch(given.call));
    for (int64_t v = first; v < last; ++v) {
      const int64_t begin = v ? end[v - 1] : 0, count = end[v] - begin;
      if (dweight && count)
        kernels().combine(given.call, &tokens[begin], &factors[begin], count, dweight + v * width, total);
      else if (dweight)
        std::fill_n(dweight + v * width, width, 0.0f);
      if (!dbias) continue;
      double sum = 0;
      for (int64_t i = begin; i < begin + count; ++i) sum += factors[i];
      dbias[v] = static_cast<float>(sum);
    }
  });
}

void slots_alone(Operands& given, const Tensor& dweight, const Tensor& dbias) {
  given.over_tokens(given.call.teacher.slots * given.call.width, [&](int64_t begin, int64_t end, float* memory) {
    kernels().linear_topk(given.call, begin, end, memory);
  });
  if (!given.call.slot_grads) return;
  if (given.call.teacher.long_ids)
    sum_by_id(given, static_cast<const int64_t*>(given.call.teacher.ids), numbers(dweight), numbers(dbias));
  else
    sum_by_id(given, static_cast<const int32_t*>(given.call.teacher.ids), numbers(dweight), numbers(dbias));
}

// --- the linear loss over the vocabulary, in blocks ---

// float32 [rows, columns] in memory that somebody else owns.
Tensor blob(const float* data, int64_t rows, int64_t columns, bool transposed = false) {
  const std::array<int64_t, 2> sizes = transposed ? std::array{columns, rows} : std::array{rows, columns};
  const std::array<int64_t, 2> strides = transposed ? std::array<int64_t, 2>{1, columns} : std::array<int64_t, 2>{columns, 1};
  AtenTensorHandle handle;
  require(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes.data(), strides.data(), 0,
                                             aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle),
          "aoti_torch_create_tensor_from_blob");
  return Tensor(handle);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  require(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), "aoti_torch_cpu_mm_out");
}
void multiply_add(const Tensor& a, const Tensor& b, const Tensor& out) {
  require(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1), "aoti_torch_cpu_addmm_out");
}

// Rows of a matrix in float32: where they lie if they are that already.
const float* wide_rows(const void* data, Dtype dtype, int64_t stride, int64_t d, int64_t first, int64_t count, float* memory) {
  const int64_t size = bytes_of(dtype);
  const void* const rows = static_cast<const char*>(data) + first * stride * size;
  if (dtype == Dtype::float32 && stride == d) return static_cast<const float*>(rows);
  kernels().widen(rows, dtype, stride, count, d, memory);
  return memory;
}

struct Blocks {
  Operands& given;
  Call& call;
  int64_t ids;  // of the vocabulary in a block
  explicit Blocks(Operands& given)
      : given(given),
        call(given.call),
        ids(std::clamp<int64_t>(kBlockWeights / std::max<int64_t>(call.width, 1) / topk_kl::right_panel * topk_kl::right_panel,
                                topk_kl::right_panel, kBlockIds)) {}

  int64_t token_blocks() const { return (given.tokens + kBlockTokens - 1) / kBlockTokens; }
  int64_t id_blocks() const { return (given.vocabulary + ids - 1) / ids; }
  Block block(int64_t token_block, int64_t id_block, float* logits) const {
    const int64_t token = token_block * kBlockTokens, first = id_block * ids;
    return {token, std::min(kBlockTokens, given.tokens - token), first, std::min(ids, given.vocabulary - first), logits};
  }
  bool counts(const Block& b) const {
    const auto begin = given.counted.begin() + b.token;
    return std::find(begin, begin + b.count, 1) != begin + b.count;
  }
  const float* weight(const Block& b, float* memory) const {
    return wide_rows(call.weight, call.weight_dtype, call.weight_stride, call.width, b.first, b.size, memory);
  }
  // What an ignored token holds must not be multiplied with anything: 0 * NaN is NaN.
  const float* hidden(const Block& b, float* memory) const {
    const bool all = std::find(given.counted.begin() + b.token, given.counted.begin() + b.token + b.count, 0) ==
                     given.counted.begin() + b.token + b.count;
    if (all) return wide_rows(call.scores, call.scores_dtype, call.scores_stride, call.width, b.token, b.count, memory);
    const int64_t size = bytes_of(call.scores_dtype);
    for (int64_t r = 0; r < b.count; ++r) {
      const int64_t n = b.token + r;
      if (given.counted[n])
        kernels().widen(static_cast<const char*>(call.scores) + n * call.scores_stride * size, call.scores_dtype, 0, 1,
                        call.width, memory + r * call.width);
      else
        std::fill_n(memory + r * call.width, call.width, 0.0f);
    }
    return memory;
  }
};

// What makes a block's logits, and the gradient's sums of them. `memory` is a thread's.
struct Products {
  virtual ~Products() = default;
  // block.logits = hidden W^T
  virtual void logits(const Block&, float* memory) const = 0;
  // rest_sums += block.logits W
  virtual void add_rows(const Block&, float* memory) const = 0;
};

// In float32, by torch.
class WideProducts final : public Products {
 public:
  explicit WideProducts(const Blocks& blocks) : blocks(blocks) {}

  void prepare(const Block& ids) {
    const Call& call = blocks.call;
    const int64_t d = call.width;
    if (call.weight_dtype == Dtype::float32 && call.weight_stride == d) {
      weight = blocks.weight(ids, nullptr);
      return;
    }
    float* const memory = widened.at_least(blocks.ids * d);
    parallel_for(0, ids.size, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(d, 1)), [&](int64_t begin, int64_t end) {
      wide_rows(call.weight, call.weight_dtype, call.weight_stride, d, ids.first + begin, end - begin, memory + begin * d);
    });
    weight = memory;
  }

  void logits(const Block& block, float* memory) const override {
    const int64_t d = blocks.call.width;
    multiply(blob(blocks.hidden(block, memory), block.count, d), blob(weight, block.size, d, true),
             blob(block.logits, block.count, block.size));
  }

  void add_rows(const Block& block, float*) const override {
    const int64_t d = blocks.call.width;
    multiply_add(blob(block.logits, block.count, block.size), blob(weight, block.size, d),
                 blob(blocks.call.rest_sums + block.token * d, block.count, d));
  }

 private:
  const Blocks& blocks;
  Buffer widened;
  const float* weight = nullptr;
};

// In integers (integer_table.h), where hidden and weight are bfloat16 and their rows fit.
class IntegerProducts final : public Products {
 public:
  explicit IntegerProducts(const Blocks& blocks) : blocks(blocks) {
    const Call& call = blocks.call;
    const bool narrow = call.scores_dtype == Dtype::bfloat16 && call.weight_dtype == Dtype::bfloat16;
    if (!narrow || blocks.given.tokens < kFewestForIntegers || !(table = integer_products())) return;
    token_inverse.resize(blocks.given.tokens);
    for (int64_t b = 0; b < blocks.token_blocks(); ++b) {
      const Block block = blocks.block(b, 0, nullptr);
      fits.push_back(table->scale(hidden(block), &blocks.given.counted[block.token], &token_inverse[block.token]));
    }
  }

  bool serves(const Block& block) const { return table && fits[block.token / kBlockTokens]; }
  bool serves_all() const { return table && std::find(fits.begin(), fits.end(), 0) == fits.end(); }

  // False where a row or a column of these ids does not fit.
  bool prepare(const Block& ids) {
    const Call& call = blocks.call;
    if (!table || std::find(fits.begin(), fits.end(), 1) == fits.end()) return false;
    id_inverse.resize(ids.size);
    const NarrowRows rows = narrow_rows(call.weight, call.weight_stride, ids.first, ids.size);
    if (!table->scale(rows, nullptr, id_inverse.data())) return false;
    constexpr int64_t panel = topk_kl::right_panel;
    int32_t* const packed = words(by_id, topk_kl::right_words(ids.size, call.width));
    parallel_for(0, (ids.size + panel - 1) / panel, 4, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * panel, last = std::min(end * panel, ids.size);
      table->pack_right({rows.data + first * rows.stride, rows.stride, last - first, rows.n}, &id_inverse[first],
                        packed + begin * topk_kl::right_words(panel, rows.n));
    });
    if (!call.rest_sums) return true;
    column_inverse.resize(call.width);
    int32_t* const columns = words(by_column, topk_kl::right_words(call.width, ids.size));
    const int64_t panels = (call.width + panel - 1) / panel;
    std::vector<uint8_t> fit(panels);
    parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        fit[p] = table->pack_columns(rows, id_inverse.data(), p * panel, std::min((p + 1) * panel, call.width),
                                     columns + p * topk_kl::right_words(panel, ids.size), column_inverse.data());
    });
    return std::find(fit.begin(), fit.end(), 0) == fit.end();
  }

  void logits(const Block& block, float* memory) const override {
    int32_t* const left = reinterpret_cast<int32_t*>(memory);
    const float* const inverse = &token_inverse[block.token];
    table->pack_left(hidden(block), inverse, left);
    table->multiply(left, inverse, block.count, words(by_id), id_inverse.data(), block.size, blocks.call.width, false,
                    block.logits, block.size);
  }

  void add_rows(const Block& block, float* memory) const override {
    const int64_t d = blocks.call.width;
    float inverse[kBlockTokens];
    int32_t* const left = reinterpret_cast<int32_t*>(memory);
    table->pack_weights(block.logits, block.count, block.size, id_inverse.data(), left, inverse);
    table->multiply(left, inverse, block.count, words(by_column), column_inverse.data(), d, block.size, true,
                    blocks.call.rest_sums + block.token * d, d);
  }

 private:
  const Blocks& blocks;
  const topk_kl::IntegerTable* table = nullptr;
  std::vector<uint8_t> fits;  // per block of tokens
  std::vector<float> token_inverse, id_inverse, column_inverse;
  Buffer by_id, by_column;

  static int32_t* words(Buffer& buffer, int64_t count) { return reinterpret_cast<int32_t*>(buffer.at_least(count)); }
  static const int32_t* words(const Buffer& buffer) { return reinterpret_cast<const int32_t*>(buffer.data); }
  NarrowRows narrow_rows(const void* data, int64_t stride, int64_t first, int64_t count) const {
    return {static_cast<const uint16_t*>(data) + first * stride, stride, count, blocks.call.width};
  }
  NarrowRows hidden(const Block& block) const {
    return narrow_rows(blocks.call.scores, blocks.call.scores_stride, block.token, block.count);
  }
};

// Which of the two a block of tokens is served by, for the ids of the moment.
class BlockProducts {
 public:
  explicit BlockProducts(const Blocks& blocks) : wide(blocks), integers(blocks) {}
  void prepare(const Block& ids) {
    in_integers = integers.prepare(ids);
    if (!in_integers || !integers.serves_all()) wide.prepare(ids);
  }
  const Products& of(const Block& block) const {
    if (in_integers && integers.serves(block)) return integers;
    return wide;
  }

 private:
  WideProducts wide;
  IntegerProducts integers;
  bool in_integers = false;
};

// A thread's memory for a block: its logits, and behind them what its products need.
struct BlockMemory {
  float *logits, *products;
  explicit BlockMemory(const Blocks& blocks)
      : logits(scratch.at_least(kBlockTokens * (blocks.ids + std::max(blocks.call.width + 16, topk_kl::pairs_of(blocks.ids))))),
        products(logits + kBlockTokens * blocks.ids) {}
};

// Loss and dhidden: the vocabulary block by block, the tokens in parallel.
void add_blocks(const Blocks& blocks) {
  BlockProducts products(blocks);
  for (int64_t v = 0; v < blocks.id_blocks(); ++v) {
    products.prepare(blocks.block(0, v, nullptr));
    parallel_for(0, blocks.token_blocks(), 1, [&](int64_t begin, int64_t end) {
      const BlockMemory memory(blocks);
      for (int64_t n = begin; n < end; ++n) {
        const Block block = blocks.block(n, v, memory.logits);
        if (!blocks.counts(block)) continue;
        products.of(block).logits(block, memory.products);
        kernels().add_block(blocks.call, block);
        if (blocks.call.rest_sums) products.of(block).add_rows(block, memory.products);
      }
    });
  }
}

// dweight and dbias, for which every block of logits is computed again: they need the tokens' final normalisers, and to
// keep all logits until then is what this loss is there to avoid. The tokens in their order, the vocabulary in parallel.
void add_gradients(const Blocks& blocks, float* dweight, float* dbias) {
  const int64_t d = blocks.call.width;
  parallel_for(0, blocks.id_blocks(), 1, [&](int64_t begin, int64_t end) {
    BlockProducts products(blocks);
    const BlockMemory memory(blocks);
    for (int64_t v = begin; v < end; ++v) {
      const Block ids = blocks.block(0, v, memory.logits);
      products.prepare(ids);
      for (int64_t n = 0; n < blocks.token_blocks(); ++n) {
        const Block block = blocks.block(n, v, memory.logits);
        if (!blocks.counts(block)) continue;
        products.of(block).logits(block, memory.products);
        kernels().block_gradient(blocks.call, block);
        if (dweight)
          multiply_add(blob(block.logits, block.count, block.size, true),
                       blob(blocks.hidden(block, memory.products), block.count, d),
                       blob(dweight + ids.first * d, ids.size, d));
        if (dbias) kernels().add_columns(block.logits, block.count, block.size, dbias + ids.first);
      }
    }
  });
}

void whole_vocabulary(Operands& given, const Tensor& dweight, const Tensor& dbias) {
  Call& call = given.call;
  constexpr float none = -std::numeric_limits<float>::infinity();
  std::vector<float> running(4 * given.tokens), slot_logits(given.tokens * call.teacher.slots);
  for (int64_t n = 0; n < given.tokens; ++n) running[4 * n] = running[4 * n + 2] = none;
  std::vector<uint8_t> slot_first(slot_logits.size());
  call.running = running.data();
  call.slot_logits = slot_logits.data();
  call.slot_first = slot_first.data();
  std::vector<float> rest_sums(call.dhidden && call.dhidden_dtype != Dtype::float32 ? given.tokens * call.width : 0);
  call.rest_sums = rest_sums.empty() ? static_cast<float*>(call.dhidden) : rest_sums.data();
  const Blocks blocks(given);
  add_blocks(blocks);
  given.over_tokens(call.teacher.slots * call.width, [&](int64_t begin, int64_t end, float* memory) {
    kernels().finish_tokens(call, begin, end, memory);
  });
  call.rest_sums = nullptr;
  if (call.slot_grads) add_gradients(blocks, numbers(dweight), numbers(dbias));
}

bool needs_reference(const Tensor& scores, const Tensor* weight, const Tensor& ids) {
  const int64_t vocabulary = weight ? weight->size(0) : scores.size(1);
  // Marks of slots in rows of 16 bits, and numbers of ids and tokens in 32.
  return !kernel_dtype(scores) || (weight && !kernel_dtype(*weight)) || ids.size(1) > 65535 ||
         std::max(vocabulary, ids.size(0)) > std::numeric_limits<int32_t>::max();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_topk_kl_loss(Tensor hidden, Tensor weight, Tensor teacher_probs,
                                                               Tensor teacher_ids, Optional bias, std::string normalization,
                                                               double temperature, bool hidden_grad, bool weight_grad,
                                                               bool bias_grad) {
  return linear_topk_kl_loss_softcapped(std::move(hidden), std::move(weight), std::move(teacher_probs),
                                        std::move(teacher_ids), std::move(bias), std::move(normalization), temperature,
                                        hidden_grad, weight_grad, bias_grad, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_topk_kl_loss_softcapped(
    Tensor hidden, Tensor weight, Tensor teacher_probs, Tensor teacher_ids, Optional bias, std::string normalization,
    double temperature, bool hidden_grad, bool weight_grad, bool bias_grad, double softcap) {
  check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, &weight, bias);
  if (softcap == std::numeric_limits<double>::infinity()) softcap = 0;
  if (softcap != 0) check_scale("softcap", softcap);
  if (needs_reference(hidden, &weight, teacher_ids)) {
    const auto results =
        call<11>(LINEARPATCH_OPERATOR("linear_topk_kl_loss_softcapped_reference"),
                 {from(hidden), from(weight), from(teacher_probs), from(teacher_ids), from(bias), from(normalization),
                  from(temperature), from(hidden_grad), from(weight_grad), from(bias_grad), from(softcap)},
                 4);
    return {results[0], results[1], results[2], results[3]};
  }
  Operands given(hidden, teacher_probs, teacher_ids, normalization, temperature, &weight, bias);
  given.call.softcap = static_cast<float>(softcap);
  const bool whole = given.call.normalization != Normalization::topk;
  const auto gradient = [&](bool wanted, std::vector<int64_t> sizes, bool zeros, ScalarType dtype = ScalarType::Float) {
    if (!wanted) sizes = {0};
    return zeros ? new_zeros(hidden, sizes, dtype) : new_empty(hidden, sizes, dtype);
  };
  // reference.py's gradient_dtype
  const bool narrow = hidden.scalar_type() == ScalarType::BFloat16;
  const Tensor dhidden = gradient(hidden_grad, {given.tokens, given.call.width}, whole,
                                  narrow ? ScalarType::BFloat16 : ScalarType::Float);
  const Tensor dweight = gradient(weight_grad, {given.vocabulary, given.call.width}, whole);
  const Tensor dbias = gradient(bias_grad, {given.vocabulary}, whole);
  std::vector<float> slot_grads(weight_grad || bias_grad ? given.tokens * given.call.teacher.slots + 1 : 0);  // not null
  given.call.dhidden = dhidden.numel() ? dhidden.mutable_data_ptr() : nullptr;
  given.call.dhidden_dtype = *kernel_dtype(dhidden);
  given.call.slot_grads = weight_grad || bias_grad ? slot_grads.data() : nullptr;
  (whole ? whole_vocabulary : slots_alone)(given, dweight, dbias);
  return {given.mean_loss(), dhidden, dweight, dbias};
}

std::tuple<Tensor, Tensor> topk_kl_loss(Tensor logits, Tensor teacher_probs, Tensor teacher_ids, std::string normalization,
                                        double temperature) {
  check_operands(logits, teacher_probs, teacher_ids, normalization, temperature, nullptr, {});
  if (needs_reference(logits, nullptr, teacher_ids)) {
    const auto results = call<5>(LINEARPATCH_OPERATOR("topk_kl_loss_reference"),
                                 {from(logits), from(teacher_probs), from(teacher_ids), from(normalization), from(temperature)},
                                 2);
    return {results[0], results[1]};
  }
  Operands given(logits, teacher_probs, teacher_ids, normalization, temperature, nullptr, {});
  const Tensor normalizers = new_empty(logits, {given.tokens, 4}, ScalarType::Float);
  given.call.normalizers = numbers(normalizers);
  std::vector<float> running(4 * given.tokens);
  for (size_t i = 0; i < running.size(); i += 2) running[i] = -std::numeric_limits<float>::infinity();
  given.call.running = running.data();
  const bool whole = given.call.normalization != Normalization::topk;
  given.over_tokens(whole ? given.call.width : given.call.teacher.slots, [&](int64_t begin, int64_t end, float* memory) {
    kernels().given_logits(given.call, begin, end, memory);
  });
  return {given.mean_loss(), normalizers};
}

Tensor topk_kl_loss_backward(Tensor grad, Tensor logits, Tensor teacher_probs, Tensor teacher_ids, Tensor normalizers,
                             std::string normalization, double temperature) {
  check_operands(logits, teacher_probs, teacher_ids, normalization, temperature, nullptr, {});
  if (needs_reference(logits, nullptr, teacher_ids))
    return call<7>(LINEARPATCH_OPERATOR("topk_kl_loss_backward_reference"),
                   {from(grad), from(logits), from(teacher_probs), from(teacher_ids), from(normalizers),
                    from(normalization), from(temperature)},
                   1)[0];
  Operands given(logits, teacher_probs, teacher_ids, normalization, temperature, nullptr, {});
  check_operand(normalizers.dim() == 2 && normalizers.size(0) == given.tokens && normalizers.size(1) == 4 &&
                    normalizers.scalar_type() == ScalarType::Float && normalizers.is_cpu(),
                "normalizers", normalizers);
  const Tensor kept = contiguous(normalizers), scale = contiguous(torch::stable::to(grad, ScalarType::Float));
  check_operand(scale.numel() == 1, "grad", grad);
  const Tensor dlogits = new_empty(logits, {given.tokens, given.vocabulary});
  given.call.gradient_scale *= *static_cast<const float*>(scale.const_data_ptr());
  given.call.normalizers = numbers(kept);
  if (dlogits.numel()) given.call.dlogits = dlogits.mutable_data_ptr();
  given.over_tokens(given.vocabulary, [&](int64_t begin, int64_t end, float* memory) {
    kernels().logits_gradient(given.call, begin, end, memory);
  });
  return dlogits;
}

}  // namespace linearpatch::cpu
