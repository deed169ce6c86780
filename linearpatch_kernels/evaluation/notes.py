"""What a result lacks, and why, in a sentence each: what only stands beside a result must never cost the result."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said

Noted = Callable[[str], None]
"""Called with a sentence about something that a result lacks or suffers from."""

_log = logging.getLogger(__name__)


def warn(note: str) -> None:
    """Where a note goes unless somebody asks for it: to Python's warnings."""
    warnings.warn(note, stacklevel=3)


@contextlib.contextmanager
def left_out(what: str, noted: Noted = warn) -> Iterator[None]:
    """What fails inside is left out, and a note says so: a row for comparison, a picture, a report.

    Whatever the failure is: a picture has as many ways to fail as there are names, fonts and figures.

    Args:
        what: subject of the note ``WHAT is left out: WHY``.
    """
    try:
        yield
    except Exception as error:
        _log.debug("%s is left out", what, exc_info=True)
        reason = said(error)
        noted(f"{what} is left out: {reason if isinstance(error, InputError) else f'{type(error).__name__}, {reason}'}")
