"""Random calls of the compiled CPU kernels, each held to float64: ``python -m tests.support.cpu_cases SEED COUNT``.

A program of its own because ``LINEARPATCH_CPU_ISA`` is read once in a process. Prints what was wrong, one line a case,
and ends with status 1 if anything was; else one line that counts what it went through.

The rule: the largest error of a result is at most twice that of the reference in the same dtype, plus what is stated.
"""

from __future__ import annotations

import random
import sys
from collections import Counter

import torch
from torch import Tensor

from benchmarks.speed.widths import LISTED
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch

OPS = torch.ops.linearpatch
SMALL = [*range(1, 66), 72, 80, 88, 96, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240, 256, 288, 320, 336, 384, 448]
WIDE = [9216, 10240, 24576, 32768, 40960, 65536]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATED = 1e-6  # beside numbers of about 1


def rows_of(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """A tensor of a shape that lies in memory as the layout says."""
    *leading, d = shape
    if layout == "every other row":
        return torch.randn(*leading[:-1], 2 * leading[-1], d).to(dtype)[..., ::2, :]
    if layout == "part of wider rows":
        return torch.randn(*leading, d + 3).to(dtype)[..., 1 : d + 1]
    if layout == "transposed":
        return torch.randn(*reversed(leading), d).to(dtype).permute(*reversed(range(len(leading))), len(leading))
    if layout == "columns":
        return torch.randn(*leading[:-1], d, leading[-1]).to(dtype).mT
    if layout == "expanded":
        return torch.randn(d).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


LAYOUTS = ("contiguous", "every other row", "part of wider rows", "transposed", "columns", "expanded")


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item() if result.numel() else 0.0


def check(
    name: str, results: tuple[Tensor, ...], references: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> list[str]:
    wrong = []
    for i, (one, other, true) in enumerate(zip(results, references, exact, strict=True)):
        largest = true.abs().max().item() if true.numel() else 0.0
        bound = 2 * error(other, true) + STATED * max(largest, 1)
        if one.dtype != other.dtype or one.shape != other.shape or not error(one, true) <= bound:
            wrong.append(
                f"{name}[{i}]: {one.dtype} {list(one.shape)}, off by {error(one, true):.2e}, allowed {bound:.2e}"
            )
    return wrong


def one_case(d: int, dtype: torch.dtype, chance: random.Random) -> list[str]:
    budget = max(1, 40_000 // d)
    leading = chance.choice(
        [(), (1,), (chance.randint(1, 40),), (chance.randint(1, 6), chance.randint(1, 6)), (2, 3, 2)]
    )
    while torch.Size(leading).numel() > budget:
        leading = leading[1:]
    layout = chance.choice(LAYOUTS) if leading else "contiguous"
    x = rows_of((*leading, d), dtype, layout)
    parameter = chance.choice([torch.float32, torch.float32, dtype, torch.float64, torch.bfloat16])
    there = [chance.random() < 0.3 for _ in range(3)]
    rank = chance.choice([1, 3, 16, 33]) if there[2] and d <= 8192 else 0
    scale = torch.randn(d).to(parameter)
    pre, post = (torch.randn(d).to(parameter) if wanted else None for wanted in there[:2])
    down, up = (
        (torch.randn(d, rank).to(parameter) / d**0.5, torch.randn(rank, d).to(parameter)) if rank else (None, None)
    )
    if rank and chance.random() < 0.5:
        down = torch.randn(rank, d).to(parameter).mT / d**0.5
    operands = (scale, pre, post, down, up)

    def double(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.double() for tensor in tensors)

    exact = OPS.hadamard_patch_reference(*double(x, *operands))
    reference = OPS.hadamard_patch_reference(x, *operands)
    named = dict(zip(("pre_scale", "post_scale", "down", "up"), operands[1:], strict=True))
    wrong = check("patch", (hadamard_patch(x, scale, **named),), (reference,), (exact,))
    out = x.clone() if layout == "expanded" or chance.random() < 0.5 else x.clone(memory_format=torch.preserve_format)
    wrong += check("patch in place", (hadamard_patch(out, scale, **named, out=out),), (reference,), (exact,))

    grad, needs = (
        rows_of((*leading, d), dtype, chance.choice(LAYOUTS) if leading else "contiguous"),
        chance.randint(1, 63),
    )
    wrong += check(
        f"gradients {needs:06b}",
        OPS.hadamard_patch_backward(grad, x, *operands, needs),
        OPS.hadamard_patch_backward_reference(grad, x, *operands, needs),
        OPS.hadamard_patch_backward_reference(*double(grad, x, *operands), needs),
    )
    weight = torch.randn(d).to(parameter)
    wrong += check(
        "norm",
        OPS.add_patch_rms_norm(x, grad, scale, weight, 1e-3, *operands[1:]),
        OPS.add_patch_rms_norm_reference(x, grad, scale, weight, 1e-3, *operands[1:]),
        OPS.add_patch_rms_norm_reference(*double(x, grad, scale, weight), 1e-3, *double(*operands[1:])),
    )
    return [f"d {d} {dtype} {list(x.shape)} {layout} parameters {parameter} {there}: {line}" for line in wrong]


def main(seed: int, count: int) -> int:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    widths = [*LISTED, *WIDE] if count >= 100 else []
    cases = [(d, dtype) for d in widths for dtype in DTYPES]
    while len(cases) < count:
        d = chance.choice(SMALL if chance.random() < 0.8 else LISTED[:16])
        cases.append((d, chance.choice(DTYPES)))
    seen: Counter[str] = Counter()
    failures = 0
    for d, dtype in cases:
        seen[str(dtype)] += 1
        for line in one_case(d, dtype, chance):
            failures += 1
            print(line)
    print(f"{len(cases)} cases, {len({d for d, _ in cases})} widths, {dict(seen)}, {failures} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
