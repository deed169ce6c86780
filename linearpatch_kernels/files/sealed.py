"""Files that carry their own checksum: the shards of a store, the state of a run, statistics to go on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files.whole import appearing

if TYPE_CHECKING:
    from torch import Tensor

KEY = "linearpatch"
"""Under which the metadata of a sealed file holds its seal."""
# Stands for the checksum while it is computed, so that it covers every byte of the file, the header's too.
_UNSET = b"0" * 64
_CHUNK = 1 << 22
# What the stores and the states of runs are made of, as safetensors calls it.
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint16": "U16",
}


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """Write a safetensors file with JSON values ``about``; returns its checksum (SHA-256, 64 hex digits).

    Same tensors and values, same bytes. The file is flushed to disk under a temporary name and then renamed. Memory: a
    copy of one tensor at a time (the library's own writer makes two of all of them).

    Raises:
        InputError: the disk is full or fails; nothing of the file is left.
    """
    # Here, so that a command's --help need not wait for torch.
    import torch

    # Larger elements first, so that all of them are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = _header(tensors, names, json.dumps({"about": dict(about), "sha256": _UNSET.decode()}))
    state = hashlib.sha256(header)
    with appearing(path) as file:
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
        listed[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": [*tensor.shape], "data_offsets": [begin, end]}
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


def _header_end(content: bytes) -> int:
    """Where the tensors' bytes begin; a safetensors file starts with the length of its header."""
    return 8 + int.from_bytes(content[:8], "little")
