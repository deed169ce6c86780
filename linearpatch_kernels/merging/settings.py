"""What decides how layers are merged: values alone, so that asking for them costs no import of torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.merging.scores import PLACE_SCORES, PlaceScore

EXACT = "exact"
"""Every KV group brings its own query heads and every unit its layer's norm gain, folded into its projections."""

AUTHORS = "authors"
"""As the public code of CoMe: the mask of the KV groups is tiled over the query heads, norm gains are averaged."""

RULES = (EXACT, AUTHORS)


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """How to merge down to ``layers`` layers.

    Attributes:
        rule: ``"exact"`` or ``"authors"`` (`RULES`).
        skip_score: a name of :data:`~linearpatch_kernels.merging.scores.PLACE_SCORES`.
        posterior: CoMe-P: the share with the lowest held-out loss, not that of the layers' influence. Of more than two
            layers the first and the last give units, those between them none.
        repeat: whether a merged layer may be merged again.
        width: layers that become one at a time (the last merge may take fewer); None: all in one merge.
        power, floor: of the influence's shares, see :func:`influence_shares`.
        grid: CoMe-P tries shares that are multiples of 1 / grid.
        least_share: CoMe-P: no layer gives less. 0 lets a merge be a plain removal.
    """

    layers: int
    rule: str = EXACT
    skip_score: str = "angular"
    posterior: bool = False
    repeat: bool = True
    width: int | None = 2
    power: float = 1.0
    floor: float = 0.0
    grid: int = 20
    least_share: float = 0.0

    @property
    def runs_the_model(self) -> bool:
        """Whether held-out windows are needed."""
        return self.posterior or self.place_score.candidate is not None

    @property
    def place_score(self) -> PlaceScore:
        """The record of the skip score; InputError for an unknown one."""
        return PLACE_SCORES.named(self.skip_score)

    @property
    def refits(self) -> bool:
        """Whether candidates are refitted before their loss is measured."""
        return self.place_score.candidate == "refitted"


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "authors": {"rule": AUTHORS},
    "come": {},
    "come-p": {"posterior": True},
    "come-loss": {"posterior": True, "skip_score": "loss"},
    "come-block": {"posterior": True, "skip_score": "refit", "width": None},
}
"""Name -> the settings it stands for: the public code's, ours, ours with searched shares, with searched places, and one
merge of neighbours, chosen with the refit in mind. (The paper's posterior variant ranks places by the angle at all
tokens; ``come-p`` by that at the last one, like the others.)"""


def check_settings(settings: MergeSettings, layers: int) -> None:
    """InputError for settings that make no sense, or not for a model of so many layers."""
    if not 1 <= settings.layers < layers:
        raise InputError(f"a model of {layers} layers cannot be merged to {settings.layers}: give 1 to {layers - 1}")
    if settings.rule not in RULES:
        raise InputError(f"no rule of merging is called {settings.rule!r}: choose one of {', '.join(RULES)}")
    PLACE_SCORES.named(settings.skip_score)
    if not math.isfinite(settings.power):
        raise InputError(f"a power of {settings.power} gives no shares: give a finite number")
    if settings.width is not None and settings.width < 2:
        raise InputError(f"{settings.width} layers are nothing to merge: give a merge width of at least 2")
    if settings.grid < 1 or not 0 <= settings.least_share <= 0.5 or not 0 <= settings.floor <= 1:
        raise InputError("give a grid of at least 1, a least share from 0 to 0.5, and a floor from 0 to 1")
