"""Files: written whole or not at all, sealed where they must be believed later, and read with suspicion.

A file that somebody else may have written, edited or cut short is read inside `reading`: whatever its parser raises
becomes one `InputError` that names the file and says what to do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError

KEY = "linearpatch"
"""Under which the metadata of a sealed file holds its seal."""
# The longest JSON that is read whole: configs, plans and indexes of the largest models are a few MB.
_MOST_JSON = 256 << 20
# Stands for the checksum while it is computed, so that it covers every byte of the file, the header's too.
_UNSET = b"0" * 64
_CHUNK = 1 << 22
_TEMPORARY = ".tmp"
# What the stores and the states of runs are made of, as safetensors calls it.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint16: "U16",
}


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], cure: str) -> Iterator[None]:
    """What is raised inside becomes an `InputError` that names the file and says what to do (an `InputError` stays).

    Parsers fail in as many ways as there are formats, and a damaged file finds them all: no list of exceptions is
    complete.

    Args:
        path: the file, as it is named to the person.
        cure: what to do, without a full stop: ``"copy the model again"``.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path} is missing: {cure}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read ({said(error)}): {cure}") from error


def said(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def read_json(path: str | os.PathLike[str], cure: str) -> dict[str, Any]:
    """The JSON object in a UTF-8 file; `InputError` for anything else, as `reading` says it."""
    file = Path(path)
    with reading(file, cure):
        with open(file, "rb") as stream:
            raw = stream.read(_MOST_JSON + 1)
        if len(raw) > _MOST_JSON:
            raise InputError(f"{file} is larger than any such file: {cure}")
        content = json.loads(raw)
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: {cure}")
    return content


def finite(content: Any) -> Any:
    """JSON values in which what is not finite is null: JSON has no word for it."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


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


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Write a safetensors file with JSON values ``about``; returns its checksum (SHA-256, 64 hex digits).

    Same tensors and values, same bytes. The file is flushed to disk under a temporary name and then renamed. Memory: a
    copy of one tensor at a time (the library's own writer makes two of all of them).

    Raises:
        InputError: the disk is full or fails; nothing of the file is left.
    """
    # Larger elements first, so that all of them are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, names, json.dumps({"about": dict(about), "sha256": _UNSET.decode()}))
    state = hashlib.sha256(header)
    with _appearing(path) as file:
        file.write(header)
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            content = flat.view(torch.uint8).numpy().data
            state.update(content)
            file.write(content)
        file.seek(header.index(_UNSET))
        file.write(state.hexdigest().encode())
    return state.hexdigest()


def _header(tensors: Mapping[str, Tensor], names: Sequence[str], seal: str) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    listed: dict[str, Any] = {"__metadata__": {KEY: seal}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        listed[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    content = json.dumps(listed).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def read_seal(path: Path, cure: str = "") -> tuple[dict[str, Any], str]:
    """``(about, checksum)`` of a file that `write_sealed` wrote, after reading every byte of it.

    Raises:
        InputError: missing, truncated, foreign, or a single bit is not as it was written; with what to do (``cure``).
    """
    advice = f"; {cure}" if cure else ""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if _header_end(start) > os.fstat(file.fileno()).st_size:
                raise ValueError("the header is longer than the file")
            header = file.read(_header_end(start) - 8)
            seal = json.loads(json.loads(header)["__metadata__"][KEY])
            about, digest = seal["about"], seal["sha256"]
            state = hashlib.sha256(start + header.replace(digest.encode(), _UNSET))
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing{advice}") from error
    except Exception as error:  # a damaged header is any JSON, and nested as deep as it likes
        raise InputError(f"{path} is damaged: it does not begin as it was written{advice}") from error
    if state.hexdigest() != digest or not isinstance(about, dict):
        raise InputError(f"{path} is damaged: its bytes do not have the checksum they were written with{advice}")
    return about, digest


def is_sealed(path: Path) -> bool:
    """Whether a file is, by its first bytes, what `write_sealed` writes, whole or not; False if it cannot be read."""
    start = json.dumps({"__metadata__": {KEY: ""}}).encode().partition(b'""')[0]
    try:
        with open(path, "rb") as file:
            return file.read(8 + len(start))[8:] == start
    except OSError:
        return False


def left_by_us(path: Path) -> bool:
    """Whether there is a file that a killed run of this package left, whole or damaged.

    Raises:
        InputError: there is something else, which must not be written over.
    """
    if not path.exists():
        return False
    with reading(path, "move it away, or give another output"), open(path, "rb") as file:
        start = file.read(_CHUNK)
    if KEY.encode() not in start:
        raise InputError(f"{path} is not a file of linearpatch and in its way: move it, or give another output")
    return True


def _header_end(content: bytes) -> int:
    """Where the tensors' bytes begin; a safetensors file starts with the length of its header."""
    return 8 + int.from_bytes(content[:8], "little")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        InputError: the disk is full or fails; nothing of the file is left.
    """
    with _appearing(path) as file:
        file.write(content)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name; what was written is flushed to disk, and then the file renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; a killed process may leave a part of it. InputError: the disk is full or fails."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} could not be written ({error.strerror}): make room, then give the same command again to go on"
    )


@contextlib.contextmanager
def working_alone(directory: Path) -> Iterator[None]:
    """Hold the directory (made if missing) against a second process that would write to it; what a killed one left
    half-written is removed.

    Raises:
        InputError: another process holds it, or it is no directory that can be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{directory} cannot be used ({error.strerror}): give another directory") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process works in {directory}: wait for it, or give another directory") from error
        for path in directory.glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
