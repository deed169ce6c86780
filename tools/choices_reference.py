"""The records -> ``docs/reference/choices.md``: scores, fits, ways to heal, places to merge, implementations, families.

``python tools/choices_reference.py`` writes the page, with a Python that has the package. A test compares the page with
what the command makes now.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.merging.scores import PLACE_SCORES
from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.ops.backends import BACKENDS
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "choices.md"
MADE_BY = "<!-- made by tools/choices_reference.py from the records: change those, not this page -->"


def page() -> str:
    """The whole page in Markdown."""
    scores = [(one.name, one.about, one.source) for one in SCORES.values()]
    fits = [(one.name, one.about, one.form, one.source) for one in FITS.values()]
    places = [(one.name, one.about, one.source) for one in PLACE_SCORES.values()]
    sections = [
        f"{MADE_BY}\n\n# What can be named\n\nEach of these is a record.",
        "## Scores\n\n`--score` ranks what can be removed: higher is better to remove. The first and the last layer "
        "always stay. [Add one](../add/score.md).",
        _table(("score", "what it is", "source"), scores),
        "## Fits\n\n`--fit` finds the map at the joint. H is the Hadamard matrix, s [d] a scale, down [d, r] and up "
        "[r, d] a low-rank term, P and M dense matrices. `auto` tries those that do not say otherwise. "
        "[Add one](../add/fit.md).",
        _table(("fit", "how it is found", "the map", "source"), fits),
        "## Ways to heal\n\n`--heal` says what a cut is healed with ([how](../guide/heal.md)).",
        _table(("way", "what it is"), ((one.name, one.about) for one in HEALS.values())),
        "## Places to merge\n\n`--skip-score` ranks the neighbours that `linearpatch merge` may make one: higher is "
        "better to merge.",
        _table(("score", "what it is", "source"), places),
        "## Implementations\n\n`impl=` names one for a call; `linearpatch doctor` says which can run here. "
        "[Add one](../add/backend.md).",
        _table(("name", "what it is"), ((one.name, one.about) for one in BACKENDS.values())),
        "## Families\n\nBy the `model_type` of a model's config. [Add one](../add/family.md). [Most other decoders]"
        "(models.md) can be cut without a record.",
        _table(("model_type", "models"), ((one.name, one.about) for one in STOCK_FAMILIES.values())),
    ]
    return "\n\n".join(sections) + "\n"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(heads), "|".join(["---"] * len(heads))]
    lines += [" | ".join((f"`{name}`", *told)) for name, *told in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
