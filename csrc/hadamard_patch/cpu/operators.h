// The patch operators on CPU tensors, as the schema in linearpatch_kernels/ops/hadamard_patch/operator.py has them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace linearpatch::cpu {

using torch::stable::Tensor;

Tensor hadamard_patch(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                      std::optional<Tensor> down, std::optional<Tensor> up);

void hadamard_patch_out(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                        std::optional<Tensor> down, std::optional<Tensor> up, Tensor out);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hadamard_patch_backward(
    Tensor grad, Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
    std::optional<Tensor> down, std::optional<Tensor> up, int64_t needs);

std::tuple<Tensor, Tensor> add_patch_rms_norm(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, double eps,
                                              std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                                              std::optional<Tensor> down, std::optional<Tensor> up);

}  // namespace linearpatch::cpu
