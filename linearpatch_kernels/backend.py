"""What is built, what is there, what the environment asks for, and why not.

The compiled kernels are one file, ``linearpatch_kernels/_C.abi3.so``. Loading it registers its kernels under the
dispatch keys of their devices, above the reference that every operator has; nothing in Python chooses afterwards.

``LINEARPATCH_BACKEND=reference|cpu|triton|cuda``, read once when this module is imported, forces one implementation on
every call that names none (``impl``: `ops.backends`). It raises where that one is not available. So does a public
function on a tensor of a device that the forced one does not run on (the dispatcher would take that device's kernel),
and so does the reference where it would stand in for the forced one. Tensors without data, meta and fake ones, have
their shapes worked out whatever is forced.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.torch_internals import has_kernel

NAMES = ("reference", "cpu", "triton", "cuda")
FORCED = os.environ.get("LINEARPATCH_BACKEND") or None


@dataclass(frozen=True)
class Support:
    """Whether something can be done, and one line that says why not."""

    ok: bool
    reason: str = ""


_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PACKAGE = Path(__file__).parent
_EXTENSION = _PACKAGE / "_C.abi3.so"


def _load_extension() -> str | None:
    """Load the compiled kernels; the reason if they are not there."""
    if FORCED in ("reference", "triton"):
        return f"not loaded, because LINEARPATCH_BACKEND={FORCED}"
    if not _EXTENSION.exists():
        return f"{_EXTENSION.name} is not built: reinstall where torch and a C++ compiler are installed to have it"
    try:
        torch.ops.load_library(_EXTENSION)
    except OSError as error:
        return f"{_EXTENSION.name} does not load: {' '.join(str(error).split())}"
    return None


def _compiled_for(key: str) -> bool:
    return has_kernel("hadamard_patch", key)


def _cpu() -> Support:
    if _EXTENSION_MISSING:
        return Support(False, _EXTENSION_MISSING)
    return Support(_compiled_for("CPU"), f"{_EXTENSION.name} has no CPU kernels")


def _cuda() -> Support:
    if _EXTENSION_MISSING:
        return Support(False, _EXTENSION_MISSING)
    if not _compiled_for("CUDA"):
        return Support(False, f"{_EXTENSION.name} was built without nvcc: reinstall with the CUDA toolkit to have it")
    if torch.version.cuda is None:
        return Support(False, f"the kernels are built, but torch {torch.__version__} is not a CUDA build")
    return Support(torch.cuda.is_available(), "the kernels are built, but torch finds no CUDA device or driver")


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton() -> Support:
    if not _triton_installed():
        return Support(False, "triton is not installed: pip install triton")
    there = _TRITON_INTERPRETED or torch.cuda.is_available()
    return Support(there, "torch finds no GPU driver for Triton's kernels")


def devices_of(name: str) -> tuple[str, ...]:
    """The devices on whose tensors an implementation other than the reference runs; ``cuda`` is AMD's name, too.

    Triton's kernels run on the CPU in its interpreter, where ``TRITON_INTERPRET=1`` was set at import.
    """
    if name == "triton":
        return ("cuda", "cpu") if _TRITON_INTERPRETED else ("cuda",)
    return (name,)


def triton_serves(device_type: str) -> bool:
    """Whether Triton's kernels run on tensors of such a device where no implementation is named.

    To be asked where the extension has no kernel of the operator. The interpreter takes nobody's place unless forced.
    """
    if FORCED not in (None, "triton") or not _triton().ok:
        return False
    return device_type in devices_of("triton") and (device_type != "cpu" or FORCED == "triton")


def compiled_for_gpus(device_type: str, operator: str) -> bool:
    """Whether the extension has this operator for GPUs, and may be used on tensors of such a device."""
    return device_type == "cuda" and FORCED in (None, "cuda") and has_kernel(operator, "CUDA")


def available(name: str) -> Support:
    """Whether an implementation (of `NAMES`) can run here at all.

    ``reference`` is plain PyTorch and always there; ``cpu`` and ``cuda`` are the compiled kernels of the extension.
    """
    if name == "reference":
        return Support(True)
    found = {"cpu": _cpu, "triton": _triton, "cuda": _cuda}[name]()
    return Support(True) if found.ok else found


def _check_forced() -> None:
    if FORCED is None:
        return
    if FORCED not in NAMES:
        raise InputError(f"LINEARPATCH_BACKEND={FORCED} is none of {', '.join(NAMES)}")
    if not (found := available(FORCED)).ok:
        raise InputError(f"LINEARPATCH_BACKEND={FORCED} is not available: {found.reason}")


def check_reference_allowed(operator: str, device: torch.device) -> None:
    """Raise where a compiled backend was forced and the reference would run in its place.

    Raises:
        RuntimeError: the forced backend has no kernel of this operator for this device.
    """
    if FORCED not in (None, "reference"):
        raise _not_served(operator, device)


def check_forced_serves(operator: str, tensor: Tensor) -> None:
    """Raise where the forced backend does not run on this tensor's device, but the dispatcher would find a kernel.

    To be asked where `FORCED` is not None, before the operator is called.

    Raises:
        RuntimeError: as `check_reference_allowed`.
    """
    device = tensor.device.type
    served = triton_serves(device) if FORCED == "triton" else FORCED in (None, "reference", device)
    if not served and has_memory(tensor):
        raise _not_served(operator, tensor.device)


def has_memory(tensor: Tensor) -> bool:
    """Not so of meta tensors and of what a tracer works with: only their shapes are worked out.

    A tracer's tensors, torch's fake ones among them, are of classes that take every operation on them over. Dynamo's
    stand for a caller's, and are not to be told from it.
    """
    if tensor.device.type == "meta":
        return False
    return torch.compiler.is_dynamo_compiling() or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _not_served(operator: str, device: torch.device) -> RuntimeError:
    return RuntimeError(
        f"LINEARPATCH_BACKEND={FORCED} has no {operator} for {device.type} tensors: unset it, or move the tensors"
    )


_EXTENSION_MISSING = _load_extension()
if _EXTENSION_MISSING and FORCED is None:
    warnings.warn(f"linearpatch_kernels runs on plain PyTorch: {_EXTENSION_MISSING}", stacklevel=2)
_check_forced()
