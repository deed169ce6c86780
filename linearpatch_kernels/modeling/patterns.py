"""The kinds of a model's layers, and whether they repeat: many engines compute them from a period."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder, family_of
from linearpatch_kernels.modeling.layer_configs import per_layer_entries
from linearpatch_kernels.span import Span


@dataclass(frozen=True)
class Pattern:
    """What each layer is, by the lists of the config that have an entry for every layer, or name some of them.

    Attributes:
        kinds: in the order of the layers.
    """

    kinds: tuple[str, ...]

    @property
    def period(self) -> int | None:
        """The least number of layers that repeat from layer 0 to the last, which may stand in the midst of them; None
        where there are not two rounds of any."""
        periods = range(1, len(self.kinds) // 2 + 1)
        return next((period for period in periods if self._repeats(self.kinds, period)), None)

    def kept_without(self, removed: Iterable[int]) -> bool:
        """Whether the layers that stay repeat as these do, from layer 0 on."""
        gone, period = set(removed), self.period
        stay = [kind for layer, kind in enumerate(self.kinds) if layer not in gone]
        return period is not None and self._repeats(stay, period)

    def spans(self, length: int) -> list[Span]:
        """Those of so many layers, without the first and the last one, that can go and leave the pattern as it is.

        Raises:
            InputError: there are none.
        """
        found = self._spans(length)
        if not found:
            lengths = ", ".join(map(str, self.lengths))
            instead = f"so many can go: {lengths}; or" if lengths else "no number of layers can go like this:"
            raise InputError(
                f"without any {length} layers in a row do the kinds of layers stay {self}: {instead} leave "
                "`keep_pattern` out"
            )
        return found

    @property
    def lengths(self) -> list[int]:
        """How many layers in a row can go and leave the pattern as it is, the first and the last one staying."""
        return [length for length in range(1, len(self.kinds) - 1) if self._spans(length)]

    def _spans(self, length: int) -> list[Span]:
        among = (Span(start, start + length) for start in range(1, len(self.kinds) - length))
        return [span for span in among if self.kept_without(range(*span))]

    def check_kept(self, removed: Iterable[Span]) -> None:
        """InputError where the layers that stay do not repeat as these do."""
        spans = sorted(removed)
        if not self.kept_without(layer for span in spans for layer in range(*span)):
            raise InputError(
                f"without the layers {', '.join(map(str, spans))} the kinds of layers do not stay {self}: give other "
                "spans, or leave `keep_pattern` out"
            )

    def _repeats(self, kinds: Sequence[str], period: int) -> bool:
        return all(kind == self.kinds[layer % period] for layer, kind in enumerate(kinds))

    def __str__(self) -> str:
        """For a person: ``5 x sliding_attention, full_attention, repeated``."""
        period = self.period
        told = [(kind, len([*those])) for kind, those in groupby(self.kinds[:period])]
        words = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in told)
        if period == 1:
            return f"all {self.kinds[0]}"
        return f"{words}, repeated" if period else words


IRREGULAR = "irregular: engines that compute the kinds of layers from a period will run it wrongly or refuse it"


def pattern_of(model: nn.Module) -> Pattern:
    """Of a model's layers."""
    return pattern_in(decoder(model).config, family_of(model).per_layer)


def pattern_in(config: Any, named: Sequence[str] | None = None) -> Pattern:
    """Of the layers that a config describes.

    Args:
        named: the lists with an entry per layer; None: those that look like it.
    """
    entries = per_layer_entries(config, named)
    kinds = zip(*entries.values(), strict=True) if entries else [("alike",)] * config.num_hidden_layers
    return Pattern(tuple(", ".join(map(str, kind)) for kind in kinds))
