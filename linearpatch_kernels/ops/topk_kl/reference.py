"""The maths of the Top-K distillation losses in plain PyTorch: what every kernel is held to.

One token has K slots (p_k, id_k), kept from the teacher, and student logits z_v over the vocabulary, which a
temperature T divides. A slot with id -1 is absent, a token without a slot is ignored. With S = sum p_k over the slots:

    loss = sum_k p_k (log p_k - log q_{id_k})  [+ t (log t - log r)  for "tail"]                    where 0 log 0 = 0
    log q_v = (z_v - m) / T - log s, with m the largest z and s = sum exp((z - m) / T), over the slots ("topk", as in
        LinearPatch, arXiv 2505.24680, section 3.3), or over the vocabulary ("full", "tail")
    log r = (m' - m) / T + log s' - log s, with (m', s') the same over the vocabulary without the slots' ids
    t = max(0, 1 - S), what the teacher left out; 0 where the ids are the whole vocabulary

    T dloss/dz_v = S q_v - p_v                                                           "topk" over the slots, "full"
    T dloss/dz_v = (S + t) q_v - p_v - t exp((z_v - m') / T) / s' [v is no slot's id]                           "tail"

m and s are kept apart, because one float32 of ``m / T + log s`` holds the less of log s the larger the logits are; a
difference of logits is exact to float32 wherever they lie, and is divided by T as that difference. Of no logit at all
m is -inf and s is 0: what stands for nothing is s, and no other number may be put in m's place outside of the sum.

With a soft-cap c (Gemma 2) z is c tanh(logits / c), and the logits' gradient has the factor 1 - tanh(logits / c)^2.

Slots are taken as they come: an id that stands twice is two slots. The loss of a batch is the mean over its tokens that
are not ignored, 0 if there are none. The gradients are divided by T, and by the number of those tokens.

Arithmetic is in float64 for float64 input, else in float32; only the linear loss over a whole vocabulary multiplies
``hidden @ weight.T`` in the dtype of the two, because a float32 copy of a half-precision head would not be small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError

NORMALIZATIONS = ("topk", "full", "tail")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECKED_EVERYWHERE = os.environ.get("LINEARPATCH_CHECK_IDS", "0") not in ("", "0")

# Numbers in one temporary: 32 MiB of float32 logits, 8 MiB of gathered rows. Less costs calls, more costs the cache.
_LOGITS_AT_ONCE = 2**23
_ROWS_AT_ONCE = 2**21


def check_operands(
    scores: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    normalization: str,
    temperature: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Shapes, dtypes and options of both losses; ``scores`` are the logits, or the hidden states with a weight."""
    name = "logits" if weight is None else "hidden"
    optional = {key: tensor for key, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    check_tensors({name: scores, "teacher_probs": teacher_probs, "teacher_ids": teacher_ids, **optional})
    if scores.dim() != 2 or scores.dtype not in FLOATING:
        raise InputError(f"{name} must be floating [N, {'V' if weight is None else 'd'}], not {_told(scores)}")
    if weight is not None:
        if weight.dim() != 2 or weight.shape[1] != scores.shape[1] or weight.dtype not in FLOATING:
            raise InputError(f"weight must be floating [V, {scores.shape[1]}] as hidden's width, not {_told(weight)}")
        if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0] or bias.dtype not in FLOATING):
            raise InputError(f"bias must be floating [{weight.shape[0]}] as weight's rows, not {_told(bias)}")
    if teacher_probs.dim() != 2 or teacher_probs.shape[0] != scores.shape[0] or teacher_probs.dtype not in FLOATING:
        raise InputError(f"teacher_probs must be floating [{scores.shape[0]}, K], not {_told(teacher_probs)}")
    if teacher_ids.shape != teacher_probs.shape or teacher_ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"teacher_ids must be int32 or int64, shaped as teacher_probs, not {_told(teacher_ids)}")
    check_options(normalization, temperature, softcap)


def check_options(normalization: str, temperature: float, softcap: float | None = None) -> None:
    """What both losses take beside tensors."""
    if normalization not in NORMALIZATIONS:
        raise InputError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {normalization!r}")
    _check_scale("temperature", temperature)
    if not leaves_logits(softcap):
        _check_scale("softcap", softcap, ", or 0 for none")


def leaves_logits(softcap: float | None) -> bool:
    """Whether it is no soft-cap: None, 0, or infinity, to whose ``c * tanh(z / c)`` z is the limit."""
    return softcap is None or (isinstance(softcap, Real) and softcap in (0, torch.inf))


def check_tensors(tensors: dict[str, Any]) -> None:
    """Dense tensors, on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise InputError(f"{name} must be a dense tensor, not a nested or sparse one ({tensor.layout})")
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(devices) > 1:
        raise InputError(f"{', '.join(tensors)} must be on one device, not on {' and '.join(devices)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | torch.SymFloat | torch.SymInt)


def _check_scale(name: str, value: Any, otherwise: str = "") -> None:
    """What logits are divided by: so that it, its reciprocal and their products with counts are float32 numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:  # which torch takes for a number
        value = value.item()
    if not (_is_number(value) and 1e-30 <= value <= 1e30):
        shown = " ".join(repr(value).split())[:40]
        raise InputError(f"{name} must be positive, between 1e-30 and 1e30{otherwise}, not {shown}")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gradient_dtype(hidden: Tensor, *others: Tensor) -> torch.dtype:
    """What dhidden is kept in until the backward multiplies it: in bfloat16 itself, which has float32's range.

    That of float16 would lose what a loss scale is there to save.
    """
    return hidden.dtype if hidden.dtype == torch.bfloat16 else arithmetic_dtype(hidden, *others)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Ids outside of -1 and the vocabulary, on the CPU, or everywhere if that was asked for."""
    # On a GPU the answer costs a synchronisation, so it has to be asked for.
    if not ids.numel() or not (CHECKED_EVERYWHERE or ids.device.type == "cpu"):
        return
    least, most = int(ids.min()), int(ids.max())
    if least < -1 or most >= vocabulary:
        wrong = least if least < -1 else most
        raise InputError(f"teacher id {wrong} is outside the vocabulary of {vocabulary}: the tokenizers must agree")


def _slots(probs: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``(p, index, present)`` [N, K]: an absent slot weighs 0 and points at an id of its token, so adds none."""
    present = ids >= 0
    index = torch.where(present, ids, ids.amax(1, keepdim=True).clamp(min=0)).long() if ids.shape[1] else ids.long()
    return torch.where(present, probs.to(dtype), 0), index, present


def _normalizer(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``(m, s)`` [N] of logits [N, any]."""
    if not z.shape[1]:
        return z.new_full((len(z),), -torch.inf), z.new_zeros(len(z))
    largest = z.amax(1)
    shift = torch.where(largest.isinf(), 0, largest)
    return largest, ((z - shift[:, None]) / temperature).exp().sum(1)


def _normalizers(z: Tensor, index: Tensor, present: Tensor, normalization: str, temperature: float) -> Tensor:
    """``(m, s, m', s')`` [N, 4], the last two of nothing but for "tail"; z is [N, K] for "topk", [N, V] otherwise."""
    whole = _normalizer(torch.where(present, z, -torch.inf) if normalization == "topk" else z, temperature)
    rest = _normalizer(z.scatter(1, index, -torch.inf) if normalization == "tail" else z[:, :0], temperature)
    return torch.stack((*whole, *rest), dim=1)


def _left_out(p: Tensor, rest_sum: Tensor) -> Tensor:
    """t [N]: what the teacher's slots leave out, where the student has anything left (s' is not 0)."""
    return torch.where(rest_sum == 0, 0, (1 - p.sum(1)).clamp(min=0))


def _token_losses(slot_z: Tensor, p: Tensor, normalizers: Tensor, temperature: float) -> Tensor:
    """The loss of each token [N], from its slots' z [N, K]."""
    largest, total, rest_largest, rest_total = normalizers.unbind(1)
    log_q = (slot_z - largest[:, None]) / temperature - total.log()[:, None]
    slots = torch.where(p == 0, 0, p * (p.log() - log_q)).sum(1)
    t = _left_out(p, rest_total)
    log_r = (rest_largest - largest) / temperature + (rest_total.log() - total.log())
    return slots + torch.where(t == 0, 0, t * (t.log() - log_r))


def _slot_gradient(slot_z: Tensor, p: Tensor, present: Tensor, normalizers: Tensor, temperature: float) -> Tensor:
    """T dloss/dz over the slots [N, K] of "topk"."""
    largest, total = normalizers[:, :1], normalizers[:, 1:2]
    student = ((slot_z - largest) / temperature).exp()
    return torch.where(present, p.sum(1, keepdim=True) / total * student - p, 0)


def _vocabulary_gradient(
    z: Tensor, p: Tensor, index: Tensor, normalizers: Tensor, normalization: str, temperature: float
) -> Tensor:
    """T dloss/dz over the vocabulary [N, V] of "full" and "tail"."""
    largest, total, rest_largest, rest_total = normalizers.unbind(1)
    t = _left_out(p, rest_total)
    gradient = ((p.sum(1) + t) / total)[:, None] * ((z - largest[:, None]) / temperature).exp()
    if normalization == "tail":
        outside = ((z - rest_largest[:, None]) / temperature).exp().scatter(1, index, 0)
        gradient -= torch.where((t == 0)[:, None], 0, (t / rest_total)[:, None] * outside)
    return gradient.scatter_add_(1, index, -p)


def _softcapped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | float]:
    """``(c tanh(logits / c), its derivative)``."""
    if leaves_logits(softcap):
        return logits, 1.0
    bounded = (logits / softcap).tanh()
    return bounded * softcap, 1 - bounded.square()


def _chunks(tokens: int, numbers_per_token: int, at_once: int) -> Iterator[slice]:
    step = max(1, at_once // max(1, numbers_per_token))
    return (slice(start, min(tokens, start + step)) for start in range(0, tokens, step))


def topk_kl_loss_reference(
    logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, normalization: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss of given logits, in the arithmetic's dtype.

    Returns:
        ``(loss, normalizers)``: a scalar, and (m, s, m', s') of each token [N, 4], which the backward would else
        compute again.
    """
    check_operands(logits, teacher_probs, teacher_ids, normalization, temperature)
    check_ids(teacher_ids, logits.shape[1])
    dtype = arithmetic_dtype(logits)
    normalizers = logits.new_zeros((len(logits), 4), dtype=dtype)
    counted = (teacher_ids >= 0).any(1)
    total = normalizers.new_zeros(())
    for tokens in _chunks(len(logits), logits.shape[1], _LOGITS_AT_ONCE):
        p, index, present = _slots(teacher_probs[tokens], teacher_ids[tokens], dtype)
        slot_z = logits[tokens].gather(1, index).to(dtype)
        z = slot_z if normalization == "topk" else logits[tokens].to(dtype)
        normalizers[tokens] = _normalizers(z, index, present, normalization, temperature)
        losses = _token_losses(slot_z, p, normalizers[tokens], temperature)
        total += torch.where(counted[tokens], losses, 0).sum()
    return total / counted.sum().clamp(min=1), normalizers


def topk_kl_loss_backward_reference(
    grad: Tensor,
    logits: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    normalizers: Tensor,
    normalization: str,
    temperature: float,
) -> Tensor:
    """The logits' gradient [N, V] in their dtype, from ``grad``, the loss', and the forward's normalizers."""
    dtype = normalizers.dtype
    counted = (teacher_ids >= 0).any(1)
    factor = grad.to(dtype) / counted.sum().clamp(min=1) / temperature
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for tokens in _chunks(len(logits), logits.shape[1], _LOGITS_AT_ONCE):
        p, index, present = _slots(teacher_probs[tokens], teacher_ids[tokens], dtype)
        if normalization == "topk":
            slot_z = logits[tokens].gather(1, index).to(dtype)
            dz = torch.zeros(logits[tokens].shape, dtype=dtype, device=logits.device)
            dz.scatter_add_(1, index, _slot_gradient(slot_z, p, present, normalizers[tokens], temperature))
        else:
            z = logits[tokens].to(dtype)
            dz = _vocabulary_gradient(z, p, index, normalizers[tokens], normalization, temperature)
        gradient[tokens] = torch.where(counted[tokens, None], dz * factor, 0)
    return gradient


class _Sums(NamedTuple):
    """What the chunks of the linear loss add up to; a gradient that is not wanted is None."""

    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _add_gathered(
    sums: _Sums,
    tokens: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    softcap: float,
) -> None:
    """Some tokens of the linear loss for "topk", by the weight's rows of their slots."""
    p, index, present = slots
    h, rows = hidden[tokens].to(p.dtype), weight[index].to(p.dtype)
    z = (rows @ h[:, :, None]).squeeze(2)
    z, slope = _softcapped(z if bias is None else z + bias[index].to(p.dtype), softcap)
    normalizers = _normalizers(z, index, present, "topk", temperature)
    sums.loss.add_(_token_losses(z, p, normalizers, temperature).sum())
    dz = _slot_gradient(z, p, present, normalizers, temperature) * slope
    if sums.hidden is not None:
        sums.hidden[tokens] = (dz[:, None] @ rows).squeeze(1)
    if sums.weight is not None:
        sums.weight.index_add_(0, index.flatten(), (dz[:, :, None] * h[:, None]).flatten(0, 1))
    if sums.bias is not None:
        sums.bias.index_add_(0, index.flatten(), dz.flatten())


def _add_whole(
    sums: _Sums,
    tokens: slice,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    normalization: str,
    softcap: float,
) -> None:
    """Some tokens of the linear loss for "full" and "tail", by the logits of the whole vocabulary."""
    p, index, present = slots
    h = hidden[tokens]
    z = (h @ weight.mT).to(p.dtype)
    z, slope = _softcapped(z if bias is None else z + bias.to(p.dtype), softcap)
    normalizers = _normalizers(z, index, present, normalization, temperature)
    sums.loss.add_(_token_losses(z.gather(1, index), p, normalizers, temperature).sum())
    if sums.hidden is None and sums.weight is None and sums.bias is None:
        return
    dz = _vocabulary_gradient(z, p, index, normalizers, normalization, temperature) * slope
    if sums.bias is not None:
        sums.bias.add_(dz.sum(0))
    dz = dz.to(h.dtype)
    if sums.hidden is not None:
        sums.hidden[tokens] = (dz @ weight).to(p.dtype)
    if sums.weight is not None:
        sums.weight.add_((dz.mT @ h).to(p.dtype))


def linear_topk_kl_loss_reference(
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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of ``logits = hidden @ weight.T + bias``, and in the same pass the gradients that are asked for.

    A chunk of tokens is met once: its logits, of all the vocabulary or of the slots' rows alone, live from the product
    that makes them to the products that use their gradient.

    Returns:
        ``(loss, dhidden [N, d], dweight [V, d], dbias [V])`` in the arithmetic's dtype, dhidden in `gradient_dtype`;
        empty where not asked for.
    """
    check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, weight, bias, softcap)
    check_ids(teacher_ids, len(weight))
    product_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    weight = weight.to(product_dtype)
    dtype = arithmetic_dtype(weight)
    kept = (teacher_ids >= 0).any(1).nonzero().squeeze(1)
    kept_hidden, probs, ids = hidden[kept].to(product_dtype), teacher_probs[kept], teacher_ids[kept]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=hidden.device)

    sums = _Sums(
        zeros(),
        zeros(*kept_hidden.shape) if hidden_grad else None,
        zeros(*weight.shape) if weight_grad else None,
        zeros(len(weight)) if bias_grad else None,
    )
    if normalization == "topk":
        chunks = _chunks(len(kept), ids.shape[1] * hidden.shape[1], _ROWS_AT_ONCE)
    else:
        chunks = _chunks(len(kept), len(weight), _LOGITS_AT_ONCE)
    for tokens in chunks:
        slots = _slots(probs[tokens], ids[tokens], dtype)
        if normalization == "topk":
            _add_gathered(sums, tokens, kept_hidden, weight, bias, slots, temperature, softcap)
        else:
            _add_whole(sums, tokens, kept_hidden, weight, bias, slots, temperature, normalization, softcap)

    count = max(1, len(kept))
    dhidden, dweight, dbias = (
        zeros(0) if gradient is None else gradient.div_(count * temperature) for gradient in sums[1:]
    )
    dhidden = dhidden.to(gradient_dtype(hidden, weight))
    if hidden_grad:
        dhidden = dhidden.new_zeros(hidden.shape).index_copy_(0, kept, dhidden)
    return sums.loss / count, dhidden, dweight, dbias
