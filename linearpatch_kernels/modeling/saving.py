"""A checkpoint directory, written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.config_forms import write_both_forms

MARKER = "linearpatch.json"
"""The file that makes a directory ours to replace."""

_FORMAT = "linearpatch-checkpoint"
# Configuration, tokenizer and code beside the weights.
_EXTRA_BYTES = 32 << 20


def parameter_bytes(model: nn.Module) -> int:
    """The bytes of the model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def is_ours(directory: Path) -> bool:
    """Whether `save_checkpoint` wrote this directory."""
    try:
        return bool(json.loads((directory / MARKER).read_bytes()).get("format") == _FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def check_output(
    directory: str | os.PathLike[str],
    needed_bytes: int = 0,
    overwrite: bool = False,
    *,
    made_from: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Whether a checkpoint of ``needed_bytes`` can go to ``directory``; call it before long work.

    Args:
        made_from: files and directories (names of a hub, and None, are passed over) that it must not replace.

    Raises:
        InputError: the directory exists and is not empty (unless ``overwrite`` and an earlier `save_checkpoint` wrote
            it), is a file, the working directory or no place to write to, is or holds what it is ``made_from``, or the
            disk has less room.
    """
    target = Path(directory).expanduser().resolve()
    if Path.cwd().is_relative_to(target):
        # Whoever stands in a directory that is replaced goes on standing in the old one.
        raise InputError(f"{directory} is the working directory, or holds it: give another directory")
    if target.exists() and not target.is_dir():
        raise InputError(f"{directory} is a file: give a directory for the output")
    if target.is_dir() and any(target.iterdir()):
        if not is_ours(target):
            raise InputError(f"{directory} exists and is not an output of linearpatch: give another directory")
        if not overwrite:
            raise InputError(f"{directory} holds an earlier output: pass overwrite=True, or give another directory")
    for source in made_from:
        if not source:
            continue
        place = Path(source).expanduser().resolve()
        if place.exists() and place.is_relative_to(target):
            raise InputError(f"{directory} is, or holds, {source}, which is still needed: give another directory")
    if target.is_mount():
        raise InputError(f"{directory} is a mount point, which cannot be replaced whole: give a directory inside it")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{directory} cannot be created: {parent} is not a directory one may write to")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"{directory} needs {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make room, or "
            "give a directory on another disk"
        )


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes | str] | None = None,
) -> None:
    """Write the model, its tokenizer and more files to a directory that appears whole, or not at all.

    A patched model also gets the modeling file that lets it load without this package; a stock one is a stock
    checkpoint. Everything is written to a hidden sibling of ``directory``, flushed to disk, and put in place by one
    rename (an earlier output of ours is exchanged for it atomically where the file system can). What a killed run left
    behind is removed by the next save to the same place.

    Args:
        model: a causal LM.
        tokenizer: with ``save_pretrained``, or None.
        overwrite: replace a directory that an earlier call wrote, with everything in it.
        extra_files: relative path -> content (text is written as UTF-8).

    Raises:
        InputError: as `check_output`; the disk is full or fails; an extra file outside the directory.
    """
    check_output(directory, parameter_bytes(model) + _EXTRA_BYTES, overwrite)
    extra = {_inside(name): content for name, content in (extra_files or {}).items()}
    with _written_whole(directory) as draft:
        _write_model(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        _write_files(draft, extra)


def save_files(directory: str | os.PathLike[str], files: Mapping[str, bytes | str], *, overwrite: bool = False) -> None:
    """Write a directory of files (a report, a plan) as `save_checkpoint` writes one with a model: whole or not at all.

    Raises:
        InputError: as `save_checkpoint`.
    """
    check_output(directory, sum(len(content) for content in files.values()), overwrite)
    content = {_inside(name): content for name, content in files.items()}
    with _written_whole(directory) as draft:
        _write_files(draft, content)


@contextlib.contextmanager
def _written_whole(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft directory that takes the place of ``directory`` if nothing fails; the one place that knows how."""
    target = Path(directory).expanduser().resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        with _temporary_sibling(target) as draft:
            yield draft
            (draft / MARKER).write_text(json.dumps({"format": _FORMAT, "version": 1}) + "\n")
            _flush(draft)
            _put_in_place(draft, target)
    except Exception as error:
        # The tokenizers library says what went wrong with a file by a bare Exception.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{directory} could not be written ({reason}); it is as it was before") from error


def _write_files(directory: Path, files: Mapping[Path, bytes | str]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_model(model: PreTrainedModel, directory: Path) -> None:
    settings = model.generation_config
    # Transformers refuses to write generation settings that contradict each other, and hub models come with such.
    model.generation_config = GenerationConfig()
    try:
        with no_progress_bar():
            model.save_pretrained(directory)
    finally:
        model.generation_config = settings
    write_both_forms(directory)
    settings.to_json_file(directory / "generation_config.json")
    # safetensors writes for the owner alone.
    mode = (directory / "config.json").stat().st_mode
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def _inside(name: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise InputError(f"an extra file must lie inside the checkpoint, not at {name!r}")
    return path


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prefix(target: Path) -> str:
    return f".{target.name}.linearpatch-"


@contextlib.contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A new directory beside the target, removed at the end; locked, so that nobody takes it for a killed run's."""
    path = target.parent / f"{_prefix(target)}{uuid.uuid4().hex}"
    path.mkdir()
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    for path in target.parent.iterdir():
        if not path.name.startswith(_prefix(target)):
            continue
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(draft: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        draft.rename(target)
    elif not is_ours(target):
        raise InputError(f"{target} was created by something else in the meantime: give another directory")
    elif not _exchanged(draft, target):
        # Without an atomic exchange there is a moment with no directory at the target.
        old = draft.with_name(draft.name + "-old")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    parent = os.open(target.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two directories atomically (Linux ``renameat2``); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
