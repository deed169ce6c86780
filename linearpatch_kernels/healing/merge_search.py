"""Where to merge and how much of each layer to keep: CoMe (arXiv 2510.15304), one merge after the other.

Every merge is decided on the model as the merges before it left it. It lies beside the healing, not in `merging`, since
a place may be chosen by the loss after its refit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import token_losses
from linearpatch_kernels.forward import PartialRun, Progress, Run, check_windows, residual_stream
from linearpatch_kernels.healing.merges import CandidateRefits, can_refit, check_refit
from linearpatch_kernels.merging.merge import Merge, check_mergeable, choose_units, gain_errors, merge_layers
from linearpatch_kernels.merging.plan import MergePlan, apply_merges, leaves
from linearpatch_kernels.merging.sensitivity import LayerScores, score_layers
from linearpatch_kernels.merging.settings import MergeSettings, check_settings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Scores that run the model run it on so many spans.
_SHORT_LIST = 8


def default_variant(model: PreTrainedModel, layers: int) -> str:
    """``come-block``; ``come-loss`` where no refit is possible, or no block down to ``layers`` is of one kind."""
    try:
        _allowed_spans(model, range(num_layers(model)), num_layers(model) - layers + 1, repeat=True)
    except InputError:
        return "come-loss"
    return "come-block" if can_refit(model) else "come-loss"


@own_state()
def plan_merging(
    model: PreTrainedModel,
    fit_windows: Tensor,
    heldout_windows: Tensor | None,
    settings: MergeSettings,
    *,
    plan: MergePlan | None = None,
    keep: Callable[[MergePlan], None] | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, MergePlan]:
    """Merge until ``settings.layers`` layers are left.

    Per merge one scoring pass over ``fit_windows`` [S, T] and, where the settings ask for losses, runs over
    ``heldout_windows`` [W, T] from states that all candidates share. Memory beyond the model: the forward pass, the
    merged layers, and W T d values per place whose candidates are run (one, or the short list); with the skip score
    ``refit`` 2 S T d per place more. The result is not refitted: that is for `healing.merges.refit_merges` to do.

    Args:
        plan: to go on from; what it holds is applied, not decided again. Its settings and origin are kept.
        keep: called with the plan after every merge, for whoever wants to go on after a kill.

    Returns:
        The merged model (``model`` itself is not changed) and its plan.

    Raises:
        InputError: settings, windows or a plan that do not fit the model (before any pass), no layers left that may
            be merged, activations that are not finite.
    """
    check_settings(settings, num_layers(model))
    if settings.runs_the_model and heldout_windows is None:
        raise InputError("these settings choose by held-out loss: give held-out windows, or other settings")
    for windows in (fit_windows, heldout_windows):
        if windows is not None:
            check_windows(model, windows)
    if settings.refits:
        check_refit(model, fit_windows)
    plan = MergePlan(num_layers(model)) if plan is None else plan
    if plan.layers < settings.layers:
        raise InputError(f"the plan to go on from leaves {plan.layers} layers and {settings.layers} are asked for")
    run = Run(batch_size, progress=progress)
    current = apply_merges(model, plan)
    while num_layers(current) > settings.layers:
        most = num_layers(current) - settings.layers + 1
        width = most if settings.width is None else min(settings.width, most)
        spans = _allowed_spans(current, plan.tree, width, settings.repeat)
        scores = score_layers(current, fit_windows, width=width, run=run)
        chooser = _Chooser(model, current, scores, fit_windows, heldout_windows, settings, plan.tree, run)
        merge, record = chooser.choose(spans)
        current = merge_layers(current, merge)
        plan = plan.extended(merge, record)
        if keep is not None:
            keep(plan)
    return current, plan


def influence_shares(influence: Sequence[float], power: float = 1.0, floor: float = 0.0) -> list[float]:
    """Each layer's share in proportion to its influence to the ``power``; the largest at least ``floor``.

    Layers that all change nothing share equally. Raising the largest to the floor scales the others down.
    """
    if sum(influence) <= 0:
        return [1 / len(influence)] * len(influence)
    try:
        powers = [(max(value, 0.0) / sum(influence)) ** power for value in influence]
        if not any(powers):
            # Every share of the sum is too small for so large a power; a share of the largest is not.
            powers = [(max(value, 0.0) / max(influence)) ** power for value in influence]
    except (OverflowError, ZeroDivisionError) as error:
        raise InputError(f"an influence to the power of {power} is beyond all numbers: give another `power`") from error
    shares = [value / sum(powers) for value in powers]
    largest = max(range(len(shares)), key=lambda i: shares[i])
    if shares[largest] >= floor:
        return shares
    others = 1 - shares[largest]
    return [floor if i == largest else share * (1 - floor) / others for i, share in enumerate(shares)]


def search_share(loss: Callable[[int, bool], float], low: int, high: int) -> tuple[int, dict[int, float]]:
    """The integer from ``low`` to ``high`` with the lowest loss, from coarse to fine, and the losses found on the way.

    Five points over the range by ``loss(point, True)``, a quick estimate; from the best of them on ever smaller steps
    by ``loss(point, False)``: nine to ten calls in a range of 21 points, five of them quick (`most_looks`). It finds
    the lowest point where the loss falls towards it from both sides at the scale of a coarse step.
    """
    spacing = (high - low) / 4
    rough = {point: loss(point, True) for point in sorted({low + round(i * spacing) for i in range(5)})}
    best = min(rough, key=lambda point: rough[point])
    found = {best: loss(best, False)}
    step = _first_step(low, high)
    while step:
        for point in (best - step, best + step):
            if low <= point <= high and point not in found:
                found[point] = loss(point, False)
        best = min(found, key=lambda point: (found[point], point))
        step //= 2
    return best, found


def _first_step(low: int, high: int) -> int:
    return max(1, round((high - low) / 4) // 2)


def most_looks(low: int, high: int) -> int:
    """How many losses `search_share` asks for at the most: five, the best of them again, and two for every step."""
    return 6 + 2 * _first_step(low, high).bit_length()


class PrefixLosses:
    """Held-out losses of models that differ from ``model`` only from some depth on: what lies before is run once.

    Memory: the residual stream of all windows, W T d values, at each of ``depths``.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, depths: Sequence[int], batch_size: int = 1) -> None:
        self._windows = windows.split(batch_size)
        with torch.no_grad(), evaluation_mode(model):
            self._states = [residual_stream(model, batch, depths) for batch in self._windows]

    @torch.no_grad()
    def __call__(self, candidate: PreTrainedModel, depth: int, share_of_windows: float = 1.0) -> float:
        """Mean loss in nats of ``candidate`` over the first windows; it must equal the model before ``depth``.

        Infinity where its logits are not finite: such a candidate is never chosen.
        """
        count = max(1, math.ceil(share_of_windows * len(self._windows)))
        suffix = PartialRun(candidate, depth, "logits")
        total, tokens = 0.0, 0
        with evaluation_mode(candidate):
            for batch, states in zip(self._windows[:count], self._states, strict=False):
                losses = token_losses(suffix(states[depth]), batch)
                if not bool(losses.isfinite().all()):
                    return math.inf
                total += float(losses.double().sum())
                tokens += losses.numel()
        return total / tokens


# How many of the held-out windows a first look at a share takes.
_QUICK = 0.25


Measure = Callable[[Span, Sequence[float], float], float]
"""Held-out loss with a span merged at some shares, over that part of the windows."""


@dataclasses.dataclass(frozen=True)
class _Chooser:
    """One decision: the next merge of ``model``, which the merges of ``tree`` made of ``dense``."""

    dense: PreTrainedModel
    model: PreTrainedModel
    scores: LayerScores
    fit_windows: Tensor
    windows: Tensor | None
    settings: MergeSettings
    tree: list[Any]
    run: Run

    def choose(self, spans: Sequence[Span]) -> tuple[Merge, dict[str, Any]]:
        settings = self.settings
        found = settings.place_score.function(self.scores)
        ranking = {span: found[span] for span in spans}
        measure = None
        if settings.place_score.candidate is not None:
            short = sorted(spans, key=lambda span: ranking[span], reverse=True)[:_SHORT_LIST]
            losses = self._prefix_losses(short)
            measure = self._measure(losses, short)
            ranking = {span: -self._place_loss(losses, measure, span) for span in self._reported(short)}
        span = max(ranking, key=lambda one: ranking[one])
        _check_some_finite(ranking.values())
        record: dict[str, Any] = {
            "score": settings.skip_score,
            "ranking": {
                str(one): value
                for one, value in sorted(ranking.items(), key=lambda item: item[1], reverse=True)
                if math.isfinite(value)
            },
            "influence": [float(value) for value in self.scores.influence[span.start : span.end]],
        }
        shares = self._influence_shares(span)
        if settings.posterior:
            measure = measure or self._measure(self._prefix_losses([span]), [span])
            shares, tried = self._searched_shares(measure, span)
            _check_some_finite(tried.values())
            record["losses"] = {share: value for share, value in tried.items() if math.isfinite(value)}
        merge = choose_units(self.scores, span, shares, settings.rule)
        record["gain_errors"] = gain_errors(self.model, merge)
        return merge, record

    def _prefix_losses(self, spans: Sequence[Span]) -> PrefixLosses:
        assert self.windows is not None  # plan_merging checks it
        # No batch is more than a first look is to take.
        batch_size = min(self.run.batch_size, math.ceil(_QUICK * len(self.windows)))
        return PrefixLosses(self.model, self.windows, sorted({span.start for span in spans}), batch_size)

    def _measure(self, losses: PrefixLosses, spans: Sequence[Span]) -> Measure:
        if not self.settings.refits:
            return lambda span, shares, part: losses(self._merged(span, shares), span.start, part)
        ends = {span: leaves(self.tree[span.end - 1])[-1] + 1 for span in spans}
        refitted = CandidateRefits(self.dense, self.model, self.fit_windows, ends)
        return lambda span, shares, part: losses(refitted(self._merged(span, shares), span), span.start, part)

    def _reported(self, spans: Sequence[Span]) -> Iterator[Span]:
        for done, span in enumerate(spans):
            self.run.report("choosing the place", done, len(spans))
            yield span
        self.run.report("choosing the place", len(spans), len(spans))

    def _place_loss(self, losses: PrefixLosses, measure: Measure, span: Span) -> float:
        if self.settings.place_score.candidate == "removed":
            kept = [layer for layer in range(num_layers(self.model)) if layer not in range(*span)]
            return losses(keep_layers(self.model, kept), span.start)
        return measure(span, self._influence_shares(span), 1.0)

    def _merged(self, span: Span, shares: Sequence[float]) -> PreTrainedModel:
        return merge_layers(self.model, choose_units(self.scores, span, shares, self.settings.rule))

    def _influence_shares(self, span: Span) -> list[float]:
        count = len(leaves(self.tree[span.start : span.end]))
        influence = self.scores.influence[span.start : span.end].tolist()
        # The floor is shared out over the merges that a group of so many layers takes, as in the public code.
        floor = self.settings.floor ** (1 / (count - 1))
        if not self.settings.posterior:
            return influence_shares(influence, self.settings.power, floor)
        first, last = influence_shares([influence[0], influence[-1]], self.settings.power, floor)
        return _of_the_ends(span, first, last)

    def _searched_shares(self, measure: Measure, span: Span) -> tuple[list[float], dict[str, float]]:
        grid = self.settings.grid
        low = math.ceil(self.settings.least_share * grid - 1e-9)

        def shares(point: int) -> list[float]:
            return _of_the_ends(span, point / grid, 1 - point / grid)

        low, high = min(low, grid // 2), max(grid - low, grid // 2)
        looks = itertools.count()

        def loss(point: int, quick: bool) -> float:
            self.run.report("choosing the shares", next(looks), most_looks(low, high))
            # Beside a refit a look at a few windows saves little, and refits leave smaller differences to see.
            few = quick and not self.settings.refits
            return measure(span, shares(point), _QUICK if few else 1.0)

        best, found = search_share(loss, low, high)
        return shares(best), {f"{point / grid:g}": value for point, value in sorted(found.items())}


def _check_some_finite(losses: Iterable[float]) -> None:
    if not any(map(math.isfinite, losses)):
        raise InputError(
            "with any of the merges that were tried the logits are not finite: load the model in bfloat16 or float32, "
            "or check its weights"
        )


def _of_the_ends(span: Span, first: float, last: float) -> list[float]:
    return [first, *[0.0] * (span.length - 2), last]


def _allowed_spans(model: PreTrainedModel, tree: Sequence[Any], width: int, repeat: bool) -> list[Span]:
    spans, reason = [], None
    for start in range(num_layers(model) - width + 1):
        span = Span(start, start + width)
        if not repeat and any(isinstance(node, list) for node in tree[span.start : span.end]):
            continue
        try:
            check_mergeable(model, span)
        except InputError as error:
            reason = error
            continue
        spans.append(span)
    if not spans:
        because = f" ({reason})" if reason is not None else " without merging a merged layer again"
        raise InputError(f"no {width} neighbours of the {num_layers(model)} layers left can be merged{because}")
    return spans
