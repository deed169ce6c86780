"""What a merge changed in the stream, taken back in closed form: by a patch behind the merged layer, or within it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import joint_statistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import compare_quality
from linearpatch_kernels.forward import PartialRun, Stream, entering, residual_stream
from linearpatch_kernels.merging.plan import leaves
from linearpatch_kernels.modeling.families import (
    decoder_layers,
    keep_layers,
    merge_tree,
    num_layers,
    sublayers,
)
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.pruning.closed_forms import SHRINKAGE
from linearpatch_kernels.pruning.fits import DEFAULT_RANK, fit_patch
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

REFIT = "refit"
"""The name of `refit_merges` beside those of the patches."""

REFIT_WINDOWS = 4
"""So many windows a refit needs: some to fit on, and others to choose its shrinkage on."""

# Ridges that are tried, relative to each neuron's own second moment.
_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_EPSILON = 1e-12


@own_state()
def heal_merges(
    dense: PreTrainedModel,
    merged: PreTrainedModel,
    windows: Tensor,
    fit: str,
    *,
    rank: int = DEFAULT_RANK,
) -> PreTrainedModel:
    """The merged model with a patch behind every merged layer.

    The patch maps the merged model's stream there to the dense model's behind the last layer that the merged one
    stands for, over token ``windows`` [W, T]; the patches are fitted from the front on, each with those before it in
    place. Both models run once, from one merged layer to the next; memory: the streams of both, 2 W T d values.

    Args:
        merged: made from ``dense`` by merges alone: the trees in their configs tell which.
        fit, rank: as for :func:`~linearpatch_kernels.pruning.fits.fit_patch`.

    Raises:
        InputError: a model without merged layers or of another depth than ``dense``, or what the fit raises.
    """
    places = _merged_places(dense, merged)
    found, wanted = Stream(windows), Stream(windows)
    for index, end in places:
        found.advance(merged, index + 1)
        wanted.advance(dense, end)
        pairs = zip(found.states, wanted.states, strict=True)
        patch = fit_patch(joint_statistics(pairs, f"the joint behind merged layer {index}"), fit, rank=rank)
        if patch is not None:
            merged = patched_model(merged, {index + 1: patch})
    return merged


@own_state()
def refit_merges(dense: PreTrainedModel, merged: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
    """The merged model with new down projections W in its merged layers, by least squares; the same architecture.

    With a_t [n] the input of W at token t, r_t what the merged layer's output lacks to the dense model's stream y_t
    behind the last layer that it stands for: ``W += SHRINKAGE * argmin_D sum_t |r_t - D a_t|^2 / |y_t|^2 + ridge *
    sum_c G_cc |D_c|^2``, G the weighted moments of a, the shrinkage that of the patches (`fits.shrunk`). The ridge
    with the lowest error on the last quarter of token ``windows`` [W, T] is taken, none where that is not below doing
    nothing. From the front on, each layer with those before it in place. Both models run once; memory: the streams of
    both, 2 W T d values, and a few n x n matrices in float64.

    Raises:
        InputError: a model without merged layers or of another depth than ``dense``, one that norms what comes out of
            W (Gemma), fewer than four windows.
    """
    places = _merged_places(dense, merged)
    check_refit(merged, windows)
    refitted = keep_layers(merged, range(num_layers(merged)))
    found, wanted = Stream(windows), Stream(windows)
    for index, end in places:
        found.advance(refitted, index)
        wanted.advance(dense, end)
        _refit_layer(refitted, index, zip(found.states, wanted.states, strict=True))
    return refitted


def too_little_to_refit(model: PreTrainedModel, windows: Tensor) -> str | None:
    """A sentence where a down projection has more inputs than there are tokens to refit it on, or None.

    It can be refitted, since its ridge is chosen on other tokens, but that may win back little.
    """
    half = sublayers(model)[1]
    projection: Any = decoder_layers(model)[0].get_submodule(half.output.projection)
    inputs, (count, length) = projection.weight.shape[1], windows.shape
    if (count - count // 4) * length >= inputs:
        return None
    return (
        f"{count} windows of {length} tokens are little text to refit {half.output.projection} and its {inputs} inputs "
        f"on: it may win back little; {math.ceil(inputs * 4 / 3 / length)} windows would do (`samples`)"
    )


def lowers_the_loss(merged: PreTrainedModel, healed: PreTrainedModel, windows: Tensor) -> bool:
    """Whether the loss on held-out token ``windows`` [W, T] is less with healing; not where its logits are not finite.

    Where it is the same, the model as it was merged is the simpler one.
    """
    found = compare_quality({"merged": merged, "healed": healed}, windows, noted=lambda _: None)
    return "healed" in found and ("merged" not in found or found["healed"].loss < found["merged"].loss)


def can_refit(model: nn.Module) -> bool:
    """Whether what comes out of the down projections goes to the stream as it is (in Gemma it is normed)."""
    return not sublayers(model)[1].shared_norms


def check_refit(model: nn.Module, windows: Tensor) -> None:
    """InputError where :func:`refit_merges` is not for this model or needs more windows."""
    if not can_refit(model):
        projection = sublayers(model)[1].output.projection
        raise InputError(f"what comes out of {projection} is normed here: heal with a patch, not {REFIT}")
    if len(windows) < REFIT_WINDOWS:
        raise InputError(
            f"{len(windows)} windows are too few to fit on and to choose on: give at least {REFIT_WINDOWS}"
        )


class CandidateRefits:
    """What :func:`refit_merges` makes of a merged layer, for many candidates for one merge of ``model``.

    The streams that enter and that should leave the candidates are run once. Memory: over token ``windows`` [W, T],
    W T d values at every start of a span and at every depth asked for.
    """

    def __init__(self, dense: PreTrainedModel, model: PreTrainedModel, windows: Tensor, ends: dict[Span, int]) -> None:
        """``ends``: span of ``model``'s layers -> the depth of ``dense`` behind the last of them."""
        check_refit(model, windows)
        self._ends = ends
        starts = sorted({span.start for span in ends})
        with torch.no_grad(), evaluation_mode(dense, model):
            self._entering = [residual_stream(model, window, starts) for window in windows.split(1)]
            self._leaving = [residual_stream(dense, window, sorted(set(ends.values()))) for window in windows.split(1)]

    def __call__(self, candidate: PreTrainedModel, span: Span) -> PreTrainedModel:
        """``candidate``, ``model`` with ``span`` merged, with that layer refitted."""
        refitted = keep_layers(candidate, range(num_layers(candidate)))
        end = self._ends[span]
        pairs = zip(self._entering, self._leaving, strict=True)
        _refit_layer(refitted, span.start, ((before[span.start][0], after[end][0]) for before, after in pairs))
        return refitted


def _refit_layer(model: PreTrainedModel, index: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """A new down projection in a layer, given per window the stream entering it and the one that should leave it."""
    projection: Any = decoder_layers(model)[index].get_submodule(sublayers(model)[1].output.projection)
    layer = PartialRun(model, index, index + 1)
    windows = list(pairs)
    held = len(windows) // 4
    change = _least_squares_change(
        _output_moments(layer, projection, windows[:-held]), _output_moments(layer, projection, windows[-held:])
    )
    if change is not None:
        weight = projection.weight.detach()
        new = (weight.double() + SHRINKAGE * change.to(weight.device)).to(weight.dtype)
        projection.weight = nn.Parameter(new, requires_grad=projection.weight.requires_grad)


class _OutputMoments(NamedTuple):
    """Sums over the tokens, weighted by 1 / |y|^2: a a^T [n, n], a r^T [n, d] and |r|^2, in float64."""

    gram: Tensor
    cross: Tensor
    error: Tensor

    def error_with(self, change: Tensor) -> float:
        """The sum of |r - D a|^2 / |y|^2 for D [d, n]."""
        return float(self.error - 2 * (change.T * self.cross).sum() + (change @ self.gram * change).sum())


def _least_squares_change(fit: _OutputMoments, held: _OutputMoments) -> Tensor | None:
    """D [d, n], or None where no ridge makes the held-out error less."""
    errors = {ridge: held.error_with(_ridge_solution(fit, ridge)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if not errors[best] < float(held.error):
        return None
    return _ridge_solution(_OutputMoments(*(one + other for one, other in zip(fit, held, strict=True))), best)


def _ridge_solution(moments: _OutputMoments, ridge: float) -> Tensor:
    own = moments.gram.diagonal().clamp_min(_EPSILON * float(moments.gram.diagonal().max()) or _EPSILON)
    solution: Tensor = torch.linalg.solve(moments.gram + torch.diag(ridge * own), moments.cross)
    return solution.T


@torch.no_grad()
def _output_moments(layer: PartialRun, projection: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> _OutputMoments:
    """Of a run of one layer, over windows: the stream entering it and the one that should leave it, [T, d]."""
    inputs: list[Tensor] = []
    sums: list[Tensor] = []
    with evaluation_mode(layer), entering([(projection, inputs.append)]):
        for state, wanted in pairs:
            leaving = layer(state.unsqueeze(0))[0]
            a, y = inputs.pop()[0].double(), wanted.to(leaving.device, torch.float64)
            lacking = y - leaving.double()
            weighted = a / y.square().sum(dim=-1, keepdim=True).clamp_min(_EPSILON)
            error = lacking.square().sum(dim=-1) / y.square().sum(dim=-1).clamp_min(_EPSILON)
            part = [weighted.T @ a, weighted.T @ lacking, error.sum()]
            sums = [one + other for one, other in zip(sums, part, strict=True)] if sums else part
    return _OutputMoments(*sums)


def _merged_places(dense: PreTrainedModel, merged: PreTrainedModel) -> list[tuple[int, int]]:
    """The merged layers, each with the depth of ``dense`` behind the last layer that it stands for."""
    before, after = merge_tree(dense), merge_tree(merged)
    ends = {leaves(node)[-1]: depth for depth, node in enumerate(before, 1)}
    places = [
        (index, ends[leaves(node)[-1]])
        for index, node in enumerate(after)
        if node not in before and leaves(node)[-1] in ends
    ]
    if not places or leaves(before) != leaves(after):
        raise InputError("the model is not the dense one with layers merged: give both as merge_layers left them")
    return places
