"""The scores of places: where to merge, from the scores of layers or the losses of candidates.

As in :mod:`~linearpatch_kernels.pruning.scores`, a score is higher where less is lost. A new score is one record:
``PLACE_SCORES.add(PlaceScore(...))``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from linearpatch_kernels.records import Registry
from linearpatch_kernels.span import Span

if TYPE_CHECKING:
    from linearpatch_kernels.merging.sensitivity import LayerScores

Candidate = Literal["removed", "merged", "refitted"]


@dataclasses.dataclass(frozen=True)
class PlaceScore:
    """One way to rank the spans that may be merged next.

    Attributes:
        name: what ``--skip-score`` takes; about: one line of help.
        source: paper and section, or whose it is.
        function: of the layers' scores, per span a number that is higher where less is lost.
        candidate: where given, the function only makes a short list, and the score is minus the held-out loss of the
            model with the span ``removed``, ``merged``, or merged and its layer ``refitted``.
    """

    name: str
    about: str
    source: str
    function: Callable[[LayerScores], Mapping[Span, float]]
    candidate: Candidate | None = None


def _minus_influence(scores: LayerScores) -> Mapping[Span, float]:
    return {span: -value for span, value in scores.span_influence.items()}


PLACE_SCORES: Registry[PlaceScore] = Registry(
    "skip score",
    (
        PlaceScore(
            "angular",
            "minus the angle between both ends of the layers at the last token",
            "CoMe, arXiv 2510.15304, the public code (where it is called bi)",
            lambda scores: {span: -value for span, value in scores.last_token_angle.items()},
        ),
        PlaceScore(
            "bi", "minus the block influence of the layers", "ShortGPT, arXiv 2403.03853, eq. 1", _minus_influence
        ),
        PlaceScore("sleb", "minus the held-out loss without the layers", "SLEB", _minus_influence, "removed"),
        PlaceScore("loss", "minus the held-out loss after the merge", "ours", _minus_influence, "merged"),
        PlaceScore(
            "refit",
            "minus the held-out loss after the merge and the refit of its layer",
            "ours",
            _minus_influence,
            "refitted",
        ),
    ),
)
"""What chooses where to merge; the highest wins."""
