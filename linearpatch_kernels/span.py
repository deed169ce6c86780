"""Which layers of a dense model something is about."""

from __future__ import annotations

import re
from typing import NamedTuple

from linearpatch_kernels.errors import InputError

MOST_LAYERS = 10_000
"""More than any model has: a number that a file or a slip of the finger says must not fill the memory."""


class Span(NamedTuple):
    """The layers [start, end) of the dense model: half-open, counted from 0, written ``13:19``."""

    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    @property
    def length(self) -> int:
        return self.end - self.start

    @classmethod
    def parse(cls, text: str) -> Span:
        """``"13:19"`` -> ``Span(13, 19)``; InputError for anything that is not START:END with START < END."""
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", text)
        if match is None:
            raise InputError(
                f"{text!r} is not a span: write START:END, half-open, for example 13:19 for layers 13 to 18"
            )
        span = cls(int(match[1]), int(match[2]))
        if span.length < 1:
            raise InputError(f"the span {span} is empty or reversed: write START:END with START < END (half-open)")
        return span
