"""The kernels of the losses in CUDA C++ (csrc/topk_kl/cuda/losses.cuh); `gpu` makes the losses of them.

Each is an operator that launches a kernel; what its operands are is said where Triton's kernel of that name is. Two are
these kernels' alone, in place of a dozen of torch's: "teacher", which has a second kernel for its count, and "mean".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels._ops import NAMESPACE
from linearpatch_kernels.torch_internals import address

_SLOTS = "Tensor probs, Tensor ids"
_PART = "int size, Tensor? bias"
_SCHEMAS = {
    "teacher": "(Tensor teacher_ids, float temperature, Tensor(a!) ids, Tensor(b!) present, Tensor(c!) count_and_scale)"
    " -> ()",
    "mean": "(Tensor losses, Tensor count, Tensor(a!) loss) -> ()",
    "slots": f"(Tensor hidden, Tensor weight, Tensor? bias, {_SLOTS}, Tensor scale, float temperature, Tensor(a!) z,"
    " Tensor(b!)? dhidden) -> ()",
    "tokens": f"(Tensor z, {_SLOTS}, Tensor? rest, Tensor scale, float temperature, bool tail, Tensor(a!) losses,"
    " Tensor(b!) normalizers, Tensor(c!)? dz, Tensor(d!)? factors) -> ()",
    "combine": "(Tensor rows, Tensor index, Tensor factors, Tensor starts, Tensor? old_factors, Tensor(a!)? out,"
    " Tensor(b!)? sums) -> ()",
    "carry": f"(Tensor(a!) logits, {_PART}, Tensor ids, Tensor bounds, int first, float temperature, Tensor(b!) z,"
    " Tensor(c!) rest, Tensor(d!)? exp, Tensor(e!)? dhidden) -> ()",
    "differentiate": f"(Tensor logits, {_PART}, {_SLOTS}, Tensor bounds, int first, float temperature,"
    " Tensor normalizers, Tensor scale, bool tail, Tensor(a!) dlogits) -> ()",
}
WIDEST = 8192


def define(namespace: str) -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"{namespace}::topk_kl_{name}", schema)


@dataclass(frozen=True)
class Kernels:
    """The operators of a namespace of ``torch.ops``, under the names that `triton` has for its kernels."""

    namespace: str
    BLOCK: int = 2048  # of the vocabulary, that the bounds are of: csrc/topk_kl/cuda/calls.h

    def __getattr__(self, name: str) -> Any:
        if name not in _SCHEMAS:
            raise AttributeError(name)
        return getattr(getattr(torch.ops, self.namespace), f"topk_kl_{name}").default

    @staticmethod
    def serves(width: int) -> bool:
        return width % 8 == 0 and width <= WIDEST

    @staticmethod
    def readable(rows: Tensor) -> Tensor:
        """The same rows, in 16-byte vectors."""
        step = rows.stride(0) * rows.element_size() if len(rows) > 1 else 0
        aligned = address(rows) % 16 == step % 16 == 0 and step < 2**31
        if rows.stride(1) == 1 and aligned:
            return rows
        return rows.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def writable(dtype: torch.dtype) -> torch.dtype:
        return dtype


define(NAMESPACE)
COMPILED = Kernels(NAMESPACE)
