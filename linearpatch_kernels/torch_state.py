"""What a process sets in torch, or on a model, and forgets, and what must not reach into a computation of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeGuard

import torch
from torch import nn


@contextmanager
def own_state() -> Iterator[None]:
    """torch as a new process has it, and afterwards as the caller had it; a decorator, too.

    The default dtype is float32 and the default device the CPU, gradients are recorded, neither inference mode nor
    autocast is on: what a model or one of its layers makes without a word of dtype and device is the same whoever
    calls, sums keep their precision, and what comes out can be trained. A model runs in the dtypes that it has.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {"cpu", torch.get_default_device().type, _accelerator()}:
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


Precision = tuple[str, str, str]


@contextmanager
def faster_float32_products() -> Iterator[None]:
    """Products of float32 matrices on the CPU by oneDNN in place of MKL, where that is faster and as exact.

    On an AMD processor it takes half the time (`python -m benchmarks.studies.float32_products`). torch has no switch
    for it but ``set_float32_matmul_precision("medium")``, which lets oneDNN round to bfloat16; it does not where a
    processor's units for bfloat16 are no faster for it, as on the AMD ones seen. So the first product that is made this
    way is held against MKL's, and where it is not as exact nothing is changed. The setting is the process's: it is as
    the caller had it when the last thread leaves the context. Nothing is changed either where there is an accelerator,
    whose products the same switch would round, or where the caller has chosen a precision.
    """
    entered = _accelerator() == "cpu" and _enter()
    try:
        yield
    finally:
        if entered:
            _leave()


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """`eval_mode`, and products of float32 by the library that is the fastest here (`faster_float32_products`)."""
    with eval_mode(*models), faster_float32_products():
        yield


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Eval mode for the modules among ``models``; afterwards each of their parts is in the mode it was in."""
    modes = {
        module: {part: part.training for part in module.modules()} for module in models if isinstance(module, nn.Module)
    }
    in_training = [module for module, parts in modes.items() if any(parts.values())]
    for module in in_training:
        module.eval()
    try:
        yield
    finally:
        for module in in_training:
            # By their own method, which may do more than set a flag.
            module.train(modes[module][module])
            for part, mode in modes[module].items():
                part.training = mode


_LOCK = Lock()
_INSIDE: list[Precision] = []  # for every thread that is inside, what the first of them found


def _enter() -> bool:
    with _LOCK:
        precision = _INSIDE[0] if _INSIDE else _precision()
        if not _is_default(precision) or not _onednn_serves():
            return False
        if not _INSIDE:
            torch.set_float32_matmul_precision("medium")
        _INSIDE.append(precision)
        return True


def _leave() -> None:
    with _LOCK:
        precision = _INSIDE.pop()
        if not _INSIDE:
            _restore(precision)


_MKLDNN: Any = torch.backends.mkldnn  # whose stubs leave `matmul` out


def _precision() -> Precision | None:
    """torch's settings that "medium" touches; None where somebody set them by the newer interface."""
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # which then refuses the older one
        return None
    return general, _MKLDNN.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def _is_default(precision: Precision | None) -> TypeGuard[Precision]:
    return precision is not None and precision[0] == "highest"


def _restore(precision: Precision) -> None:
    general, torch_mkldnn, torch_cuda = precision
    torch.set_float32_matmul_precision(general)
    _MKLDNN.matmul.fp32_precision = torch_mkldnn
    torch.backends.cuda.matmul.fp32_precision = torch_cuda


# Sums of 4096 terms: oneDNN's order of them, one after the other, doubles MKL's error of 2.6e-7. bfloat16 makes 2e-3.
_LARGEST_RATIO = 4.0


@cache
def _onednn_serves() -> bool:
    """Whether this processor is one of those on which oneDNN was measured to be faster, and is as exact here."""
    if "AuthenticAMD" not in _cpu_information() or not torch.backends.mkldnn.is_available():
        return False
    precision = _precision()
    if not _is_default(precision):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 4096, generator=generator, device="cpu", dtype=torch.float32) for _ in range(2))
    exact = a.double() @ b.double().mT
    usual = torch.linalg.norm((a @ b.mT).double() - exact)
    torch.set_float32_matmul_precision("medium")
    try:
        other = torch.linalg.norm((a @ b.mT).double() - exact)
    finally:
        _restore(precision)
    return bool(other <= _LARGEST_RATIO * usual)


def _cpu_information() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
