"""Perplexity over windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import Model, Progress, batches, check_windows, model_logits
from linearpatch_kernels.torch_state import evaluation_mode

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


def require_finite(values: Tensor, first_window: int, whose: str) -> None:
    """Raise InputError naming the first window and position where ``values [B, T-1]`` are not finite."""
    if bool(values.isfinite().all()):
        return
    window, position = (int(i) for i in (~values.isfinite()).nonzero()[0])
    raise InputError(
        f"{whose} gives logits that are not finite (window {first_window + window}, position {position}): "
        "load it in bfloat16 or float32, and check its weights and patches"
    )
