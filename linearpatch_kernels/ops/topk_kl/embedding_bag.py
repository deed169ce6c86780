"""The linear loss over the slots on a CPU without the compiled kernels: two of torch's own kernels read the rows.

``embedding_bag`` sums rows of a matrix by number, weighted; its gradient with respect to those weights is the dot
product of a row with what the sum's gradient is, here the hidden state. Neither copies the rows it reads, so that this
takes no more memory than N * K numbers. The maths, and the other normalisations, are `reference`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearpatch_kernels.ops.topk_kl.reference import (
    _normalizers,
    _slot_gradient,
    _slots,
    _token_losses,
    arithmetic_dtype,
    check_ids,
    check_operands,
    gradient_dtype,
    linear_topk_kl_loss_reference,
)
from linearpatch_kernels.torch_internals import embedding_bag_products


def linear_topk_kl_loss_embedding_bag(
    hidden: Tensor,
    weight: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    bias: Tensor | None,
    normalization: str,
    temperature: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_topk_kl_loss_reference`, for "topk" without copies of the weight's rows.

    The products are in the weight's dtype, and their sums in float32; dhidden is rounded to that dtype on its way.
    """
    served = normalization == "topk" and hidden.dtype == weight.dtype and not (weight_grad or bias_grad)
    if embedding_bag_products is None or not served or not teacher_ids.numel() or not hidden.shape[1]:
        return linear_topk_kl_loss_reference(
            hidden,
            weight,
            teacher_probs,
            teacher_ids,
            bias,
            normalization,
            temperature,
            hidden_grad,
            weight_grad,
            bias_grad,
        )
    check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, weight, bias)
    check_ids(teacher_ids, len(weight))
    dtype = arithmetic_dtype(hidden, weight)
    kept = (teacher_ids >= 0).any(1).nonzero().squeeze(1)
    p, index, present = _slots(teacher_probs[kept], teacher_ids[kept], dtype)
    tokens, slots = p.shape
    flat, offsets = index.flatten(), torch.arange(0, tokens * slots, max(slots, 1), device=index.device)
    bags = torch.arange(tokens, device=index.device).repeat_interleave(slots)
    products = embedding_bag_products(hidden[kept], weight.detach(), flat, offsets, bags, 0)
    z = products.to(dtype).view(tokens, slots)
    z = z if bias is None else z + bias[index].to(dtype)
    normalizers = _normalizers(z, index, present, "topk", temperature)
    count = max(1, tokens)
    loss = _token_losses(z, p, normalizers, temperature).sum() / count
    nothing = loss.new_zeros(0)
    if not hidden_grad:
        return loss, nothing.to(gradient_dtype(hidden, weight), copy=True), nothing, nothing.clone()
    factors = _slot_gradient(z, p, present, normalizers, temperature).to(weight.dtype)
    sums = torch.nn.functional.embedding_bag(flat, weight, offsets, mode="sum", per_sample_weights=factors.flatten())
    sums = sums.to(dtype).div_(count * temperature).to(gradient_dtype(hidden, weight))
    dhidden = sums.new_zeros(hidden.shape).index_copy_(0, kept, sums)
    return loss, dhidden, nothing, nothing.clone()
