"""The CUDA kernels on CPU tensors: emulator.cpp compiled, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linearpatch_kernels.hadamard import paley_factor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "hadamard_patch"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KIB = 1024
# Processors, and shared memory of a block and of a processor.
H100 = (132, 227 * KIB, 228 * KIB)
RTX = (46, 99 * KIB, 100 * KIB)
FEW = (1, 227 * KIB, 228 * KIB)  # so that the few rows of a test are many rows for each block


class RowShape(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("m", "k", "a", "b", "threads")]


class PatchRows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "y", "normed")),
        *((name, c_int64) for name in ("rows", "x_stride", "residual_stride", "y_stride", "normed_stride")),
        *((name, c_int32) for name in ("into", "out")),
        *((name, c_void_p) for name in ("scale", "pre", "post", "norm_weight")),
        ("eps", c_float),
        ("shape", RowShape),
        ("rows_together", c_int32),
        ("scale_in_shared", ctypes.c_bool),
        *((name, c_void_p) for name in ("signs_there", "signs_back")),
    ]


class GradientRows(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "grad", "dx")),
        *((name, c_int64) for name in ("rows", "x_stride", "grad_stride", "dx_stride")),
        *((name, c_int32) for name in ("into", "out")),
        *((name, c_void_p) for name in ("scale", "pre", "post", "scale_sums", "pre_sums", "post_sums")),
        ("sums_in_shared", ctypes.c_bool),
        ("shape", RowShape),
        ("rows_together", c_int32),
        *((name, c_void_p) for name in ("signs_there", "signs_back")),
    ]


class Settings(ctypes.Structure):
    _fields_ = [
        ("schedule", c_int32),
        ("seed", c_uint32),
        ("processors", c_int32),
        ("count_wavefronts", c_int32),
        ("shared_per_block", c_int64),
        ("shared_per_processor", c_int64),
    ]


class Outcome(ctypes.Structure):
    """What a launch was, and what was seen: faults in all, the first of them one a line, and elements never written."""

    _fields_ = [
        *((name, c_int32) for name in ("possible", "fixed", "blocks", "diagonal_blocks", "threads", "rows_together")),
        *((name, c_int64) for name in ("shared_bytes", "unwritten", "wavefronts", "least_wavefronts")),
        *((name, c_int64) for name in ("barriers", "shuffles", "faults")),
        ("report", c_char_p),
    ]


@dataclass(frozen=True)
class Run:
    """A schedule of threads on a GPU."""

    schedule: str = "forward"
    seed: int = 0
    gpu: tuple[int, int, int] = FEW
    count_wavefronts: bool = False

    def settings(self) -> Settings:
        processors, block, processor = self.gpu
        return Settings(SCHEDULES[self.schedule], self.seed, processors, self.count_wavefronts, block, processor)


def compile_library(target: Path, *sources: Path) -> Path:
    command = [COMPILER, "-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-o", target, *sources]
    subprocess.run(command, check=True)
    return target


def floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def row_stride(tensor: Tensor) -> int:
    return tensor.stride(0) * tensor.element_size()


def extent(tensor: Tensor | None) -> int:
    """Bytes from a row tensor's first element to its last."""
    if tensor is None or not tensor.numel():
        return 0
    return ((tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]) * tensor.element_size()


class Emulator:
    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.simt_width.restype = c_void_p
        self.library.simt_width.argtypes = [c_int64, c_int64, c_int64, c_void_p]
        for name, call in (("simt_patch", PatchRows), ("simt_gradients", GradientRows)):
            function = getattr(self.library, name)
            function.restype = Outcome
            function.argtypes = [POINTER(Settings), c_void_p, POINTER(call), *[c_void_p] * (2 if "g" in name else 1)]
        self.library.simt_patch.argtypes = [POINTER(Settings), c_void_p, POINTER(PatchRows), c_void_p]

    def width(self, d: int) -> int:
        h, k = paley_factor(d)
        h = h.contiguous()
        return self.library.simt_width(d, len(h), 1 << k, h.data_ptr())

    def patch(
        self,
        x: Tensor,
        scale: Tensor,
        pre: Tensor | None = None,
        post: Tensor | None = None,
        *,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        run: Run = Run(),  # noqa: B008
    ) -> tuple[Tensor, Tensor | None, Outcome]:
        """y and its norm, of rows x [N, d]."""
        y = torch.full_like(x, float("nan"), dtype=out_dtype) if out is None else out
        normed = None if norm_weight is None else torch.full_like(y, float("nan"))
        vectors = [floats(v) for v in (scale, pre, post, norm_weight)]
        call = PatchRows(
            *(address(t) for t in (x, residual, y, normed)),
            x.shape[0],
            *(0 if t is None else row_stride(t) for t in (x, residual, y, normed)),
            DTYPES[x.dtype],
            DTYPES[y.dtype],
            *map(address, vectors),
            eps,
        )
        sizes = (c_int64 * 4)(*(extent(t) for t in (x, residual, y, normed)))
        outcome = self.library.simt_patch(run.settings(), self.width(x.shape[1]), call, sizes)
        return y, normed, outcome

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        pre: Tensor | None = None,
        post: Tensor | None = None,
        *,
        needs: int = 0b1111,
        run: Run = Run(),  # noqa: B008
    ) -> tuple[list[Tensor | None], Outcome]:
        """Gradients of x, scale, pre and post, those whose bit is set in ``needs``."""
        d = x.shape[1]
        dx = torch.full_like(x, float("nan")) if needs & 1 else None
        totals = [torch.full((d,), float("nan")) if needs >> i & 1 else None for i in (1, 2, 3)]
        vectors = [floats(v) for v in (scale, pre, post)]
        call = GradientRows(
            *(address(t) for t in (x, grad, dx)),
            x.shape[0],
            *(0 if t is None else row_stride(t) for t in (x, grad, dx)),
            DTYPES[x.dtype],
            DTYPES[x.dtype],
            *map(address, vectors),
        )
        places = (c_void_p * 3)(*map(address, totals))
        sizes = (c_int64 * 3)(*(extent(t) for t in (x, grad, dx)))
        outcome = self.library.simt_gradients(run.settings(), self.width(d), call, places, sizes)
        return [dx, *totals], outcome
