"""A result: what a command printed, and where. Results that have tables are written by `record.record`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Table:
    """Cells as they are shown.

    Attributes:
        columns: their heads.
        rows: a row that was measured at another commit than its result ends with one cell more, that commit.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def cell(self, row: str, column: str) -> str:
        """By the row's first cell."""
        (found,) = (one for one in self.rows if one[0] == row)
        return found[self.columns.index(column)]


@dataclass(frozen=True)
class Result:
    """One file of ``benchmarks/results``.

    Attributes:
        command: as it was spelled at that commit.
        commit: whose code was measured.
        machine: in words, or what `hardware.describe` found.
        versions: of what the figures depend on, by package.
        date: YYYY-MM-DD, or None where nobody wrote it down.
        tables: by name.
        printed: the lines that the command printed, where they are shown as they are.
        note: what else has to be known of the figures.
    """

    command: str
    commit: str
    machine: str | Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    printed: Sequence[str] = ()
    note: str = ""

    def table(self, name: str = "") -> Table:
        """The one of that name, or the only one."""
        if name:
            return self.tables[name]
        (table,) = self.tables.values()
        return table

    def origin(self) -> str:
        """The line under its figures."""
        machine = (
            self.machine if isinstance(self.machine, str) else f"{self.machine['cpu']}, {self.machine['cores']} cores"
        )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        known = [f"`{self.command}`", f"commit {self.commit}", machine, versions, self.date or ""]
        return f"*{'; '.join(filter(None, known))}.{f' Note: {self.note}.' if self.note else ''}*"


def load(name: str, folder: Path = RESULTS) -> Result:
    """
    Raises:
        ValueError: the file lacks what a result must tell, or a row has not the table's cells.
    """
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if missing := {"command", "commit", "machine"} - content.keys():
        raise ValueError(f"{name}.json does not say its {', '.join(sorted(missing))}")
    tables = {key: Table(**table) for key, table in content.pop("tables", {}).items()}
    for key, table in tables.items():
        if any(len(row) - len(table.columns) not in (0, 1) for row in table.rows):
            raise ValueError(f"{name}.json: a row of {key!r} does not have the cells of its columns")
    return Result(**content, tables=tables)
