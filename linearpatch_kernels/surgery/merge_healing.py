"""A patch behind a merged layer: what the merge changed in the stream, taken back in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span, residual_stream, stream_statistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import evaluation_mode
from linearpatch_kernels.modeling.families import merge_tree, num_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.surgery.fitting import DEFAULT_RANK, fit_patch
from linearpatch_kernels.surgery.merge_plan import leaves


def heal_merges(
    dense: PreTrainedModel,
    merged: PreTrainedModel,
    windows: Tensor,
    fit: str,
    *,
    rank: int = DEFAULT_RANK,
    last_only: bool = False,
) -> PreTrainedModel:
    """The merged model with a patch behind every merged layer (or behind the last of them alone).

    The patch maps the merged model's stream there to the dense model's behind the last layer that the merged one
    stands for, over token ``windows`` [W, T]; the patches are fitted from the front on, each with those before it in
    place. Two partial passes per patch; one window's streams are held at a time.

    Args:
        merged: made from ``dense`` by merges alone: its config holds the tree.
        fit, rank: as for :func:`~linearpatch_kernels.surgery.fitting.fit_patch`.

    Raises:
        InputError: a model without merged layers or of another depth than ``dense``, or what the fit raises.
    """
    tree = merge_tree(merged)
    places = [index for index, node in enumerate(tree) if isinstance(node, list)]
    if not places or leaves(tree) != list(range(num_layers(dense))):
        raise InputError("the model is not the dense one with layers merged: give both as merge_layers left them")
    for index in places[-1:] if last_only else places:
        depths = index + 1, leaves(tree[index])[-1] + 1
        statistics = stream_statistics(_streams(merged, dense, windows, *depths))
        patch = fit_patch(statistics, Span(0, 1), fit, rank=rank)
        if patch is not None:
            merged = patched_model(merged, {index + 1: patch})
    return merged


def _streams(
    merged: PreTrainedModel, dense: PreTrainedModel, windows: Tensor, depth: int, dense_depth: int
) -> Iterator[tuple[Tensor, Tensor]]:
    with torch.no_grad(), evaluation_mode(merged, dense):
        for window in windows.split(1):
            yield (
                residual_stream(merged, window, [depth])[depth][0],
                residual_stream(dense, window, [dense_depth])[dense_depth][0],
            )
