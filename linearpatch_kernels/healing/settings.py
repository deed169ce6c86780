"""How much a refit fits again, and how far."""

from __future__ import annotations

import dataclasses

import torch

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.healing.ways import BEHIND


@dataclasses.dataclass(frozen=True)
class RefitSettings:
    """How much is fitted again, and how far.

    Attributes:
        behind: layers behind a joint.
        shrinkage: the part of a change that is kept: the rest is what the change would do wrong on other text.
        ridges: those tried, each relative to an input's own second moment.
        precision: of the products that the moments are sums of: float32, or the slower float64.
        neurons: how many of the removed layers' are weighed beside those of the layer in front of a joint, for its
            feed-forward; 0: that keeps its own.
        final_norm: whether the final norm gets another scale, too.
        on_all: whether a change is fitted on the held-out windows, too, once they have chosen its ridge: more text,
            where nothing else is judged on them.
    """

    behind: int = BEHIND
    # docs/results/healing.md: on text like the calibration's as good as three quarters, on text of another kind better.
    shrinkage: float = 0.6
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    precision: torch.dtype = torch.float32
    neurons: int = 4096
    final_norm: bool = True
    on_all: bool = False

    def __post_init__(self) -> None:
        if min(self.behind, self.neurons) < 0 or not 0 <= self.shrinkage <= 1:
            raise InputError(
                f"behind={self.behind}, neurons={self.neurons}, shrinkage={self.shrinkage}: give a number of layers "
                "and one of neurons, from 0 on, and a part from 0 to 1"
            )
        if not self.ridges or not all(ridge > 0 for ridge in self.ridges):
            raise InputError(f"ridges={self.ridges}: give at least one, each above 0")
