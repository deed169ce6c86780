// The patch operators on CPU and on CUDA tensors, as linearpatch_kernels/ops/hadamard_patch/operator.py has their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace linearpatch {

using torch::stable::Tensor;

// The types of the functions, which each device has of its own.
struct PatchOperators {
  using Patch = Tensor(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                       std::optional<Tensor> down, std::optional<Tensor> up);
  using PatchOut = void(Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                        std::optional<Tensor> down, std::optional<Tensor> up, Tensor out);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      Tensor grad, Tensor x, Tensor scale, std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
      std::optional<Tensor> down, std::optional<Tensor> up, int64_t needs);
  using Norm = std::tuple<Tensor, Tensor>(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, double eps,
                                          std::optional<Tensor> pre_scale, std::optional<Tensor> post_scale,
                                          std::optional<Tensor> down, std::optional<Tensor> up);
};

namespace cpu {
PatchOperators::Patch hadamard_patch;
PatchOperators::PatchOut hadamard_patch_out;
PatchOperators::Backward hadamard_patch_backward;
PatchOperators::Norm add_patch_rms_norm;
}  // namespace cpu

namespace cuda {
PatchOperators::Patch hadamard_patch;
PatchOperators::PatchOut hadamard_patch_out;
PatchOperators::Backward hadamard_patch_backward;
PatchOperators::Norm add_patch_rms_norm;
}  // namespace cuda

}  // namespace linearpatch
