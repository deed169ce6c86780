"""Every implementation that is there, named call by call in one process, and each held to float64.

A program of its own, ``python -m tests.support.impl_cases IMPL...``, because ``TRITON_INTERPRET`` is read at import.
The rule: the largest error of a result is at most twice that of "reference" in the same dtype, plus what is stated in
`cpu_cases`. Prints what was wrong, then how many kernels of Triton were launched; ends with status 1 if anything was,
or if other implementations than those named can run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels.ops.backends import BACKENDS
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.hadamard_patch import triton as patch_kernels
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from linearpatch_kernels.ops.topk_kl import triton as loss_kernels
from tests.support.cpu_cases import check

Call = Callable[..., tuple[Tensor, ...]]
LAUNCHED = {"hadamard": 0, "topk": 0}


def count_launches() -> None:
    def counted(module: Any, what: str) -> None:
        launch = module._launch

        def launching(*arguments: Any, **options: Any) -> Any:
            LAUNCHED[what] += 1
            return launch(*arguments, **options)

        module._launch = launching

    counted(patch_kernels, "hadamard")
    counted(loss_kernels, "topk")


def patch(impl: str, *operands: Tensor) -> tuple[Tensor, ...]:
    """The map, its six gradients, and the map written into a tensor."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = hadamard_patch(*leaves[:2], **dict(zip(NAMES, leaves[2:], strict=False)), impl=impl)
    grads = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    with torch.no_grad():
        out = torch.empty_like(operands[0])
        written = hadamard_patch(*operands[:2], **dict(zip(NAMES, operands[2:], strict=False)), out=out, impl=impl)
    assert written is out
    return y.detach(), *grads, out


NAMES = ("pre_scale", "post_scale", "down", "up")


def norm(impl: str, x: Tensor, residual: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_patch_rms_norm(x, residual, scale, weight, 1e-5, impl=impl)


def given_logits(normalization: str) -> Call:
    def call(impl: str, logits: Tensor, probs: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        loss = topk_kl_loss(leaf, probs, ids, normalization=normalization, impl=impl)
        return loss.detach(), *torch.autograd.grad(3 * loss, leaf)

    return call


def linear(normalization: str, softcap: float | None = None) -> Call:
    def call(impl: str, hidden: Tensor, weight: Tensor, bias: Tensor, probs: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        options = {"normalization": normalization, "softcap": softcap, "impl": impl}
        loss = linear_topk_kl_loss(*leaves[:2], probs, ids, bias=leaves[2], **options)  # type: ignore[arg-type]  # of several types
        return loss.detach(), *torch.autograd.grad(3 * loss, leaves)

    return call


def cases() -> dict[str, tuple[str, Call, tuple[Tensor, ...]]]:
    """By name: ``(operator, call, operands)``."""
    found: dict[str, tuple[str, Call, tuple[Tensor, ...]]] = {}
    for d, dtype in ((64, torch.float32), (96, torch.bfloat16), (300, torch.float16)):
        scales, low_rank = torch.randn(3, d), (torch.randn(d, 3) / d**0.5, torch.randn(3, d))
        x = torch.randn(5, d).to(dtype)
        found[f"patch {d}"] = "hadamard_patch", patch, (x, *scales, *low_rank)
        found[f"patch {d}, scale alone"] = "hadamard_patch", patch, (x, scales[0])
        found[f"norm {d}"] = "add_patch_rms_norm", norm, (x, x.flip(0), scales[0], scales[1])
    ids = torch.stack([torch.randperm(33)[:4] for _ in range(6)])
    ids[1, 2], ids[3] = -1, -1
    probs = torch.rand(6, 4).softmax(1) * 0.8
    hidden, weight, bias = torch.randn(6, 16), torch.randn(33, 16) / 4, torch.randn(33)
    for normalization in ("topk", "full", "tail"):
        found[f"loss {normalization}"] = "topk_kl_loss", given_logits(normalization), (hidden @ weight.T, probs, ids)
        operands = (hidden, weight, bias, probs, ids)
        found[f"linear {normalization}"] = "linear_topk_kl_loss", linear(normalization), operands
        capped = linear(normalization, 2.0)
        found[f"softcap {normalization}"] = "linear_topk_kl_loss_softcapped", capped, operands
    return found


def compare(impl: str) -> list[str]:
    """What is wrong; every operator that the implementation does not serve has to be refused."""
    wrong = []
    for name, (operator, call, operands) in cases().items():
        support = BACKENDS[impl].serves(operator, operands[0])
        if support.ok:
            true = call("reference", *(one.double() if one.is_floating_point() else one for one in operands))
            wrong += check(f"{impl}: {name}", call(impl, *operands), call("reference", *operands), true)
            continue
        try:
            call(impl, *operands)
        except ValueError as error:
            wrong += [] if support.reason in str(error) else [f"{impl}: {name}: {error}"]
        else:
            wrong.append(f"{impl}: {name}: computed, though {support.reason}")
    return wrong


def main(expected: list[str]) -> int:
    torch.manual_seed(0)
    count_launches()
    there = [name for name, one in BACKENDS.items() if one.available().ok]
    wrong = [] if there == expected else [f"there are {there}, not {expected}"]
    for impl in there:
        before = dict(LAUNCHED)
        wrong += compare(impl)
        if (before != LAUNCHED) != (impl == "triton"):
            wrong.append(f"{impl}: {LAUNCHED} launches of Triton's kernels, {before} before")
    print(*wrong, f"{len(there)} implementations, {LAUNCHED} launches of Triton's kernels", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
