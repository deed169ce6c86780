"""Triton's kernels as the host code launches them, compiled without a GPU: ``python -m benchmarks.triton_static``.

The host code itself is run, on small CPU tensors, and what it would launch is recorded: constants, warps and the kinds
of the arguments are written nowhere else. A stand-in takes the driver's place, which says for which GPU to compile, so
that Triton's own cache has the kernels afterwards: with TRITON_CACHE_DIR set, what was compiled here is found there by
the same Triton on a machine with that GPU.
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

from benchmarks.gpu_static import lanes_of, resource_usage

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


def patch_launches(d: int, dtype: torch.dtype, rows: int = 2) -> Iterator[Launch]:
    """Those of the patch operators for [rows, d], with only the scale and with all that there can be."""
    from linearpatch_kernels.ops.hadamard_patch import triton as kernels

    x, s = torch.ones(rows, d, dtype=dtype), torch.ones(d)
    for vectors, needs in (((None, None), 0b11), ((s, s), 0b1111)):
        more = (*vectors, None, None)
        name = f"{d} {dtype} {'pre and post' if vectors[0] is not None else 'scale alone'}"
        yield from launches(name, lambda more=more: kernels.hadamard_patch(x, s, *more))
        yield from launches(name, lambda more=more: kernels.add_patch_rms_norm(x, x, s, s, 1e-5, *more))
        yield from launches(name, lambda more=more, needs=needs: kernels.hadamard_patch_backward(x, x, s, *more, needs))


def loss_launches(
    d: int, dtype: torch.dtype, rows: int = 2, slots: int = 5, vocabulary: int = 200, normalization: str = "topk"
) -> Iterator[Launch]:
    """Those of the losses for hidden states [rows, d], with and without every gradient and bias."""
    from linearpatch_kernels.ops.topk_kl import gpu
    from linearpatch_kernels.ops.topk_kl import triton as kernels

    hidden, weight = torch.ones(rows, d, dtype=dtype), torch.ones(vocabulary, d, dtype=dtype)
    probs, ids = torch.full((rows, slots), 0.5 / slots), torch.arange(rows * slots).reshape(rows, slots) % vocabulary
    name = f"{normalization} {d} {dtype}"
    linear: Iterable[tuple[Tensor | None, tuple[bool, bool, bool]]] = (
        (None, (False, False, False)),
        (None, (True, False, False)),
        (None, (True, True, False)),
        (torch.ones(vocabulary), (True, True, True)),
    )
    for bias, flags in linear:
        yield from launches(
            name,
            lambda bias=bias, flags=flags: gpu.linear_topk_kl_loss(
                hidden, weight, probs, ids, bias, normalization, 1.0, *flags, kernels=kernels
            ),
        )
    logits, normalizers = torch.ones(rows, vocabulary, dtype=dtype), torch.ones(rows, 4)
    with patch.object(gpu, "triton_serves", lambda device: True):
        yield from launches(name, lambda: gpu.topk_kl_loss(logits, probs, ids, normalization, 1.0))
        yield from launches(
            name,
            lambda: gpu.topk_kl_loss_backward(torch.ones(()), logits, probs, ids, normalizers, normalization, 1.0),
        )


def every_launch(widths: Sequence[int] = WIDTHS, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Launch]:
    """Those of every operator, many of them more than once.

    The kernels over a vocabulary know nothing of the width. Of its last id they know whether it ends a vector.
    """
    for d, dtype in product(widths, dtypes):
        yield from patch_launches(d, dtype)
        yield from loss_launches(d, dtype, slots=100)
    for dtype, normalization, vocabulary in product(dtypes, NORMALIZATIONS[1:], (201, 208)):
        yield from loss_launches(64, dtype, slots=100, vocabulary=vocabulary, normalization=normalization)


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
