"""The scores: which layers to remove, from the statistics of one calibration pass.

Every score is higher where removal should hurt less. Layer 0 and the last layer are never removed (as in the code of
LinearPatch): the first writes the scale that all the others build on, the last one feeds the final norm. A new score is
one record: ``SCORES.add(Score(...))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.records import Registry
from linearpatch_kernels.span import Span

if TYPE_CHECKING:
    from torch import Tensor

    from linearpatch_kernels.calibration import CalibrationStatistics
    from linearpatch_kernels.modeling.patterns import Pattern

# How many spans a score that runs the model runs it on.
_SHORT_LIST = 5
# And one that fits weights again: each of them takes as long as a refit.
_REFITTED = 8


@dataclasses.dataclass(frozen=True)
class Score:
    """One way to rank what can be removed.

    Attributes:
        name: what ``--score`` takes; about: one line of help.
        source: paper and equation, or whose it is.
        function: of the statistics, a tensor that is higher where removal should hurt less: [L+1, L+1], of the span
            between every two depths, of which one is removed; or [L], of every layer, of which the best are.
        runs_the_model: the function only makes a short list; of that, the span with the lowest held-out loss once it is
            healed is removed (:func:`~linearpatch_kernels.pruning.search.plan_pruning`).
        refits: where that fits weights again (:class:`linearpatch_kernels.healing.search.Search`, so `plan_pruning`
            cannot), whether of ``"spans"``, or of ``"layers"``, one after the other.
    """

    name: str
    about: str
    source: str
    function: Callable[[CalibrationStatistics], Tensor]
    runs_the_model: bool = False
    refits: Literal["", "spans", "layers"] = ""


SCORES: Registry[Score] = Registry(
    "score",
    (
        Score(
            "cosine",
            "of the stream at both ends of the span, per token",
            "LinearPatch, arXiv 2505.24680, eq. 3",
            lambda statistics: statistics.mean_token_cosine(),
        ),
        Score(
            "channel-cosine",
            "of the stream at both ends of the span, per channel along the tokens",
            "LinearPatch, the public code",
            lambda statistics: statistics.mean_channel_cosine(),
        ),
        Score(
            "angular",
            "minus the angle between both ends at the last token",
            "arXiv 2403.17887, eq. 7",
            lambda statistics: -statistics.mean_last_token_angle(),
        ),
        Score(
            "bi",
            "single layers, minus their block influence",
            "ShortGPT, arXiv 2403.03853, eq. 1",
            lambda statistics: -statistics.block_influence(),
        ),
        Score(
            "loss",
            f"minus the held-out loss once healed, of the {_SHORT_LIST} best by cosine",
            "ours",
            lambda statistics: statistics.mean_token_cosine(),
            runs_the_model=True,
        ),
        Score(
            "healability",
            f"minus the held-out loss once refitted, of the {_REFITTED} best by cosine",
            "ours",
            lambda statistics: statistics.mean_token_cosine(),
            runs_the_model=True,
            refits="spans",
        ),
        Score(
            "healability-layers",
            "minus the held-out loss once refitted, of one layer at a time, each removed from the model that was "
            "refitted without those before it",
            "the loop is that of Prune&Comp, arXiv 2507.18212; what heals is ours",
            lambda statistics: -statistics.block_influence(),
            runs_the_model=True,
            refits="layers",
        ),
    ),
)


def scores_of_statistics() -> list[str]:
    """The names of the scores that statistics alone can give: all that :func:`choose_spans` takes."""
    return [name for name, score in SCORES.items() if not score.runs_the_model]


def score_spans(
    statistics: CalibrationStatistics, drop: int, score: str, pattern: Pattern | None = None
) -> dict[Span, float]:
    """The score of every contiguous span of ``drop`` layers, highest (best to remove) first; ties: the earlier span.

    Of a score that runs the model, what makes its short list.

    Args:
        pattern: of the kinds of layers; then only spans that leave it as it is.

    Raises:
        InputError: an unknown score or one of single layers, more layers than can go, no span that keeps the pattern.
    """
    check_drop(drop, statistics.num_layers)
    pairs = SCORES.named(score).function(statistics)
    if pairs.dim() != 2:
        raise InputError(f"the score {score} is of single layers, not of spans: give another")
    spans = [Span(start, start + drop) for start in range(1, statistics.num_layers - drop)]
    if pattern is not None:
        spans = pattern.spans(drop)
    return dict(sorted(((span, float(pairs[span.start, span.end])) for span in spans), key=lambda item: -item[1]))


def span_score(statistics: CalibrationStatistics, span: Span, score: str) -> float | None:
    """The score of one span; None where it has none: an unknown score, one of layers or one that runs the model."""
    record = SCORES.get(score)
    values = None if record is None or record.runs_the_model else record.function(statistics)
    return None if values is None or values.dim() != 2 else float(values[span.start, span.end])


def choose_spans(
    statistics: CalibrationStatistics, drop: int, score: str = "cosine", pattern: Pattern | None = None
) -> list[Span]:
    """The spans whose removal the score prefers, ``drop`` layers together, in the order of the model.

    A score of spans gives one; a score of layers the ``drop`` best of them, neighbours joined to one span.

    Args:
        pattern: of the kinds of layers, which must be left as it is.

    Raises:
        InputError: an unknown score or one that runs the model, more layers than can go, none that keep the pattern.
    """
    record = SCORES.named(score, among=scores_of_statistics())
    check_drop(drop, statistics.num_layers)
    values = record.function(statistics)
    if values.dim() == 2:
        return [next(iter(score_spans(statistics, drop, score, pattern)))]
    best = values[1:-1].argsort(descending=True, stable=True)[:drop]
    chosen = spans_of_layers((best + 1).sort().values.tolist())
    if pattern is not None:
        pattern.check_kept(chosen)
    return chosen


def likely_spans(statistics: CalibrationStatistics, drop: int, score: str) -> list[Span]:
    """As `choose_spans`, and of a score that runs the model the first of its short list."""
    if SCORES.named(score).runs_the_model:
        return short_list(statistics, drop, score)[:1]
    return choose_spans(statistics, drop, score)


def short_list(statistics: CalibrationStatistics, drop: int, score: str, pattern: Pattern | None = None) -> list[Span]:
    """The best spans of a score, for the model itself to judge: running all of them would cost a pass each."""
    return list(score_spans(statistics, drop, score, pattern))[: _REFITTED if SCORES[score].refits else _SHORT_LIST]


def spans_of_layers(layers: list[int]) -> list[Span]:
    """``[3, 4, 7]`` -> ``[Span(3, 5), Span(7, 8)]``; the layers must be sorted and different."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1].end == layer:
            spans[-1] = Span(spans[-1].start, layer + 1)
        else:
            spans.append(Span(layer, layer + 1))
    return spans


def check_drop(drop: int | None, layers: int) -> None:
    """InputError unless ``drop`` layers of ``layers`` can go with the first and the last one staying."""
    if drop is None or not 1 <= drop <= layers - 2:
        raise InputError(
            f"{drop} of {layers} layers cannot be dropped: the first and the last stay, so give a number from 1 to "
            f"{layers - 2}"
        )
