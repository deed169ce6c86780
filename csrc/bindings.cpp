// Everything that torch learns of the compiled kernels: loading this library registers them.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"
#include "hadamard_patch/operators.h"
#include "topk_kl/cpu/operators.h"
#ifdef LINEARPATCH_CUDA
#include "topk_kl/cuda/operators.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(LINEARPATCH_NAMESPACE, CPU, library) {
  library.impl("hadamard_patch", TORCH_BOX(&linearpatch::cpu::hadamard_patch));
  library.impl("hadamard_patch_backward", TORCH_BOX(&linearpatch::cpu::hadamard_patch_backward));
  library.impl("add_patch_rms_norm", TORCH_BOX(&linearpatch::cpu::add_patch_rms_norm));
  library.impl("hadamard_patch_out", TORCH_BOX(&linearpatch::cpu::hadamard_patch_out));
  library.impl("topk_kl_loss", TORCH_BOX(&linearpatch::cpu::topk_kl_loss));
  library.impl("topk_kl_loss_backward", TORCH_BOX(&linearpatch::cpu::topk_kl_loss_backward));
  library.impl("linear_topk_kl_loss", TORCH_BOX(&linearpatch::cpu::linear_topk_kl_loss));
  library.impl("linear_topk_kl_loss_softcapped", TORCH_BOX(&linearpatch::cpu::linear_topk_kl_loss_softcapped));
}

#ifdef LINEARPATCH_CUDA
STABLE_TORCH_LIBRARY_IMPL(LINEARPATCH_NAMESPACE, CUDA, library) {
  library.impl("hadamard_patch", TORCH_BOX(&linearpatch::cuda::hadamard_patch));
  library.impl("hadamard_patch_backward", TORCH_BOX(&linearpatch::cuda::hadamard_patch_backward));
  library.impl("add_patch_rms_norm", TORCH_BOX(&linearpatch::cuda::add_patch_rms_norm));
  library.impl("hadamard_patch_out", TORCH_BOX(&linearpatch::cuda::hadamard_patch_out));
  library.impl("topk_kl_teacher", TORCH_BOX(&linearpatch::cuda::topk_kl_teacher));
  library.impl("topk_kl_mean", TORCH_BOX(&linearpatch::cuda::topk_kl_mean));
  library.impl("topk_kl_slots", TORCH_BOX(&linearpatch::cuda::topk_kl_slots));
  library.impl("topk_kl_tokens", TORCH_BOX(&linearpatch::cuda::topk_kl_tokens));
  library.impl("topk_kl_combine", TORCH_BOX(&linearpatch::cuda::topk_kl_combine));
  library.impl("topk_kl_carry", TORCH_BOX(&linearpatch::cuda::topk_kl_carry));
  library.impl("topk_kl_differentiate", TORCH_BOX(&linearpatch::cuda::topk_kl_differentiate));
}
#endif
