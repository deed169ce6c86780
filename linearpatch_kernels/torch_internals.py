"""Every private name of torch and accelerate that this package uses, each with what it gains and what is done without.

Torch's are looked up once, at import: one that a version lacks is None, and what stands behind "without" is done.
``LINEARPATCH_PUBLIC_TORCH=1`` makes every one of them absent, accelerate's too: to test that the package works without
them, and to go on where one of them has changed its meaning. All of torch's were seen in 2.11, 2.13 and 2.14.1.
Microseconds are those that ``python -m benchmarks.speed.call_overhead`` printed: torch 2.13, one core of an AMD EPYC.

Not listed are ``_parameters``, ``_modules`` and ``_buffers`` of ``nn.Module``, which are for its subclasses to use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from linearpatch_kernels._ops import NAMESPACE


def _public_alone() -> bool:
    return os.environ.get("LINEARPATCH_PUBLIC_TORCH", "0") not in ("", "0")


def _private(path: str) -> Any:
    """What torch has under a dotted name, or None."""
    found: Any = None if _public_alone() else torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# --- a call of an operator -------------------------------------------------------------------------------------------

_Guard = Callable[[], AbstractContextManager[object]]

below_autograd: _Guard = _private("_C._AutoDispatchBelowAutograd") or nullcontext
"""Goes past the Python that notes what a gradient needs. Without: that Python runs, and notes nothing under no_grad.

A call of `hadamard_patch` under no_grad takes 6.0 microseconds with this, `called_by` and `may_be_dual`, 10.6 without.
"""

below_versions: _Guard | None = _private("_C._AutoDispatchBelowADInplaceOrView")
"""Goes past the Python that increments versions, for a caller that does. Without: None, that Python increments them.

A call of `hadamard_patch` with ``out`` takes 6.1 microseconds with it, 26.8 without.
"""

_any_level = _private("autograd.forward_ad._current_level") is None
_transforms_active = _private("_C._are_functorch_transforms_active")


def called_by(overload: Any) -> Callable[..., Any]:
    """What an operator's overload calls when it is called (``_op``). Without: the overload, a Python frame more."""
    called: Callable[..., Any] = overload if _public_alone() else getattr(overload, "_op", overload)
    return called


def may_be_dual() -> bool:
    """Whether a level of forward mode is open (``_current_level``). Without: True, so that each operand is asked."""
    return _any_level or forward_ad._current_level >= 0


def transformed(operands: Iterable[Any]) -> bool:
    """Whether torch.func is at work (``_are_functorch_transforms_active``).

    Without: whether it has wrapped one of the operands. Where it has wrapped none of them, but works on others, a
    gradient is refused in torch's words then.
    """
    if _transforms_active is not None:
        return bool(_transforms_active())
    return any(isinstance(one, Tensor) and torch.func.debug_unwrap(one) is not one for one in operands)


# --- kernels ---------------------------------------------------------------------------------------------------------

_has_kernel = _private("_C._dispatch_has_kernel")
_has_kernel_for = _private("_C._dispatch_has_kernel_for_dispatch_key")


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator of ours has a kernel of its own under a dispatch key.

    ``_dispatch_has_kernel`` and ``_dispatch_has_kernel_for_dispatch_key`` know it before the operator is defined, too.
    Looked up and not listed: it is asked in every call of a loss, and to list what CUDA has takes torch a millisecond.
    Without: the overload is asked; for an operator that is not defined yet the answer is yes.
    """
    name = f"{NAMESPACE}::{operator}"
    if _has_kernel is not None and _has_kernel_for is not None:
        return _has_kernel(name) and _has_kernel_for(name, key)
    defined = getattr(getattr(torch.ops, NAMESPACE), operator, None)
    return defined is None or defined.default.has_kernel_for_dispatch_key(key)


embedding_bag_products: Callable[..., Tensor] | None = _private(
    "ops.aten._embedding_bag_per_sample_weights_backward.default"
)
"""Products of rows with the gradient of their sum. Without: None, and the linear loss copies the rows that it reads."""

_data_address = _private("_C._data_address")


def address(tensor: Tensor) -> int:
    """Of the first element (``_data_address``, its storage's). Without: ``data_ptr()``, which copies a lazy clone."""
    if _data_address is None:
        return tensor.data_ptr()
    first: int = _data_address(tensor) + tensor.storage_offset() * tensor.element_size()
    return first


# --- tensors that are kept -------------------------------------------------------------------------------------------

_modes = _private("_C._len_torch_dispatch_stack")
_without_transforms: _Guard | None = _private("_C._DisableFuncTorch")


def where_constants_are_made() -> _Guard | None:
    """Makes what a tensor that outlives the call is to be made in; None: no tensor may outlive the call.

    A tensor that is made while a mode watches belongs to it (``_len_torch_dispatch_stack``), and one that is made under
    torch.func to the transform (``_DisableFuncTorch``). Without: None, so that it is made again in every call: a row of
    4096 is transformed in 37 microseconds with these, in 113 without.
    """
    # Some of torch's guards begin when they are made, so it is left to the caller to make one.
    return None if _modes is None or _modes() else _without_transforms


_weakly = _private("multiprocessing.reductions.StorageWeakRef")


class StorageMark:
    """Knows a tensor's storage again, and is not taken in by another one at its address.

    By a weak reference (``StorageWeakRef``). Without: by a reference that keeps the storage alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage = storage if _weakly is None else _weakly(storage)

    def marks(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if _weakly is not None:
            return bool(self._storage == _weakly(storage))
        return self._storage.data_ptr() == storage.data_ptr()


# --- accelerate ------------------------------------------------------------------------------------------------------

ACCELERATE_ATTRIBUTES = () if _public_alone() else ("_hf_hook", "_old_forward")
"""What accelerate sets on a module that it dispatches (``device_map``): its hook, and the method that it replaced.

Without: such a model is taken for one whose weights are where its parameters are, and is refused where that is nowhere.
"""


def accelerate_hook(module: nn.Module) -> Any:
    """Accelerate's hook on a module, or None."""
    return vars(module).get("_hf_hook") if ACCELERATE_ATTRIBUTES else None


def forward_before_accelerate(module: nn.Module) -> Any:
    """The ``forward`` that a module had before accelerate replaced it; None: it has replaced none."""
    return vars(module).get("_old_forward") if ACCELERATE_ATTRIBUTES else None
