"""What is ours: the one place that decides what a run may remove or replace.

An output directory carries the marker ``linearpatch.json``, which lists every file that was written with it and what
each holds. A directory that holds anything else, or a listed file with other content (weights that somebody trained on
and saved in place), is not replaced. Outputs of 0.1.0, whose marker lists nothing, are taken as ours for exactly the
file names that 0.1.0 wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files.reading import reading, said
from linearpatch_kernels.files.whole import final_name, temporary_name, write_whole

MARKER = "linearpatch.json"
"""The file that makes a directory ours to replace, and says what in it is."""

RECORDS = "linearpatch"
"""The directory inside an output that holds the plan, the summary and the report, out of the way of engines that load
every ``*.safetensors`` they find beside a config."""

OUTPUT, DRAFT, WORK = "linearpatch-checkpoint", "linearpatch-draft", "linearpatch-work"
_VERSION = 2

# A file is told by its size and by what stands in this many blocks of it: all of a small one, and enough of the weights
# that another training step, dtype or cut shows.
_BLOCK, _BLOCKS = 1 << 16, 64

# What 0.1.0 wrote into an output.
_NAMES_OF_0_1_0 = re.compile(
    r"config\.json|generation_config\.json|modeling_linearpatch\.py"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|tokenizer\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
    r"|plan\.json|plan\.safetensors|merge\.json|summary\.json|sweep\.json"
    r"|(report/)?(report\.md|depth-cosine\.png|joint-magnitudes\.png|quality-against-depth\.png)"
    r"|report/(distillation\.png|log\.jsonl)"
)


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with its ``~`` resolved; it need not exist.

    Raises:
        InputError: the ``~`` of a user that is not there, a link to itself, a name that no file can have.
    """
    try:
        there = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            there.lstat()
            # From Python 3.13 on, only a strict look finds a link to itself.
            there.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{str(path)[:300]} is no path that can be looked at ({said(error)}): give another") from error
    return there


def lies_in(path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> bool:
    """Whether the path is the directory or something below it, links and ``..`` resolved."""
    return expanded(path).resolve().is_relative_to(expanded(directory).resolve())


def record(directory: str | os.PathLike[str], name: str) -> Path:
    """Where an output keeps its plan, summary or report ``name``; outputs of 0.1.0 have them beside the weights."""
    place = Path(directory) / RECORDS / name
    older = Path(directory) / name
    return older if older.exists() and not place.exists() else place


# --- outputs ---------------------------------------------------------------------------------------------------------


def is_ours(directory: Path) -> bool:
    """Whether a finished output of this package carries its marker here."""
    return _marked(directory).get("format") == OUTPUT


def is_draft(directory: Path) -> bool:
    """Whether this is an output that a run is, or was when it was killed, still writing."""
    return _marked(directory).get("format") == DRAFT


def _marked(directory: Path) -> Mapping[str, Any]:
    """What the marker says; nothing where there is none or it cannot be read."""
    file = directory / MARKER
    try:
        with reading(file, "delete it"):
            content = json.loads(file.read_bytes())
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def mark(directory: Path, kind: str) -> None:
    """Write the marker; that of an `OUTPUT` lists what is there now."""
    content: dict[str, Any] = {"format": kind, "version": _VERSION}
    if kind == OUTPUT:
        content["files"] = {name: _described(directory / name) for name in _names(directory) if name != MARKER}
    write_whole(directory / MARKER, (json.dumps(content, indent=1) + "\n").encode())


def foreign_files(directory: Path) -> list[str]:
    """The files of an output directory that this package did not write, or that were changed since, by name.

    A link is foreign whatever it points to: we write none.
    """
    marked = _marked(directory)
    ours = marked.get("format") == OUTPUT
    listed = marked.get("files")
    return [
        name
        for name in _names(directory)
        if name != MARKER and not (ours and _is_listed(directory / name, name, listed))
    ]


def _is_listed(file: Path, name: str, listed: Any) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    if listed is None:
        return _NAMES_OF_0_1_0.fullmatch(name) is not None
    return isinstance(listed, Mapping) and name in listed and listed[name] == _described(file)


def _names(directory: Path) -> Iterator[str]:
    """Every file and link below, relative to the directory, in order; links are not followed."""
    for folder, below, files in os.walk(directory):
        links = [name for name in below if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            yield Path(folder, name).relative_to(directory).as_posix()
        below.sort()


def _described(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    state = hashlib.sha256()
    with open(file, "rb") as content:
        if size <= _BLOCK * _BLOCKS:
            state.update(content.read())
        else:
            for block in range(_BLOCKS):
                content.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                state.update(content.read(_BLOCK))
    return {"bytes": size, "digest": state.hexdigest()}


def remove_output(directory: Path) -> list[str]:
    """Remove what we wrote into an output, and the directories that are empty then; returns what stays because it is
    foreign."""
    foreign = set(foreign_files(directory))
    _remove(directory, [name for name in _names(directory) if name not in foreign and name != MARKER])
    if not foreign:
        _remove(directory, [MARKER])
    return sorted(foreign)


def _remove(directory: Path, names: Iterable[str]) -> None:
    """Remove these files, and the directories (the outermost too) that are empty then."""
    for name in names:
        (directory / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)


def shown(names: list[str]) -> str:
    """A few names for one line."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


# --- single files -----------------------------------------------------------------------------------------------------


# How the single files begin that say whose they are: plans, statistics and other sealed tensors.
_OUR_BEGINNING = re.compile(rb'"format": ?"linearpatch|"linearpatch": ?"')
_BEGINNING = 4096


def says_ours(file: Path) -> bool:
    """Whether the file begins as the plans and sealed files of this package do."""
    with open(file, "rb") as content:
        return _OUR_BEGINNING.search(content.read(_BEGINNING)) is not None


def left_by_us(file: Path) -> bool:
    """Whether there is a file that a killed run of this package left, whole or damaged.

    Raises:
        InputError: there is something else, which must not be written over.
    """
    if not file.exists():
        return False
    with reading(file, "move it away, or give another output"):
        ours = says_ours(file)
    if not ours:
        raise InputError(f"{file} is not a file of linearpatch and in its way: move it, or give another output")
    return True


def check_file(file: Path, what: str, ours: Callable[[Path], bool] = says_ours, *, parents: bool = False) -> None:
    """Whether a run may write, and replace, this single file; call it before long work.

    Args:
        what: how the file is named to a person: ``"--json out.json"``.
        ours: tells a file that this package wrote from another.
        parents: directories that are missing above it will be made.

    Raises:
        InputError: something stands there that this package did not write (an empty file may be replaced), or no file
            can be made there.
    """
    file = expanded(file)
    try:
        if file.is_dir():
            raise InputError(f"{what} is a directory: give a file")
        if file.exists() and not file.is_file():
            raise InputError(f"{what} is a device or a pipe, which nothing may take the place of: give a file")
        if file.exists() and file.stat().st_size and not ours(file):
            raise InputError(f"{what} exists and is no file of linearpatch's: give another file, or delete it")
        place = file.resolve()
        temporary_name(place).exists()  # raises where it would be too long
        parent = next(path for path in place.parents if path.exists()) if parents else place.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
    except (OSError, RuntimeError) as error:
        raise InputError(f"{what} cannot be written ({said(error)}): give another file") from error


# --- working directories ---------------------------------------------------------------------------------------------


def check_work_directory(directory: Path, names: re.Pattern[str]) -> None:
    """Whether a run may keep its unfinished work here; call it before long work.

    Args:
        directory: need not exist.
        names: of the files that the run writes, relative to the directory.

    Raises:
        InputError: it holds something else, or is a file.
    """
    for place in (directory, directory.parent):
        if os.path.lexists(place) and not place.is_dir():
            raise InputError(f"{place}, where unfinished work is kept, is not a directory: move it away")
    if directory.is_symlink():
        raise InputError(f"{directory}, where unfinished work is kept, is a link: move it away")
    foreign = [name for name in _work_files(directory) if not _is_work(name, names)]
    if foreign:
        raise InputError(
            f"{directory}, where unfinished work is kept, holds files that linearpatch did not write "
            f"({shown(foreign)}): move them, or give another output"
        )


def claim_work_directory(directory: Path) -> None:
    """Make the directory, if it is not there, with the marker by which `remove_work_directory` knows it."""
    if not directory.exists():
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{directory} cannot be made ({error.strerror}): give another output") from error
        mark(directory, WORK)


def remove_work_directory(directory: Path, names: re.Pattern[str]) -> bool:
    """Remove the files ``names`` of a directory that `claim_work_directory` made; whether it is gone.

    What stands without the marker, and any other file, stays.
    """
    if _marked(directory).get("format") != WORK:
        return not directory.exists()
    _remove(directory, [name for name in _work_files(directory) if _is_work(name, names)])
    if all(name == MARKER for name in _names(directory)):
        _remove(directory, [MARKER])
    return not directory.exists()


def _work_files(directory: Path) -> list[str]:
    return [name for name in _names(directory) if name != MARKER] if directory.is_dir() else []


def _is_work(name: str, names: re.Pattern[str]) -> bool:
    folder, _, file = name.rpartition("/")
    return names.fullmatch(f"{folder}/{final_name(file)}" if folder else final_name(file)) is not None
