"""Distillation against the authors' loop on SmolLM2-135M: ``python -m benchmarks.studies.distillation``.

First ``rows``, then ``tables``; with ``--hour`` the same of runs as long as an hour of two cores allows, on more text.

``rows`` trains what is named by ``--only`` (drop/method/learning rate, ``--list`` shows them) and writes every finished
row to ``rows.json`` in ``--work`` at once; rows that are there are not run again, and a stopped row goes on where it
was. ``step`` times a training step of ``--steps-of``, taking turns with the authors'; it is the part that wants an idle
machine, and the minutes of the tables are so many of its steps. ``memory`` measures how far a step rises above what is
resident before it, as the process sees it, and again with every tensor in a mapping of its own, so that what is freed
is given back and only what lives is counted. ``tables`` prints what is there.

All rows of a depth share the span (that of the authors' score, cosine per channel), the calibration, training and
held-out windows, the teacher's answers, and the order of the windows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import Rows, add_option, commit, record
from benchmarks.speed.hardware import describe
from benchmarks.speed.memory import peak_memory
from benchmarks.speed.table import markdown
from benchmarks.studies.authors_loop import AuthorsLoop
from linearpatch_kernels.calibration import CalibrationStatistics, calibrate, collect_moments
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.distillation.forms import reformed
from linearpatch_kernels.distillation.recompute import recomputing
from linearpatch_kernels.distillation.settings import RECOMPUTE, TrainingSettings
from linearpatch_kernels.distillation.structure import structure
from linearpatch_kernels.distillation.teacher_store import TeacherStore, teacher_answers, write_teacher_store
from linearpatch_kernels.distillation.trainable import prepare
from linearpatch_kernels.distillation.trainer import (
    Distillation,
    SuffixLoss,
    distill,
    heldout_losses,
)
from linearpatch_kernels.evaluation.perplexity import token_losses
from linearpatch_kernels.forward import PartialRun, residual_stream
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.scores import choose_spans
from linearpatch_kernels.text import cache_dir, split_windows, token_windows, without_shared_runs
from linearpatch_kernels.torch_state import evaluation_mode

DROPS = (3, 6, 9)
STEPS, LENGTH = 100, 512
FIT, HELDOUT, REPORT = 64, 8, 12
LOOKS = 10
TEXTS = ("BoolQ passages", "LAMBADA passages")
STRUCTURED_RANK = 32
HOUR_STEPS, HOUR_WINDOWS = 2350, 1100
# glibc's, in bytes: larger allocations get a mapping of their own. Set, it does not adapt itself.
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


@dataclasses.dataclass(frozen=True)
class Method:
    """What stands at the joint, and how it is trained.

    Attributes:
        fit: the closed form it starts from.
        form: of `forms.FORMS`.
        train: of `settings.TRAIN`; "" for a method without training.
        rank: of the fit and the form, where they have one.
        loss: of `settings.LOSSES`.
        label_weight: of the text's own next tokens.
        structured_of: the method whose trained dense patch it takes back to Hadamard + ``rank`` first.
    """

    fit: str
    form: str = "keep"
    train: str = ""
    rank: int = STRUCTURED_RANK
    loss: str = "tail"
    label_weight: float = 0.0
    structured_of: str = ""


METHODS = {
    "dropped": Method("none"),
    "linearpatch": Method("linearpatch"),
    "fitted": Method("shrunk-least-squares"),
    "fitted, rank 32": Method("shrunk-low-rank"),
    "authors": Method("linearpatch", "dense", "patch"),
    "ours, all as theirs": Method("linearpatch", "dense", "patch", loss="topk"),
    "ours, dense": Method("shrunk-least-squares", "keep", "patch"),
    "ours, dense, structured": Method("shrunk-least-squares", structured_of="ours, dense"),
    "ours, structured + norms": Method("shrunk-least-squares", train="patch+norms", structured_of="ours, dense"),
    "ours, dense + norms": Method("shrunk-least-squares", "keep", "patch+norms"),
    "ours, dense + norms + LoRA": Method("shrunk-least-squares", "keep", "lora"),
    "ours, suffix": Method("shrunk-least-squares", "keep", "suffix"),
    "ours, suffix, labels": Method("shrunk-least-squares", "keep", "suffix", label_weight=0.3),
    "ours, scale": Method("linearpatch", "scale", "patch"),
    "ours, scale + diagonals": Method("linearpatch", "scales", "patch"),
    "ours, rank 32": Method("shrunk-low-rank", "keep", "patch"),
    "ours, rank 32 + diagonals": Method("shrunk-low-rank", "low-rank", "patch"),
    "ours, rank 32 + norms": Method("shrunk-low-rank", "keep", "patch+norms"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: so many layers less, by a method, with a learning rate (0: none needed)."""

    drop: int
    method: str
    learning_rate: float = 0.0

    def __str__(self) -> str:
        return f"{self.drop}/{self.method}/{self.learning_rate:g}"

    @classmethod
    def parse(cls, text: str) -> Row:
        drop, method, rate = text.split("/")
        if method not in METHODS:
            raise SystemExit(f"no method is called {method!r}: one of {', '.join(METHODS)}")
        return cls(int(drop), method, float(rate))


def default_rows() -> list[Row]:
    """What the tables need: at 6 the authors' best of three rates and every freedom; at 9 and 3 the best rates."""
    free = ("dropped", "linearpatch", "fitted", "fitted, rank 32")
    rows = [Row(6, name) for name in free]
    rows += [Row(6, "authors", rate) for rate in (3e-4, 1e-3, 1e-4)]
    rows += [Row(6, name, 3e-4) for name in METHODS if name.startswith(("ours, dense", "ours, rank 32 + norms"))]
    rows += [Row(6, name, 1e-3) for name in METHODS if name.startswith(("ours, rank", "ours, scale"))]
    rows.append(Row(6, "ours, suffix", 1e-4))
    for drop in (9, 3):
        rows += [Row(drop, name) for name in free]
        rows += [Row(drop, "authors", 1e-3), Row(drop, "ours, dense + norms", 3e-4)]
    return rows


def hour_rows() -> list[Row]:
    """What an hour heals of 6 layers, beside what no training heals."""
    free = [Row(6, name) for name in ("dropped", "linearpatch", "fitted")]
    return [*free, Row(6, "ours, suffix, labels", 1e-4)]


class Study:
    """The demo model, its texts as windows, and what is computed from them once and kept in a folder."""

    steps: int = STEPS
    drops: tuple[int, ...] = DROPS

    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.model, tokenizer = load_model(demo_model_path(), device="cpu")
        self.windows = self.shares(tokenizer)
        far = token_windows(tokenizer, demo_text("heldout"), length=LENGTH, count=REPORT)
        self.reported = torch.cat([self.windows["report"], far])
        count = len(self.windows["training"])
        self.training, self.heldout = range(count), range(count, count + HELDOUT)
        self.statistics = self._statistics(work / "statistics.safetensors")
        self.spans = {drop: choose_spans(self.statistics, drop, "channel-cosine")[0] for drop in self.drops}
        self.dense = self._dense(work / "report.safetensors")

    def shares(self, tokenizer: Any) -> dict[str, Tensor]:
        """The windows of the first text: to fit, to train, to choose the best step, to report."""
        sizes = {"fit": FIT, "training": self.steps, "heldout": HELDOUT, "report": REPORT}
        near = token_windows(tokenizer, demo_text("calibration"), length=LENGTH, count=sum(sizes.values()))
        return split_windows(near, sizes)

    def _statistics(self, file: Path) -> CalibrationStatistics:
        if not file.exists():
            batches = self.windows["fit"].split(1)
            first = calibrate(self.model, batches, progress=show)
            spans = [choose_spans(first, drop, "channel-cosine")[0] for drop in self.drops]
            found = collect_moments(self.model, batches, spans, progress=show)
            first.with_moments(found).save(file, fingerprint="benchmark")
        return CalibrationStatistics.load(file, fingerprint="benchmark")

    @torch.no_grad()
    def _dense(self, file: Path) -> dict[str, Tensor]:
        """What the dense model says of the report's windows: its losses, its likeliest tokens, its states at joints."""
        if not file.exists():
            layers = num_layers(self.model)
            starts = sorted({span.start for span in self.spans.values()})
            found: dict[str, list[Tensor]] = {}
            head = PartialRun(self.model, layers, "logits")
            with evaluation_mode(self.model):
                for window in self.reported.split(1):
                    states = residual_stream(self.model, window, [*starts, layers])
                    logits = head(states[layers])
                    kept = {"loss": token_losses(logits, window), "likeliest": logits.argmax(-1)}
                    for name, tensor in (kept | {f"state.{start}": states[start] for start in starts}).items():
                        found.setdefault(name, []).append(tensor)
            save_file({name: torch.cat(parts).contiguous() for name, parts in found.items()}, file)
        return load_file(file)

    @functools.cached_property
    def store(self) -> TeacherStore:
        """The teacher's answers on the training and held-out windows, with the states at the joint of every depth."""
        windows = torch.cat([self.windows["training"], self.windows["heldout"]])
        depths = [span.start for span in self.spans.values()]
        return write_teacher_store(self.model, windows, self.work / "store", depths=depths, progress=show)

    def student(self, row: Row) -> PreTrainedModel:
        method, span = METHODS[row.method], self.spans[row.drop]
        patch = fit_patch(self.statistics.at(span), method.fit, rank=method.rank)
        if patch is not None and method.form != "keep":
            patch = reformed(patch, method.form, method.rank)
        return apply_plan(self.model, PrunePlan(num_layers(self.model), (Joint(span, patch, method.fit),)))

    @torch.no_grad()
    def quality(self, student: PreTrainedModel, drop: int) -> dict[str, dict[str, float]]:
        """Per text the loss, and how often the likeliest token is the dense model's."""
        start = self.spans[drop].start
        suffix = PartialRun(student, start, "logits")
        losses, agreeing = [], []
        with evaluation_mode(student):
            for i, window in enumerate(self.reported.split(1)):
                logits = suffix(self.dense[f"state.{start}"][i : i + 1])
                losses.append(token_losses(logits, window))
                agreeing.append((logits.argmax(-1) == self.dense["likeliest"][i])[:, :-1])
        return self._by_text(torch.cat(losses), torch.cat(agreeing))

    def dense_quality(self) -> dict[str, dict[str, float]]:
        return self._by_text(self.dense["loss"], torch.ones_like(self.dense["loss"]))

    def _by_text(self, losses: Tensor, agreeing: Tensor) -> dict[str, dict[str, float]]:
        return {
            text: {
                "loss": float(losses[i * REPORT : (i + 1) * REPORT].double().mean()),
                "agreement": float(agreeing[i * REPORT : (i + 1) * REPORT].double().mean()),
            }
            for i, text in enumerate(TEXTS)
        }


class HourStudy(Study):
    """What an hour of two cores is enough for: the answers of the dense model on more text, and more steps of it."""

    drops = (6,)

    def __init__(self, work: Path, steps: int = HOUR_STEPS, training: int = HOUR_WINDOWS) -> None:
        self.steps, self._training = steps, training
        super().__init__(work)

    def shares(self, tokenizer: Any) -> dict[str, Tensor]:
        near = token_windows(tokenizer, demo_text("calibration"), length=LENGTH)
        sizes = {"fit": FIT, "heldout": HELDOUT, "report": REPORT}
        found = split_windows(near, sizes | {"training": len(near) - sum(sizes.values())})
        kept_back = tokenizer.batch_decode(torch.cat([found["heldout"], found["report"]]))
        more = token_windows(tokenizer, without_shared_runs(demo_text("training"), kept_back), length=LENGTH)
        training = torch.cat([found["training"], more])
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
        return found | {"training": training[order][: self._training]}


def show(description: str, done: int, total: int) -> None:
    if done % 8 == 0 or done == total:
        print(f"  {description} {done}/{total}", flush=True)


class Results:
    """``rows.json``: what is finished, by name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}

    def put(self, name: str, value: Any) -> None:
        # Another process may have finished other rows since.
        self.content = (json.loads(self.file.read_bytes()) if self.file.exists() else {}) | {name: value}
        new = self.file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(self.content, indent=1))
        os.replace(new, self.file)


def make_row(study: Study, row: Row) -> dict[str, Any]:
    student = study.student(row)
    method = METHODS[row.method]
    if not (method.train or method.structured_of):
        chain = patches(student).get(study.spans[row.drop].start)
        found: dict[str, Any] = {"parameters": 0 if chain is None else chain.num_parameters}
    else:
        found = (train_authors if row.method == "authors" else train_ours)(study, row, student)
    quality = study.quality(student, row.drop)
    return {"span": str(study.spans[row.drop]), **found, "quality": quality, "commit": commit()}


def train_authors(study: Study, row: Row, student: PreTrainedModel) -> dict[str, Any]:
    store, joint = study.store, study.spans[row.drop].start
    loop = AuthorsLoop(student, store, joint, row.learning_rate, STEPS)
    place = study.work / f"{str(row).replace('/', '-')}.pt"
    curve: list[Any] = []
    seconds = 0.0
    if place.exists():
        about = loop.load(place)
        curve, seconds = about["curve"], about["seconds"]  # type: ignore[assignment]  # as saved below
    order = torch.randperm(STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    while True:
        if loop.done % (STEPS // LOOKS) == 0 and (not curve or curve[-1]["step"] < loop.done):
            found = heldout_losses(student, store, joint, study.heldout, ("tail", "topk"))
            curve.append({"step": loop.done, **found})
            loop.save(place, {"curve": curve, "seconds": seconds})
            show(f"{row}: held-out KL {found['tail']:.4f},", loop.done, STEPS)
        if loop.done == STEPS:
            break
        begin = time.perf_counter()
        loop.step(study.training[order[loop.done]])
        seconds += time.perf_counter() - begin
    place.unlink()
    return {"parameters": loop.matrix.numel(), "seconds": seconds, "curve": curve}


def train_ours(study: Study, row: Row, student: PreTrainedModel) -> dict[str, Any]:
    method = METHODS[row.method]
    found: dict[str, Any] = {}
    if method.structured_of:
        found = take_back(study, dataclasses.replace(row, method=method.structured_of), student, method.rank)
    if method.train:
        result = train_once(study, row, student)
        found |= {"parameters": result.parameters, "steps": result.steps}
        found |= {"seconds": result.seconds, "curve": [dict(point) for point in result.curve]}
    return found


def train_once(study: Study, row: Row, student: PreTrainedModel) -> Distillation:
    method = METHODS[row.method]
    settings = TrainingSettings(
        steps=study.steps,
        train=method.train,
        loss=method.loss,
        label_weight=method.label_weight,
        learning_rate=row.learning_rate,
        evaluate_every=study.steps // LOOKS,
    )
    return distill(
        student,
        study.store,
        joint=study.spans[row.drop].start,
        training=study.training,
        heldout=study.heldout,
        settings=settings,
        directory=study.work / str(row).replace("/", "-"),
        on_step=lambda step: show(f"{row}: held-out KL {step.heldout:.4f}, step", step.done, step.steps),
    )


def take_back(study: Study, row: Row, student: PreTrainedModel, rank: int) -> dict[str, Any]:
    """Train ``row``'s dense patch, or take it from where it was trained, and put the structured one in its place."""
    joint = study.spans[row.drop].start
    trained = train_once(study, row, student)
    dense = {joint: patches(student)[joint]}
    structure(student, study.store, joint=joint, windows=study.training, dense=dense, rank=rank)
    after = heldout_losses(student, study.store, joint, study.heldout)["tail"]
    patch = patches(student)[joint]
    return {"parameters": patch.num_parameters, "structured": [trained.heldout(trained.best_step), after]}


class OurStep:
    """A step of ours, from the cached state at the joint, through the suffix and the linear loss."""

    def __init__(self, study: Study, row: Row, student: PreTrainedModel, recompute: str) -> None:
        self.student, self.joint, self.recompute = student, study.spans[row.drop].start, recompute
        method = METHODS[row.method]
        trainable = prepare(student, self.joint, method.train, lora_rank=16, seed=0)
        self.store, self.loss = study.store, method.loss
        self.measure = SuffixLoss(student, self.joint)
        self.optimizer = torch.optim.AdamW(trainable.groups(), lr=1e-5, weight_decay=0.0, foreach=False)

    def step(self, window: int) -> float:
        batch = self.store.batch([window], [self.joint])
        with recomputing(self.student, self.joint, self.recompute):
            loss = self.measure(batch.states[self.joint].float(), batch.probs, batch.ids, [self.loss])[0]
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        return float(loss.detach())


class TeacherStep:
    """The dense model's answers on a window, as a store keeps them."""

    def __init__(self, study: Study) -> None:
        self.model, self.windows, self.request = study.model, study.windows["training"], study.store.request

    def step(self, window: int) -> None:
        teacher_answers(self.model, self.windows[window : window + 1], self.request)


def step_cases(study: Study, drop: int, names: Sequence[str], recompute: Sequence[str]) -> dict[str, Any]:
    """Name -> what has a ``step(window)``, made once already: the authors' loop, then ours."""
    row = Row(drop, "authors", 1e-5)
    cases: dict[str, Any] = {
        "authors": AuthorsLoop(study.student(row), study.store, study.spans[drop].start, 1e-5, 1000),
        "teacher": TeacherStep(study),
    }
    for name in names:
        for what in recompute:
            row = Row(drop, name, 1e-5)
            shown = name if what == TrainingSettings.recompute else f"{name} (recompute {what})"
            cases[shown] = OurStep(study, row, study.student(row), what)
    for case in cases.values():
        case.step(0)
    return cases


def compare_steps(cases: Mapping[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, taking turns; the ratio to the authors' is the median of the rounds' own."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name, case in cases.items():
            begin = time.perf_counter()
            case.step(i % STEPS)
            seconds[name].append(time.perf_counter() - begin)
    ratios = {
        name: statistics.median(mine / its for mine, its in zip(one, seconds["authors"], strict=True))
        for name, one in seconds.items()
    }
    return {name: {"seconds": statistics.median(one), "of theirs": ratios[name]} for name, one in seconds.items()}


def measure_memory(cases: Mapping[str, Any], rounds: int) -> dict[str, float]:
    """Bytes of a step above what is resident before it, the median of some."""
    return {
        name: statistics.median(peak_memory(functools.partial(case.step, 0)) for _ in range(rounds))
        for name, case in cases.items()
    }


def group_name(what: str, drop: int) -> str:
    """Under which steps (``step`` by so many threads) or memory are kept, and shown."""
    return f"{what}, {drop} of 30 layers gone"


# --- tables -----------------------------------------------------------------------------------------------------------


def print_tables(results: Mapping[str, Any], json_file: Path | None) -> None:
    """And keep them in the file, if one is given."""
    print(f"{describe()['cpu']}, {os.cpu_count()} cores, torch {torch.__version__}")
    found = tables(results)
    for title, table in found.items():
        print(f"\n{title}\n\n{markdown(*table)}")
    if json_file:
        record(json_file, found, note=f"perplexity / agreement on {REPORT} windows of each text")


def tables(results: Mapping[str, Any]) -> dict[str, Rows]:
    """Those that have rows, by title."""
    found: dict[str, Rows] = {}
    shown = ("step", "seconds", "of theirs", "MB live", "of theirs", "MB resident", "of theirs")
    figures = ("trained", "held-out KL", *TEXTS, "log-perplexity healed", "minutes", "commit")
    header = ("layers", "method", "learning rate", *figures)
    for drop in DROPS:
        for threads in (1, 2):
            title = f"A step of {LENGTH} tokens, {drop} of 30 layers gone, {threads} threads"
            found[title] = shown, list(step_rows(results, drop, threads))
    for drop in DROPS:
        found[f"{drop} of 30 layers gone"] = header, list(table_rows(results, drop))
    return {title: table for title, table in found.items() if table[1]}


def step_rows(results: Mapping[str, Any], drop: int, threads: int) -> Iterator[tuple[str, ...]]:
    live, resident = (results.get(group_name(f"memory {kind}", drop), {}) for kind in ("live", "resident"))
    for name, one in results.get(group_name(f"step of {threads} threads", drop), {}).items():
        memory = [
            text
            for found in (live, resident)
            for text in (
                (f"{found[name] / 1e6:.0f}", f"{found[name] / found['authors']:.2f}") if name in found else ("", "")
            )
        ]
        yield name, f"{one['seconds']:.2f}", f"{one['of theirs']:.2f}", *memory


def table_rows(results: Mapping[str, Any], drop: int) -> Iterator[tuple[str, ...]]:
    dense = results.get("dense")
    steps = results.get(group_name("step of 2 threads", drop), {})
    found = {Row.parse(name): one for name, one in results.items() if name.startswith(f"{drop}/")}
    lost = found.get(Row(drop, "dropped"))
    order = list(METHODS)
    if dense and found:
        yield "", "dense", "", "", "", *_figures(dense), "", "", dense.get("commit", "not kept")
    for row, one in sorted(found.items(), key=lambda item: (order.index(item[0].method), item[0].learning_rate)):
        curve = one.get("curve", [])
        ends = [curve[0]["tail"], min(point["tail"] for point in curve)] if curve else one.get("structured", [])
        kl = " to ".join(f"{end:.4f}" for end in ends)
        healed = [healed_share(dense, lost, one, text) for text in TEXTS] if dense and lost else []
        rate = f"{row.learning_rate:g}" if row.learning_rate else ""
        step = steps.get(row.method, {}).get("seconds")
        minutes = f"{one.get('steps', STEPS) * step / 60:.1f}" if step else ""
        shares = " / ".join(f"{share:.0%}" for share in healed)
        trained = f"{one['parameters']:,}"
        yield one["span"], row.method, rate, trained, kl, *_figures(one), shares, minutes, one.get("commit", "not kept")


def _figures(one: Mapping[str, Any]) -> list[str]:
    """Perplexity and agreement per text."""
    return [f"{math.exp(one['quality'][text]['loss']):.1f} / {one['quality'][text]['agreement']:.1%}" for text in TEXTS]


def healed_share(dense: Mapping[str, Any], dropped: Mapping[str, Any], one: Mapping[str, Any], text: str) -> float:
    """(what plain removal lost - what this one loses) / what plain removal lost, in log-perplexity."""
    worst = dropped["quality"][text]["loss"]
    return float((worst - one["quality"][text]["loss"]) / (worst - dense["quality"][text]["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rows", "step", "memory", "tables"])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="as --list writes them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--drop", nargs="+", type=int, default=[6], choices=DROPS, help="whose steps are measured")
    parser.add_argument("--hour", action="store_true", help="rows and tables: of the long runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps-of", nargs="+", default=["ours, all as theirs", "ours, dense"], choices=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--recompute", nargs="+", default=[TrainingSettings.recompute], choices=RECOMPUTE)
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmark-distillation")
    add_option(parser)
    options = parser.parse_args()
    results = Results(options.work / "rows.json")
    seconds = {name: one for name, one in results.content.items() if name.startswith("step")}
    if options.hour:
        if options.what in ("step", "memory"):
            parser.error("a step is the same in an hour: leave out --hour")
        options.work /= "hour"
        results = Results(options.work / "rows.json")
    everything = hour_rows() if options.hour else default_rows()
    rows = [Row.parse(text) for text in options.only] if options.only else everything
    if options.list:
        print("\n".join(f"{row}{'  (done)' if str(row) in results.content else ''}" for row in rows))
    elif options.what == "tables":
        print_tables(results.content | seconds, options.json)
    else:
        study = HourStudy(options.work) if options.hour else Study(options.work)
        results.put("dense", {"quality": study.dense_quality(), "parameters": 0, "span": "none", "commit": commit()})
        if options.what in ("step", "memory"):
            for drop in options.drop:
                cases = step_cases(study, drop, options.steps_of, options.recompute)
                if options.what == "step":
                    name = group_name(f"step of {torch.get_num_threads()} threads", drop)
                    results.put(name, results.content.get(name, {}) | compare_steps(cases, options.rounds))
                else:
                    name = group_name(f"memory {'live' if _THRESHOLD in os.environ else 'resident'}", drop)
                    results.put(name, results.content.get(name, {}) | measure_memory(cases, options.rounds))
            if options.what == "memory" and _THRESHOLD not in os.environ:
                os.execve(
                    sys.executable,
                    [sys.executable, "-m", "benchmarks.studies.distillation", *sys.argv[1:]],
                    os.environ | {_THRESHOLD: "65536"},
                )
            costs = {name: one for name, one in results.content.items() if name.startswith(("step", "memory"))}
            print_tables(costs, options.json)
            return
        for row in rows:
            if str(row) not in results.content:
                results.put(str(row), make_row(study, row))
        print_tables(results.content | seconds, options.json)


if __name__ == "__main__":
    main()
