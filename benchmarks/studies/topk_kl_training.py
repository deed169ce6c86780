"""Distilling the demo model (SmolLM2-135M) with the fused loss: ``python -m benchmarks.studies.topk_kl_training``.

``curve`` trains the patch twice over the same windows, by the paper's four lines on the model's logits and by
`fuse_distillation_loss`, and prints both losses. ``step`` prints what a whole step takes with each loss, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import Rows, add_option, record
from benchmarks.speed.cases.topk_kl import divergence
from benchmarks.speed.hardware import describe
from benchmarks.speed.table import markdown
from linearpatch_kernels.calibration import Span
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.fused_loss import fuse_distillation_loss
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.text import token_windows

SPAN = Span(13, 19)
SLOTS = 50


class Distillation:
    """A student whose patch alone is trained, from the identity, and the teacher's answers to some windows."""

    def __init__(self, windows: int, tokens: int) -> None:
        self.teacher, tokenizer = load_model(demo_model_path(), device="cpu")
        self.windows = token_windows(tokenizer, demo_text("calibration"), length=tokens, count=windows)
        with torch.no_grad():
            self.answers = [self.teacher(input_ids=window[None]).logits.topk(SLOTS) for window in self.windows]

    def student(self) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        patch = DensePatch.from_dense(torch.eye(hidden_size(self.teacher)))
        student = apply_plan(self.teacher, PrunePlan(num_layers(self.teacher), (Joint(SPAN, patch),)))
        student.requires_grad_(False)
        weight = patches(student)[SPAN.start][0].weight.requires_grad_(True)
        return student, torch.optim.AdamW([weight], lr=1e-4, weight_decay=1e-4)

    def probs(self, step: int, normalization: str) -> Tensor:
        """[1, tokens, K]: the paper's over the K, or the true ones."""
        values = self.answers[step].values
        if normalization == "topk":
            return values.softmax(-1)
        with torch.no_grad():
            logits = self.teacher(input_ids=self.windows[step][None]).logits
        return (values - logits.logsumexp(-1, keepdim=True)).exp()

    def steps(self, normalization: str, fused: bool) -> Callable[[int], float]:
        """A step by its number: forward, loss, backward, update; returns the loss."""
        student, optimizer = self.student()
        targets = [self.probs(step, normalization) for step in range(len(self.windows))]
        if fused:
            fuse_distillation_loss(student, normalization=normalization)

        def step(i: int) -> float:
            given, probs, ids = self.windows[i][None], targets[i], self.answers[i].indices
            if fused:
                loss = student(input_ids=given, teacher_probs=probs, teacher_ids=ids, use_cache=False).loss
            else:
                logits = student(input_ids=given, use_cache=False).logits
                loss = divergence(logits[0], probs[0], ids[0], normalization) / len(ids[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step


def curves(steps: int, tokens: int) -> tuple[list[float], list[float]]:
    """The losses of the paper's lines, and ours."""
    study = Distillation(steps, tokens)
    paper, ours = (study.steps("topk", fused) for fused in (False, True))
    return [paper(i) for i in range(steps)], [ours(i) for i in range(steps)]


def print_curves(steps: int, tokens: int) -> Rows:
    paper, ours = curves(steps, tokens)
    print(f"patch of SmolLM2-135M without layers {SPAN}, {steps} steps of {tokens} tokens, K = {SLOTS}")
    shown = sorted({0, *range(4, steps, 5), steps - 1})
    table = ("step", "the paper's lines", "fused"), [(f"{i + 1}", f"{paper[i]:.6f}", f"{ours[i]:.6f}") for i in shown]
    print(markdown(*table))
    furthest = max(abs(one - other) / other for one, other in zip(ours, paper, strict=True))
    print(f"furthest apart: {furthest:.1e} of the loss")
    return table


def print_steps(rounds: int, tokens: int) -> Rows:
    study = Distillation(1, tokens)
    forms = {
        f"{normalization}, {'fused' if fused else 'by the logits'}": study.steps(normalization, fused)
        for normalization in ("topk", "tail", "full")
        for fused in (False, True)
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, step in forms.items():
            begin = time.perf_counter()
            step(0)
            if i:
                seconds[name].append(time.perf_counter() - begin)
    print(f"a step of {tokens} tokens, float32, {torch.get_num_threads()} thread, median of {rounds}")
    paper = seconds["topk, by the logits"]
    rows = []
    for name, its in seconds.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(paper, its, strict=True))
        rows.append((name, f"{statistics.median(its) * 1e3:.0f} ms", f"{ratio:.2f}x"))
    table = ("loss", "step", "as fast as the paper's lines"), rows
    print(markdown(*table), flush=True)
    print(describe()["cpu"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "step"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "curve":
        table = print_curves(options.steps, options.tokens or 16)
    else:
        table = print_steps(options.rounds, options.tokens or 512)
    if options.json:
        record(options.json, {options.what: table})


if __name__ == "__main__":
    main()
