"""The losses on GPUs, made of the kernels of `cuda` or `triton`; the maths, and its letters, are `reference`'s.

Over the slots ("topk"), a kernel makes their z and dhidden in one pass over the rows that the ids name.

Over a whole vocabulary ("full", "tail") the logits of some thousand ids at a time are torch's matrix product, in
float32. A kernel takes the slots' logits out, carries (m', s') of the rest along, and leaves ``exp((z - m') / T)`` of
the rest behind for the product that adds up dhidden: nothing is computed twice for it, and nothing [N, V] is ever
there. dweight and dbias need the final normalisers, so that the products are made again for them alone.

What is added up is added up in one order, each number by one program: slots are sorted by their id for the gradients of
gathered rows. There are no atomics, and the same call has the same bits.

An id outside the vocabulary makes its token's loss NaN; ``LINEARPATCH_CHECK_IDS=1`` has it refused (`reference`).
float64, and what neither has a kernel for, is left to plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels.backend import compiled_for_gpus, triton_serves
from linearpatch_kernels.ops.topk_kl import cuda
from linearpatch_kernels.ops.topk_kl.reference import (
    check_ids,
    check_operands,
    gradient_dtype,
    linear_topk_kl_loss_reference,
    topk_kl_loss_backward_reference,
    topk_kl_loss_reference,
)

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32
_IDS_AT_ONCE = 3 * 2**13  # whose logits a block of `cuda`'s holds: csrc/topk_kl/cuda/calls.h
_MOST = 2**31 - 1  # the kernels count in 32 bits


def _triton(device: torch.device) -> Any:
    return import_module(f"{__package__}.triton") if triton_serves(device.type) else None


def kernels_of(impl: str) -> Any:
    """What an implementation that is named has the kernels in."""
    return cuda.COMPILED if impl == "cuda" else import_module(f"{__package__}.triton")


def kernels_for(hidden: Tensor) -> Any:
    """What has the kernels for such hidden states, `cuda` before `triton`, or None."""
    if compiled_for_gpus(hidden.device.type, "topk_kl_slots") and cuda.COMPILED.serves(hidden.shape[1]):
        return cuda.COMPILED
    kernels = _triton(hidden.device)
    return kernels if kernels and kernels.serves(hidden.shape[1]) else None


def _counted(kernels: Any, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids in 32 bits, how many tokens have any, what every gradient is multiplied with)``, the last two [1]."""
    if isinstance(kernels, cuda.Kernels):
        narrow, both = (
            torch.empty(ids.shape, dtype=torch.int32, device=ids.device),
            ids.new_empty(2, dtype=torch.float32),
        )
        kernels.teacher(ids.contiguous(), temperature, narrow, both.new_empty(len(ids)), both)
        return narrow, *both.split(1)
    # What is below -1 is no absent slot, but as wrong as an id past the vocabulary.
    ids = ids.masked_fill(ids < -1, _MOST).clamp(max=_MOST).int().contiguous()
    count = (ids >= 0).any(1).sum().clamp(min=1).float().reshape(1)
    return ids, count, (count * temperature).reciprocal()


@dataclass(frozen=True)
class _Teacher:
    """The slots, how many tokens have any, and what every gradient is multiplied with.

    For kernels that go over a vocabulary the slots are in ascending order of their ids, and ``bounds`` [N, blocks + 1]
    is how many of a token's are below the start of each block.
    """

    probs: Tensor
    ids: Tensor
    count: Tensor
    scale: Tensor
    bounds: Tensor

    @classmethod
    def of(
        cls, kernels: Any, probs: Tensor, ids: Tensor, temperature: float, vocabulary: int, block: int | None
    ) -> _Teacher:
        probs = probs.float().contiguous()
        ids, count, scale = _counted(kernels, ids, temperature)
        bounds = ids
        if block is not None:
            ids, order = ids.sort(dim=1)
            probs = probs.gather(1, order)
            starts = torch.arange(0, vocabulary + block, block, device=ids.device, dtype=ids.dtype)
            starts = starts.clamp_(max=vocabulary).expand(len(ids), -1).contiguous()
            bounds = torch.searchsorted(ids, starts, out_int32=True)
        return cls(probs, ids, count, scale, bounds)

    def finished(
        self, kernels: Any, z: Tensor, rest: Tensor | None, normalization: str, temperature: float, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(loss, normalizers, dz, factors of the rest)``."""
        losses, normalizers = z.new_empty(len(z)), z.new_empty(len(z), 4)
        dz = torch.empty_like(z) if gradient else None
        factors = torch.empty_like(losses) if gradient and rest is not None else None
        tail = normalization == "tail"
        kernels.tokens(z, self.probs, self.ids, rest, self.scale, temperature, tail, losses, normalizers, dz, factors)
        if isinstance(kernels, cuda.Kernels):
            loss = losses.new_empty(())
            kernels.mean(losses, self.count, loss)
        else:
            loss = losses.sum() / self.count.squeeze()
        return loss, normalizers, dz, factors


def _start(teacher: _Teacher) -> tuple[Tensor, Tensor]:
    """``(z, rest)``: NaN for a slot that no part of the vocabulary has, and (m', s') of nothing."""
    z = torch.full_like(teacher.probs, torch.nan)
    rest = teacher.probs.new_zeros(len(teacher.ids), 2)
    rest.select(1, 0).fill_(-torch.inf)
    return z, rest


def _over_slots(
    kernels: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: _Teacher, temperature: float,
    grads: list[Tensor | None],
) -> Tensor:  # fmt: skip
    """The linear loss for "topk"; the gradients that are there are filled."""
    dhidden, dweight, dbias = grads
    z = torch.empty_like(teacher.probs)
    kernels.slots(hidden, weight, bias, teacher.probs, teacher.ids, teacher.scale, temperature, z, dhidden)
    further = dweight is not None or dbias is not None
    loss, _, dz, _ = teacher.finished(kernels, z, None, "topk", temperature, further)
    if dz is not None:
        ids, order = teacher.ids.flatten().sort(stable=True)
        rows = torch.arange(len(weight) + 1, device=ids.device, dtype=ids.dtype)
        starts = torch.searchsorted(ids, rows, out_int32=True)
        tokens = (order // teacher.ids.shape[1]).int()
        kernels.combine(hidden, tokens, dz.flatten().index_select(0, order), starts, None, dweight, dbias)
    return loss


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out (+)= a @ b`` in float32; on the CPU the kernels are run for tests alone."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


@dataclass(frozen=True)
class _Vocabulary:
    """The logits of a linear loss, some ids at a time: one buffer that every part of them passes through."""

    kernels: Any
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor

    @classmethod
    def of(cls, kernels: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Vocabulary:
        dtype = kernels.writable(torch.promote_types(hidden.dtype, weight.dtype))
        at_once = max(1, min(_IDS_AT_ONCE, _LOGITS_AT_ONCE // len(hidden)) // kernels.BLOCK) * kernels.BLOCK
        size = min(at_once, -(-len(weight) // 16) * 16)
        return cls(kernels, hidden.to(dtype), weight, bias, hidden.new_empty((len(hidden), size), dtype=torch.float32))

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """``(first id, rows of the weight)``, whose logits without the bias are in the buffer then."""
        step = self.logits.shape[1]
        for first in range(0, len(self.weight), step):
            rows = self.weight[first : first + step].to(self.hidden.dtype)
            _product(self.hidden, rows.mT, self.logits[:, : len(rows)])
            yield first, rows

    def carried(self, teacher: _Teacher, temperature: float, dhidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slots' z, and (m', s'); dhidden is then the sum of ``exp((z - m') / T) * weight`` over the rest.

        What dhidden held before counts nothing.
        """
        z, rest = _start(teacher)
        exp = None if dhidden is None else torch.empty_like(self.logits, dtype=self.hidden.dtype)
        for first, rows in self.parts():
            self.kernels.carry(
                self.logits, len(rows), self.bias, teacher.ids, teacher.bounds, first, temperature, z, rest, exp,
                dhidden,
            )  # fmt: skip
            if dhidden is not None and exp is not None:
                _product(exp[:, : len(rows)], rows, dhidden, add=first > 0)
        return z, rest

    def gradients(
        self, teacher: _Teacher, normalizers: Tensor, tail: bool, temperature: float, dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:  # fmt: skip
        """The gradients of weight and bias, without their scale."""
        one = torch.ones_like(teacher.scale)
        counted = (teacher.ids >= 0).any(1, keepdim=True)
        hidden = torch.where(counted, self.hidden, 0)  # an ignored token may hold anything
        # Halves are what the product wants, but their sum would not be what dbias is.
        dlogits = torch.empty_like(self.logits, dtype=self.hidden.dtype if dbias is None else torch.float32)
        for first, rows in self.parts():
            self.kernels.differentiate(
                self.logits, len(rows), self.bias, teacher.probs, teacher.ids, teacher.bounds, first, temperature,
                normalizers, one, tail, dlogits,
            )  # fmt: skip
            part, last = dlogits[:, : len(rows)], first + len(rows)
            if dweight is not None:
                _product(part.to(hidden.dtype).mT, hidden, dweight[first:last])
            if dbias is not None:
                torch.sum(part, 0, out=dbias[first:last])


def _over_vocabulary(
    kernels: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: _Teacher, normalization: str,
    temperature: float, grads: list[Tensor | None],
) -> Tensor:  # fmt: skip
    """The linear loss for "full" and "tail"; the gradients that are there are filled."""
    dhidden, dweight, dbias = grads
    vocabulary = _Vocabulary.of(kernels, hidden, weight, bias)
    z, rest = vocabulary.carried(teacher, temperature, dhidden)
    loss, normalizers, dz, factors = teacher.finished(kernels, z, rest, normalization, temperature, dhidden is not None)
    if dhidden is not None and dz is not None:
        slots = teacher.ids.shape[1]
        starts = torch.arange(0, dz.numel() + 1, slots, device=dz.device, dtype=torch.int32)
        kernels.combine(weight, teacher.ids.flatten(), dz.flatten(), starts, factors, dhidden, None)
    if dweight is not None or dbias is not None:
        vocabulary.gradients(teacher, normalizers, normalization == "tail", temperature, dweight, dbias)
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.mul_(teacher.scale)
    return loss


def linear_topk_kl_loss(
    hidden: Tensor, weight: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, bias: Tensor | None,
    normalization: str, temperature: float, hidden_grad: bool, weight_grad: bool, bias_grad: bool, kernels: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``linearpatch::linear_topk_kl_loss``."""
    check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, weight, bias)
    flags = (hidden_grad, weight_grad, bias_grad)
    double = torch.float64 in (hidden.dtype, weight.dtype)
    counted = not double and hidden.shape[1] and max(teacher_ids.numel(), len(weight)) <= _MOST
    kernels = (kernels or kernels_for(hidden)) if counted else None
    if kernels is None:
        return linear_topk_kl_loss_reference(
            hidden, weight, teacher_probs, teacher_ids, bias, normalization, temperature, *flags
        )
    check_ids(teacher_ids, len(weight))
    narrow = gradient_dtype(hidden)
    rounds = normalization == "topk" and isinstance(kernels, cuda.Kernels)  # where it makes dhidden, in one go
    dtypes = (narrow if rounds else torch.float32, torch.float32, torch.float32)
    grads = [
        hidden.new_empty(shape, dtype=dtype) if wanted else None
        for shape, dtype, wanted in zip((hidden.shape, weight.shape, weight.shape[:1]), dtypes, flags, strict=True)
    ]
    if teacher_ids.numel() and len(weight):
        hidden, weight = kernels.readable(hidden), kernels.readable(weight)
        bias = None if bias is None else bias.float().contiguous()
        block = None if normalization == "topk" else kernels.BLOCK
        teacher = _Teacher.of(kernels, teacher_probs, teacher_ids, temperature, len(weight), block)
        if block is None:
            loss = _over_slots(kernels, hidden, weight, bias, teacher, temperature, grads)
        else:
            loss = _over_vocabulary(kernels, hidden, weight, bias, teacher, normalization, temperature, grads)
    else:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grads = [None if gradient is None else gradient.zero_() for gradient in grads]
    dhidden, dweight, dbias = (loss.new_empty(0) if gradient is None else gradient for gradient in grads)
    return loss, dhidden.to(narrow), dweight, dbias


def topk_kl_loss(
    logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, normalization: str, temperature: float,
    kernels: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator ``linearpatch::topk_kl_loss``: Triton's, because given logits need not lie as the others want it."""
    check_operands(logits, teacher_probs, teacher_ids, normalization, temperature)
    kernels, vocabulary = kernels or _triton(logits.device), logits.shape[1]
    if kernels is None or logits.dtype == torch.float64 or not teacher_ids.numel() or not vocabulary:
        return topk_kl_loss_reference(logits, teacher_probs, teacher_ids, normalization, temperature)
    check_ids(teacher_ids, vocabulary)
    block = None if normalization == "topk" else kernels.BLOCK
    teacher = _Teacher.of(kernels, teacher_probs, teacher_ids, temperature, vocabulary, block)
    if block is None:
        rest, index = None, teacher.ids.clamp(0, vocabulary - 1).long()
        z = logits.gather(1, index).float().masked_fill_(teacher.ids >= vocabulary, torch.nan)
    else:
        z, rest = _start(teacher)
        rows = kernels.readable(logits)
        kernels.carry(rows, vocabulary, None, teacher.ids, teacher.bounds, 0, temperature, z, rest, None, None)
    return teacher.finished(kernels, z, rest, normalization, temperature, False)[:2]


def topk_kl_loss_backward(
    grad: Tensor, logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, normalizers: Tensor, normalization: str,
    temperature: float, kernels: Any = None,
) -> Tensor:  # fmt: skip
    """The operator ``linearpatch::topk_kl_loss_backward``."""
    kernels, vocabulary = kernels or _triton(logits.device), logits.shape[1]
    if kernels is None or logits.dtype == torch.float64 or not teacher_ids.numel() or not vocabulary:
        return topk_kl_loss_backward_reference(
            grad, logits, teacher_probs, teacher_ids, normalizers, normalization, temperature
        )
    teacher = _Teacher.of(kernels, teacher_probs, teacher_ids, temperature, vocabulary, kernels.BLOCK)
    dlogits = logits.new_empty(logits.shape, dtype=kernels.writable(logits.dtype))
    kernels.differentiate(
        kernels.readable(logits), vocabulary, None, teacher.probs, teacher.ids, teacher.bounds, 0, temperature,
        normalizers.contiguous(), teacher.scale * grad.float(), normalization == "tail", dlogits,
        whole=normalization != "topk",
    )  # fmt: skip
    return dlogits.to(logits.dtype)
