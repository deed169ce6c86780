"""The GPUs of the static model: published figures, and what was measured on one."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Machine:
    """Published figures, unless `measured_machine` put measured ones in their place.

    Attributes:
        bandwidth: bytes/s of the memory.
        clock: of the multiprocessors, the boost clock in Hz.
        lanes: float32 operations a cycle and multiprocessor.
        matrix_products: bfloat16 products with float32 sums a cycle and multiprocessor, by warp-level instructions.
        shared: bytes of shared memory that a block, and that a multiprocessor may have (CUDA C++ Programming Guide,
            Technical Specifications per Compute Capability).
        device: what its name begins with where it was measured.
        memory: what ``bandwidth`` is.
    """

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    lanes: int
    matrix_products: int
    shared: tuple[int, int]
    device: str
    memory: str = "published"


KIB = 1024
MACHINES = {
    # 108 multiprocessors of 64 lanes, 1.41 GHz, 2,039 GB/s, 312 TFLOP/s in bfloat16:
    # glennklockwood.com/garden/processors/A100, thundercompute.com/blog/nvidia-a100-specs-full-guide
    "sm_80": Machine("A100 80 GB", 2.039e12, 108, 1.41e9, 64, 1024, (163 * KIB, 164 * KIB), "NVIDIA A100"),
    # 132 of 128 lanes, 3.35 TB/s: glennklockwood.com/garden/processors/h100. 1.755 GHz is the lowest boost clock listed
    # for it. Its full matrix rate (2048) is that of warp groups; half of it for one warp's instructions is assumed.
    "sm_90": Machine("H100 SXM", 3.35e12, 132, 1.755e9, 128, 1024, (227 * KIB, 228 * KIB), "NVIDIA H100 80GB HBM3"),
    # 148 of 128 lanes, 1.86 GHz for matrix units (1.98 GHz otherwise): hmc-tech.com/gpus/nvidia-b200-vs-nvidia-b100;
    # 8 TB/s: glennklockwood.com/garden/processors/B200. The rate of one warp's matrix instructions is assumed: sm_80's.
    "sm_100": Machine("B200", 8.0e12, 148, 1.86e9, 128, 1024, (227 * KIB, 228 * KIB), "NVIDIA B200"),
    # 170 of 128 lanes, 2.407 GHz, 1,792 GB/s, 838 TFLOP/s for sparse matrices and half-precision sums, a fourth of it
    # otherwise: pocketmags.com/linux-format-magazine/may-2025/articles/nvidia-geforce-rtx-5090.
    "sm_120": Machine("RTX 5090", 1.792e12, 170, 2.407e9, 128, 256, (99 * KIB, 100 * KIB), "NVIDIA GeForce RTX 5090"),
}


# --- what was measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A call of ``tools/gpu_day``, the newest of a file that has times of the patch.

    Attributes:
        cases: of the patch operators in CUDA, as ``tools/gpu_day`` wrote them.
        copy: bytes/s, read and written, of the fastest copy beside them. "ceilings" has another one, 2 GiB at a time,
            which is slower than the patch itself, and no ceiling.
        clock: Hz, the median over the cases.
        empty: seconds of a call of an empty kernel.
    """

    commit: str
    cases: tuple[dict[str, Any], ...]
    copy: float
    clock: float
    empty: float


@cache
def measured(file: Path) -> Measured | None:
    calls = json.loads(file.read_text())["calls"]
    call = next((call for call in reversed(calls) if any(map(_is_case, call["times"]))), None)
    if call is None:
        return None
    cases = tuple(line for line in call["times"] if _is_case(line))
    empties = [line["times"]["empty"]["us"] for line in call["times"] if line.get("op") == "decode"]
    return Measured(
        call["commit"],
        cases,
        copy=max(case["bytes"] / case["times"]["copy"]["us"] for case in cases) * 1e6,
        clock=statistics.median(case["clocks"]["sm_mhz"] for case in cases) * 1e6,
        empty=statistics.median(empties) / 1e6,
    )


def _is_case(line: dict[str, Any]) -> bool:
    return line.get("backend") == "cuda" and line.get("op") in ("patch", "norm", "backward") and "ours" in line["times"]


def device_of(file: Path) -> str | None:
    """The one that its calls name."""
    return next((call["device"] for call in json.loads(file.read_text())["calls"] if call["device"]), None)


@cache
def machine_of(arch: str) -> Machine:
    """With the measured copy for its memory, and the clock of that day, where there is one."""
    machine = MACHINES[arch]
    for file in sorted(RESULTS.glob("gpu-*.json")):
        if device_of(file) == machine.device and (found := measured(file)):
            return replace(machine, bandwidth=found.copy, clock=found.clock, memory="measured copy")
    return machine


def lanes_of(arch: str) -> int:
    """Threads of a warp: AMD's data-centre GPUs have 64."""
    return 64 if arch.startswith("gfx") else 32
