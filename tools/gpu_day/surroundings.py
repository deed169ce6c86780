"""Where a step of the GPU day runs, and how it tells what it found: a JSON object a line, as it goes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

DRY = bool(os.environ.get("DRY"))
BACKEND = os.environ.get("LINEARPATCH_BACKEND", "cuda")
if BACKEND == "cuda":
    # Not forced: what CUDA has no kernel for, the loss of whole logits, is Triton's then, as for everybody.
    os.environ.pop("LINEARPATCH_BACKEND", None)
if DRY:  # the CPU's kernels stand for CUDA's, Triton's are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402 - reads these variables' package once
from torch import Tensor  # noqa: E402 - see above

DEVICE = "cpu" if DRY else "cuda"


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def failure(error: BaseException) -> str:
    """One line of what went wrong in somebody's code."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def relative_error(result: Tensor, exact: Tensor) -> float:
    """``||result - exact|| / ||exact||`` in float64; NaN where either has one."""
    return float((result.double() - exact.double()).norm() / exact.double().norm())


def clocks() -> dict[str, Any]:
    """The SM's clock in MHz and the power in W, read and never set."""
    if DRY:
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        power = pynvml.nvmlDeviceGetPowerUsage(handle) // 1000
        return {"sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM), "watts": power}
    except Exception as error:  # the times are worth having without
        print(failure(error), file=sys.stderr)
        return {}
