"""The page of a run: a report in Markdown, and the pictures in it.

Every string of `ReportData` is plain text: the report alone writes Markdown.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from linearpatch_kernels.evaluation.agreement import Quality, healed_share
from linearpatch_kernels.evaluation.latency import ModelSize, Speed
from linearpatch_kernels.evaluation.notes import Noted, left_out, warn
from linearpatch_kernels.report import words
from linearpatch_kernels.report.tables import Table, number, percent

DENSE, DROPPED = "dense", "dropped (no patch)"
"""Rows of every comparison: the model as it was, and as many of its layers plainly removed."""


@dataclass(frozen=True)
class QualityRow:
    """One model of the quality table; what was not measured is None."""

    name: str
    layers: int
    quality: Quality
    size: ModelSize | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class CandidateRow:
    """One (span, fit) that was tried at a joint.

    Attributes:
        span: the dropped layers, half-open, written ``13:19``.
        fit: the fit's name.
        loss: loss on the held-out calibration windows, nats per token.
        cost: floating-point operations per token of the patch.
        chosen: whether this one was kept.
    """

    span: str
    fit: str
    loss: float
    cost: int
    chosen: bool


@dataclass(frozen=True)
class SpanRow:
    """A span of the plan: the dropped layers (half-open), what chose it, its score, and the patch at its joint."""

    span: str
    chosen_by: str
    score: float | None
    patch: str


@dataclass(frozen=True)
class ReportData:
    """Everything :func:`write_report` writes down, as plain text; an empty field leaves its section out.

    Attributes:
        title: the report's heading.
        notes: what the result lacks or suffers from, a sentence each.
        steps: what was done, a sentence each.
        quality: the models on the held-out text, the dense one first.
        quality_text: which text that was, and how much of it.
        dense, dropped: names of the rows between which "healed" is measured.
        candidates, spans: what the plan was chosen from, and the plan.
        sweep: fit -> number of dropped layers -> perplexity.
        tasks: model -> task -> scores, as ``evaluate_tasks`` gives them.
        plots: file name inside the report's directory -> caption.
        timings: step -> seconds.
        files: path -> what is in it.
        usage: Python that loads the result.
        sample_prompt, sample: a prompt and its continuation by the model as it was saved.
    """

    title: str
    notes: Sequence[str] = ()
    steps: Sequence[str] = ()
    quality: Sequence[QualityRow] = ()
    quality_text: str = ""
    dense: str | None = None
    dropped: str | None = None
    candidates: Sequence[CandidateRow] = ()
    spans: Sequence[SpanRow] = ()
    sweep: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Mapping[str, float | int]]] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    usage: str = ""
    sample_prompt: str = ""
    sample: str = ""


Drawing = tuple[str, Callable[[Path], None]]
"""A picture's caption, and what draws it into a PNG file."""


def draw_report(data: ReportData, drawings: Mapping[str, Drawing], noted: Noted = warn) -> dict[str, bytes]:
    """The files of a report directory: ``report.md`` and the pictures in it.

    What cannot be drawn or written is left out; the report and ``noted`` say so.

    Args:
        drawings: file name -> picture; those of ``data.plots`` are there already.
    """
    notes, plots = [*data.notes], dict(data.plots)
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (caption, draw) in drawings.items():
            with left_out(f"the picture {name}", _kept(notes, noted)):
                draw(Path(folder, name))
                files[name] = Path(folder, name).read_bytes()
                plots[name] = caption
        path = write_report(folder, dataclasses.replace(data, plots=plots, notes=notes), noted)
        return {path.name: path.read_bytes(), **files}


def write_report(directory: str | Path, data: ReportData, noted: Noted = warn) -> Path:
    """Write ``report.md`` into an existing directory and return its path; a section that fails is left out, noted."""
    sections: dict[str, Callable[[], str]] = {
        "What was done": lambda: "\n".join(f"{i}. {words.line(step)}" for i, step in enumerate(data.steps, 1)),
        "Quality": lambda: _quality_section(data),
        "Perplexity against dropped layers": lambda: _sweep_section(data.sweep),
        "Accuracy, zero-shot": lambda: _tasks_section(data.tasks),
        "Spans": lambda: _spans_section(data.spans),
        "Candidates": lambda: _candidates_section(data.candidates),
        "Plots": lambda: "\n\n".join(words.picture(name, caption) for name, caption in data.plots.items()),
        "A continuation by the reloaded model": lambda: _sample_section(data),
        "How to load it": lambda: words.fenced(data.usage, "python"),
        "Files": lambda: _files_section(data.files),
        "Time": lambda: _timings_section(data.timings),
    }
    notes = [*data.notes]
    body = []
    for heading, section in sections.items():
        text = ""
        with left_out(f"the section “{heading}” of the report", _kept(notes, noted)):
            text = section()
        if text:
            body.append(f"## {heading}\n\n{text}")
    if notes:
        body.insert(0, "## To be known\n\n" + "\n".join(f"- {words.line(note)}" for note in notes))
    path = Path(directory) / "report.md"
    path.write_text("\n\n".join([f"# {words.line(data.title)}", *body]) + "\n", encoding="utf-8")
    return path


def _kept(notes: list[str], noted: Noted) -> Noted:
    """For notes that go into the report too."""

    def note(sentence: str) -> None:
        notes.append(sentence)
        noted(sentence)

    return note


def _quality_section(data: ReportData) -> str:
    if not data.quality:
        return ""
    named = {row.name: row.quality for row in data.quality}
    dense, dropped = named.get(data.dense or ""), named.get(data.dropped or "")
    columns: dict[str, list[str]] = {
        "model": [row.name for row in data.quality],
        "layers": [str(row.layers) for row in data.quality],
        "perplexity": [number(row.quality.perplexity) for row in data.quality],
        "loss ± s.e. (nats)": [_loss(row.quality) for row in data.quality],
        "top-1 agreement": [percent(row.quality.top1_agreement) for row in data.quality],
        "KL (nats)": ["" if row.quality.kl is None else f"{row.quality.kl:.3f}" for row in data.quality],
        "healed": [_healed(dense, dropped, row, data) for row in data.quality] if dense and dropped else [],
        "parameters": ["" if row.size is None else f"{row.size.parameters / 1e6:,.1f} M" for row in data.quality],
        "size": ["" if row.size is None else f"{row.size.bytes / 1e6:,.0f} MB" for row in data.quality],
        "prefill tok/s": [_speed(row.speed, "prefill_tokens_per_second") for row in data.quality],
        "decode tok/s": [_speed(row.speed, "decode_tokens_per_second") for row in data.quality],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = list(zip(*columns.values(), strict=True))
    notes = []
    if data.quality_text:
        tokens = data.quality[0].quality.tokens
        notes.append(f"Measured on {words.escaped(data.quality_text)}, {tokens:,} predicted tokens.")
    if any(row.quality.kl is not None for row in data.quality):
        notes.append("Top-1 agreement and KL(dense || model) compare with the dense model at every predicted position.")
    if "healed" in columns:
        notes.append(
            f"Healed: the share of the log-perplexity lost from “{words.escaped(data.dense or '')}” to "
            f"“{words.escaped(data.dropped or '')}” that is won back."
        )
    speed = next((row.speed for row in data.quality if row.speed), None)
    if speed:
        notes.append(
            f"Speed: {speed.prompt_tokens} prompt tokens, {speed.new_tokens} new tokens, batch {speed.batch_size}, "
            f"median of {speed.repeats}, the models taking turns."
        )
    return Table(list(columns), rows).markdown() + "\n\n" + " ".join(notes)


def _loss(quality: Quality) -> str:
    error = quality.loss_standard_error
    return f"{quality.loss:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _healed(dense: Quality, dropped: Quality, row: QualityRow, data: ReportData) -> str:
    return "" if row.name in (data.dense, data.dropped) else percent(healed_share(dense, dropped, row.quality))


def _speed(speed: Speed | None, name: str) -> str:
    return "" if speed is None else number(getattr(speed, name))


def _sweep_section(sweep: Mapping[str, Mapping[int, float]]) -> str:
    counts = sorted({n for points in sweep.values() for n in points})
    rows = [[str(n), *(number(points[n]) if n in points else "" for points in sweep.values())] for n in counts]
    return Table(["dropped layers", *sweep], rows, align="r" * (1 + len(sweep))).markdown()


def _tasks_section(tasks: Mapping[str, Mapping[str, Mapping[str, float | int]]]) -> str:
    names = list(dict.fromkeys(task for scores in tasks.values() for task in scores))
    rows = []
    for task in names:
        count = next(int(scores[task]["n"]) for scores in tasks.values() if task in scores)
        rows.append([task, str(count), *(_accuracy(scores.get(task)) for scores in tasks.values())])
    note = "Accuracy, and where lm-eval has one, accuracy by answer length (acc_norm) after the slash."
    table = Table(["task", "questions", *tasks], rows).markdown()
    return f"{table}\n\n{note}" if table else ""


def _accuracy(scores: Mapping[str, float | int] | None) -> str:
    if scores is None:
        return ""
    return " / ".join(percent(scores[name]) for name in ("acc", "acc_norm") if name in scores)


def _spans_section(spans: Sequence[SpanRow]) -> str:
    rows = [(r.span, r.chosen_by, "" if r.score is None else f"{r.score:.4f}", r.patch) for r in spans]
    table = Table(("dropped layers", "chosen by", "score", "patch at the joint"), rows, align="llrl").markdown()
    return f"{table}\n\nSpans are half-open: `13:19` drops the layers 13 to 18 of the dense model." if table else ""


def _candidates_section(candidates: Sequence[CandidateRow]) -> str:
    rows = [
        (r.span, r.fit, f"{r.loss:.4f}", f"{r.cost:,}", "kept" if r.chosen else "")
        for r in sorted(candidates, key=lambda r: r.loss)
    ]
    columns = ("span", "fit", "held-out loss (nats)", "operations per token", "")
    return Table(columns, rows, align="llrrl").markdown()


def _sample_section(data: ReportData) -> str:
    first, *others = [words.line(line) for line in data.sample.splitlines()] or [""]
    quoted = [f"{words.line(data.sample_prompt)} **⟶** {first}".strip(), *others]
    return "\n".join(f"> {line}".rstrip() for line in quoted) if data.sample else ""


def _files_section(files: Mapping[str, str]) -> str:
    rows = [(words.code(name), about) for name, about in files.items()]
    return Table(("file", "what it is"), rows, align="ll").markdown()


def _timings_section(timings: Mapping[str, float]) -> str:
    rows = [(step, f"{seconds:.1f}") for step, seconds in timings.items()]
    if len(rows) > 1:
        rows.append((words.Markdown("**together**"), words.Markdown(f"**{sum(timings.values()):.1f}**")))
    return Table(("step", "seconds"), rows).markdown()
