"""A checkpoint directory, written whole or not at all, and read back before it is put in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import MARKER, check_output, is_ours, save_files, written_whole
from linearpatch_kernels.modeling.config_forms import write_both_forms
from linearpatch_kernels.modeling.families import auto_class, text_config
from linearpatch_kernels.modeling.weights import names_in
from linearpatch_kernels.torch_state import evaluation_mode

__all__ = ["MARKER", "check_output", "is_ours", "no_progress_bar", "parameter_bytes", "save_checkpoint", "save_files"]

# Configuration, tokenizer and code beside the weights.
_EXTRA_BYTES = 32 << 20
# What a second model takes while its weights are being read, as a multiple of their bytes.
_SECOND_MODEL = 1.25
_PROBE_TOKENS = 16


def parameter_bytes(model: nn.Module) -> int:
    """The bytes of the model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes | str] | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Write the model, its tokenizer and more files to a directory that appears whole, or not at all.

    A patched model also gets the modeling file that lets it load without this package; a stock one is a stock
    checkpoint. Everything is written to a hidden sibling of ``directory`` and read back: every weight must have the
    bits that it has in memory, and the directory must load and give the logits that the model gives (where memory has
    no room for a second model, its names, shapes and config are compared instead). Then it is put in place, as
    `files.written_whole` says.

    Args:
        model: a causal LM.
        tokenizer: with ``save_pretrained``, or None.
        overwrite: replace a directory that an earlier call wrote, and that holds nothing else.
        extra_files: relative path -> content (text is written as UTF-8). Engines read every safetensors file beside
            the weights as weights, so one of those goes into a folder, such as ``linearpatch/plan.safetensors``.
        companions: files of the model that this one was made from (license, vocabulary, ...), written where neither
            the model nor the tokenizer wrote one of their name.

    Raises:
        InputError: as `check_output`; the disk is full or fails; an extra file outside the directory, or that would be
            taken for weights; what was written is not the model. What was finished by then is kept, and the message
            says where.
    """
    for name in extra_files or {}:
        if Path(name).suffix == ".safetensors" and len(Path(name).parts) == 1:
            raise InputError(f"{name} would be taken for weights beside them: write it as linearpatch/{name}")
    check_output(directory, parameter_bytes(model) + _EXTRA_BYTES, overwrite)
    with written_whole(directory, extra_files or {}) as draft:
        _write_model(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        for name, content in (companions or {}).items():
            if not (draft / name).exists():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                (draft / name).write_bytes(content)
        write_both_forms(draft)
        _read_back(model, draft)


def _write_model(model: PreTrainedModel, directory: Path) -> None:
    settings = model.generation_config
    # Transformers refuses to write generation settings that contradict each other, and hub models come with such.
    model.generation_config = GenerationConfig()
    try:
        with no_progress_bar():
            model.save_pretrained(directory)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(directory / "generation_config.json")
    # safetensors writes for the owner alone. Many a mount knows no modes, and shows the same to everybody.
    with contextlib.suppress(OSError):
        mode = (directory / "config.json").stat().st_mode
        for path in directory.glob("*.safetensors"):
            path.chmod(mode)


def _read_back(model: PreTrainedModel, directory: Path) -> None:
    """InputError where what was written is not the model in memory."""
    state = model.state_dict()
    written, converted = set(), set()
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            # A stock model is written under the names, and in the parts, that its type's checkpoints have.
            for name, (now, made) in names_in(model, state, tensors.keys()).items():
                if now not in state or not (made or _same_bits(state[now], tensors.get_tensor(name))):
                    raise _not_the_model(f"the weight {name} was written otherwise")
                written.add(now)
                converted |= {now} if made else set()
    # One of several names of a shared tensor is enough.
    places = {state[name].data_ptr() for name in written}
    missing = [name for name, tensor in state.items() if tensor.numel() and tensor.data_ptr() not in places]
    if missing:
        raise _not_the_model(f"the weight {missing[0]} was not written")
    if _free_memory(model.device) < _SECOND_MODEL * parameter_bytes(model):
        _check_structure(model, directory)
    else:
        _check_loaded(model, directory, converted)


def _not_the_model(what: str) -> InputError:
    return InputError(f"what was written is not the model in memory: {what}; please report this")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(one, other)


def _check_structure(model: PreTrainedModel, directory: Path) -> None:
    with torch.device("meta"):
        again = auto_class(model.config).from_config(AutoConfig.from_pretrained(directory))
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (model, again)]
    if type(again) is not type(model) or shapes[0] != shapes[1]:
        raise _not_the_model("its config describes another")


def _check_loaded(model: PreTrainedModel, directory: Path, converted: Iterable[str]) -> None:
    """What the directory loads as: the class, the logits, and the weights that were written in parts."""
    with no_progress_bar():
        loads = auto_class(model.config)
        again, info = loads.from_pretrained(directory, dtype=model.dtype, output_loading_info=True)
    wrong = [f"{what.replace('_', ' ')} {sorted(keys)[0]}" for what, keys in info.items() if keys]
    if wrong or type(again) is not type(model):
        raise _not_the_model(", ".join(wrong) or f"it loads as a {type(again).__name__}")
    again.to(model.device)
    states = [one.state_dict() for one in (model, again)]
    other = next((name for name in sorted(converted) if not _same_bits(*(state[name] for state in states))), None)
    if other is not None:
        raise _not_the_model(f"the weight {other} was written otherwise")
    # A model that was cast computes with rotary tables that were cast; a loaded one makes them anew.
    for name, buffer in model.named_buffers():
        path, _, leaf = name.rpartition(".")
        holder = again.get_submodule(path)
        # Without the tables of kinds of layers that went.
        if leaf in holder._buffers:
            setattr(holder, leaf, getattr(holder, leaf).to(buffer.dtype))
    here, there = (_probe_logits(one) for one in (model, again))
    # Another attention implementation than the one in memory may serve the loaded model.
    tolerance = min(4096 * torch.finfo(model.dtype).eps, 0.05)
    scale = float(here[here.isfinite()].abs().max()) if bool(here.isfinite().any()) else 0.0
    if not torch.allclose(here, there, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
        raise _not_the_model(f"its logits are off by {float((here - there).abs().max()):.3g}")


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    """The logits [T, V] of a few tokens, float32, on the CPU."""
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device).remainder(text_config(model.config).vocab_size)
    with evaluation_mode(model):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float().cpu()


def _free_memory(device: torch.device) -> int:
    """Bytes that a second model may take; 0 where that cannot be told."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, AttributeError):
            return int(torch.get_device_module(device).mem_get_info(device)[0])
        return 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return 0


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
