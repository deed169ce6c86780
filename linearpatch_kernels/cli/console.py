"""What a person sees: progress, tables, one-line errors; and what a program reads: JSON."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Grid
from rich.text import Text

from linearpatch_kernels.cli.flags import in_flags
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import RECORDS, check_file, expanded, json_text, lies_in, read_json, said, write_whole
from linearpatch_kernels.report.tables import Table, number, percent

if TYPE_CHECKING:
    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.pruning.plan import PrunePlan
    from linearpatch_kernels.recipes import Result


# What would move the cursor, clear the screen or colour what follows.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Letters(Console):
    """Names of files and models are printed as they are: neither [bold] nor :x: nor an escape sequence means anything
    in them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text), **options)


class _Aside(_Letters):
    """What is said beside a result: where it cannot be written (a log on a full disk), the work goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            super().print(*objects, **options)


console = _Letters()
problems = _Aside(stderr=True)

_PLAIN_INTERVAL = 5.0


def print_error(message: str) -> None:
    problems.print(Text.assemble(("error:", "bold red"), " ", problems.render_str(message)), soft_wrap=True)


class Terminal:
    """The `recipes.Reporter` of the command: a bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._last_line = ""
        self._last_time = time.monotonic()

    def note(self, note: str) -> None:
        problems.print(f"note: {in_flags(note)}", soft_wrap=True)

    def mention(self, line: str) -> None:
        problems.print(line, soft_wrap=True)

    def progress(self, description: str, done: int, total: int, detail: str = "") -> None:
        if problems.is_terminal:
            self._draw(description, done, total, detail)
        elif done >= total or time.monotonic() - self._last_time > _PLAIN_INTERVAL:
            line = f"{description}: {done}/{total}" if total else f"{description}: {done}"
            line += f", {detail}" if detail else ""
            if line != self._last_line:
                problems.print(line, soft_wrap=True)
            self._last_line, self._last_time = line, time.monotonic()

    def _draw(self, description: str, done: int, total: int, detail: str) -> None:
        if self._bar is None or self._bar.tasks[0].description != description:
            self.finish()
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._bar = Progress(*columns, console=problems, transient=True)
            self._bar.add_task(description, total=total or None, detail=detail)
            self._bar.start()
        self._bar.update(self._bar.tasks[0].id, completed=done, detail=detail)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_table(table: Table) -> None:
    grid = Grid(title=table.title, title_justify="left", show_edge=False, pad_edge=False)
    for column, side in zip(table.columns, table.sides, strict=True):
        grid.add_column(column, justify="right" if side == "r" else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*row)
    console.print(grid)
    console.print()


def print_quality(found: Mapping[str, Quality], source: str) -> None:
    from linearpatch_kernels.evaluation.agreement import healed_share

    if not found:
        return

    # Either may have been left out of the comparison.
    dense, dropped = found.get("dense"), found.get("dropped (no patch)")

    def healed(quality: Quality) -> str:
        if dense is None or dropped is None or quality in (dense, dropped):
            return ""
        return percent(healed_share(dense, dropped, quality), 0)

    rows = [
        [
            name,
            number(quality.perplexity),
            percent(quality.top1_agreement),
            "" if quality.kl is None else f"{quality.kl:.3f}",
            healed(quality),
        ]
        for name, quality in found.items()
    ]
    columns = ["model", "perplexity", "top-1 agreement", "KL", "healed"]
    print_table(Table(columns, rows, f"Quality on held-out text ({source})"))


def healing_tables(about: Mapping[str, Any]) -> list[Table]:
    """The ways to heal that ``auto`` compared, and what a refit did, from what ``summary.json`` says."""
    tables: list[Table] = []
    if "heal_candidates" in about:
        rows = [
            [name, number(one["perplexity"]), "taken" if name == about.get("heal") else ""]
            for name, one in about["heal_candidates"].items()
        ]
        tables.append(Table(["way", "perplexity", ""], rows, "Ways to heal on held-out calibration windows"))
    if "refit" in about:
        errors = [
            ["" if row[when] is None else f"{row[when]:.4f}" for when in ("before", "after")] for row in about["refit"]
        ]
        rows = [
            [str(row["layer"]), ", ".join(row["projections"]), *error, row["why"]]
            for row, error in zip(about["refit"], errors, strict=True)
        ]
        heads = ["layer", "new weights", "error before", "after", "left alone because"]
        tables.append(Table(heads, rows, "The refit: held-out error of every least-squares fit"))
    return tables


def candidates_table(plan: PrunePlan) -> list[Table]:
    """The table that ``--fit auto`` decided on, if it did."""
    if not plan.candidates:
        return []
    rows = [
        [
            row["fit"] + (" (kept)" if row["kept"] else ""),
            f"{row['loss']:.4f}",
            percent(row["healed"], 0),
            f"{row['parameters']:,}",
            f"{row['flops_per_token']:,}",
        ]
        for row in plan.candidates
    ]
    spans = ", ".join(map(str, plan.spans))
    columns = ["fit", "loss", "healed", "parameters", "operations/token"]
    return [Table(columns, rows, f"Candidates for the joint {spans} on held-out calibration windows")]


def print_seconds(seconds: Mapping[str, float]) -> None:
    parts = ", ".join(f"{name} {one:.0f} s" for name, one in seconds.items())
    console.print(f"Time: {parts}; together {sum(seconds.values()):.0f} s")


def print_result(result: Result, what: str, *, tables: Sequence[Table] = (), lines: Sequence[str] = ()) -> None:
    """How good the result is, how long it took, where it lies, and what speaks against it.

    Args:
        what: lies in the output, beside the report.
        tables, lines: behind the qualities.
    """
    print_quality(result.quality, result.quality_text)
    for table in tables:
        print_table(table)
    for line in lines:
        console.print(line, soft_wrap=True)
    print_seconds(result.seconds)
    report = result.output / RECORDS / "report" / "report.md"
    console.print(f"{what} and report: {result.output} (report: {report})", soft_wrap=True)
    for line in result.verdict:
        console.print(in_flags(line), soft_wrap=True)


def check_json(file: Path | None, *, made_from: Iterable[Path | str | None] = (), output: Path | None = None) -> None:
    """Whether figures can go to ``file``; call it first. For standard output (``-``) tables make room, on stderr.

    Args:
        made_from: what the run reads, which figures must not take the place of.
        output: the directory that the run replaces whole.
    """
    console.stderr = str(file) == "-"
    if file is None or console.stderr:
        return
    if output is not None and lies_in(file, output):
        raise InputError(f"--json {file} is inside the output, which is replaced whole: give a file elsewhere")
    if _is_stream(file):
        _try_stream(file)
        return
    for source in made_from:
        # 'demo' is no path, whatever lies under that name.
        if (
            source
            and source != "demo"
            and file.exists()
            and expanded(source).exists()
            and file.samefile(expanded(source))
        ):
            raise InputError(f"--json {file} is what the run reads: give another file")
    check_file(file, f"--json {file}", _holds_figures)


# What the figures of a command have at their top, among others; those of `inspect` have nothing else.
_FIGURES = (
    {"quality", "seconds"},
    {"points", "seconds"},
    {"perplexity", "windows", "length"},
    {"architecture", "tensors", "file_bytes"},
    {"backends", "packages"},
)
_INSPECTED = {
    *("model", "merges", "plan", "base", "text", "heal", "heal_candidates", "refit", "result", "quality"),
    *("distillation", "sweep"),
}


def _holds_figures(file: Path) -> bool:
    """Whether a file holds what `write_json` writes. It has no mark: who reads it wants figures and nothing else."""
    try:
        content = read_json(file, "").keys()
    except InputError:
        return False
    return any(keys <= content for keys in _FIGURES) or (bool(content) and content <= _INSPECTED)


def _is_stream(file: Path) -> bool:
    """A pipe, a device, a descriptor: what is written to, and never replaced."""
    absolute = file.absolute()
    if file.is_dir():
        return False
    return absolute.is_relative_to("/dev") or absolute.is_relative_to("/proc") or (file.exists() and not file.is_file())


def _try_stream(file: Path) -> None:
    try:
        # Only a device can be tried out: what goes into a pipe is read.
        if file.is_char_device() and not console.is_terminal:
            file.write_text("\n", encoding="utf-8")
        elif not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--json {file} cannot be written ({error.strerror}): give another file") from error


def write_json(file: Path | None, summary: Mapping[str, Any]) -> None:
    if file is None:
        return
    text = json_text(summary)
    if str(file) == "-":
        sys.stdout.write(text)
        return
    try:
        if _is_stream(file):
            file.write_text(text, encoding="utf-8")
        else:
            write_whole(file.resolve(), text.encode())
    except (OSError, InputError) as error:
        raise InputError(f"--json {file} could not be written ({said(error)}): give another file") from error
