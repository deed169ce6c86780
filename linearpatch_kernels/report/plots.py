"""The pictures of a report."""

from __future__ import annotations

import contextlib
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.report.tables import number
from linearpatch_kernels.report.words import letters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any colour vision, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
        label="after the patch" + (f" ({letters(fit)})" if fit else ""),
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
        axes.plot(list(points), list(points.values()), color=colour, marker=marker, label=_label(f"held out, {name}"))
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
    lines = textwrap.wrap(letters(model), _TITLE_LETTERS, max_lines=_TITLE_LINES, placeholder=" …")
    return "".join(f"\n{line}" for line in lines)


def _label(text: str) -> str:
    """A text for the legend, which leaves out what begins with an underscore."""
    return f" {letters(text)}" if text.startswith("_") else letters(text)


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
