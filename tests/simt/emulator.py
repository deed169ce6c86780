"""The CUDA operators on CPU tensors: emulator.cpp, compiled and loaded as ``torch.ops.linearpatch_simt``."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "hadamard_patch"
HOST = (KERNELS / "cuda" / "operators.cpp", KERNELS / "width.cpp")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}

KIB = 1024
# Processors, and the shared memory of a block and of a processor.
H100 = (132, 227 * KIB, 228 * KIB)
RTX = (46, 99 * KIB, 100 * KIB)
ONE_BLOCK = (1, 227 * KIB, 0)  # so that the few rows of a test are many turns of a block


@dataclass(frozen=True)
class Seen:
    """Of all launches since `Emulator.configure`; from ``fixed`` on, of the last kernel that was not a sum of parts.

    ``barriers`` are those of whole blocks, ``narrow_barriers`` those of a warp or of some warps of a block.
    """

    launches: int
    faults: int
    barriers: int
    narrow_barriers: int
    shuffles: int
    products: int
    wavefronts: int
    least_wavefronts: int
    fixed: bool
    warp_rows: bool
    blocks: int
    threads: int
    shared_bytes: int
    rows_together: int
    scale_in_shared: bool


def compiled(folder: Path, sources: Sequence[Path], optimize: str) -> list[Path]:
    """Their object files, in a folder."""
    include = [argument for path in include_paths() for argument in ("-isystem", path)]
    flags = ["-std=c++20", optimize, "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-D_GLIBCXX_ASSERTIONS"]

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        macro = "-DTORCH_TARGET_VERSION=0x020d000000000000"
        subprocess.run([COMPILER, *flags, macro, *include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def build(folder: Path, *, here: Path = HERE, host: Sequence[Path] = (), optimize: str = "-O2") -> Path:
    """The library of emulator.cpp with the host's half of the operators, made in a folder.

    Args:
        here: where emulator.cpp is, two folders below a copy of the sources.
        host: object files of `HOST`, which knows nothing of the kernels' insides; made here if not given.
    """
    sources = [here / "emulator.cpp", *(() if host else HOST)]
    objects = [*compiled(folder, sources, optimize), *host]
    library = folder / "emulator.so"
    libraries = [f"-L{path}" for path in library_paths()]
    subprocess.run([COMPILER, "-shared", "-o", library, *objects, *libraries, "-ltorch_cpu"], check=True)
    return library


class Emulator:
    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(str(library))
        self.library.simt_faults.restype = ctypes.c_char_p
        self.library.simt_configure.argtypes = [
            *(ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int),
        ]
        self.configure()

    def configure(
        self,
        schedule: str = "forward",
        *,
        seed: int = 0,
        gpu: tuple[int, int, int] = ONE_BLOCK,
        count_wavefronts: bool = False,
        capturing: bool = False,
    ) -> None:
        """Choose how threads take turns, what the GPU has, and whether a graph is captured; forget what was seen."""
        self.library.simt_configure(SCHEDULES[schedule], seed, count_wavefronts, *gpu, capturing)

    def seen(self) -> Seen:
        counts = (ctypes.c_int64 * 15)()
        self.library.simt_counts(counts)
        return Seen(*counts)

    def faults(self) -> list[str]:
        """The first of them, one line each."""
        return self.library.simt_faults().decode().splitlines()


def mutated_sources(folder: Path, kernels: str, name: str, before: str, after: str) -> Path:
    """A copy of the sources in which ``csrc/kernels/cuda/name`` has ``after`` where it had ``before``, once; the
    emulator's folder in it."""
    root = HERE.parents[1]
    for source in (root / "csrc", HERE):
        shutil.copytree(source, folder / source.relative_to(root), ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "csrc" / kernels / "cuda" / name
    text = target.read_text()
    assert text.count(before) == 1, f"{name} has changed: this mutation is to be written anew: {before}"
    target.write_text(text.replace(before, after))
    return folder / "tests" / "simt"
