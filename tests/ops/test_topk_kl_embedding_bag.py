"""What runs where no kernels are compiled, against float64 and against the plain expression."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.ops.topk_kl.embedding_bag import linear_topk_kl_loss_embedding_bag
from linearpatch_kernels.ops.topk_kl.reference import linear_topk_kl_loss_reference
from tests.support.topk_kl_cases import check, definition, double, extreme_calls

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (40, 17), (40, 0)])
def test_loss_and_gradient_of_hidden(dtype: torch.dtype, biased: bool, n: int, k: int) -> None:
    hidden, weight = torch.randn(n, 33).to(dtype), (torch.randn(60, 33) / 33**0.5).to(dtype)
    bias = torch.randn(60) if biased else None
    probs, ids = torch.rand(n, k).softmax(1), torch.randint(-1, 60, (n, k))
    if n > 2:
        ids[2] = -1
    options = (bias, "topk", 1.3, True, False, False)
    loss, dhidden, _, _ = linear_topk_kl_loss_embedding_bag(hidden, weight, probs, ids, *options)
    wide = (tensor.double() for tensor in (hidden, weight, probs))
    exact = linear_topk_kl_loss_reference(*wide, ids, None if bias is None else bias.double(), *options[1:])

    def plain() -> tuple[Tensor, Tensor]:
        h = hidden.clone().requires_grad_()
        logits = (h @ weight.T).to(exact[0].dtype if dtype == torch.float64 else torch.float32)
        z = (logits if bias is None else logits + bias) / 1.3
        kept = (ids >= 0).any(1) if k else torch.zeros(n, dtype=torch.bool)
        gathered = z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)[kept].log_softmax(1)
        p = probs.masked_fill(ids < 0, 0)[kept].to(z.dtype)
        loss = torch.where(p == 0, 0, p * (p.log() - gathered)).sum() / kept.sum().clamp(min=1)
        return loss.detach(), torch.autograd.grad(loss, h)[0]

    if not n or not k:
        assert loss == 0
        assert dhidden.eq(0).all()
        return
    for ours, true, other in zip((loss, dhidden), exact[:2], plain(), strict=True):
        assert (ours.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + 1e-6


def test_logits_far_from_zero() -> None:
    for told, call, _ in extreme_calls():
        if call[5] != "topk":
            continue

        def plain(call: Any) -> list[Tensor]:
            hidden = call[0].clone().requires_grad_()
            loss = definition(hidden @ call[1].T + call[4], *call[2:4], "topk", 1.0)
            return [loss, *torch.autograd.grad(loss, hidden)]

        ours = linear_topk_kl_loss_embedding_bag(*call, True, False, False)[:2]
        assert not check(told, ours, plain(call), plain(double(*call)), 1e-6)


def test_it_is_what_runs_without_the_extension(tmp_path: Path) -> None:
    """In a process that finds no compiled kernels, by the record of what torch called."""
    program = """
import pathlib, warnings
warnings.simplefilter("ignore")
import linearpatch_kernels
assert linearpatch_kernels.backends()["cpu"] is not True
import torch
from linearpatch_kernels import linear_topk_kl_loss
hidden = torch.randn(4, 8, requires_grad=True)
with torch.profiler.profile() as called:
    probs, ids = torch.rand(4, 3).softmax(1), torch.randint(0, 20, (4, 3))
    linear_topk_kl_loss(hidden, torch.randn(20, 8), probs, ids).backward()
print(any("embedding_bag" in event.key for event in called.key_averages()), hidden.grad.isfinite().all().item())
"""
    for source in (ROOT / "linearpatch_kernels").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("LINEARPATCH_BACKEND", None)
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.stdout == "True True\n", ran.stdout + ran.stderr
