"""The ways to heal a cut, by name."""

from __future__ import annotations

import dataclasses

from linearpatch_kernels.records import Registry

AUTO = "auto"
BEHIND = 3
"""Layers behind a joint, or behind a patched merged layer, that a refit fits again where no other number is named."""

MERGE_FIT = "shrunk-least-squares"
"""The fit of a patch behind a merged layer where none is named."""


@dataclasses.dataclass(frozen=True)
class Heal:
    """A way to heal.

    Attributes:
        name: what ``heal`` takes; about: one line of help.
        patched: whether the plan's patches stand at the joints; refitted: whether the weights around them are fitted.
    """

    name: str
    about: str
    patched: bool
    refitted: bool

    @property
    def stock(self) -> bool:
        """Whether the result has the dense model's architecture and nothing else."""
        return not self.patched


HEALS: Registry[Heal] = Registry(
    "way to heal",
    (
        Heal("none", "plain removal", patched=False, refitted=False),
        Heal("patch", "the fit's map at every joint", patched=True, refitted=False),
        Heal("refit", "new weights around every joint; a stock model", patched=False, refitted=True),
        Heal("patch+refit", "the map, and new weights behind it", patched=True, refitted=True),
    ),
)
"""The ways; ``auto`` compares them all."""
