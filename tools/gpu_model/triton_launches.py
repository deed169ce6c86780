"""Triton's kernels as the host launches them, compiled without a GPU: ``python -m tools.gpu_model.triton_launches``.

The host code itself is run, on small CPU tensors, and what it would launch is recorded: constants, warps and the kinds
of the arguments are written nowhere else. A stand-in takes the driver's place, which says for which GPU to compile, so
that Triton's own cache has the kernels afterwards. With TRITON_CACHE_DIR set, what was compiled here is found on a
machine with that GPU by the same wheel of Triton (of the same version, for the same Python).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tools.gpu_model.build import resource_usage
from tools.gpu_model.machines import lanes_of

WIDTHS = (64, 576, 1536, 2048, 3072, 4096, 5120, 8192, 16384)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORMALIZATIONS = ("topk", "full", "tail")


@dataclass(frozen=True)
class Launch:
    """A kernel, as the host code has called it for ``call``."""

    call: str
    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants, warps, stages

    def compiled(self) -> Any:
        """Triton's compiled kernel for the GPU of `driver_of`."""
        return self.kernel.warmup(*self.arguments, **self.options)

    def key(self) -> str:
        """What decides, for the GPU of `driver_of`, whether Triton compiles the kernel anew. Nothing is compiled."""
        keys: list[str] = []

        def note(key: str, **_: Any) -> bool:
            keys.append(key)
            return True  # as if somebody else had compiled it

        with (
            patch.object(triton.knobs.runtime, "jit_cache_hook", note),
            patch.dict(self.kernel.device_caches, clear=True),
        ):
            self.compiled()
        (key,) = keys
        return key


class _Driver:
    """What the JIT asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        """Triton keeps what it has compiled by device."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@cache
def _driver(arch: str) -> _Driver:
    maker, name = ("hip", arch) if arch.startswith("gfx") else ("cuda", int(arch.removeprefix("sm_")))
    return _Driver(GPUTarget(maker, name, lanes_of(arch)))


@contextmanager
def driver_of(arch: str) -> Iterator[None]:
    """Within, Triton compiles for ``arch`` (sm_90, gfx942, ...), and the host code takes the device for such a GPU."""
    hip = "a version" if arch.startswith("gfx") else None
    with patch.object(driver, "_active", _driver(arch)), patch.object(torch.version, "hip", hip):
        yield


def launches(name: str, call: Callable[[], Any]) -> list[Launch]:
    """What ``call`` would launch; nothing is, so that its results are not to be read."""
    seen: list[Launch] = []

    def record(kernel: JITFunction[Any], *arguments: Any, warmup: bool, **options: Any) -> None:
        seen.append(Launch(name, kernel, arguments, options))

    with patch.object(JITFunction, "run", record):
        call()
    return seen


# --- what is launched ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """Operands of the patch operators: x is [rows, d], and everything is ones."""

    d: int
    dtype: torch.dtype
    rows: int = 2
    vectors: bool = False  # pre and post

    def launches(self, operator: str) -> list[Launch]:
        """The operator's: "hadamard_patch_forward", "add_patch_rms_norm" or "hadamard_patch_backward"."""
        from linearpatch_kernels.ops.hadamard_patch import triton as kernels

        x, s = torch.ones(self.rows, self.d, dtype=self.dtype), torch.ones(self.d)
        more = (s if self.vectors else None, s if self.vectors else None, None, None)
        calls: dict[str, Callable[[], Any]] = {
            "hadamard_patch_forward": lambda: kernels.hadamard_patch(x, s, *more),
            "add_patch_rms_norm": lambda: kernels.add_patch_rms_norm(x, x, s, s, 1e-5, *more),
            "hadamard_patch_backward": lambda: kernels.hadamard_patch_backward(
                x, x, s, *more, 0b1111 if self.vectors else 0b11
            ),
        }
        name = f"{operator} {self.d} {self.dtype} {'pre and post' if self.vectors else 'scale alone'}"
        return launches(name, calls[operator])


@dataclass(frozen=True)
class Loss:
    """Operands of the losses: hidden states [rows, d], teacher's [rows, slots], a weight [vocabulary, d]."""

    d: int
    dtype: torch.dtype
    normalization: str = "topk"
    rows: int = 2
    slots: int = 100
    vocabulary: int = 200

    @property
    def name(self) -> str:
        return f"{self.normalization} {self.d} {self.dtype} {self.vocabulary}"

    def _teacher(self) -> tuple[Tensor, Tensor]:
        ids = torch.arange(self.rows * self.slots).reshape(self.rows, self.slots) % self.vocabulary
        return torch.full((self.rows, self.slots), 0.5 / self.slots), ids

    def linear(self, gradients: tuple[bool, bool, bool], bias: bool = False) -> list[Launch]:
        """Those of the linear loss with gradients of hidden, weight, bias."""
        from linearpatch_kernels.ops.topk_kl import gpu
        from linearpatch_kernels.ops.topk_kl import triton as kernels

        hidden = torch.ones(self.rows, self.d, dtype=self.dtype)
        weight = torch.ones(self.vocabulary, self.d, dtype=self.dtype)
        probs, ids = self._teacher()
        offset = torch.ones(self.vocabulary) if bias else None
        return launches(
            f"linear {self.name}",
            lambda: gpu.linear_topk_kl_loss(
                hidden, weight, probs, ids, offset, self.normalization, 1.0, *gradients, kernels=kernels
            ),
        )

    def of_logits(self) -> list[Launch]:
        """Those of the loss of given logits, and of its backward."""
        from linearpatch_kernels.ops.topk_kl import gpu

        logits, normalizers = torch.ones(self.rows, self.vocabulary, dtype=self.dtype), torch.ones(self.rows, 4)
        operands, options = (logits, *self._teacher()), (self.normalization, 1.0)
        with patch.object(gpu, "triton_serves", lambda device: True):
            return [
                *launches(self.name, lambda: gpu.topk_kl_loss(*operands, *options)),
                *launches(
                    self.name, lambda: gpu.topk_kl_loss_backward(torch.ones(()), *operands, normalizers, *options)
                ),
            ]

    def all_launches(self) -> list[Launch]:
        return [
            *self.linear((False, False, False)),
            *self.linear((True, False, False)),
            *self.linear((True, True, False)),
            *self.linear((True, True, True), bias=True),
            *self.of_logits(),
        ]


PATCHES = ("hadamard_patch_forward", "add_patch_rms_norm", "hadamard_patch_backward")
# Of each of the losses' kernels, by name: the kernel's function, the normalisation, which gradients are wanted.
LOSSES = {
    "linear_topk_kl_forward": ("slots_kernel", "topk", (False, False, False)),
    "linear_topk_kl_forward_backward": ("slots_kernel", "topk", (True, False, False)),
    "topk_kl_token": ("token_kernel", "tail", (True, False, False)),
    "topk_kl_combine_rows": ("combine_rows_kernel", "topk", (True, True, False)),
    "topk_kl_vocabulary": ("vocabulary_kernel", "tail", (False, False, False)),
    "topk_kl_vocabulary_exp": ("vocabulary_kernel", "tail", (True, False, False)),
    "topk_kl_vocabulary_gradient": ("vocabulary_gradient_kernel", "tail", (True, True, False)),
}


def patch_launch(operator: str, layout: Any, dtype: str) -> Launch:
    """The operator's one launch, with only the scale, where the rows are held by this layout."""
    from linearpatch_kernels.ops.hadamard_patch import triton as kernels

    with patch.object(kernels, "_layout", lambda x: layout):
        (launch,) = Patch(layout.d, getattr(torch, dtype)).launches(operator)
    return launch


def loss_launch(name: str, d: int, dtype: str, slots: int = 100) -> Launch:
    """The launch of a kernel of `LOSSES`."""
    function, normalization, gradients = LOSSES[name]
    made = Loss(d, getattr(torch, dtype), normalization, slots=slots, vocabulary=208).linear(gradients)
    (launch,) = (launch for launch in made if launch.kernel.fn.__name__ == function)
    return launch


def patch_launches(d: int, dtype: torch.dtype, rows: int = 2) -> Iterator[Launch]:
    """Those of every patch operator, without and with pre and post."""
    for operator, vectors in product(PATCHES, (False, True)):
        yield from Patch(d, dtype, rows, vectors).launches(operator)


def vocabulary_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Those of the losses over a vocabulary, whose kernels know no width; the last id ends a vector, or does not."""
    for normalization, vocabulary in product(NORMALIZATIONS[1:], (201, 208)):
        yield from Loss(64, dtype, normalization, vocabulary=vocabulary).all_launches()


def every_launch(widths: Sequence[int] = WIDTHS, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Launch]:
    """Those of every operator, many of them more than once."""
    for d, dtype in product(widths, dtypes):
        yield from patch_launches(d, dtype)
        yield from Loss(d, dtype).all_launches()
    for dtype in dtypes:
        yield from vocabulary_launches(dtype)


# --- what it is compiled to ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a launch was compiled to.

    Attributes:
        seconds: that compiling took; none where Triton's cache had it.
        registers: of a thread.
        stack: bytes a thread of local memory, which spills are.
        shared: bytes a block.
    """

    arch: str
    kernel: str
    call: str
    seconds: float
    warps: int
    registers: int
    stack: int
    shared: int


def compiled(launch: Launch, arch: str) -> Compiled:
    """For an NVIDIA GPU."""
    begin = time.perf_counter()
    with driver_of(arch):
        made = launch.compiled()
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(Path(file.name)).values()
    return Compiled(
        arch, launch.kernel.fn.__name__, launch.call, round(seconds, 2), made.metadata.num_warps, usage["REG"],
        usage["STACK"] + usage["LOCAL"], made.metadata.shared,
    )  # fmt: skip


def compile_all(arch: str, launches: Iterable[Launch]) -> Iterator[Compiled]:
    """What differs of the launches, compiled one after the other for an NVIDIA GPU."""
    seen: set[tuple[Any, str]] = set()
    for launch in launches:
        with driver_of(arch):
            key = launch.kernel, launch.key()
        if key not in seen:
            seen.add(key)
            yield compiled(launch, arch)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90"], help="sm_80, sm_90, ...")
    parser.add_argument("--d", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--dtype", nargs="+", default=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    options = parser.parse_args(arguments)
    spilling = number = 0
    for arch in options.arch:
        for made in compile_all(arch, every_launch(options.d, [getattr(torch, name) for name in options.dtype])):
            print(json.dumps(asdict(made)), flush=True)
            number, spilling = number + 1, spilling + (made.stack > 0)
    print(json.dumps({"triton": triton.__version__, "kernels": number, "spilling": spilling}))
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
