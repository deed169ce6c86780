"""What a recipe tells while it runs, and whom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from linearpatch_kernels.evaluation.notes import warn


class Reporter(Protocol):
    """Whom a recipe tells what it does."""

    def progress(self, description: str, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` (0: not known) of what is being done."""

    def finish(self) -> None:
        """What was in progress has ended."""

    def note(self, note: str) -> None:
        """What the result lacks or suffers from."""

    def mention(self, line: str) -> None:
        """What is good to know and changes nothing: that an earlier run is gone on from."""


class Quiet:
    """The reporter of a recipe that is given none: notes become Python warnings, nothing else is shown."""

    def progress(self, description: str, done: int, total: int, detail: str = "") -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, note: str) -> None:
        warn(note)

    def mention(self, line: str) -> None:
        pass


class _Silent(Quiet):
    def note(self, note: str) -> None:
        pass


class Log:
    """One run of a recipe: its notes, and the seconds of its stages.

    Args:
        reporter: None: `Quiet`.

    Attributes:
        notes: what the result lacks or suffers from, each once.
        seconds: stage -> seconds.
    """

    def __init__(self, reporter: Reporter | None = None) -> None:
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self._reporter: Reporter = reporter or Quiet()

    def silence(self) -> None:
        """Tell nobody from now on: of several processes one talks."""
        self._reporter = _Silent()

    def note(self, note: str) -> None:
        """Tell what the result lacks or suffers from, once, and keep it for the report."""
        if note not in self.notes:
            self.notes.append(note)
            self._reporter.note(note)

    def aside(self, note: str) -> None:
        """Tell a note that the report need not have."""
        self._reporter.note(note)

    def mention(self, line: str) -> None:
        """Tell what changes nothing."""
        self._reporter.mention(line)

    def progress(self, description: str, done: int, total: int, detail: str = "") -> None:
        """Tell how far the work is."""
        self._reporter.progress(description, done, total, detail)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside under ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._reporter.finish()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def rounded_seconds(self) -> dict[str, float]:
        """For ``summary.json``."""
        return {name: round(seconds, 2) for name, seconds in self.seconds.items()}
