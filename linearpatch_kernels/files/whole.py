"""Single files that appear whole or not at all, and a directory held against a second writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files.reading import said


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        InputError: the disk is full or fails; nothing of the file is left.
    """
    with appearing(path) as file:
        file.write(content)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name; what was written is flushed to disk, and then the file renamed.

    It is locked meanwhile, where that is possible, so that `remove_unfinished` tells it from a killed writer's.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            try_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            # Who may read what is replaced may read what takes its place, and nobody else.
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    flush_directory(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of this file left beside it. Where the file system has no locks nobody can tell theirs
    from a living one's, and all stays."""
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if left.name == path.name or final_name(left.name) != path.name or left.is_symlink():
                continue
            with open(left, "rb") as file:
                if try_lock(file.fileno()):
                    left.unlink(missing_ok=True)


def flush_directory(directory: Path) -> None:
    """Make the names in a directory outlast a power cut, where the file system can flush directories."""
    with contextlib.suppress(OSError):
        flush(directory)


def flush(path: Path) -> None:
    """Write what the system still holds of a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; a killed process may leave a part of it. InputError: the disk is full or fails."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} could not be written ({said(error)}): make room, then give the same command again to go on"
    )


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or directory against other processes; False: one holds it; None: no locks on this file system
    (many a network or cluster file system has none)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def working_alone(directory: Path, names: re.Pattern[str]) -> Iterator[None]:
    """Hold the directory (made if missing) against a second process that would write to it, where the file system has
    locks; what a killed writer of the files ``names`` left half-written is removed.

    Raises:
        InputError: another process holds it, or it is no directory that can be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{directory} cannot be used ({error.strerror}): give another directory") from error
    try:
        if try_lock(descriptor) is False:
            raise InputError(f"another process works in {directory}: wait for it, or give another directory")
        for path in directory.iterdir():
            if path.name != final_name(path.name) and names.fullmatch(final_name(path.name)):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """What `appearing` may call a file for as long as it is unfinished: a name that nobody else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def final_name(name: str) -> str:
    """The name of the file that any process calls ``name`` for as long as it is unfinished; other names as they are."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.tmp", name)
    return name if match is None else match[1]
