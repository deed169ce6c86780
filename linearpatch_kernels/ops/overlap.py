"""Which memory tensors touch: what an operator that writes to an operand has to know of the others.

By addresses, because two storages may lie in the same memory (``torch.from_numpy`` twice).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses: of the first byte that a tensor with elements touches, and of the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that the one reaches over ends before the other's begins; cheap."""
    if not a.numel() or not b.numel():
        return True
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a_end <= b_first or b_end <= a_first


def same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same memory, element by element."""
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _steps_are_nested(tensor: Tensor) -> bool:
    """Whether each step is longer than what the shorter ones reach together: then no two elements are one."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


def share_memory(a: Tensor, b: Tensor | None = None) -> bool:
    """Whether two tensors have a byte in common; without b: whether two elements of a are one.

    Exact: what address ranges and strides leave open is counted, in a byte for each element in range.
    """
    if b is None:
        if not a.numel() or _steps_are_nested(a):
            return False
        touched, of_a, _ = _map(a, a)
        of_a.fill_(True)
        return bool(touched.sum() < a.numel())
    if apart(a, b):
        return False
    _, of_a, of_b = _map(a, b)
    of_a.fill_(True)
    return bool(of_b.any())


def _map(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A map of the memory that a and b reach over, all False, and the places of a's elements and of b's in it.

    A unit of memory lies in an element of a, or of b, whole or not at all.
    """
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    unit = math.gcd(a.element_size(), b.element_size(), a_first - b_first)
    first = min(a_first, b_first)
    memory = torch.zeros((max(a_end, b_end) - first) // unit, dtype=torch.bool, device="cpu")

    def places(tensor: Tensor) -> Tensor:
        units = tensor.element_size() // unit
        distinct = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [stride * units for stride in tensor.stride()]
        return memory.as_strided([*distinct, units], [*strides, 1], (tensor.data_ptr() - first) // unit)

    return memory, places(a), places(b)
