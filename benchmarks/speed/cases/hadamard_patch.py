"""Cases and peers of `hadamard_patch`, its backward, its low-rank term and `add_patch_rms_norm`.

A rival computes the same y. One that has no fused scale does two transforms and the multiplication in between; one
without an H of its own for d = m 2^k is asked for powers of two only. ``out=`` is preallocated on both sides wherever
the rival takes it. Where torch's bf16 product is slower than "upcast, float32 product, round back", as on processors
without bf16 instructions, goals are against the latter: they are always against the fastest of the dense products.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.hardware import cache_bytes, has_bf16_instructions
from benchmarks.speed.registry import Case, Goal, Peer, Run, register
from benchmarks.speed.widths import LISTED
from linearpatch_kernels.hadamard import hadamard_matrix, hadamard_order, paley_factor
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# bf16 peers round in the middle, some of them several times.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Operands:
    """x and y [rows, width], the scale, and what else the case asks of the operator."""

    rows: int
    width: int
    dtype: torch.dtype
    rank: int = 0
    scaled: bool = False

    @cached_property
    def x(self) -> Tensor:
        some = torch.randn(min(self.rows, 2048), self.width, dtype=self.dtype)
        return some.repeat(-(-self.rows // len(some)), 1)[: self.rows]

    @cached_property
    def y(self) -> Tensor:
        return torch.empty_like(self.x).zero_()

    @cached_property
    def scale(self) -> Tensor:
        return self._vector()

    @cached_property
    def options(self) -> dict[str, Tensor | None]:
        low_rank = self.rank > 0
        std = self.width**-0.5
        return {
            "pre_scale": self._vector() if self.scaled else None,
            "post_scale": self._vector() if self.scaled else None,
            "down": torch.randn(self.width, self.rank).mul_(std).to(self.dtype) if low_rank else None,
            "up": torch.randn(self.rank, self.width).to(self.dtype) if low_rank else None,
        }

    @cached_property
    def dense(self) -> Tensor:
        """The float32 matrix of the map."""
        identity = torch.eye(self.width)
        return hadamard_patch(identity, self.scale, **self.options, out=identity)

    def _vector(self) -> Tensor:
        return torch.rand(self.width) + 0.5


def ours(o: Operands) -> Run:
    return partial(hadamard_patch, o.x, o.scale, **o.options, out=o.y)


def ours_allocating(o: Operands) -> Run:
    return partial(hadamard_patch, o.x, o.scale, **o.options)


# --- the dense product -----------------------------------------------------------------------------------------------


def mm(o: Operands) -> Run:
    return partial(torch.mm, o.x, o.dense.to(o.dtype), out=o.y)


def linear(o: Operands) -> Run:
    return partial(torch.nn.functional.linear, o.x, o.dense.T.to(o.dtype).contiguous())


def upcast_mm(o: Operands) -> Run:
    wide, product = torch.empty(o.x.shape), torch.empty(o.x.shape)

    def run() -> Tensor:
        torch.mm(wide.copy_(o.x), o.dense, out=product)
        return o.y.copy_(product)

    return run


MM = Peer("mm", mm)
LINEAR = Peer("linear", linear)
UPCAST_MM = Peer("upcast + mm + round", upcast_mm)


def dense_products(dtype: torch.dtype) -> tuple[Peer, ...]:
    return (MM,) if dtype == torch.float32 else (MM, UPCAST_MM)


def against(peers: tuple[Peer, ...], solid: float, aim: float | None = None) -> tuple[Goal, ...]:
    return (Goal(tuple(peer.name for peer in peers), solid, aim),)


# --- fast transforms -------------------------------------------------------------------------------------------------


def reference(o: Operands) -> Run:
    return partial(hadamard_patch_reference, o.x, o.scale, **o.options)


def compiled_reference(o: Operands) -> Run:
    return partial(torch.compile(hadamard_patch_reference, dynamic=False), o.x, o.scale, **o.options)


def kronecker_matmul(o: Operands) -> Run:
    """H = A ⊗ B with A and B about sqrt(d) wide: a row as a matrix X [a, b] becomes A.T X B, and A X B.T on the way
    back; 64 ⊗ 64 for d = 4096."""
    m, k = len(paley_factor(o.width)[0]), paley_factor(o.width)[1]
    left = min((m << j for j in range(k + 1)), key=lambda order: abs(math.log(order * order / o.width)))
    a, b = hadamard_matrix(left, dtype=torch.float32), hadamard_matrix(o.width // left, dtype=torch.float32)
    matrices = (o.rows, left, o.width // left)
    forward, back = a.T.expand(o.rows, -1, -1), a.expand(o.rows, -1, -1)
    one, two = torch.empty(matrices), torch.empty(matrices)
    x, y, scale = o.x.view(-1, matrices[2]), o.y.view(matrices), o.scale.view(matrices[1:])

    def run() -> Tensor:
        torch.mm(x, b, out=one.view(x.shape))
        torch.bmm(forward, one, out=two)
        torch.mul(two, scale, out=one)
        torch.mm(one.view(x.shape), b.T, out=two.view(x.shape))
        torch.bmm(back, two, out=y)
        return o.y

    return run


def fht_cpu_twice(o: Operands) -> Run:
    fht_cpu = import_module("fht_cpu")
    x, y, scale, threads = o.x.numpy(), o.y.numpy(), (o.scale / o.width).numpy(), torch.get_num_threads()

    def run() -> Any:
        fht_cpu.fht(x, out=y, num_threads=threads)
        np.multiply(y, scale, out=y)
        return fht_cpu.fht(y, num_threads=threads)

    return run


def ffht_twice(o: Operands) -> Run:
    ffht = import_module("ffht")
    x, y, scale, threads = o.x.numpy(), o.y.numpy(), (o.scale / o.width).numpy(), torch.get_num_threads()

    def run() -> Any:
        np.copyto(y, x)
        ffht.fht_(y, threads)
        np.multiply(y, scale, out=y)
        ffht.fht_(y, threads)
        return y

    return run


def mlx_twice(o: Operands) -> Run:
    mx = import_module("mlx.core")
    dtype = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16}[o.dtype]
    x, scale = (mx.array(tensor.float().numpy()).astype(dtype) for tensor in (o.x, o.scale))

    def run() -> Any:
        result = mx.hadamard_transform(mx.hadamard_transform(x) * scale)
        mx.eval(result)
        return result

    return run


FHT_CPU = Peer("fht-cpu, twice", fht_cpu_twice, package="fht-cpu", module="fht_cpu")
FFHT = Peer("ffht, twice", ffht_twice, package="ffht-unofficial", module="ffht")
MLX = Peer("mlx, twice", mlx_twice, package="mlx[cpu]", module="mlx")
REFERENCE = (
    Peer("reference, eager", reference),
    Peer("reference, torch.compile", compiled_reference, slow_to_build=True),
)


def _fast_transforms(width: int, dtype: torch.dtype) -> tuple[Peer, ...]:
    power_of_two = width & (width - 1) == 0
    peers: tuple[Peer, ...] = REFERENCE
    if dtype == torch.float32:
        left, right = {4096: (64, 64), 576: (36, 16)}[width]
        peers += (Peer(f"{left} ⊗ {right} matmul", kronecker_matmul),)
    if power_of_two:
        peers += (MLX,)
    if power_of_two and dtype == torch.float32:
        peers += (FHT_CPU, FFHT)
    return peers


# --- bounds ----------------------------------------------------------------------------------------------------------


def copy(o: Operands) -> Run:
    return partial(o.y.copy_, o.x)


def memcpy(o: Operands) -> Run:
    move = partial(ctypes.memmove, o.y.data_ptr(), o.x.data_ptr(), o.x.nbytes)
    return lambda: (move(), o.y)[1]


COPIES = (
    Peer("copy_", copy, floor=True, same_result=False),
    Peer("memcpy (one thread)", memcpy, floor=True, same_result=False),
)


def power_of_two(o: Operands) -> Run:
    width = _nearest_power(o.width)
    return ours(Operands(o.rows * o.width // width, width, o.dtype))


def _nearest_power(width: int) -> int:
    return int(2 ** round(math.log2(width)))


# --- other calls of ours ---------------------------------------------------------------------------------------------


def backward(needs: int) -> Callable[[Operands], Run]:
    """The gradients of x, scale, pre_scale and post_scale whose bit is set."""

    def build(o: Operands) -> Run:
        operands = (o.x, o.scale, *o.options.values())
        call = partial(torch.ops.linearpatch.hadamard_patch_backward.default, torch.randn_like(o.x), *operands, needs)
        wanted = [i for i in range(6) if needs >> i & 1]
        return lambda: tuple(map(call().__getitem__, wanted))

    return build


def patch_then_products(dtype: torch.dtype) -> Callable[[Operands], Run]:
    """The low-rank term as two products in a dtype behind the fused patch."""

    def build(o: Operands) -> Run:
        down, up = o.options["down"], o.options["up"]
        assert down is not None
        assert up is not None
        down, up = down.to(dtype), up.to(dtype)
        lowered = torch.empty(o.rows, o.rank, dtype=dtype)
        x, y = (torch.empty_like(o.x, dtype=dtype) for _ in range(2)) if dtype != o.dtype else (o.x, o.y)

        def run() -> Tensor:
            if x is not o.x:
                x.copy_(o.x)
            hadamard_patch(x, o.scale, out=y)
            torch.addmm(y, torch.mm(x, down, out=lowered), up, out=y)
            return y if y is o.y else o.y.copy_(y)

        return run

    return build


@dataclass(frozen=True)
class NormOperands(Operands):
    @cached_property
    def residual(self) -> Tensor:
        return torch.randn_like(self.x)

    @cached_property
    def norm_weight(self) -> Tensor:
        return self._vector().to(self.dtype)


EPS = 1e-5


def add_patch_norm(o: NormOperands) -> Run:
    return partial(add_patch_rms_norm, o.x, o.residual, o.scale, o.norm_weight, EPS)


def unfused_norm(product: Callable[[Operands], Callable[[Tensor, Tensor], Tensor]]) -> Callable[[NormOperands], Run]:
    """Sum, patch and norm one after the other; two results are new in each call, as in ours."""

    def build(o: NormOperands) -> Run:
        total = torch.empty_like(o.x)
        patched = product(o)

        def run() -> tuple[Tensor, Tensor]:
            torch.add(o.x, o.residual, out=total)
            stream = patched(total, torch.empty_like(total))
            return torch.nn.functional.rms_norm(stream, (o.width,), o.norm_weight, EPS), stream

        return run

    return build


def _with_kernel(o: Operands) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, out: hadamard_patch(x, o.scale, out=out)


def _with_product(o: Operands) -> Callable[[Tensor, Tensor], Tensor]:
    dense = o.dense.to(o.dtype)
    return lambda x, out: torch.mm(x, dense, out=out)


def _with_upcast_product(o: Operands) -> Callable[[Tensor, Tensor], Tensor]:
    wide, product = torch.empty(o.x.shape), torch.empty(o.x.shape)
    return lambda x, out: out.copy_(torch.mm(wide.copy_(x), o.dense, out=product))


# --- the cases -------------------------------------------------------------------------------------------------------


def _rows_beyond(cache: int, width: int, dtype: torch.dtype) -> int:
    """The power of two of rows with which x alone is at least as large as a cache."""
    return int(2 ** math.ceil(math.log2(cache / (width * dtype.itemsize))))


def _register_dense() -> None:
    goals = {
        (4096, torch.float32): (150, 190),
        (4096, torch.bfloat16): (80, 110),
        (576, torch.float32): (14, 24),
        (576, torch.bfloat16): (6.5, 11),
    }
    for (width, dtype), (solid, aim) in goals.items():
        for rows in (512, 2048):
            products = dense_products(dtype)
            register(
                Case(
                    group="dense",
                    name=f"{rows} x {width} {NAMES[dtype]}",
                    operands=partial(Operands, rows, width, dtype),
                    ours=ours,
                    peers=products + (_fast_transforms(width, dtype) if rows == 512 else ()) + COPIES[:1],
                    goals=against(products, solid, aim),
                    tolerance=TOLERANCES[dtype],
                    quick=rows == 512,
                )
            )


def _register_decode() -> None:
    for width in (4096, 576):
        for dtype in NAMES:
            for mode, context in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
                rivals = (MM, LINEAR)
                headline = (width, dtype, mode) == (4096, torch.float32, "inference_mode")
                asked = (400, 600) if width == 4096 and mode == "inference_mode" else None
                register(
                    Case(
                        group="decode, N = 1, with the dispatch of the operator",
                        name=f"1 x {width} {NAMES[dtype]} {mode}",
                        operands=partial(Operands, 1, width, dtype),
                        ours=ours_allocating,
                        peers=rivals,
                        goals=against(rivals, *asked) if asked else (),
                        context=context,
                        tolerance=TOLERANCES[dtype],
                        seconds=0.7,
                        quick=headline,
                    )
                )


def _register_memory() -> None:
    caches = cache_bytes()
    width, l2, last = 4096, caches.get(2, 1 << 20), max(caches.values(), default=1 << 25)
    for dtype, copies in ((torch.float32, (1.45, 1.15)), (torch.bfloat16, (2.4, 1.7))):
        places = {
            "in L2": _rows_beyond(l2, width, dtype) // 4,
            "beyond L2": _rows_beyond(l2, width, dtype) * 8,
            "beyond the last cache": _rows_beyond(last, width, dtype),
        }
        for place, rows in places.items():
            transforms = (FHT_CPU, FFHT) if dtype == torch.float32 else ()
            inside = place == "in L2"
            goals = () if inside else against(COPIES, *copies)
            if transforms:
                goals += against((FHT_CPU,), *((2.2, 2.6) if inside else (1.5, 1.9)))
            register(
                Case(
                    group="memory",
                    name=f"{rows} x {width} {NAMES[dtype]} {place}",
                    operands=partial(Operands, rows, width, dtype),
                    ours=ours,
                    peers=transforms + COPIES,
                    goals=goals,
                    quick=inside,
                )
            )


def _register_orders() -> None:
    widths: dict[int, int] = {}
    for width in sorted(LISTED, key=lambda width: abs(math.log(width / 4096))):
        if hadamard_order(width) == width:
            widths.setdefault(len(paley_factor(width)[0]), width)
    for m, width in sorted(widths.items()):
        if m == 1:
            continue
        step = _nearest_power(width) // math.gcd(width, _nearest_power(width))
        rows = step * math.ceil(2**17 / (width * step))
        asked = m in (12, 20, 28, 36)
        for dtype in NAMES:
            peer = Peer(f"d = {_nearest_power(width)}, as many elements", power_of_two, floor=True, same_result=False)
            register(
                Case(
                    group="orders m of d = m 2^k, in L2",
                    name=f"m = {m}: {rows} x {width} {NAMES[dtype]}",
                    operands=partial(Operands, rows, width, dtype),
                    ours=ours,
                    peers=(peer,),
                    goals=against((peer,), 2, 1.3) if asked else (),
                    seconds=0.3,
                    quick=m == 12,
                )
            )


def _register_backward() -> None:
    peer = Peer("forward", ours_allocating, floor=True, same_result=False)
    for width, rows in ((4096, 512), (4096, 32), (576, 512)):
        for dtype in NAMES:
            for wanted, needs, scaled, solid in (("dx, dscale", 0b11, False, 2.2), ("all four", 0b1111, True, 3)):
                register(
                    Case(
                        group="backward over forward",
                        name=f"{wanted}: {rows} x {width} {NAMES[dtype]}",
                        operands=partial(Operands, rows, width, dtype, scaled=scaled),
                        ours=backward(needs),
                        peers=(peer,),
                        goals=against((peer,), solid),
                        seconds=0.5,
                        quick=(width, rows, dtype) == (4096, 512, torch.float32),
                    )
                )


def _register_low_rank() -> None:
    for width in (4096, 576):
        for dtype in NAMES:
            unfused: tuple[Peer, ...] = (Peer("patch + mm + addmm", patch_then_products(dtype)),)
            if dtype != torch.float32:
                unfused += (Peer("upcast + patch + mm + addmm + round", patch_then_products(torch.float32)),)
            register(
                Case(
                    group="low-rank term, r = 64",
                    name=f"512 x {width} {NAMES[dtype]} r = 64",
                    operands=partial(Operands, 512, width, dtype, rank=64),
                    ours=ours,
                    peers=dense_products(dtype) + unfused,
                    tolerance=TOLERANCES[dtype],
                    seconds=0.7,
                )
            )


def _register_norm() -> None:
    for width in (4096, 576):
        for rows in (512, 1):
            for dtype in NAMES:
                peers = {"add + hadamard_patch + rms_norm": _with_kernel, "add + mm + rms_norm": _with_product}
                if dtype != torch.float32 and rows > 1:
                    peers["add + upcast + mm + round + rms_norm"] = _with_upcast_product
                register(
                    Case(
                        group="add_patch_rms_norm",
                        name=f"{rows} x {width} {NAMES[dtype]} norm",
                        operands=partial(NormOperands, rows, width, dtype),
                        ours=add_patch_norm,
                        peers=tuple(Peer(name, unfused_norm(product)) for name, product in peers.items()),
                        tolerance=TOLERANCES[dtype],
                        seconds=0.5,
                    )
                )


def _register_widths() -> None:
    """For the plot. On a processor without bf16 instructions torch's own bf16 product is left out: group "dense" shows
    how much slower it is there."""
    bf16_products = (MM, UPCAST_MM) if has_bf16_instructions() else (UPCAST_MM,)
    for width in LISTED:
        for dtype in NAMES:
            register(
                Case(
                    group="widths, N = 128",
                    name=f"128 x {width} {NAMES[dtype]} width",
                    operands=partial(Operands, 128, width, dtype),
                    ours=ours,
                    peers=(MM,) if dtype == torch.float32 else bf16_products,
                    tolerance=TOLERANCES[dtype],
                    seconds=0.2,
                    threads=(1,),
                    about={"width": width, "order": len(paley_factor(width)[0]), "dtype": NAMES[dtype]},
                )
            )


_register_dense()
_register_decode()
_register_memory()
_register_orders()
_register_backward()
_register_low_rank()
_register_norm()
_register_widths()
