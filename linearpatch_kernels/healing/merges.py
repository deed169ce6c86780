"""What a merge changed in the stream, won back in closed form: by a patch behind the merged layer, or in weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import joint_statistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, Run, Stream, residual_stream
from linearpatch_kernels.healing.refit import Refit, RefitRow, Step, refit, refit_output, steps_of
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.merging.plan import leaves
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, merge_tree, norm_eps, num_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.pruning.closed_forms import SHRINKAGE
from linearpatch_kernels.pruning.fits import DEFAULT_RANK, fit_patch, needs_normed_moments
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

REFIT_WINDOWS = 4
"""So many windows a refit needs: some to fit on, and others to choose its ridge on."""

# Nothing else is judged on the windows that choose the ridge, so what is kept is fitted on them, too; and the products
# are what they were in 0.1.0, whose results stay.
_SETTINGS = RefitSettings(shrinkage=SHRINKAGE, precision=torch.float64, on_all=True, final_norm=False)


@own_state()
def heal_merges(
    dense: PreTrainedModel,
    merged: PreTrainedModel,
    windows: Tensor,
    heal: str,
    *,
    fit: str,
    rank: int = DEFAULT_RANK,
    behind: int = 0,
    done: Mapping[str, Tensor] | None = None,
    keep: Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None] | None = None,
    run: Run = PLAIN,
) -> Refit:
    """The merged model, healed by a way of `HEALS`: `patch_merges`, `refit_merges`, or one after the other.

    Args:
        dense, merged, windows, fit, rank, behind, done, keep: as for these two. A patch behind a merged layer takes the
            place of its new down projection.

    Raises:
        InputError: an unknown way, or what these two raise.
    """
    way = HEALS.named(heal)
    student = patch_merges(dense, merged, windows, fit, rank=rank) if way.patched else merged
    if not way.refitted:
        return Refit(student, [])
    return refit_merges(dense, student, windows, behind=behind, in_front=not way.patched, done=done, keep=keep, run=run)


@own_state()
def patch_merges(
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
    eps = norm_eps(dense) if needs_normed_moments(fit) else None
    found, wanted = Stream(windows), Stream(windows)
    for index, span in enumerate(merged_from(dense, merged)):
        if span.length == 1:
            continue
        found.advance(merged, index + 1)
        wanted.advance(dense, span.end)
        pairs = zip(found.states, wanted.states, strict=True)
        joint = joint_statistics(pairs, f"the joint behind merged layer {index}", eps=eps)
        patch = fit_patch(joint, fit, rank=rank)
        if patch is not None:
            merged = patched_model(merged, {index + 1: patch})
    return merged


@own_state()
def refit_merges(
    dense: PreTrainedModel,
    merged: PreTrainedModel,
    windows: Tensor,
    *,
    behind: int = 0,
    in_front: bool = True,
    done: Mapping[str, Tensor] | None = None,
    keep: Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None] | None = None,
    run: Run = PLAIN,
) -> Refit:
    """The merged model with new weights in its merged layers and in ``behind`` layers behind each; the same
    architecture.

    `healing.refit.refit` has the equations. A merged layer gets a new down projection, toward the dense model's stream
    behind the last layer that it stands for; of the layers behind, all that reads the stream or writes to it. The last
    quarter of token ``windows`` [W, T] chooses the ridges, and the changes are fitted on all.

    Args:
        merged: made from ``dense`` by merges alone (the trees in their configs tell which), and patched perhaps.
        in_front: whether the merged layers are fitted, too; False where a patch behind them does what that would do.
        done, keep: as for `refit`.

    Raises:
        InputError: a model without merged layers or of another depth than ``dense``, one that norms what comes out of
            the down projection (Gemma) with ``in_front``, fewer than four windows.
    """
    spans = merged_from(dense, merged)
    check_refit(merged, windows, in_front=in_front)
    steps = steps_of(spans, num_layers(dense), behind, in_front=in_front)
    held = _heldout(windows)
    return refit(
        dense,
        merged,
        steps,
        windows[:-held],
        windows[-held:],
        settings=_SETTINGS,
        done=done,
        keep=keep,
        run=run,
    )


def _heldout(windows: Tensor) -> int:
    """How many of the windows, the last ones, choose the ridges."""
    return len(windows) // 4


def too_little_to_refit(model: PreTrainedModel, windows: Tensor) -> str | None:
    """A sentence where a down projection has more inputs than there are tokens to refit it on, or None.

    It can be refitted, since its ridge is chosen on other tokens, but that may win back little.
    """
    half = sublayers(model)[1]
    projection: Any = decoder_layers(model)[0].get_submodule(half.output.projection)
    inputs, (count, length) = projection.weight.shape[1], windows.shape
    if (count - _heldout(windows)) * length >= inputs:
        return None
    return (
        f"{count} windows of {length} tokens are little text to refit {half.output.projection} and its {inputs} inputs "
        f"on: it may win back little; {math.ceil(inputs * 4 / 3 / length)} windows would do (`samples`)"
    )


def can_refit(model: nn.Module) -> bool:
    """Whether what comes out of the down projections goes to the stream as it is (in Gemma it is normed)."""
    return sublayers(model)[1].output_norm is None


def check_refit(model: nn.Module, windows: Tensor, *, in_front: bool = True) -> None:
    """InputError where :func:`refit_merges` is not for this model or needs more windows."""
    if in_front and not can_refit(model):
        projection = sublayers(model)[1].output.projection
        raise InputError(f"what comes out of {projection} is normed here: heal with a patch, not refit")
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
        self._ends, self._held = ends, _heldout(windows)
        starts = sorted({span.start for span in ends})
        with torch.no_grad(), evaluation_mode(dense, model):
            self._entering = [residual_stream(model, window, starts) for window in windows.split(1)]
            self._leaving = [residual_stream(dense, window, sorted(set(ends.values()))) for window in windows.split(1)]

    def __call__(self, candidate: PreTrainedModel, span: Span) -> PreTrainedModel:
        """``candidate``, ``model`` with ``span`` merged, with that layer refitted."""
        refitted = keep_layers(candidate, range(num_layers(candidate)))
        entering = [states[span.start][0] for states in self._entering]
        leaving = [states[self._ends[span]][0] for states in self._leaving]
        refit_output(refitted, span.start, entering, leaving, self._held, _SETTINGS)
        return refitted


def merged_from(dense: PreTrainedModel, merged: PreTrainedModel) -> list[Span]:
    """Per layer of ``merged`` the layers of ``dense`` that it was made of.

    Raises:
        InputError: it is not ``dense`` with layers merged.
    """
    before, after = merge_tree(dense), merge_tree(merged)
    depths = {leaves(node)[-1]: depth for depth, node in enumerate(before, 1)}
    ends = [depths[last] for last in (leaves(node)[-1] for node in after) if last in depths]
    if before == after or leaves(before) != leaves(after) or len(ends) < len(after):
        raise InputError("the model is not the dense one with layers merged: give both as merge_layers left them")
    return [Span(*ends) for ends in itertools.pairwise([0, *ends])]
