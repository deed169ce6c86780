"""Perplexity over windows of tokens, and how any model is asked for logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.torch_state import faster_float32_products
from linearpatch_kernels.torch_internals import accelerate_hook

#: Called with what is being done, how many windows are done, and how many there are.
Progress = Callable[[str, int, int], None]
#: A Transformers model, or anything that maps token ids [B, T] to logits [B, T, V] (or to an object with `.logits`).
Model = nn.Module | Callable[[Tensor], Any]

# Logits upcast at a time: 16 MB of float32, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 22


def perplexity(model: Model, windows: Tensor, *, batch_size: int = 1, progress: Progress | None = None) -> float:
    """exp(sum of the negative log-likelihoods / number of predicted tokens), over non-overlapping windows.

    Every window stands alone: tokens 1 .. T-1 are predicted from the tokens before them in the same window, token 0 is
    only context. So ``[W, T]`` windows are W·(T-1) predictions, each weighing the same. Logits are raised to float32,
    the sum is float64. This is the usual WikiText number for T-token segments with a stride of T; a sliding window
    with overlap gives lower numbers.

    Equivalent to ``torch.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))`` over all
    windows at once.

    Args:
        model: see :data:`Model`; called in eval mode, without gradients.
        windows: token ids, LongTensor ``[W, T]``, T >= 2; see :func:`linearpatch_kernels.text.token_windows`.
        batch_size: windows per forward pass; the result does not depend on it beyond rounding.

    Raises:
        InputError: windows that do not fit the model, or logits that are not finite.
    """
    check_windows(model, windows)
    total = 0.0
    with evaluation_mode(model):
        for start, batch in batches(windows, batch_size, "perplexity", progress):
            losses = token_losses(model_logits(model, batch), batch)
            require_finite(losses, start, "the model")
            total += float(losses.double().sum())
    return exp_loss(total / (windows.shape[0] * (windows.shape[1] - 1)))


def exp_loss(loss: float) -> float:
    """exp, and inf where that is beyond float64."""
    return math.exp(loss) if loss < 709 else math.inf


def token_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """The negative log-likelihood of every predicted token, in nats.

    Args:
        logits: ``[B, T, V]``, any float dtype.
        windows: token ids ``[B, T]``.

    Returns:
        ``[B, T-1]`` in float32 (float64 for float64 logits): ``-log_softmax(l)[target]`` with l the logits raised to
        that dtype, as exact however far the logits are from 0. Memory beside the result: at most 16 MB (or one row),
        whatever T and V.
    """
    targets = windows[:, 1:].to(logits.device)

    def loss(rows: Tensor, index: tuple[int, slice]) -> Tensor:
        return -rows.log_softmax(-1).gather(-1, targets[index].unsqueeze(-1)).squeeze(-1)

    return over_predictions(loss, logits)


def over_predictions(function: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """Apply ``function(rows, ..., index)`` to the logits of the predicted positions, a bounded chunk at a time.

    Args:
        function: maps chunks ``[n, V]`` (one per tensor of logits, float32 or float64) and their index
            ``(window, slice of positions)`` to ``[n]``.
        logits: tensors ``[B, T, V]``; the last position predicts nothing inside the window and is left out.

    Returns:
        ``[B, T-1]``.
    """
    batch, length, vocabulary = logits[0].shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    windows = []
    for b in range(batch):
        slices = [slice(i, min(i + step, length - 1)) for i in range(0, length - 1, step)]
        windows.append(torch.cat([function(*(_raised(t[b, s]) for t in logits), (b, s)) for s in slices]))
    return torch.stack(windows)


def _raised(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


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
        hooks = map(accelerate_hook, model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "meta"))
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def evaluation_mode(*models: Model) -> Iterator[None]:
    """`eval_mode`, and products of float32 by the library that is the fastest here (`faster_float32_products`)."""
    with eval_mode(*models), faster_float32_products():
        yield


@contextmanager
def eval_mode(*models: Model) -> Iterator[None]:
    """Eval mode for the modules among ``models``; afterwards they are in the mode they were in."""
    training = [m for m in models if isinstance(m, nn.Module) and m.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


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


def require_finite(values: Tensor, first_window: int, whose: str) -> None:
    """Raise InputError naming the first window and position where ``values [B, T-1]`` are not finite."""
    if bool(values.isfinite().all()):
        return
    window, position = (int(i) for i in (~values.isfinite()).nonzero()[0])
    raise InputError(
        f"{whose} gives logits that are not finite (window {first_window + window}, position {position}): "
        "load it in bfloat16 or float32, and check its weights and patches"
    )
