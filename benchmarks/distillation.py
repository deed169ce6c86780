"""Distillation against the authors' loop, SmolLM2-135M less 6 of 30 layers: ``python -m benchmarks.distillation``.

``step`` prints the time and the memory of a training step for the same trained parameters (a dense P), taking turns.
``curve --method NAME ...`` trains and prints the held-out KL now and then, on the same windows for every method.
What both need (statistics, the teacher's answers) is kept in ``--work`` and not computed again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span, calibrate
from linearpatch_kernels.distillation.forms import reformed
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainer import Step, SuffixLoss, TrainingSettings, distill, heldout_losses
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import Patch
from linearpatch_kernels.surgery.apply import apply_plan
from linearpatch_kernels.surgery.fitting import fit_patch
from linearpatch_kernels.surgery.plan import Joint, PrunePlan
from linearpatch_kernels.text import demo_model_path, demo_text, split_windows, token_windows

SPAN = Span(13, 19)
HELDOUT = 4
CALIBRATION = 24

# method: the closed-form fit it starts from, the form that is trained, what else is trained
METHODS = {
    "authors": ("linearpatch", "dense", "patch"),
    "ours-from-linearpatch": ("linearpatch", "dense", "patch"),
    "ours": ("least-squares", "dense", "patch"),
    "ours-low-rank": ("low-rank", "keep", "patch"),
    "ours-norms": ("least-squares", "dense", "patch+norms"),
    "ours-lora": ("least-squares", "dense", "lora"),
}


class Study:
    """The demo model, windows to calibrate, train and choose on, and what is computed from them once."""

    def __init__(self, work: Path, steps: int, length: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, tokenizer = load_model(demo_model_path(), device="cpu")
        # A number of windows of its own, so that runs of other lengths train on a part of the same store.
        count = CALIBRATION + steps + HELDOUT
        shares = split_windows(
            token_windows(tokenizer, demo_text("calibration"), length=length, count=count),
            {"fit": CALIBRATION, "training": steps, "heldout": HELDOUT},
        )
        place = work / f"{steps}x{length}"
        place.mkdir(parents=True, exist_ok=True)
        self.statistics = self._statistics(place / "statistics.safetensors", shares["fit"])
        windows = torch.cat([shares["training"], shares["heldout"]])
        self.store = write_teacher_store(self.model, windows, place / "store", joint=SPAN.start)
        self.training, self.heldout = range(steps), range(steps, steps + HELDOUT)

    def _statistics(self, file: Path, windows: Tensor) -> CalibrationStatistics:
        if not file.exists():
            calibrate(self.model, windows.split(4), moments=[SPAN]).save(file, fingerprint="benchmark")
        return CalibrationStatistics.load(file, fingerprint="benchmark")

    def student(self, method: str) -> PreTrainedModel:
        fit, form, _ = METHODS[method]
        patch = fit_patch(self.statistics, SPAN, fit)
        assert isinstance(patch, Patch)
        start = patch if form == "keep" else reformed(patch, form, 0)
        return apply_plan(self.model, PrunePlan(num_layers(self.model), (Joint(SPAN, start, fit),)))


class AuthorsLoop:
    """LinearPatch's offline distillation: the whole student runs, its logits are held, K of them are gathered.

    loss = KL(teacher's K, softmaxed over the K || softmax of the student's logits at the same ids), summed over the
    vocabulary's K, mean over the tokens. Only P [d, d] is trained: AdamW, weight decay 1e-4, cosine to 1/20.
    """

    def __init__(self, student: PreTrainedModel, store: TeacherStore, learning_rate: float, steps: int) -> None:
        self.student, self.store = student, store
        student.requires_grad_(False)
        self.matrix = patches(student)[SPAN.start].weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([self.matrix], lr=learning_rate, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps, eta_min=learning_rate / 20)

    def step(self, window: int) -> float:
        batch = self.store.batch([window])
        logits = self.student(batch.input_ids, use_cache=False).logits
        student = logits.gather(-1, batch.ids.long()).log_softmax(-1)
        teacher = batch.probs / batch.probs.sum(-1, keepdim=True)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean") / student.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())


class OurStep:
    """The same trained parameter, from the cached state at the joint, through the suffix and the linear loss."""

    def __init__(self, student: PreTrainedModel, store: TeacherStore, loss: str, precision: torch.dtype) -> None:
        student.requires_grad_(False)
        self.matrix = patches(student)[SPAN.start].weight.requires_grad_(True)
        self.store, self.loss = store, loss
        self.measure = SuffixLoss(student, SPAN.start, precision)
        self.optimizer = torch.optim.AdamW([self.matrix], lr=1e-4, weight_decay=0.0, foreach=False)

    def step(self, window: int) -> float:
        batch = self.store.batch([window])
        assert batch.joint_state is not None
        loss = self.measure(batch.joint_state.float(), batch.probs, batch.ids, [self.loss])[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def compare_steps(study: Study, rounds: int) -> None:
    """Time of a step, pairwise in turns; memory of a step above what is resident before it."""
    cases: dict[str, Any] = {"authors' loop": AuthorsLoop(study.student("authors"), study.store, 1e-4, 1000)}
    for loss in ("topk", "tail"):
        for precision in (torch.float32, torch.bfloat16):
            name = f"ours, {loss}, {str(precision).removeprefix('torch.')}"
            cases[name] = OurStep(study.student("authors"), study.store, loss, precision)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case.step(0)
    for i in range(rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            case.step(study.training[i % len(study.training)])
            seconds[name].append(time.perf_counter() - begin)
    theirs = seconds["authors' loop"]
    tokens = study.store.request.length
    print(f"a step of {tokens} tokens, dense P trained, {torch.get_num_threads()} threads, median of {rounds}")
    base = 0.0
    for name, case in cases.items():
        memory = peak_memory(lambda case=case: case.step(0))
        base = base or memory
        ratio = statistics.median(mine / its for mine, its in zip(seconds[name], theirs, strict=True))
        print(
            f"  {name:24} {statistics.median(seconds[name]):.3f} s ({ratio:.2f} of theirs), "
            f"{memory / 1e6:.0f} MB above the resident ({memory / base:.2f} of theirs)"
        )


def peak_memory(run: Callable[[], object]) -> float:
    """Bytes by which the process grows at most while ``run`` runs, the memory it has freed before given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def curve(study: Study, method: str, learning_rate: float, steps: int) -> None:
    """Train with one method; print the held-out KL (of both losses) after some of the steps, and the time."""
    student = study.student(method)
    points = authors_curve if method == "authors" else our_curve
    print(f"{method}, learning rate {learning_rate:g}, {steps} steps of {study.store.request.length} tokens")
    for step, tail, topk, seconds in points(study, student, method, learning_rate, steps):
        print(f"  step {step:4}: held-out KL {tail:.4f} with the tail, {topk:.4f} over the top 50, {seconds:.0f} s")


def authors_curve(
    study: Study, student: PreTrainedModel, method: str, learning_rate: float, steps: int
) -> Iterator[tuple[int, float, float, float]]:
    loop = AuthorsLoop(student, study.store, learning_rate, steps)
    order = torch.randperm(len(study.training), generator=torch.Generator().manual_seed(0)).tolist()
    seconds = 0.0
    for step in range(steps + 1):
        if step % max(1, steps // 4) == 0 or step == steps:
            found = heldout_losses(student, study.store, SPAN.start, study.heldout, ("tail", "topk"))
            yield step, found["tail"], found["topk"], seconds
        if step < steps:
            begin = time.perf_counter()
            loop.step(study.training[order[step]])
            seconds += time.perf_counter() - begin


def our_curve(
    study: Study, student: PreTrainedModel, method: str, learning_rate: float, steps: int
) -> Iterator[tuple[int, float, float, float]]:
    settings = TrainingSettings(
        steps=steps, train=METHODS[method][2], learning_rate=learning_rate, evaluate_every=max(1, steps // 4)
    )
    spent = {0: 0.0}

    def count(step: Step) -> None:
        spent[step.done] = spent[step.done - 1] + study.store.request.length / step.tokens_per_second

    result = distill(
        student,
        study.store,
        joint=SPAN.start,
        training=study.training,
        heldout=study.heldout,
        settings=settings,
        on_step=count,
    )
    for point in result.curve:
        yield int(point["step"]), point["tail"], point["topk"], spent[int(point["step"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "curve"], nargs="?", default="step")
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=["authors", "ours"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("distillation-benchmark"))
    options = parser.parse_args()
    study = Study(options.work, options.steps, options.length, options.threads)
    size = study.store.request.bytes_per_token
    print(f"SmolLM2-135M without layers {SPAN}; the teacher's answers and states: {size} MB per million tokens")
    if options.what == "step":
        compare_steps(study, options.rounds)
        return
    for method in options.method:
        for learning_rate in options.learning_rate:
            curve(study, method, learning_rate, options.steps)


if __name__ == "__main__":
    main()
