"""What a GGUF file holds: its metadata, and its tensors by name, each unpacked when it is asked for.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). No
length is believed that the file does not have: gguf's own reader counts to whatever a damaged file says.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# More dimensions than any format of tensors has.
_MOST_DIMENSIONS = 8
# The types of values by their number: as struct packs them, or a text, or an array of one of the others.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        shape: in the order of torch, the last dimension fastest.
        kind: the number of its data type, ``gguf.GGMLQuantizationType``.
        start: where its bytes begin in the file.
    """

    path: Path
    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in bytes; ValueError where a row is no whole number of blocks or the type is not known."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quant_shape_to_byte_shape

        return tuple(map(int, quant_shape_to_byte_shape(self.shape, GGMLQuantizationType(self.kind))))

    def read(self) -> Tensor:
        """The values in float32, in memory of their own."""
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        stored = np.memmap(self.path, mode="r", dtype=np.uint8, offset=self.start, shape=self.stored_shape)
        values = dequantize(stored, GGMLQuantizationType(self.kind))
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(self.shape))


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata, and the tensors by name.

    Raises:
        ValueError: the file is damaged, cut short, or of a version that is not known.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(content)
        if cursor.take(4) != MAGIC or cursor.number("I") not in _VERSIONS:
            raise ValueError(f"it is of no version of GGUF that is known here: {', '.join(map(str, _VERSIONS))}")
        tensors, entries = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            _put(metadata, cursor.text(), cursor.value)
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            _put(found, cursor.text(), partial(_tensor, cursor))
        stored = _placed(path, found, cursor.at, metadata)
        for name, tensor in stored.items():
            if tensor.start + math.prod(tensor.stored_shape) > len(content):
                raise ValueError(f"it ends before its tensor {name} does")
    return metadata, stored


def _placed(
    path: Path, found: Mapping[str, tuple[tuple[int, ...], int, int]], end: int, metadata: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """The tensors with their places: they begin behind the head, ``end`` bytes long, at a multiple of the alignment."""
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its tensors are aligned to {alignment!r} bytes")
    begin = -(-end // alignment) * alignment
    return {name: StoredTensor(path, shape, kind, begin + at) for name, (shape, kind, at) in found.items()}


def _put(entries: dict[str, Any], name: str, read: Any) -> None:
    if name in entries:
        raise ValueError(f"it says {name} twice")
    entries[name] = read()


def _tensor(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    dimensions = cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers("Q", dimensions)))
    return shape, cursor.number("I"), cursor.number("Q")


class _Cursor:
    """A place in the file; what is read there is compared with the file's end first."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.at = content, 0

    def take(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise ValueError("it ends before what it announces")
        self.at += size
        return self._content[self.at - size : self.at]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(f"<{form}")))

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element == _TEXT:
                return [self.text() for _ in range(count)]
            return list(self.numbers(self._form(element), count))
        return self.text() if kind == _TEXT else self.number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"it holds a value of type {kind}")
        return _NUMBERS[kind]
