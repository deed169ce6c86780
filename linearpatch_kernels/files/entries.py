"""The entries of foreign JSON, each asked for by what it must be."""

from __future__ import annotations

import math
from typing import Any


class Entries:
    """The entries of a JSON object that somebody else may have written, each asked for by what it must be.

    Every method raises a ValueError that names an entry which is missing or something else: for use inside `reading`.
    """

    def __init__(self, content: Any, place: str = "") -> None:
        """``place``: of this object within the file, for what is said."""
        if not isinstance(content, dict):
            raise ValueError(f"{place or 'it'} is no JSON object")
        self._content, self._place = content, place

    def _named(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _one(self, name: str, what: str, *types: type) -> Any:
        if name not in self._content:
            raise ValueError(f"it has no {self._named(name)}")
        value = self._content[name]
        # JSON's true and false are numbers to Python.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"{self._named(name)} must be {what}, not {repr(value)[:40]}")
        return value

    def text(self, name: str) -> str:
        value: str = self._one(name, "text", str)
        return value

    def whole(self, name: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
        """A whole number from ``least`` to ``most``."""
        value: int = self._one(name, "a whole number", int)
        if not least <= value <= most:
            raise ValueError(f"{self._named(name)} must be from {least} to {most}, not {str(value)[:40]}")
        return value

    def real(self, name: str) -> float:
        """A finite number."""
        value = float(self._one(name, "a number", int, float))
        if not math.isfinite(value):
            raise ValueError(f"{self._named(name)} must be finite, not {value}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self._one(name, "an object", dict)
        return value

    def maybe_table(self, name: str) -> dict[str, Any] | None:
        """An object, or null."""
        value: dict[str, Any] | None = self._one(name, "an object", dict, type(None))
        return value

    def rows(self, name: str) -> list[Any]:
        value: list[Any] = self._one(name, "a list", list)
        return value

    def entries(self, name: str) -> Entries:
        """Those of the object ``name``."""
        return Entries(self.table(name), self._named(name))

    def listed(self, name: str) -> Entries:
        """Those of the list ``name``, by their numbers as text."""
        return Entries({str(i): one for i, one in enumerate(self.rows(name))}, self._named(name))

    @property
    def names(self) -> list[str]:
        return list(self._content)

    def each(self, name: str) -> list[Entries]:
        """The objects of the list ``name``."""
        found = self.listed(name)
        return [found.entries(i) for i in found.names]

    def wholes(self, least: int = 0, most: int = (1 << 63) - 1) -> list[int]:
        """All of them, as whole numbers."""
        return [self.whole(name, least, most) for name in self._content]

    def reals(self) -> list[float]:
        """All of them, as finite numbers."""
        return [self.real(name) for name in self._content]
