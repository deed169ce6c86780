"""Running a model, or a part of it, on windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder_layers, partial_decoder

#: Called with what is being done, how many windows are done, and how many there are.
Progress = Callable[[str, int, int], None]
#: A Transformers model, or anything that maps token ids [B, T] to logits [B, T, V] (or to an object with `.logits`).
Model = nn.Module | Callable[[Tensor], Any]


def check_windows(model: Any, windows: Tensor) -> None:
    """Raise InputError where windows are malformed, or hold ids or positions that the model does not have.

    The model's ``config`` tells, if there is one: what has just that will do.
    """
    if not isinstance(windows, Tensor):
        raise InputError(
            f"windows must be a tensor of token ids [count >= 1, length >= 2], not {type(windows).__name__}"
        )
    whole = not windows.is_floating_point() and not windows.is_complex() and windows.dtype != torch.bool
    if windows.dim() != 2 or not whole or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows must be token ids [count >= 1, length >= 2], not {windows.dtype} {[*windows.shape]}")
    if int(windows.min()) < 0:
        raise InputError(f"windows must be token ids, and {int(windows.min())} is none")
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise InputError(
            f"the text has token id {int(windows.max())} but the model's vocabulary ends at {vocabulary - 1}: "
            "the tokenizer does not belong to this model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise InputError(f"windows of {windows.shape[1]} tokens exceed the model's {positions} positions: shorten them")


def batches(
    windows: Tensor, batch_size: int, description: str, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first window, windows ``[<= batch_size, T]``), reporting each batch once it has been worked on."""
    check_batch_size(batch_size)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        yield start, batch
        if progress:
            progress(description, start + len(batch), len(windows))


def check_batch_size(batch_size: int) -> None:
    """InputError for a number of windows per forward pass that no tensor can be split into."""
    if not 1 <= batch_size < 1 << 31:
        raise InputError(f"the batch size must be a number from 1 to {(1 << 31) - 1}, not {batch_size}")


def model_logits(model: Model, windows: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of token ids ``[B, T]``, without a key/value cache and without gradients."""
    # Not inference_mode: what a module caches on its first call must stay usable in training.
    with torch.no_grad():
        if isinstance(model, nn.Module):
            windows = windows.to(model_device(model))
            output = model(input_ids=windows, use_cache=False) if hasattr(model, "config") else model(windows)
        else:
            output = model(windows)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def model_device(model: nn.Module) -> torch.device:
    """Where the model's input belongs: the device of its first parameter (its embedding), or the one that accelerate
    brings it to for a call; the CPU where there is none."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type == "meta":
        hooks = (vars(module).get("_hf_hook") for module in model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "meta"))
    return torch.device("cpu") if parameter is None else parameter.device


def residual_stream(model: nn.Module, ids: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream [B, T, d] at each of ``depths`` for token ids [B, T]; no layer behind the last one is run."""
    last = max(depths)
    view = partial_decoder(model, 0, last, embed=True)
    found: dict[int, Tensor] = {}

    def keep(depth: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[depth] = args[0] if args else kwargs["hidden_states"]

        return hook

    layers = decoder_layers(model)
    handles = [
        layers[depth].register_forward_pre_hook(keep(depth), with_kwargs=True) for depth in depths if depth < last
    ]
    try:
        found[last] = view(input_ids=ids.to(model_device(model)), use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return found
