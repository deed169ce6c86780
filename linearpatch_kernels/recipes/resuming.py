"""What a run keeps beside its output until it is done, for the same run to go on from after a kill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import check_file, left_by_us
from linearpatch_kernels.recipes.log import Log

Kept = TypeVar("Kept")


class Unfinished:
    """The file beside an output that an unfinished run is gone on from.

    Args:
        what: ends its name.

    Raises:
        InputError: something else stands there.
    """

    def __init__(self, output: Path, what: str) -> None:
        target = output.resolve()
        self._file = target.with_name(f".{target.name}.{what}")
        check_file(self._file, f"{self._file}, where an unfinished run keeps its work,", parents=True)

    def earlier(self, load: Callable[[Path], Kept], log: Log) -> Kept | None:
        """What an earlier run left, if it left something that can be read."""
        if not left_by_us(self._file):
            return None
        try:
            return load(self._file)
        except InputError as error:
            log.aside(str(error))
            return None

    def keep(self, save: Callable[[Path], None]) -> None:
        """Save what a killed run goes on from; where there is no room or directory for it, do without."""
        with contextlib.suppress(InputError):
            save(self._file)

    def forget(self) -> None:
        """Remove it; that it cannot be removed costs no result."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def forgotten_if_refused(self) -> Iterator[None]:
        """Whatever is refused inside, not killed, would be refused again."""
        try:
            yield
        except InputError:
            self.forget()
            raise
