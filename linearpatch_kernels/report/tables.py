"""Tables: made once, shown on a terminal (`cli.console`) and on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from linearpatch_kernels.report.words import Markdown, escaped


@dataclass(frozen=True)
class Table:
    """Rows of plain text under the names of their columns.

    Attributes:
        title: stands above it on a terminal; a page has its own headings.
        align: a letter per column, l or r; by default the first is a name, on the left, and the rest are figures.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    align: str = ""

    @property
    def sides(self) -> str:
        """On which side the cells of each column stand: ``lrr``."""
        return self.align or "l" + "r" * (len(self.columns) - 1)

    def markdown(self) -> str:
        """The table in Markdown, '' without rows."""
        if not self.rows:
            return ""
        rule = [Markdown("---:" if side == "r" else "---") for side in self.sides]
        lines = ([escaped(cell) for cell in row] for row in (self.columns, rule, *self.rows))
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None) -> str:
    """A perplexity or a rate: 4 significant digits, whole numbers from a thousand, powers of ten from a million.

    None, which is what JSON has for a number that is not finite, is left out.
    """
    if value is None:
        return ""
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1; what is not finite is left out."""
    return "" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"
