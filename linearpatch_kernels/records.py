"""Registries of records: what can be named, with a line about each.

Help texts, pages, checks and error messages are made of them, so adding a record is all that adding takes. Such a
module is read for ``--help``, too, which answers without torch: what a record computes with is imported when it is
first called (:func:`deferred`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from linearpatch_kernels.errors import InputError


class Record(Protocol):
    """A frozen object with a name and one line about it."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...


RecordT = TypeVar("RecordT", bound=Record)


class Registry(dict[str, RecordT]):
    """Records by name, in the order in which they are shown.

    Args:
        kind: what one of them is called in a sentence: ``"fit"``.
    """

    def __init__(self, kind: str, records: Iterable[RecordT] = ()) -> None:
        super().__init__()
        self.kind = kind
        for record in records:
            self.add(record)

    def add(self, record: RecordT) -> RecordT:
        """Make a record known. InputError where one of its name is."""
        if record.name in self:
            raise InputError(f"a {self.kind} is called {record.name!r} already: choose another name")
        self[record.name] = record
        return record

    def named(self, name: str, *, among: Iterable[str] | None = None, also: Sequence[str] = ()) -> RecordT:
        """The record of a name.

        Args:
            among: the names that serve here; None: all.
            also: what else can be given in its place, for the message.

        Raises:
            InputError: there is none.
        """
        names = [*(self if among is None else among)]
        if name not in names:
            raise InputError(f"no {self.kind} is called {name!r}: choose one of {', '.join((*names, *also))}")
        return self[name]

    def described(self, names: Iterable[str] | None = None) -> str:
        """Names, each with its line, for a help text: ``none (plain removal), ...``."""
        return ", ".join(f"{name} ({self[name].about})" for name in (self if names is None else names))


def deferred(place: str) -> Callable[..., Any]:
    """A function of another module, ``module:name``, that is imported when it is first called."""
    module, _, name = place.partition(":")

    @functools.cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    def call(*arguments: Any, **options: Any) -> Any:
        return function()(*arguments, **options)

    return call
