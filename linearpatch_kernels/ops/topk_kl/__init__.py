"""KL divergence from a teacher of which K probabilities per token were kept."""

from linearpatch_kernels.ops.topk_kl.operator import linear_topk_kl_loss, topk_kl_loss

__all__ = ["linear_topk_kl_loss", "topk_kl_loss"]
