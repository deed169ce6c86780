"""The losses' Triton kernels, interpreted, against float64.

``python -m tests.support.topk_kl_triton_cases SEED COUNT``.

A program of its own, with TRITON_INTERPRET=1 and LINEARPATCH_BACKEND=triton, because both are read at import. The cases
and the rule are those of `topk_kl_cases`, with a vocabulary that takes several parts; then what is true of one call.
Ends with status 1 if anything was wrong, or a kernel was never reached.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from linearpatch_kernels.ops.topk_kl import gpu
from linearpatch_kernels.ops.topk_kl import triton as kernels
from tests.support.topk_kl_cases import OPS, STATED, Sizes, check, double, one_case, wrong_in_extremes

# Every program of the interpreter costs about a millisecond, and dweight is one program an id.
SIZES = Sizes(
    n=(0, 1, 2, 3, 7, 21),
    v=(1, 2, 17, 64, 333, 1025),
    d=(1, 3, 8, 31, 33, 64, 100, 160, 576),
    softcap=(0.0,),  # the reference serves soft-capped logits on GPUs
    most_of_slots=300_000,
    most_of_vocabulary=1_000_000,
)
NAMES = {"slots", "token", "combine_rows", "vocabulary", "vocabulary_gradient"}


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch calls it
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


def properties() -> Iterator[str]:
    """What does not hold, by name."""
    hidden, weight = torch.randn(6, 40), torch.randn(90, 40)
    for normalization in ("topk", "full", "tail"):
        probs, ids = torch.rand(6, 7).softmax(1) * 0.9, torch.randint(0, 90, (6, 7))
        ids[4] = -1
        ids[2, 3] = -1
        flags = (normalization, 1.3, True, True, False)

        spoiled, bad = hidden.clone(), probs.masked_fill(ids < 0, torch.nan)
        spoiled[4] = torch.nan
        clean = OPS.linear_topk_kl_loss(hidden, weight, probs, ids, None, *flags)
        ignored = OPS.linear_topk_kl_loss(spoiled, weight, bad, ids, None, *flags)
        if not all(one.equal(two) for one, two in zip(clean, ignored, strict=True)):
            yield f"{normalization}: what an ignored token or an absent slot holds is read"

        spoiled[2, 5] = torch.nan
        loss, dhidden, _, _ = OPS.linear_topk_kl_loss(spoiled, weight, probs, ids, None, *flags)
        if not loss.isnan() or not dhidden[2].isnan().all() or not dhidden[[0, 1, 3, 4, 5]].isfinite().all():
            yield f"{normalization}: a NaN in one token does not stay there"

        if normalization == "topk":
            other = torch.full_like(weight, torch.nan)
            used = ids[ids >= 0].unique()
            other[used] = weight[used]
            if not OPS.linear_topk_kl_loss(hidden, other, probs, ids, None, *flags)[0].equal(clean[0]):
                yield "topk: rows that no id names are read"

        outside = ids.clone()
        outside[1, 2] = 90
        check, gpu.check_ids = gpu.check_ids, lambda *_: None  # as on a GPU
        loss, dhidden, _, _ = gpu.linear_topk_kl_loss(hidden, weight, probs, outside, None, *flags)
        given = gpu.topk_kl_loss(hidden @ weight.T, probs, outside, normalization, 1.0)[0]
        gpu.check_ids = check
        if not loss.isnan() or not given.isnan() or not dhidden[[0, 2, 3, 4, 5]].equal(clean[1][[0, 2, 3, 4, 5]]):
            yield f"{normalization}: an id outside of the vocabulary spoils more or less than its token"

        kernels.BLOCK, gpu._LOGITS_AT_ONCE = 8, 6 * 8
        with LargestTensor() as largest:
            parts = gpu.linear_topk_kl_loss(hidden, weight, probs, ids, None, normalization, 1.3, True, False, False)
        kernels.BLOCK, gpu._LOGITS_AT_ONCE = 128, 2**24
        if largest.numel >= 6 * 90:
            yield f"{normalization}: a tensor of {largest.numel} numbers, where N * V is {6 * 90}"
        for one, two in zip(parts[:2], clean, strict=False):
            if not torch.allclose(one, two, rtol=1e-5, atol=1e-6):
                yield f"{normalization}: in parts it is another result"

    for value in (torch.inf, -torch.inf):
        logits = torch.randn(6, 90)
        logits[2, int(ids[2].max())] = logits[3, next(i for i in range(90) if i not in ids[3])] = value
        for normalization in ("topk", "full", "tail"):
            ours, reference = (
                operator(logits, probs, ids, normalization, 1.0)[0]
                for operator in (OPS.topk_kl_loss, OPS.topk_kl_loss_reference)
            )
            if not torch.allclose(ours, reference, equal_nan=True):
                yield f"{normalization}: logits of {value} give {ours}, the reference {reference}"


def wrong_where_rows_are_not_held() -> list[str]:
    hidden, weight = torch.randn(3, 9000), torch.randn(20, 9000) / 9000**0.5
    probs, ids = torch.rand(3, 7).softmax(1) * 0.9, torch.randint(0, 20, (3, 7))
    ids[1, 2] = -1
    arguments = (hidden, weight, probs, ids, None, "topk", 1.3, True, True, False)
    reference = OPS.linear_topk_kl_loss_reference
    ours, theirs = OPS.linear_topk_kl_loss(*arguments), reference(*arguments)
    return check("wide", ours, theirs, reference(*double(*arguments)), STATED)


def main(seed: int, count: int) -> int:
    assert kernels.INTERPRETED
    launches: Counter[str] = Counter()
    launch = kernels._launch

    def counted(kernel: Any, *arguments: Any, **others: Any) -> None:
        launches[kernel.fn.__name__.removesuffix("_kernel")] += 1
        with _disable_current_modes():  # the interpreter makes copies of its own
            launch(kernel, *arguments, **others)

    kernels._launch = counted
    chance = random.Random(seed)
    torch.manual_seed(seed)
    wrong = []
    for _ in range(count):
        kernels.BLOCK = chance.choice([16, 64, 2048])
        gpu._LOGITS_AT_ONCE = chance.choice([1, 4000, 2**24])
        wrong += one_case(chance, SIZES)
    kernels.BLOCK, gpu._LOGITS_AT_ONCE = 128, 2**24
    wrong += [*properties(), *wrong_in_extremes(), *wrong_where_rows_are_not_held()]
    print(*wrong, f"{count} cases, {dict(launches)}, {len(wrong)} wrong", sep="\n")
    return 1 if wrong or set(launches) != NAMES else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
