"""The losses' CUDA kernels on CPU tensors: topk_kl.cpp, compiled and loaded into ``torch.ops.linearpatch_simt``."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from linearpatch_kernels.ops.topk_kl import cuda
from tests.simt.emulator import COMPILER, HERE, SCHEDULES

NAMESPACE = "linearpatch_simt"


def build(folder: Path, *, here: Path = HERE, optimize: str = "-O1") -> Path:
    """The library of topk_kl.cpp with the host's half of the operators, made in a folder."""
    sources = [here / "topk_kl.cpp", here.parents[1] / "csrc" / "topk_kl" / "cuda" / "operators.cpp"]
    flags = ["-std=c++20", optimize, "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    include = [argument for path in include_paths() for argument in ("-isystem", path)]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        macro = "-DTORCH_TARGET_VERSION=0x020d000000000000"
        subprocess.run([COMPILER, *flags, macro, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(len(sources)) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "topk_kl.so"
    libraries = [f"-L{path}" for path in library_paths()]
    subprocess.run([COMPILER, "-shared", "-o", library, *objects, *libraries, "-ltorch_cpu"], check=True)
    return library


class Emulator:
    """``kernels`` are what `linearpatch_kernels.ops.topk_kl.gpu` takes in place of those of a GPU."""

    def __init__(self, library: Path) -> None:
        cuda.define(NAMESPACE)
        torch.ops.load_library(library)
        self.kernels = cuda.Kernels(NAMESPACE)
        self.library = ctypes.CDLL(str(library))
        self.library.simt_faults.restype = ctypes.c_char_p
        self.library.simt_launches.restype = ctypes.c_int64
        self.configure()

    def configure(self, schedule: str = "forward", seed: int = 0) -> None:
        """Choose how threads take turns, and forget what was seen."""
        self.library.simt_configure(SCHEDULES[schedule], seed)

    def launches(self) -> int:
        return self.library.simt_launches()

    def faults(self) -> list[str]:
        return self.library.simt_faults().decode().splitlines()
