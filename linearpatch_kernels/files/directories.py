"""A directory that appears whole or not at all, in the place of an earlier output or where nothing was."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files.owned import (
    DRAFT,
    OUTPUT,
    expanded,
    foreign_files,
    is_draft,
    is_ours,
    lies_in,
    mark,
    remove_output,
    shown,
)
from linearpatch_kernels.files.reading import said
from linearpatch_kernels.files.whole import flush, flush_directory, try_lock

# What a name may have in bytes on the file systems in use; the draft's is longer than the output's.
_LONGEST_NAME = 255
_OLD = "-old"


def check_output(
    directory: str | os.PathLike[str],
    needed_bytes: int = 0,
    overwrite: bool = False,
    *,
    made_from: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Whether an output of ``needed_bytes`` can go to ``directory``; call it before long work.

    What the file system must be able to do (make a directory beside it, write, rename) is tried.

    Args:
        overwrite: the place of an earlier output of ours may be taken.
        made_from: files and directories that the run reads (names of a hub, and None, are passed over).

    Raises:
        InputError: the directory holds a file that this package did not write or that was changed since, an earlier
            output (unless ``overwrite``), or what it is ``made_from``; it is a file, the working directory or no place
            to write to; or the disk has less room.
    """
    target = expanded(directory).resolve()
    if _working_directory().is_relative_to(target):
        # Whoever stands in a directory that is replaced goes on standing in the old one.
        raise InputError(f"{directory} is the working directory, or holds it: give another directory")
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{os.fsencode(target).decode('utf-8', 'replace')} is not UTF-8, and libraries that write models take no "
            "other names: give another directory"
        ) from error
    if target.exists() and not target.is_dir():
        raise InputError(f"{directory} is a file: give a directory for the output")
    _bring_back(target)
    _check_content(directory, target, overwrite)
    for source in made_from:
        if source and expanded(source).exists() and lies_in(source, target):
            raise InputError(f"{directory} is, or holds, {source}, which is still needed: give another directory")
    if target.is_mount():
        raise InputError(f"{directory} is a mount point, which cannot be replaced whole: give a directory inside it")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{directory} cannot be created: {parent} is not a directory one may write to")
    _try_out(directory, target, parent)
    check_room(directory, parent, needed_bytes)


def check_room(name: str | os.PathLike[str], parent: Path, needed_bytes: int) -> None:
    """InputError where the disk of a directory has less room than what goes there, called ``name``, needs."""
    disk = shutil.disk_usage(parent)
    # Some mounts say of themselves that they hold nothing at all.
    if disk.total and disk.free < needed_bytes:
        raise InputError(
            f"{name} needs {needed_bytes / 1e9:.2f} GB and the disk has {disk.free / 1e9:.2f} GB free: make room, "
            "or give a place on another disk"
        )


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the working directory is gone: change to one that is there") from error


def _bring_back(target: Path) -> None:
    """Put an output back that a run was about to replace when it was killed between the two renames of
    `_put_in_place`."""
    if target.exists() or not target.parent.is_dir():
        return
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*{_OLD}"):
        if is_ours(path):
            path.rename(target)
            return


def _check_content(directory: str | os.PathLike[str], target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not is_ours(target):
        raise InputError(f"{directory} exists and is not an output of linearpatch: give another directory")
    if foreign := foreign_files(target):
        raise InputError(
            f"{directory} holds files that linearpatch did not write, or that were changed since ({shown(foreign)}): "
            "move them, or give another directory"
        )
    if not overwrite:
        raise InputError(f"{directory} holds an earlier output: pass overwrite=True, or give another directory")


def _try_out(directory: str | os.PathLike[str], target: Path, parent: Path) -> None:
    """Do in small, where it costs nothing, what the end of the run must do."""
    draft = parent / _draft_name(target)
    moved = draft.with_name(_draft_name(target))
    try:
        draft.mkdir()
        mark(draft, DRAFT)
        draft.rename(moved)
    except (OSError, InputError) as error:
        raise InputError(f"{directory} cannot be written ({said(error)}): give a directory elsewhere") from error
    finally:
        for path in (draft, moved):
            shutil.rmtree(path, ignore_errors=True)


def save_files(directory: str | os.PathLike[str], files: Mapping[str, bytes | str], *, overwrite: bool = False) -> None:
    """Write a directory of files (a report, a plan), whole or not at all.

    Args:
        files: relative path -> content (text is written as UTF-8).

    Raises:
        InputError: as `check_output`; the disk is full or fails; a path that leads out of the directory.
    """
    check_output(directory, sum(len(content) for content in files.values()), overwrite)
    with written_whole(directory, files):
        pass


@contextlib.contextmanager
def written_whole(directory: str | os.PathLike[str], files: Mapping[str, bytes | str]) -> Iterator[Path]:
    """A draft directory, with ``files`` in it, that takes the place of ``directory`` if nothing fails.

    The draft is a hidden sibling. It is flushed to disk and put in place by one rename (an earlier output is exchanged
    for it atomically where the file system can). What a killed run left behind is removed by the next one.

    Raises:
        InputError: the disk is full or fails, something foreign appeared at the place. What was finished by then (all
            of the draft, or else ``files``) is kept beside it, and the message says where.
    """
    content = {_inside(name): text for name, text in files.items()}
    target = expanded(directory).resolve()
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target)
            draft = stack.enter_context(_temporary_sibling(target))
            written: list[Path] = []
            for name, text in content.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                (draft / name).write_bytes(text.encode() if isinstance(text, str) else text)
                written.append(name)
        except OSError as error:
            raise InputError(f"{directory} could not be written ({said(error)}); it is as it was before") from error
        try:
            yield draft
            written = [path.relative_to(draft) for path in draft.rglob("*")]
            _flush(draft)
            mark(draft, OUTPUT)
            _put_in_place(draft, target)
        except Exception as error:
            where = _kept(draft, target, written)
            if not _is_of_files(error):
                if where is not None:
                    error.add_note(f"What was finished is kept in {where}.")
                raise
            what = "; it is as it was before" + (f", and what was finished is kept in {where}" if where else "")
            raise InputError(f"{directory} could not be written ({said(error)}){what}") from error


def _is_of_files(error: Exception) -> bool:
    """Whether an error is about files, as the libraries say it that write them."""
    # Here, so that a command's --help need not wait for it.
    from safetensors import SafetensorError

    # The tokenizers library says what went wrong with a file by a bare Exception.
    return isinstance(error, OSError | SafetensorError | InputError) or type(error) is Exception


def _inside(name: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InputError(f"an extra file must lie inside the checkpoint, not at {name!r}")
    return path


def _prefix(target: Path) -> str:
    """Of the hidden siblings of an output; cut where the name is so long that they would not fit."""
    room = _LONGEST_NAME - len(".linearpatch-") - 32 - len("." + _OLD)
    name = os.fsencode(target.name)
    return f".{os.fsdecode(name if len(name) <= room else name[:room])}.linearpatch-"


def _draft_name(target: Path) -> str:
    return _prefix(target) + uuid.uuid4().hex


@contextlib.contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A new directory beside the target, removed at the end; locked where that is possible, so that nobody takes it
    for a killed run's."""
    path = target.parent / _draft_name(target)
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try_lock(descriptor)
        mark(path, DRAFT)
        yield path
    finally:
        os.close(descriptor)
        if is_draft(path):
            shutil.rmtree(path, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what killed runs left: drafts, by their name and marker, that no process holds, and what we wrote into
    outputs that were just being exchanged. Where the file system has no locks nobody can tell, and all stays."""
    name = re.compile(re.escape(_prefix(target)) + f"[0-9a-f]{{32}}({_OLD})?")
    for path in _listed(target.parent):
        if not name.fullmatch(path.name) or path.is_symlink() or not (is_draft(path) or is_ours(path)):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if try_lock(descriptor):
                    _remove_left(path)
            finally:
                os.close(descriptor)


def _listed(directory: Path) -> list[Path]:
    """What is in a directory; nothing where one may write to it and not look into it."""
    try:
        return [*directory.iterdir()]
    except OSError:
        return []


def _remove_left(path: Path) -> None:
    if is_draft(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        remove_output(path)


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            flush_directory(path)
        else:
            flush(path)


def _put_in_place(draft: Path, target: Path) -> None:
    if target.exists():
        with contextlib.suppress(OSError):
            # Who may look into what is replaced may look into what takes its place, and nobody else.
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
    if not target.exists() or not any(target.iterdir()):
        draft.rename(target)
        flush_directory(target.parent)
        return
    if not is_ours(target) or foreign_files(target):
        raise InputError(f"something else was put into {target.name} in the meantime: move it away")
    old = draft
    if not _exchanged(draft, target):
        # Without an atomic exchange there is a moment with no directory at the target.
        old = draft.with_name(draft.name + _OLD)
        target.rename(old)
        try:
            draft.rename(target)
        except OSError:
            old.rename(target)
            raise
    flush_directory(target.parent)
    _retire(old, target)


def _retire(old: Path, target: Path) -> None:
    """Remove the output whose place was taken; what of it cannot or must not be removed is told of, and stays."""
    try:
        if not (left := remove_output(old)):
            return
        what = f"files that appeared in {target} at the last moment are in"
    except OSError as error:
        left, what = [said(error)], f"the earlier output of {target} could not be removed and is in"
    kept = _beside(target, "kept")
    try:
        old.rename(kept)
    except OSError:
        kept = old
    warnings.warn(f"{what} {kept}: {shown(left)}", stacklevel=2)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two directories atomically (Linux ``renameat2``); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _kept(draft: Path, target: Path, finished: list[Path]) -> Path | None:
    """Give what was finished of a failed save a name to be found under; None where nothing was."""
    if not finished:
        return None
    for path in sorted(draft.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(draft) not in finished:
            path.unlink(missing_ok=True)
    place = _beside(target, "unfinished")
    try:
        mark(draft, OUTPUT)
        draft.rename(place)
    except (OSError, InputError):
        # What it is called matters less than that it is there.
        return draft
    return place


def _beside(target: Path, what: str) -> Path:
    """A free name next to the target."""
    names = (f"{target.name}.{what}{number or ''}" for number in range(1000))
    return next(place for place in map(target.with_name, names) if not place.exists())
