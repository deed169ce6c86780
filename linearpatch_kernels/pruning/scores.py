"""Which layers to remove: scores over the statistics of one calibration pass.

Every score is higher where removal should hurt less. Layer 0 and the last layer are never removed (as in the code of
LinearPatch): the first writes the scale that all the others build on, the last one feeds the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from linearpatch_kernels.calibration import CalibrationStatistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.span import Span


def _cosine(statistics: CalibrationStatistics) -> Tensor:
    """Mean over the tokens of cos(x_start, x_end): the text of LinearPatch (arXiv 2505.24680, eq. 3)."""
    return statistics.mean_token_cosine()


def _channel_cosine(statistics: CalibrationStatistics) -> Tensor:
    """Mean over windows and channels of the cosine along the tokens: what LinearPatch's public code computes."""
    return statistics.mean_channel_cosine()


def _angular(statistics: CalibrationStatistics) -> Tensor:
    """Minus the angular distance of the last token, arccos(cos)/pi (arXiv 2403.17887, eq. 7)."""
    return -statistics.mean_last_token_angle()


PAIR_SCORES: Mapping[str, Callable[[CalibrationStatistics], Tensor]] = {
    "cosine": _cosine,
    "channel-cosine": _channel_cosine,
    "angular": _angular,
}
"""Scores of one contiguous span, from a [L+1, L+1] matrix over pairs of depths."""

SCORES = (*PAIR_SCORES, "bi")
"""The scores that statistics alone can give: all names that :func:`choose_spans` takes. ``bi`` removes the single
layers of the lowest block influence (ShortGPT)."""

LOSS = "loss"
"""The score that runs the model: held-out loss of healed candidates (:func:`~.pruning.plan_pruning`)."""


def score_spans(statistics: CalibrationStatistics, drop: int, score: str) -> dict[Span, float]:
    """The score of every contiguous span of ``drop`` layers, highest (best to remove) first; ties: the earlier span.

    Raises:
        InputError: an unknown score, or more layers than can go.
    """
    if score not in PAIR_SCORES:
        raise InputError(f"no score of contiguous spans is called {score!r}: choose one of {', '.join(PAIR_SCORES)}")
    check_drop(drop, statistics.num_layers)
    pairs = PAIR_SCORES[score](statistics)
    spans = [Span(start, start + drop) for start in range(1, statistics.num_layers - drop)]
    return dict(sorted(((span, float(pairs[span.start, span.end])) for span in spans), key=lambda item: -item[1]))


def choose_spans(statistics: CalibrationStatistics, drop: int, score: str = "cosine") -> list[Span]:
    """The spans whose removal the score prefers, ``drop`` layers together, in the order of the model.

    ``cosine``, ``channel-cosine`` and ``angular`` give one contiguous span. ``bi`` gives the ``drop`` layers of the
    lowest block influence (ShortGPT, arXiv 2403.03853), neighbours joined to one span.

    Raises:
        InputError: an unknown score, or more layers than can go.
    """
    check_score(score, SCORES)
    if score != "bi":
        return [next(iter(score_spans(statistics, drop, score)))]
    check_drop(drop, statistics.num_layers)
    removable = statistics.block_influence()[1:-1]
    layers = (torch.argsort(removable, stable=True)[:drop] + 1).sort().values.tolist()
    return spans_of_layers(layers)


def spans_of_layers(layers: list[int]) -> list[Span]:
    """``[3, 4, 7]`` -> ``[Span(3, 5), Span(7, 8)]``; the layers must be sorted and different."""
    spans: list[Span] = []
    for layer in layers:
        if spans and spans[-1].end == layer:
            spans[-1] = Span(spans[-1].start, layer + 1)
        else:
            spans.append(Span(layer, layer + 1))
    return spans


def check_score(score: str, known: Sequence[str]) -> None:
    """InputError for a score that is not among the known ones."""
    if score not in known:
        raise InputError(f"no score is called {score!r}: choose one of {', '.join(known)}")


def check_drop(drop: int | None, layers: int) -> None:
    """InputError unless ``drop`` layers of ``layers`` can go with the first and the last one staying."""
    if drop is None or not 1 <= drop <= layers - 2:
        raise InputError(
            f"{drop} of {layers} layers cannot be dropped: the first and the last stay, so give a number from 1 to "
            f"{layers - 2}"
        )
