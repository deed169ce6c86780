"""Random calls of the losses' CPU kernels, each held to float64: ``python -m tests.support.topk_kl_cases SEED COUNT``.

A program of its own because ``LINEARPATCH_CPU_ISA`` is read once in a process. Prints what was wrong, one line a case,
and ends with status 1 if anything was; else one line that counts what it went through.

The rule: the largest error of a result is at most twice that of the reference in the same dtype, plus what is stated.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import linearpatch_kernels.ops.topk_kl  # noqa: F401  # defines the operators

OPS = torch.ops.linearpatch
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATED = 4e-6  # beside sums of numbers up to 1, 512 of them
ABOUT = (0.0, 0.0, 0.0, -150.0, 150.0, 2e4, -2e4)  # where logits lie


def double(*values: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in values]


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item() if result.numel() else 0.0


def check(name: str, results: Any, references: Any, exact: Any, stated: float = STATED) -> list[str]:
    wrong = []
    for i, (one, other, true) in enumerate(zip(results, references, exact, strict=True)):
        largest = true.abs().max().item() if true.numel() else 0.0
        bound = 2 * error(other, true) + stated * max(largest, 1)
        if one.dtype != other.dtype or one.shape != other.shape or not error(one, true) <= bound:
            wrong.append(
                f"{name}[{i}]: {one.dtype} {list(one.shape)}, off by {error(one, true):.2e}, allowed {bound:.2e}"
            )
    return wrong


def teacher(n: int, k: int, v: int, normalization: str, chance: random.Random) -> tuple[Tensor, Tensor]:
    """Ids with duplicates, both ends of the vocabulary, absent slots and ignored tokens; probabilities with zeros."""
    ids = torch.randint(0, v, (n, k))
    distinct = chance.random() < 0.5 and k <= v
    if distinct and n:
        ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)])
    if n:
        ids[0, 0], ids[-1, -1] = 0, v - 1
    absent = torch.rand(n, k) < chance.choice([0.0, 0.2])
    absent[torch.rand(n) < chance.choice([0.0, 0.3])] = True
    ids[absent] = -1
    probs = torch.rand(n, k) * (torch.rand(n, k) > 0.1)
    whole = (probs * (ids >= 0)).sum(1, keepdim=True)
    probs = probs / whole.where(whole > 0, 1) * (1 if normalization == "topk" else chance.choice([0.5, 0.9]))
    return probs, ids


class Sizes(NamedTuple):
    """What a case is drawn from; N is halved until N * K * d and N * V * d are small enough."""

    n: tuple[int, ...] = (0, 1, 2, 3, 7, 33, 130, 300)
    d: tuple[int, ...] = (1, 3, 8, 31, 32, 33, 64, 100, 160, 576)
    v: tuple[int, ...] = (1, 2, 17, 64, 333, 1025, 5000)
    k: tuple[int, ...] = (1, 2, 5, 16, 50, 100, 512)
    softcap: tuple[float, ...] = (0.0, 0.0, 0.5, 4.0)
    most_of_slots: int = 3_000_000
    most_of_vocabulary: int = 60_000_000


SIZES = Sizes()


def one_case(chance: random.Random, sizes: Sizes = SIZES) -> list[str]:
    n, d, v, k = (chance.choice(of) for of in sizes[:4])
    if chance.random() < 0.2:  # most tokens then keep every id
        v = k = min(v, k)
    while n * k * d > sizes.most_of_slots or n * v * d > sizes.most_of_vocabulary:
        n //= 2
    normalization = chance.choice(["topk", "full", "tail"])
    temperature = chance.choice([1.0, 0.7, 2.5])
    dtype, other = chance.choice(DTYPES), chance.choice(DTYPES)
    weight_dtype = dtype if chance.random() < 0.7 else other
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(weight_dtype)
    if chance.random() < 0.3:
        hidden, weight = torch.randn(n, 2 * d).to(dtype)[:, :d], torch.randn(d, v).to(weight_dtype).T / d**0.5
    about = chance.choice(ABOUT[:5])
    probs, ids = teacher(n, k, v, normalization, chance)
    bias = torch.randn(v) + about if chance.random() < 0.5 else None
    if bias is not None and chance.random() < 0.3:
        bias[~torch.isin(torch.arange(v), ids)] = -torch.inf
    bias = None if bias is None else bias.to(chance.choice([*DTYPES, torch.float64]))
    probs = probs.to(chance.choice([torch.float32, torch.float16, torch.float64]))
    ids = ids.to(chance.choice([torch.int32, torch.int64]))
    flags = [chance.random() < 0.7, chance.random() < 0.5, bias is not None and chance.random() < 0.7]

    arguments = (hidden, weight, probs, ids, bias, normalization, temperature, *flags)
    softcap = chance.choice(sizes.softcap)
    wrong = check(
        f"linear {flags} softcap {softcap}",
        OPS.linear_topk_kl_loss_softcapped(*arguments, softcap) if softcap else OPS.linear_topk_kl_loss(*arguments),
        OPS.linear_topk_kl_loss_softcapped_reference(*arguments, softcap),
        OPS.linear_topk_kl_loss_softcapped_reference(*double(*arguments), softcap),
        STATED + abs(about) * 2**-24,  # what rounding the logits alone can do
    )
    about = chance.choice(ABOUT)
    logits = (torch.randn(n, v) * 3 + about).to(dtype)
    if chance.random() < 0.3:
        logits = (torch.randn(v, n) + about).to(dtype).T
    given = (logits, probs, ids, normalization, temperature)
    loss, normalizers = OPS.topk_kl_loss(*given)
    reference_loss, reference_normalizers = OPS.topk_kl_loss_reference(*given)
    true_loss, true_normalizers = OPS.topk_kl_loss_reference(*double(*given))
    wrong += check("given", (loss,), (reference_loss,), (true_loss,))
    grad = torch.tensor(chance.choice([1.0, -3.0]))
    wrong += check(
        "given gradient",
        (OPS.topk_kl_loss_backward(grad, logits, probs, ids, normalizers, *given[3:]),),
        (OPS.topk_kl_loss_backward_reference(grad, logits, probs, ids, reference_normalizers, *given[3:]),),
        (
            OPS.topk_kl_loss_backward_reference(
                *double(grad, logits, probs, ids, true_normalizers), normalization, temperature
            ),
        ),
    )
    told = f"N {n} d {d} V {v} K {k} {normalization} T {temperature} {dtype} {weight_dtype} {probs.dtype} {ids.dtype}"
    return [f"{told} bias {bias is not None}, given logits about {about}: {line}" for line in wrong]


def definition(logits: Tensor, probs: Tensor, ids: Tensor, normalization: str, temperature: float) -> Tensor:
    """Token by token, in the logits' dtype."""
    losses = []
    for z, p, i in zip(logits / temperature, probs.to(logits.dtype), ids, strict=True):
        p, i = p[i >= 0], i[i >= 0]
        if not len(i):
            continue
        student = z[i].log_softmax(0) if normalization == "topk" else z.log_softmax(0)[i]
        loss = torch.nn.functional.kl_div(student, p, reduction="sum")
        if normalization == "tail":
            others = torch.ones(len(z), dtype=torch.bool)
            others[i] = False
            t = (1 - p.sum()).clamp(min=0)
            loss = loss + torch.xlogy(t, t) - t * z.log_softmax(0)[others].logsumexp(0)
        losses.append(loss)
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def extreme_calls() -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Logits far from 0, and nothing left beside the slots: what is said of a call, its operands, what it amounts to.

    The operands lie on a grid on which float32 is exact, so that nothing is lost before the losses begin.
    """
    kept = {"some ids": 7, "every id": 40, "all but masked ids": 7}
    for normalization, about, which in product(("topk", "full", "tail"), (0.0, -147.0, 147.0, 98304.0, -98304.0), kept):
        hidden, weight = torch.randint(-8, 9, (5, 8)) / 8, torch.randint(-8, 9, (40, 8)) / 8
        bias = torch.full((40,), about)
        ids = torch.stack([torch.randperm(40)[: kept[which]] for _ in range(5)])
        if which == "all but masked ids":
            ids = ids.sort(1).indices  # 0 to 6
            bias[7:] = -torch.inf
        probs = torch.rand(5, kept[which]).softmax(1) * (1 if normalization == "topk" else 0.8)
        left = normalization if which == "some ids" or normalization == "topk" else "full"
        yield f"{normalization}, {which}, about {about}", (hidden, weight, probs, ids, bias, normalization, 1.0), left


def wrong_in_extremes(linear: Callable[..., Any] = OPS.linear_topk_kl_loss) -> list[str]:
    """Both losses and gradients on `extreme_calls`, held to twice the error of the plain expression in float32."""
    wrong = []
    for told, call, amounts_to in extreme_calls():
        probs, ids, temperature = call[2], call[3], call[6]

        def plain(call: Any, amounts_to: str = amounts_to) -> list[Tensor]:
            hidden, weight, bias = (call[i].clone().requires_grad_() for i in (0, 1, 4))
            logits = hidden @ weight.T + bias
            loss = definition(logits, call[2], call[3], amounts_to, call[6])
            return [loss, *torch.autograd.grad(loss, (hidden, weight, bias, logits))]

        single, exact = plain(call), plain(double(*call))
        wrong += check(told, linear(*call, True, True, True), single[:4], exact[:4], 1e-6)
        logits = call[0] @ call[1].T + call[4]
        loss, normalizers = OPS.topk_kl_loss(logits, probs, ids, call[5], temperature)
        dlogits = OPS.topk_kl_loss_backward(torch.ones(()), logits, probs, ids, normalizers, call[5], temperature)
        wrong += check(f"given, {told}", (loss, dlogits), (single[0], single[4]), (exact[0], exact[4]), 1e-6)
    return wrong


def main(seed: int, count: int) -> int:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    wrong = wrong_in_extremes()
    for _ in range(count):
        wrong += one_case(chance)
    print(*wrong, f"{count} cases, {len(wrong)} wrong", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
