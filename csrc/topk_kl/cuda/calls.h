// What the losses' CUDA kernels work on. No CUDA and no torch here: operators.cpp, the kernels, and the
// emulator of tests/simt share it.
//
// The maths and its letters (p, z, m, s, S, t, T) are those of linearpatch_kernels/ops/topk_kl/reference.py. All rows are
// contiguous but for a stride, in bytes for those of a Dtype; an id of -1 is an absent slot.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/cuda/launch.h"
#include "../../common/dtype.h"

namespace linearpatch::cuda {

constexpr int kVectorOfRow = 8;       // numbers that a thread reads together
constexpr int kWidestRow = 8192;      // of slot_rows: a thread holds two vectors of a row, of 512 threads
constexpr int kSlotsTogether = 4, kSlotsTogetherOfTwo = 2, kRowsTogether = 4;
constexpr int kTokenThreads = 128, kSumThreads = 1024;
constexpr int kCombineThreads = 128, kCombineBlocks = 8;  // with registers for rows that travel together
constexpr int kVocabularyThreads = 256;
constexpr int kVocabularyBlock = kVocabularyThreads * kVectorOfRow;  // what the bounds of a token's ids are of
constexpr int kVectorsOfPart = 4;     // of a token's logits, that a thread of carry_part holds
constexpr int kMostThreadsOfPart = 768;  // at 1024 a thread has 64 registers, and sm_120 spills

struct TeacherIds {
  const int32_t* given;  // of 64 bits two words, the lower one first
  int32_t* ids;          // [tokens, slots]; what neither stands for a token nor for an absent slot is the largest number
  float* present;        // [tokens]: 1 where a token has a slot, else 0
  int tokens, slots;
  bool wide;
};

// Without a count, out is the sum of the values, at least 1, and what every gradient is multiplied with if that is the
// count; with one, it is the sum divided by it.
struct TokenSum {
  const float* values;  // [tokens]
  const float* count;   // or null
  float* out;
  int tokens;
  float inverse_temperature;
};

struct SlotRows {
  const char* hidden;
  const char* weight;
  int64_t hidden_stride;
  uint32_t weight_stride;  // so that a row's place is one instruction
  Dtype hidden_dtype, weight_dtype;
  const float* bias;  // or null
  const float* probs;
  const int32_t* ids;
  const float* scale;  // of the gradient: one number
  float* z;
  char* dhidden;  // or null
  Dtype dhidden_dtype;
  int tokens, slots, width, vocabulary;
  float inverse_temperature;
};

struct TokenSlots {
  const float* z;
  const float* probs;
  const int32_t* ids;  // ascending where there is a rest
  const float* rest;   // [tokens, 2], m' and s'; or null: m and s are over the slots
  const float* scale;
  float* losses;
  float* normalizers;  // [tokens, 4]: m, s, m', s'
  float* dz;           // or null
  float* factors;      // of exp((z - m') / T) of the rest in dhidden; or null
  int tokens, slots;
  float inverse_temperature;
  bool tail;
};

struct RowSums {
  const char* rows;
  int64_t stride;
  Dtype dtype;
  const int32_t* index;
  const float* factors;
  const int32_t* starts;     // [results + 1]
  const float* old_factors;  // or null
  float* out;                // or null
  float* sums;               // or null
  int results, count, width;  // count: of the rows
};

struct VocabularyPart {
  const float* logits;  // [tokens, size], a part of the vocabulary from `first` on
  const float* bias;
  const int32_t* ids;
  const int32_t* bounds;  // [tokens, blocks + 1]
  int tokens, slots, first, size, blocks;
  int64_t stride;  // of the logits, in numbers, and of exp or dlogits: a multiple of 16
  float inverse_temperature;
  char* out;  // exp or dlogits; or null
  Dtype out_dtype;
  // to carry
  float* overwritten;  // the logits
  float* z;
  float* rest;
  float* dhidden;
  int width;
  // to differentiate
  const float* probs;
  const float* normalizers;
  const float* scale;
  bool tail;
};

// --- launches ---

inline int warps_of(int64_t threads) { return static_cast<int>((threads + 31) / 32); }

inline int vectors_of(const SlotRows& call) { return call.width > 2048 ? 2 : 1; }

inline Launch plan_slots(const SlotRows& call) {
  const int threads = 32 * warps_of((call.width / kVectorOfRow + vectors_of(call) - 1) / vectors_of(call));
  return {.possible = call.width % kVectorOfRow == 0 && call.width <= kWidestRow, .blocks = call.tokens, .diagonal_blocks = 1,
          .threads = threads, .shared_bytes = 2 * threads / 32 * kSlotsTogether * 4};
}

// A block for every token, and a float for each of its warps.
inline Launch plan_of_tokens(int tokens) {
  return {.possible = true, .blocks = tokens, .diagonal_blocks = 1, .threads = kTokenThreads,
          .shared_bytes = kTokenThreads / 32 * 4};
}

inline Launch plan_teacher(const TeacherIds& call) { return plan_of_tokens(call.tokens); }

inline Launch plan_sum_of_tokens(const TokenSum&) {
  return {.possible = true, .blocks = 1, .diagonal_blocks = 1, .threads = kSumThreads, .shared_bytes = kSumThreads / 32 * 4};
}

inline Launch plan_tokens(const TokenSlots& call) { return plan_of_tokens(call.tokens); }

inline Launch plan_sums(const RowSums& call) {
  const int wide = kCombineThreads * kVectorOfRow;
  return {.possible = true, .blocks = call.results, .diagonal_blocks = call.out ? (call.width + wide - 1) / wide : 1,
          .threads = kCombineThreads};
}

inline Launch plan_carry(const VocabularyPart& call) {
  const int held = kVectorsOfPart * kVectorOfRow, threads = 32 * warps_of((call.size + held - 1) / held);
  return {.possible = threads <= kMostThreadsOfPart, .blocks = call.tokens, .diagonal_blocks = 1, .threads = threads,
          .shared_bytes = threads / 32 * 4};
}

inline Launch plan_differentiate(const VocabularyPart& call) {
  return {.possible = true, .blocks = call.tokens, .diagonal_blocks = (call.size + kVocabularyBlock - 1) / kVocabularyBlock,
          .threads = kVocabularyThreads, .shared_bytes = kVocabularyThreads / 32 * 4};
}

}  // namespace linearpatch::cuda
