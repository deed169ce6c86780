"""What a run leaves for people: a Markdown report and the plots in it.

Names of models, files, fits and tasks, prompts and what a model writes are somebody else's words: letters, never
markup. Every string of `ReportData` is plain text; this module alone writes Markdown, and it tells matplotlib that a $
is a dollar sign.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import tempfile
import textwrap
import unicodedata
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, healed_share
from linearpatch_kernels.evaluation.latency import ModelSize, Speed
from linearpatch_kernels.evaluation.notes import Noted, left_out, warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
        "What was done": lambda: "\n".join(f"{i}. {_line(step)}" for i, step in enumerate(data.steps, 1)),
        "Quality": lambda: _quality_section(data),
        "Perplexity against dropped layers": lambda: _sweep_section(data.sweep),
        "Accuracy, zero-shot": lambda: _tasks_section(data.tasks),
        "Spans": lambda: _spans_section(data.spans),
        "Candidates": lambda: _candidates_section(data.candidates),
        "Plots": lambda: "\n\n".join(_picture(name, caption) for name, caption in data.plots.items()),
        "A continuation by the reloaded model": lambda: _sample_section(data),
        "How to load it": lambda: _fenced(data.usage, "python"),
        "Files": lambda: _table(("file", "what it is"), [(_code(k), v) for k, v in data.files.items()]),
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
        body.insert(0, "## To be known\n\n" + "\n".join(f"- {_line(note)}" for note in notes))
    path = Path(directory) / "report.md"
    path.write_text("\n\n".join([f"# {_line(data.title)}", *body]) + "\n", encoding="utf-8")
    return path


def _kept(notes: list[str], noted: Noted) -> Noted:
    """For notes that go into the report too."""

    def note(sentence: str) -> None:
        notes.append(sentence)
        noted(sentence)

    return note


class _Markdown(str):
    """Text that is Markdown already."""


# What GitHub's Markdown, its mathematics or HTML would read as more than letters, wherever it stands in a line: the
# bracket that would end the text of a link, and the colon or dot of an address, among others.
_MARKUP = re.compile(r"[\\`*_<>|~$&]|\](?=[(\[:])|:(?=//)|(?<=www)\.")
# At the start of a line: headings, lists, tasks, rules.
_STARTS = re.compile(r"^([-+#=]|\[(?=[ xX]\])|\d{1,9}(?=[.)](\s|$)))")


def _letters(text: str) -> str:
    """One line of text as it can be written down: no line ends, control characters or halves of letters.

    (A file name may hold anything; what is not UTF-8 in it comes as lone surrogates.)
    """
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in whole).split())


def _escaped(text: str) -> str:
    """Plain text, in Markdown."""
    return text if isinstance(text, _Markdown) else _MARKUP.sub(r"\\\g<0>", _letters(text))


def _line(text: str) -> str:
    """Plain text that a line of Markdown, or what follows its list marker, begins with."""
    return _STARTS.sub(lambda found: found[0] + "\\" if found[0].isdigit() else "\\" + found[0], _escaped(text))


def _code(text: str) -> str:
    """A file's name, as code where it can be told as code within a table."""
    name = _letters(text)
    return name if any(c in name for c in "`|\\") else _Markdown(f"`{name}`")


def _fenced(text: str, language: str) -> str:
    """A block of code, '' for none, in a fence that nothing in it closes."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    whole = text.encode("utf-8", "replace").decode("utf-8").strip()
    return f"{fence}{language}\n{whole}\n{fence}" if whole else ""


def _picture(name: str, caption: str) -> str:
    alternative = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", _escaped(caption))
    return f"![{alternative}]({urllib.parse.quote(name)})\n\n*{_escaped(caption)}*"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A Markdown table, '' without rows; ``align``: one character per column, r for right."""
    if not rows:
        return ""
    rule = [_Markdown("---:" if align[i : i + 1] == "r" else "---") for i in range(len(header))]
    escaped = ([_escaped(cell) for cell in row] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


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
        "top-1 agreement": [_percent(row.quality.top1_agreement) for row in data.quality],
        "KL (nats)": ["" if row.quality.kl is None else f"{row.quality.kl:.3f}" for row in data.quality],
        "healed": [_healed(dense, dropped, row, data) for row in data.quality] if dense and dropped else [],
        "parameters": ["" if row.size is None else f"{row.size.parameters / 1e6:,.1f} M" for row in data.quality],
        "size": ["" if row.size is None else f"{row.size.bytes / 1e6:,.0f} MB" for row in data.quality],
        "prefill tok/s": [_speed(row.speed, "prefill_tokens_per_second") for row in data.quality],
        "decode tok/s": [_speed(row.speed, "decode_tokens_per_second") for row in data.quality],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    rows = list(zip(*columns.values(), strict=True))
    notes = [f"Measured on {_escaped(data.quality_text)}, {data.quality[0].quality.tokens:,} predicted tokens."] * bool(
        data.quality_text
    )
    if any(row.quality.kl is not None for row in data.quality):
        notes.append("Top-1 agreement and KL(dense || model) compare with the dense model at every predicted position.")
    if "healed" in columns:
        notes.append(
            f"Healed: the share of the log-perplexity lost from “{_escaped(data.dense or '')}” to "
            f"“{_escaped(data.dropped or '')}” that is won back."
        )
    speed = next((row.speed for row in data.quality if row.speed), None)
    if speed:
        notes.append(
            f"Speed: {speed.prompt_tokens} prompt tokens, {speed.new_tokens} new tokens, batch {speed.batch_size}, "
            f"median of {speed.repeats}, the models taking turns."
        )
    return _table(list(columns), rows, "l" + "r" * (len(columns) - 1)) + "\n\n" + " ".join(notes)


def number(value: float) -> str:
    """A perplexity or a rate: 4 significant digits, whole numbers from a thousand, powers of ten from a million."""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _loss(quality: Quality) -> str:
    error = quality.loss_standard_error
    return f"{quality.loss:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _percent(share: float | None) -> str:
    return "" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _healed(dense: Quality, dropped: Quality, row: QualityRow, data: ReportData) -> str:
    return "" if row.name in (data.dense, data.dropped) else _percent(healed_share(dense, dropped, row.quality))


def _speed(speed: Speed | None, name: str) -> str:
    return "" if speed is None else number(getattr(speed, name))


def _sweep_section(sweep: Mapping[str, Mapping[int, float]]) -> str:
    counts = sorted({n for points in sweep.values() for n in points})
    rows = [[str(n), *(number(points[n]) if n in points else "" for points in sweep.values())] for n in counts]
    return _table(["dropped layers", *sweep], rows, "r" * (1 + len(sweep)))


def _tasks_section(tasks: Mapping[str, Mapping[str, Mapping[str, float | int]]]) -> str:
    names = list(dict.fromkeys(task for scores in tasks.values() for task in scores))
    rows = []
    for task in names:
        count = next(int(scores[task]["n"]) for scores in tasks.values() if task in scores)
        rows.append([task, str(count), *(_accuracy(scores.get(task)) for scores in tasks.values())])
    note = "Accuracy, and where lm-eval has one, accuracy by answer length (acc_norm) after the slash."
    table = _table(["task", "questions", *tasks], rows, "l" + "r" * (1 + len(tasks)))
    return f"{table}\n\n{note}" if table else ""


def _accuracy(scores: Mapping[str, float | int] | None) -> str:
    if scores is None:
        return ""
    return " / ".join(_percent(scores[name]) for name in ("acc", "acc_norm") if name in scores)


def _spans_section(spans: Sequence[SpanRow]) -> str:
    rows = [(r.span, r.chosen_by, "" if r.score is None else f"{r.score:.4f}", r.patch) for r in spans]
    table = _table(("dropped layers", "chosen by", "score", "patch at the joint"), rows, "llrl")
    return f"{table}\n\nSpans are half-open: `13:19` drops the layers 13 to 18 of the dense model." if table else ""


def _candidates_section(candidates: Sequence[CandidateRow]) -> str:
    rows = [
        (r.span, r.fit, f"{r.loss:.4f}", f"{r.cost:,}", "kept" if r.chosen else "")
        for r in sorted(candidates, key=lambda r: r.loss)
    ]
    return _table(("span", "fit", "held-out loss (nats)", "operations per token", ""), rows, "llrrl")


def _sample_section(data: ReportData) -> str:
    first, *others = [_line(line) for line in data.sample.splitlines()] or [""]
    quoted = [f"{_line(data.sample_prompt)} **⟶** {first}".strip(), *others]
    return "\n".join(f"> {line}".rstrip() for line in quoted) if data.sample else ""


def _timings_section(timings: Mapping[str, float]) -> str:
    rows = [(step, f"{seconds:.1f}") for step, seconds in timings.items()]
    if len(rows) > 1:
        rows.append((_Markdown("**together**"), _Markdown(f"**{sum(timings.values()):.1f}**")))
    return _table(("step", "seconds"), rows, "lr")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr from matplotlib: that it has no directory of its own, that a letter is missing from a font.

    Without a directory it works in a temporary one. Nor does it hand texts to LaTeX, whatever a person's settings say.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import matplotlib

            with matplotlib.rc_context({"text.usetex": False}):
                yield
    finally:
        logger.setLevel(level)


@_quiet()
def plot_depth_cosine(path: str | Path, cosine: Tensor, spans: Sequence[tuple[int, int]] = (), model: str = "") -> None:
    """Heatmap of the cosine between the residual streams at every two depths, the chosen spans marked.

    Args:
        path: where the PNG goes.
        cosine: ``[L+1, L+1]``; depth i is the stream that enters layer i, depth L the one that leaves the last layer.
        spans: half-open layer spans ``(start, end)``; each is drawn as the block start..end on the diagonal, whose
            corner is the cosine that the joint has to bridge.
        model: a name for the title.

    Raises:
        InputError: not a square matrix, or a span that is not in it.
    """
    from matplotlib.patheffects import withStroke

    depths = cosine.shape[0]
    if cosine.dim() != 2 or cosine.shape[1] != depths or depths < 2:
        raise InputError(f"a depth x depth matrix is needed, not {[*cosine.shape]}")
    if any(not 0 <= start < end < depths for start, end in spans):
        raise InputError(f"spans {list(spans)} do not lie within 0:{depths - 1}")
    figure, axes = _figure(6.4, 5.4)
    values = cosine.detach().double().cpu().numpy()
    image = axes.imshow(values, origin="lower", cmap="viridis", vmin=max(-1.0, float(values.min())), vmax=1.0)
    figure.colorbar(image, ax=axes, label="cosine similarity", fraction=0.046, pad=0.03)
    halo = [withStroke(linewidth=5, foreground="white")]
    for start, end in spans:
        label = f"drop {start}:{end}, cosine {values[start, end]:.3f}"
        corners = [start, start, end, end, start], [start, end, end, start, start]
        axes.plot(*corners, color="black", linewidth=2, path_effects=halo, label=label)
        axes.plot([end], [start], marker="o", color="white", markeredgecolor="black", markeredgewidth=2, markersize=7)
    if spans:
        # The matrix is symmetric: nothing is lost under a legend above the diagonal.
        axes.legend(loc="upper left", fontsize=10, handlelength=0, handletextpad=0, framealpha=0.9)
    axes.set_xlabel("depth (layer that the stream enters)")
    axes.set_ylabel("depth (layer that the stream enters)")
    axes.set_title("Similarity of the residual stream between depths" + _of(model))
    _save(figure, path)


@_quiet()
def plot_joint_magnitudes(
    path: str | Path, before: Tensor, after: Tensor, target: Tensor, span: tuple[int, int], fit: str = ""
) -> None:
    """Mean absolute value of every channel at a joint: without a patch, with it, and what layer ``end`` expects.

    Args:
        path: where the PNG goes.
        before, after, target: mean over tokens of |x_start|, |x_start P|, |x_end|, each ``[d]``.
        span: the dropped layers ``(start, end)``.
        fit: the patch's name for the legend.

    Raises:
        InputError: vectors of different lengths.
    """
    if not before.shape == after.shape == target.shape or before.dim() != 1:
        raise InputError(f"three vectors [d] are needed, not {[*before.shape]}, {[*after.shape]}, {[*target.shape]}")
    order = target.argsort(descending=True)
    rank = range(1, len(order) + 1)
    figure, axes = _figure(7.2, 4.2)
    style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "alpha": 0.65, "zorder": 3}
    axes.plot(rank, _array(before[order]), color=_COLOURS[1], label="before the patch", **style)
    axes.plot(
        rank,
        _array(after[order]),
        color=_COLOURS[0],
        label="after the patch" + (f" ({_letters(fit)})" if fit else ""),
        **style,
    )
    axes.plot(rank, _array(target[order]), color="black", linewidth=1.5, label=f"target: what layer {span[1]} expects")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel("channel, ranked by the target's magnitude")
    axes.set_ylabel("mean |activation|")
    axes.set_title(f"Channel magnitudes at joint {span[0]}:{span[1]}")
    axes.legend()
    _save(figure, path)


@_quiet()
def plot_sweep(
    path: str | Path, perplexity: Mapping[str, Mapping[int, float]], dense: float | None = None, model: str = ""
) -> None:
    """Perplexity against the number of dropped layers, one line per fit, the dense model as a horizontal line.

    Args:
        path: where the PNG goes.
        perplexity: fit -> number of dropped layers -> perplexity (what is not finite is left out of its line).
        dense: the dense model's perplexity.
        model: a name for the title.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure, axes = _figure(7.2, 4.6)
    for i, (fit, points) in enumerate(perplexity.items()):
        finite = {n: p for n, p in sorted(points.items()) if p < math.inf}
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(list(finite), list(finite.values()), label=_label(fit), color=colour, marker=marker, markersize=5)
    if dense is not None:
        axes.axhline(dense, color="0.35", linestyle="--", linewidth=1.5, label=f"dense ({number(dense)})")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    within_a_factor = {4: MaxNLocator(6), 2000: LogLocator(subs=(1.0, 2.0, 5.0), numticks=12)}
    locators = (locator for limit, locator in within_a_factor.items() if high / low < limit)
    axes.yaxis.set_major_locator(next(locators, LogLocator()))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(visible=True, axis="y", color="0.9")
    axes.set_xlabel("dropped layers n")
    axes.set_ylabel("perplexity (log scale)")
    axes.set_title("Quality against depth" + _of(model))
    axes.legend()
    _save(figure, path)


@_quiet()
def plot_training(
    path: str | Path,
    losses: Sequence[float],
    heldout: Mapping[str, Mapping[int, float]],
    best_step: int,
    model: str = "",
) -> None:
    """The training loss of every step, and what the held-out windows say now and then.

    Args:
        path: where the PNG goes.
        losses: of step 1, 2, ...
        heldout: name of a loss -> steps made -> its held-out mean, nats per token.
        best_step: marked.
        model: a name for the title.
    """
    figure, axes = _figure(7.2, 4.4)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="training, each step on other text", zorder=1)
    for i, (name, points) in enumerate(heldout.items()):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=f"held out, {name}")
    axes.axvline(best_step, color="black", linestyle=":", linewidth=1.5, label=f"best: step {best_step}")
    axes.set_xlabel("step")
    axes.set_ylabel("KL to the teacher (nats per token)")
    axes.set_title("Distillation" + _of(model))
    axes.legend()
    _save(figure, path)


# Letters of the title's size that fit above a picture, and lines of them that leave room for it.
_TITLE_LETTERS, _TITLE_LINES = 60, 3


def _of(model: str) -> str:
    """The model's name below a title."""
    lines = textwrap.wrap(_letters(model), _TITLE_LETTERS, max_lines=_TITLE_LINES, placeholder=" …")
    return "".join(f"\n{line}" for line in lines)


def _label(text: str) -> str:
    """A text for the legend, which leaves out what begins with an underscore."""
    return f" {_letters(text)}" if text.startswith("_") else _letters(text)


def _array(values: Tensor) -> Any:
    return values.detach().to("cpu", torch.float64).numpy()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure objects instead of pyplot: no global state, no display, safe beside a caller's own plots.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(visible=False)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    axes = figure.axes[0]
    axes.title.set_fontsize(13)
    axes.xaxis.label.set_fontsize(11)
    axes.yaxis.label.set_fontsize(11)
    legend = axes.get_legend()
    # A $ in a name is a dollar sign. (The ticks' numbers are ours, and may be powers of ten.)
    for text in (axes.title, *(legend.get_texts() if legend is not None else ())):
        text.set_parse_math(False)
    figure.savefig(path, format="png")
