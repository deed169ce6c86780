// The losses on CPU tensors, as the schemas in linearpatch_kernels/ops/topk_kl/operator.py have them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace linearpatch::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> topk_kl_loss(Tensor logits, Tensor teacher_probs, Tensor teacher_ids, std::string normalization,
                                        double temperature);

Tensor topk_kl_loss_backward(Tensor grad, Tensor logits, Tensor teacher_probs, Tensor teacher_ids, Tensor normalizers,
                             std::string normalization, double temperature);

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_topk_kl_loss(Tensor hidden, Tensor weight, Tensor teacher_probs,
                                                               Tensor teacher_ids, std::optional<Tensor> bias,
                                                               std::string normalization, double temperature,
                                                               bool hidden_grad, bool weight_grad, bool bias_grad);

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_topk_kl_loss_softcapped(
    Tensor hidden, Tensor weight, Tensor teacher_probs, Tensor teacher_ids, std::optional<Tensor> bias,
    std::string normalization, double temperature, bool hidden_grad, bool weight_grad, bool bias_grad, double softcap);

}  // namespace linearpatch::cpu
