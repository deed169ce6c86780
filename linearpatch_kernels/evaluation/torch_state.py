"""What a process sets in torch once and then forgets, and what must not reach into a computation of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


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
