"""The implementations of the operators: what each is, whether it can run here, and which calls it serves.

A call names one with ``impl``, so that two can be compared in one process. One that does not serve the call raises,
with its reason; no other takes its place. What is left to plain PyTorch wherever a kernel runs (the low-rank products
of Triton's patch, and on GPUs what the CUDA kernels have no instance for) belongs to that implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels import backend
from linearpatch_kernels.backend import Support
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.torch_internals import has_kernel


@dataclass(frozen=True)
class Kernel:
    """An implementation of one operator that torch's dispatcher does not choose by itself.

    Args:
        run: the operator; takes every argument of its schema.
        serves: whether it has rows of a width on a type of device.
    """

    run: Callable[..., Any]
    serves: Callable[[str, int], bool]


@dataclass(frozen=True)
class Backend:
    """An implementation that ``impl`` and ``LINEARPATCH_BACKEND`` can name, with one line about it."""

    name: str
    help: str

    def available(self) -> Support:
        """Whether it can run here at all."""
        return backend.available(self.name)

    def serves(self, operator: str, tensor: Tensor) -> Support:
        """Whether it computes an operator of such a tensor.

        Args:
            operator: ``hadamard_patch``, ``add_patch_rms_norm``, ``hadamard_transform``, ``topk_kl_loss``,
                ``linear_topk_kl_loss`` or ``linear_topk_kl_loss_softcapped`` (with a soft-cap).
            tensor: its first operand [..., d]; the device, the dtype and the width are looked at.
        """
        width = tensor.shape[-1] if tensor.dim() else 0
        reason = _why_not(self.name, operator, tensor.device.type, tensor.dtype, index(width))
        return Support(not reason, reason)


BACKENDS: dict[str, Backend] = {
    one.name: one
    for one in (
        Backend("reference", "plain PyTorch, on every device"),
        Backend("cpu", "the extension's C++ kernels, in the instructions that the processor has"),
        Backend("triton", "Triton's kernels, for NVIDIA's and AMD's GPUs"),
        Backend("cuda", "the extension's CUDA kernels, for NVIDIA's GPUs"),
    )
}
assert tuple(BACKENDS) == backend.NAMES

_KERNELS: dict[str, Mapping[str, Kernel]] = {}


def add_operator(name: str, kernels: Mapping[str, Kernel]) -> None:
    """Make an operator known, with those of its implementations that the dispatcher does not choose by itself."""
    _KERNELS[name] = kernels


def backends() -> dict[str, bool | str]:
    """Every implementation by name: True where it can run here, else one line that says why not."""
    found = {name: one.available() for name, one in BACKENDS.items()}
    return {name: support.ok or support.reason for name, support in found.items()}


# A compiler takes the answer as a constant; it is about nothing that a compiled graph could be called with otherwise.
@torch.compiler.assume_constant_result
def _why_not(name: str, operator: str, device: str, dtype: torch.dtype, width: int) -> str:
    """One line, empty where the implementation serves."""
    if name == "reference":
        return ""
    if not (found := backend.available(name)).ok:
        return found.reason
    kernel = _KERNELS.get(operator, {}).get(name)
    compiled = operator in _KERNELS and name in ("cpu", "cuda") and has_kernel(operator, name.upper())
    if kernel is None and not compiled:
        return f"{name} has no kernel of {operator}"
    if device not in (devices := backend.devices_of(name)):
        return f"{name} runs on {' and '.join(devices)} tensors, and this one is on {device}"
    if dtype == torch.float64:
        return f"{name} has no float64 kernels"
    if kernel is not None and not kernel.serves(device, width):
        return f"{name} has no kernel of {operator} for a width of {width}"
    return ""


def check_served(impl: str, operator: str, *tensors: Any) -> None:
    """Raise where the implementation that a call, or the environment, names does not serve these tensors.

    Where a tensor has no data, and only shapes are worked out, all serve.

    Raises:
        InputError: there is no such implementation, or it does not serve a tensor.
        RuntimeError: as `backend.check_forced_serves`.
    """
    if impl == "auto":
        if backend.FORCED is not None:
            backend.check_forced_serves(operator.removesuffix("_softcapped"), tensors[0])
        return
    if impl not in BACKENDS:
        raise InputError(f"impl={impl!r} is none of auto, {', '.join(BACKENDS)}")
    dense = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not all(map(backend.has_memory, dense)):
        return
    for tensor in dense:
        width = tensor.shape[-1] if tensor.dim() else 0
        if reason := _why_not(impl, operator, tensor.device.type, tensor.dtype, index(width)):
            raise InputError(f"impl={impl!r} does not serve {operator} here: {reason}")
