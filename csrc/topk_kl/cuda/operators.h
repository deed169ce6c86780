// The kernels of the losses on CUDA tensors, as the schemas in linearpatch_kernels/ops/topk_kl/cuda.py have them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace linearpatch::cuda {

using torch::stable::Tensor;

void topk_kl_teacher(Tensor teacher_ids, double temperature, Tensor ids, Tensor present, Tensor count_and_scale);

void topk_kl_mean(Tensor losses, Tensor count, Tensor loss);

void topk_kl_slots(Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor probs, Tensor ids, Tensor scale,
                   double temperature, Tensor z, std::optional<Tensor> dhidden);

void topk_kl_tokens(Tensor z, Tensor probs, Tensor ids, std::optional<Tensor> rest, Tensor scale, double temperature, bool tail,
                    Tensor losses, Tensor normalizers, std::optional<Tensor> dz, std::optional<Tensor> factors);

void topk_kl_combine(Tensor rows, Tensor index, Tensor factors, Tensor starts, std::optional<Tensor> old_factors,
                     std::optional<Tensor> out, std::optional<Tensor> sums);

void topk_kl_carry(Tensor logits, int64_t size, std::optional<Tensor> bias, Tensor ids, Tensor bounds, int64_t first,
                   double temperature, Tensor z, Tensor rest, std::optional<Tensor> exp, std::optional<Tensor> dhidden);

void topk_kl_differentiate(Tensor logits, int64_t size, std::optional<Tensor> bias, Tensor probs, Tensor ids, Tensor bounds,
                           int64_t first, double temperature, Tensor normalizers, Tensor scale, bool tail, Tensor dlogits);

}  // namespace linearpatch::cuda
