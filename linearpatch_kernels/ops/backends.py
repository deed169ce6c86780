"""The implementations of the operators: what each is, whether it can run here, and which calls it serves.

A call names one with ``impl``, so that two can be compared in one process. One that does not serve the call raises,
with its reason; no other takes its place. What is left to plain PyTorch wherever a kernel runs (the low-rank products
of Triton's patch, and on GPUs what the CUDA kernels have no instance for) belongs to that implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels import backend
from linearpatch_kernels.backend import Support
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.records import Registry
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
    """An implementation that ``impl`` can name.

    Attributes:
        name: what ``impl`` takes; about: one line about it.
        available: whether it can run here at all.
        devices: the types of device on whose tensors it runs; None: all, and it has every operator.
        dispatch_key: where torch's dispatcher finds its kernels in the extension; None: they are in `Kernel` records.
        float64: whether it computes in float64.
    """

    name: str
    about: str
    available: Callable[[], Support]
    devices: Callable[[], Sequence[str]] | None
    dispatch_key: str | None = None
    float64: bool = False

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


BACKENDS: Registry[Backend] = Registry(
    "implementation",
    (
        Backend("reference", "plain PyTorch, on every device", lambda: Support(True), None, float64=True),
        Backend(
            "cpu",
            "the extension's C++ kernels, in the instructions that the processor has",
            lambda: backend.available("cpu"),
            lambda: backend.devices_of("cpu"),
            "CPU",
        ),
        Backend(
            "triton",
            "Triton's kernels, for NVIDIA's and AMD's GPUs",
            lambda: backend.available("triton"),
            lambda: backend.devices_of("triton"),
        ),
        Backend(
            "cuda",
            "the extension's CUDA kernels, for NVIDIA's GPUs",
            lambda: backend.available("cuda"),
            lambda: backend.devices_of("cuda"),
            "CUDA",
        ),
    ),
)
assert tuple(BACKENDS) == backend.NAMES

_KERNELS: dict[str, Mapping[str, Kernel]] = {}
_ADDED: dict[str, Mapping[str, Kernel]] = {}


def add_backend(record: Backend, kernels: Mapping[str, Kernel]) -> None:
    """Make an implementation known, with its kernels by the names of the operators.

    What it has no kernel of raises where a call names it, derivatives among that (``hadamard_patch_backward``): no
    other implementation takes its place.

    Raises:
        InputError: one of its name is there, or operators were imported already: they are defined with their kernels.
    """
    if _KERNELS:
        raise InputError(f"{next(iter(_KERNELS))} is imported already: add {record.name} before the operators are")
    _ADDED[BACKENDS.add(record).name] = kernels


def added_kernels(operator: str) -> dict[str, Kernel | None]:
    """By the names of the implementations that `add_backend` made known, their kernels of an operator."""
    return {name: kernels.get(operator) for name, kernels in _ADDED.items()}


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
    one = BACKENDS[name]
    if not (found := one.available()).ok:
        return found.reason
    if one.devices is None:
        return ""
    kernel = _KERNELS.get(operator, {}).get(name)
    key = one.dispatch_key
    if kernel is None and (operator not in _KERNELS or key is None or not has_kernel(operator, key)):
        return f"{name} has no kernel of {operator}"
    if device not in (devices := one.devices()):
        return f"{name} runs on {' and '.join(devices)} tensors, and this one is on {device}"
    if dtype == torch.float64 and not one.float64:
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
