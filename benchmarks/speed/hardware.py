"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]  # it ships no types
import torch

from linearpatch_kernels.ops.backends import backends

# What matrix products and our kernels look at.
_FLAGS = re.compile(r"avx2|fma|f16c|avx512(f|bw|dq|vl|_bf16|_fp16|_vnni)|amx_\w+|asimd\w*|neon|sve\w*|bf16|i8mm")
_PEERS = ("fht-cpu", "ffht-unofficial", "mlx", "numpy")


@cache
def _cpu() -> dict[str, Any]:
    found: dict[str, Any] = cpuinfo.get_cpu_info()
    return found


def has_bf16_instructions() -> bool:
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_cpu().get("flags", ()))


@cache
def describe() -> dict[str, Any]:
    """Processor, caches, memory, versions; JSON values."""
    cpu = _cpu()
    return {
        "cpu": cpu.get("brand_raw", platform.processor()),
        "architecture": platform.machine(),
        "flags": sorted(flag for flag in cpu.get("flags", ()) if _FLAGS.fullmatch(flag)),
        "cores": os.cpu_count(),
        "caches": {f"L{level}": size for level, size in cache_bytes().items()},
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {name: state if isinstance(state, str) else "yes" for name, state in backends().items()},
        "kernel instruction set": kernel_instruction_set(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "peers": {package: _version(package) for package in _PEERS},
    }


@cache
def cache_bytes() -> dict[int, int]:
    """Size of the data cache of each level that the first core sees, where the system tells."""
    sizes: dict[int, int] = {}
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind, level, size = ((place / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction":
            sizes[int(level)] = int(size.removesuffix("K")) * 1024
    return dict(sorted(sizes.items()))


def kernel_instruction_set() -> str | None:
    """What the CPU kernels run on here, the widest unless LINEARPATCH_CPU_ISA asks for another; None without them.

    Asked for one that no machine has, they name those that this one has, the widest first.
    """
    if backends()["cpu"] is not True:
        return None
    if forced := os.environ.get("LINEARPATCH_CPU_ISA"):
        return forced
    call = "import torch; from linearpatch_kernels import hadamard_patch as f; f(torch.ones(1, 16), torch.ones(16))"
    asked = {**os.environ, "LINEARPATCH_CPU_ISA": "none"}
    refusal = subprocess.run([sys.executable, "-c", call], env=asked, capture_output=True, text=True).stderr
    return refusal.rpartition("what this machine has: ")[2].split(",")[0].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
