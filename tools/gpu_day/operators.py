"""The patch operators beside a copy of their bytes, and beside what else computes the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearpatch_kernels.hadamard import factor_order, hadamard_matrix
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.hadamard_patch.reference import add_patch_rms_norm_reference, hadamard_patch_reference
from tools.gpu_day.surroundings import BACKEND, DEVICE, DRY, clocks, failure, relative_error, say
from tools.gpu_day.timing import Contestant, contest, measure, operand_sets, prepared

OPS = torch.ops.linearpatch
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Shape(NamedTuple):
    rows: int
    d: int
    dtype: torch.dtype = BF16

    @property
    def bytes(self) -> int:
        return self.rows * self.d * self.dtype.itemsize

    @property
    def about(self) -> dict[str, Any]:
        return {"rows": self.rows, "d": self.d, "dtype": str(self.dtype).removeprefix("torch.")}


HEADLINE = (Shape(16384, 4096), Shape(16384, 2048), Shape(16384, 8192))
NEXT = (Shape(16384, 5120), Shape(16384, 3072), Shape(65536, 576), Shape(16384, 4096, FP32))
MORE = tuple(
    Shape(n, d, dtype)
    for dtype in (BF16, FP16, FP32)
    for n in (512, 16384)
    for d in (576, 1024, 2560, 3584, 7168, 14336)
)
DECODE_ROWS = (1, 8, 64, 132, 264)


class Operands:
    """Several sets of them, so that no cache holds all."""

    def __init__(self, shape: Shape, sets: int) -> None:
        with torch.device(DEVICE):
            self.x = [torch.randn(shape.rows, shape.d).to(shape.dtype) for _ in range(sets)]
            self.scale, self.weight = torch.rand(shape.d) + 0.5, torch.rand(shape.d) + 0.5
        self.out = [torch.full_like(x, torch.nan) for x in self.x]

    def like_x(self) -> list[Tensor]:
        return [torch.randn_like(x) for x in self.x]

    def patch(self) -> Contestant:
        return lambda i: hadamard_patch(self.x[i], self.scale, out=self.out[i])

    def copy(self) -> Contestant:
        return lambda i: self.out[i].copy_(self.x[i])

    def dense(self) -> Contestant:
        """cuBLAS by the dense matrix."""
        d = len(self.scale)
        eye = torch.eye(d, device=DEVICE, dtype=torch.float64)
        matrix = hadamard_patch_reference(eye, self.scale.double()).to(self.x[0].dtype)
        return lambda i: torch.mm(self.x[i], matrix, out=self.out[i])

    def three_passes(self) -> Contestant:
        transform = import_module("fast_hadamard_transform").hadamard_transform
        factor, weight = len(self.scale) ** -0.5, self.scale.to(self.x[0].dtype)
        return lambda i: transform(transform(self.x[i], scale=factor) * weight, scale=factor)

    def compiled(self) -> Contestant:
        """The strongest form for torch.compile: H = A (x) B, so that four small products on the tensor cores, in x's
        dtype with float32 sums, do what the dense one does, and nothing breaks the graph."""
        d, dtype = len(self.scale), self.x[0].dtype
        whole = hadamard_matrix(d).double()
        inner = min(64, 2 ** factor_order(d)[1])
        big = whole[::inner, ::inner] * inner**0.5
        small = whole[:inner, :inner] / whole[0, 0].abs() / inner**0.5 * whole[0, 0].sign()
        if (torch.kron(big[:2], small) - whole[: 2 * inner]).abs().max() > 1e-9:
            raise ValueError("H is no Kronecker product here")
        big, small = big.to(DEVICE, dtype), small.to(DEVICE, dtype)

        def four_products(x: Tensor, scale: Tensor) -> Tensor:
            y = (x.view(-1, d // inner, inner) @ small).mT @ big
            y = (y.float() * scale.view(-1, inner).mT).to(x.dtype)
            return ((y @ big.mT).mT @ small.mT).reshape(x.shape)

        call = torch.compile(four_products, backend="eager" if DRY else "inductor", dynamic=False)
        return lambda i: call(self.x[i], self.scale)


def _patch_error(shape: Shape, of: Operands) -> str:
    x, out = of.x[0], of.out[0]
    some = slice(0, 64)
    exact = hadamard_patch_reference(x[some].double(), of.scale.double())
    hadamard_patch(x, of.scale, out=out)
    return f"{relative_error(out[some], exact):.1e}" + ("" if bool(out.isfinite().all()) else " NOT WRITTEN WHOLE")


def forward(shape: Shape, *, peers: bool = True, compiled: bool = False) -> None:
    sets = operand_sets(2 * shape.bytes)
    of = Operands(shape, sets)
    runs: dict[str, Callable[[], Contestant]] = {"ours": of.patch, "copy": of.copy}
    others = {"mm": of.dense, "three passes": of.three_passes} if peers else {}
    others |= {"compile": of.compiled} if compiled else {}
    what = {"op": "patch", **shape.about, "error": _patch_error(shape, of)}
    contest(what, runs | others, sets=sets, moved=2 * shape.bytes, same_as_ours=tuple(others))


def norm(shape: Shape) -> None:
    sets = operand_sets(4 * shape.bytes)
    of = Operands(shape, sets)
    residual, second = of.like_x(), [torch.empty_like(x) for x in of.x]
    some = slice(0, 64)
    operands = (of.x[0][some], residual[0][some], of.scale, of.weight)
    normed, _ = add_patch_rms_norm(*operands, 1e-5)
    exact = add_patch_rms_norm_reference(*(t.double() for t in operands), 1e-5, None, None, None, None)[0]

    def ours() -> Contestant:
        return lambda i: add_patch_rms_norm(of.x[i], residual[i], of.scale, of.weight, 1e-5)

    def two_copies() -> Contestant:
        return lambda i: (of.out[i].copy_(of.x[i]), second[i].copy_(residual[i]))

    what = {"op": "norm", **shape.about, "error": f"{relative_error(normed, exact):.1e}"}
    contest(what, {"ours": ours, "copy": two_copies}, sets=sets, moved=4 * shape.bytes)


def backward(shape: Shape) -> None:
    """dx and dscale of x and dy: three times the bytes of x."""
    sets = operand_sets(3 * shape.bytes)
    of = Operands(shape, sets)
    grad, call = of.like_x(), OPS.hadamard_patch_backward.default

    def ours() -> Contestant:
        return lambda i: call(grad[i], of.x[i], of.scale, None, None, None, None, 0b11)

    def copy_and_half() -> Contestant:
        return lambda i: (of.out[i].copy_(of.x[i]), grad[i].sum())

    contest({"op": "backward", **shape.about}, {"ours": ours, "copy": copy_and_half}, sets=sets, moved=3 * shape.bytes)


def decode(d: int = 4096, rows: tuple[int, ...] = DECODE_ROWS) -> None:
    """Few rows, warm in L2, as graph replays over an empty kernel: what a decoding step pays."""
    for n in rows[:2] if DRY else rows:
        of = Operands(Shape(n, 64 if DRY else d), 1)
        residual = of.like_x()
        entries = {
            "empty": prepared(_empty_kernel, 1),
            "ours": prepared(of.patch(), 1),
            "norm": prepared(lambda i, o=of, r=residual: add_patch_rms_norm(o.x[i], r[i], o.scale, o.weight, 1e-5), 1),
            "copy": prepared(of.copy(), 1),
            "mm": prepared(of.dense(), 1),
        }
        times = measure(entries, rounds=15)
        over = {name: round(one["us"] - times["empty"]["us"], 3) for name, one in times.items()}
        say(step="time", op="decode", backend=BACKEND, rows=n, d=d, times=times, over_empty_us=over, clocks=clocks())


def _empty_kernel(_: int) -> None:
    if not DRY:
        torch.cuda._sleep(0)  # a kernel that returns at once; torch has no public one


def ceilings() -> None:
    """What this card copies, and multiplies: the two budgets."""
    size = 1 << 12 if DRY else 1 << 30
    a = torch.randn(size // 4, device=DEVICE)
    b, m = torch.empty_like(a), torch.randn(64 if DRY else 8192, 64 if DRY else 8192, device=DEVICE).to(BF16)
    entries = {"copy": prepared(lambda _: b.copy_(a), 1), "mm": prepared(lambda _: m @ m, 1)}
    times = measure(entries)
    gbs, tflops = 2 * size / times["copy"]["us"] / 1e3, 2 * len(m) ** 3 / times["mm"]["us"] / 1e6
    say(step="ceilings", copy_gbs=round(gbs, 1), mm_tflops=round(tflops, 1), times=times, clocks=clocks())


STEPS: dict[str, list[Callable[[], None]]] = {
    "headline": [ceilings, *(partial(forward, shape, compiled=shape.d == 4096) for shape in HEADLINE)],
    "decode": [decode],
    "others": [
        *(partial(forward, shape, peers=shape.d != 576) for shape in NEXT),
        *(partial(norm, Shape(16384, d)) for d in (4096, 2048, 8192, 5120)),
        *(partial(backward, Shape(n, 4096)) for n in (16384, 512)),
        partial(backward, Shape(65536, 576)),
    ],
    "triton": [
        *(partial(forward, shape, peers=False) for shape in (*HEADLINE, *NEXT[:3])),
        partial(norm, Shape(16384, 4096)),
        partial(backward, Shape(16384, 4096)),
        partial(decode, 4096, (1, 64)),
    ],
    "more": [partial(forward, shape, peers=False) for shape in MORE],
}


def times(which: str) -> int:
    steps = STEPS[which]
    if DRY:
        small = Shape(2, 512)
        steps = [
            ceilings,
            partial(forward, small, compiled=True),
            partial(norm, small),
            partial(backward, small),
            decode,
        ]
    failed = 0
    with torch.inference_mode():
        for step in steps:
            try:
                step()
            except Exception as error:
                failed += 1
                say(step="failed", call=str(getattr(step, "args", step)), error=failure(error))
            if not DRY:
                torch.cuda.empty_cache()
    return 1 if failed else 0


def few_calls() -> None:
    """For ncu: the headline kernels, warm."""
    from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss

    with torch.device(DEVICE):
        for d in (64,) if DRY else (4096, 5120, 2048, 8192):
            x, s = torch.randn(4 if DRY else 16384, d).bfloat16(), torch.rand(d) + 0.5
            hadamard_patch(x, s, out=torch.empty_like(x))
            if d == 4096:
                add_patch_rms_norm(x, x, s, s, 1e-5)
                OPS.hadamard_patch_backward(x, x, s, None, None, None, None, 0b11)
        h, w = torch.randn(64, 576).bfloat16().requires_grad_(), torch.randn(49152, 576).bfloat16()
        probs, ids = torch.rand(64, 100).softmax(1), torch.randint(0, 49152, (64, 100))
        for _ in range(2):
            linear_topk_kl_loss(h, w, probs, ids).backward()
    say(step="few calls", done=True)
