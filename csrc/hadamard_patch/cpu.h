// The patch operators on CPU tensors, as the schema in linearpatch_kernels/ops/hadamard_patch/operator.py has them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace linearpatch::cpu {

using torch::stable::Tensor;

Tensor hadamard_patch(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                      std::optional<Tensor> down, std::optional<Tensor> up);

void hadamard_patch_out(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                        std::optional<Tensor> down, std::optional<Tensor> up, Tensor out);

}  // namespace linearpatch::cpu
