// What an instruction-set unit offers to the losses: plain data only, so that nothing inline is shared between units.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace linearpatch::topk_kl {

enum class Normalization : int { topk, full, tail };

// The teacher's slots of every token, [tokens, slots], rows contiguous. An id of -1 is an absent slot.
struct Teacher {
  int64_t slots;
  const void* probs;
  Dtype probs_dtype;
  const void* ids;
  bool long_ids;
};

// What a call works on. Rows of scores (logits, or hidden states with a weight) are `width` numbers.
struct Call {
  Normalization normalization;
  float inverse_temperature;
  float softcap;  // logits are softcap * tanh(logits / softcap) before the temperature; 0 leaves them
  float gradient_scale;  // what every gradient is multiplied with in the end
  Teacher teacher;
  const void* scores;
  Dtype scores_dtype;
  int64_t scores_stride, width;
  const void* weight;  // null for given logits
  Dtype weight_dtype;
  int64_t weight_stride;
  const float* bias;  // or null
  int64_t rows_ahead;  // how many rows of the weight before its turn one is fetched

  // Results; null where one is not wanted.
  float* losses;        // [tokens]
  float* normalizers;   // [tokens, 4]: (m, s) and (m', s')
  void* dhidden;        // [tokens, width] in dhidden_dtype, rows contiguous
  Dtype dhidden_dtype;
  float* slot_grads;    // [tokens, slots]: the gradient of each slot's logit, its scale in it
  void* dlogits;        // [tokens, width] in scores_dtype, rows contiguous

  // Of a vocabulary that is met block by block: (m, s) of the rest and of the slots.
  float* running;       // [tokens, 4]
  float* rest_sums;     // [tokens, width]: the rest's sum of exp((z - m') / T) * weight, in dhidden's memory if it can be
  float* slot_logits;   // [tokens, slots]
  uint8_t* slot_first;  // [tokens, slots]: 1 where an id stands for the first time in its token
};

// Logits [tokens, vocabulary] of a block: `count` tokens from `token` on, `size` ids from `first` on.
struct Block {
  int64_t token, count, first, size;
  float* logits;  // rows contiguous
};

// Scratch is for one thread, as many floats as `scratch` says, aligned to 64 bytes.
struct KernelTable {
  int64_t (*scratch)(const Call&);
  // count rows of d numbers in float32.
  void (*widen)(const void* rows, Dtype, int64_t stride, int64_t count, int64_t d, float* out);
  // sums[c] += the sum of the column c.
  void (*add_columns)(const float* rows, int64_t count, int64_t d, float* sums);
  // out = the sum of factors[i] * row tokens[i] of the scores, [width].
  void (*combine)(const Call&, const int32_t* tokens, const float* factors, int64_t count, float* out, float* scratch);

  // Tokens of the linear loss over the slots: loss, dhidden, slot_grads.
  void (*linear_topk)(const Call&, int64_t begin, int64_t end, float* scratch);
  // The linear loss over the vocabulary: every block once; then loss, normalizers, dhidden and slot_grads of the tokens.
  // A block's logits, hidden @ weight.T, become exp((z - m') / T) over the rest where there are rest_sums.
  void (*add_block)(const Call&, const Block&);
  void (*finish_tokens)(const Call&, int64_t begin, int64_t end, float* scratch);
  // After that: a block's logits once more, turned into their gradient.
  void (*block_gradient)(const Call&, const Block&);

  // Tokens of given logits: loss and normalizers; dlogits from the normalizers.
  void (*given_logits)(const Call&, int64_t begin, int64_t end, float* scratch);
  void (*logits_gradient)(const Call&, int64_t begin, int64_t end, float* scratch);
};

const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();

}  // namespace linearpatch::topk_kl
