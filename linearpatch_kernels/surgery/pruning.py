"""From a model and windows of text to a plan, and to the quality of many plans at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Ranks, Span, calibrate, collect_moments
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.perplexity import Progress, check_windows
from linearpatch_kernels.evaluation.torch_state import own_state
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.surgery.fitting import DEFAULT_RANK, RANKED_FITS, checked_rank
from linearpatch_kernels.surgery.plan import PrunePlan, checked_spans
from linearpatch_kernels.surgery.scoring import LOSS, SCORES, check_drop, check_score, choose_spans, score_spans
from linearpatch_kernels.surgery.selection import (
    DENSE,
    FitChoice,
    choose_fit,
    compare_candidates,
    fitted_joints,
    needs_moments,
)

AUTO = "auto"
# How many spans the score ``loss`` runs the model on, and what heals them for that.
_SHORT_LIST = 5
_HEALER = "shrunk-low-rank"


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A plan, the statistics it was made from (with the moments of its spans, where collected), and what auto saw."""

    plan: PrunePlan
    statistics: CalibrationStatistics
    choice: FitChoice | None = None


@own_state()
def plan_pruning(
    model: PreTrainedModel,
    fit_windows: Tensor,
    heldout_windows: Tensor | None = None,
    *,
    drop: int | None = None,
    spans: Sequence[Span] = (),
    score: str = "cosine",
    fit: str = AUTO,
    rank: int = DEFAULT_RANK,
    structured: bool = False,
    about: Mapping[str, Any] | None = None,
    fingerprint: str = "",
    batch_size: int = 4,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Decide what to remove and what heals it.

    One pass over ``fit_windows`` where ``spans`` are given or the fit needs no second moments, else a second, shorter
    one; ``fit="auto"`` adds one over ``heldout_windows``, and so does ``score="loss"``: it heals the five spans of the
    best cosine and keeps the one with the lowest held-out loss.

    Args:
        model: the dense causal LM; not changed.
        fit_windows: token ids [S, T] that scores and fits are computed on.
        heldout_windows: token ids [W, T], other text, that ``auto`` chooses on; needed for ``auto`` only.
        drop: how many layers go; or ``spans``: which. Exactly one of the two.
        score, fit, rank, structured: see :mod:`~linearpatch_kernels.surgery.scoring`,
            :mod:`~linearpatch_kernels.surgery.fitting` and :func:`~linearpatch_kernels.surgery.selection.choose_fit`.
        about: JSON values for ``plan.calibration``; ``fingerprint``: of the dense model, for ``plan.model``.
        ranks: processes that share the passes over both kinds of windows, and the fits that ``auto`` compares; all of
            them get the same result.

    Raises:
        InputError: arguments that do not fit the model or each other (before any pass), or what the passes raise.
    """
    layers = num_layers(model)
    moments = needs_moments(fit)
    if (drop is None) == (not spans):
        raise InputError("give either the number of layers to drop or the spans to remove")
    check_score(score, (*SCORES, LOSS))
    if heldout_windows is None and (fit == AUTO or score == LOSS):
        raise InputError("the fit auto and the score loss choose on held-out windows: give some, or name others")
    if spans:
        checked_spans(spans, layers)
    else:
        check_drop(drop, layers)
    check_rank(rank, hidden_size(model), [fit], score)
    for windows in (fit_windows, heldout_windows):
        if windows is not None:
            check_windows(model, windows)
    if spans:
        chosen, score = checked_spans(spans, layers), "given"
        statistics = calibrate(
            model, fit_windows.split(batch_size), moments=chosen if moments else (), ranks=ranks, progress=progress
        )
    else:
        statistics = calibrate(model, fit_windows.split(batch_size), ranks=ranks, progress=progress)
        short = _short_list(statistics, drop or 0) if score == LOSS else choose_spans(statistics, drop or 0, score)
        if moments or score == LOSS:
            found = collect_moments(model, fit_windows.split(batch_size), short, ranks=ranks, progress=progress)
            statistics = statistics.with_moments(found)
        chosen = short
        if score == LOSS and heldout_windows is not None:
            chosen = [_best_healed(model, heldout_windows, statistics, short, rank, ranks, progress)]
    if fit == AUTO and heldout_windows is not None:
        choice = choose_fit(
            model,
            heldout_windows,
            statistics,
            chosen,
            rank=rank,
            structured=structured,
            ranks=ranks,
            progress=progress,
        )
        plan = PrunePlan(layers, choice.joints, fingerprint, score, dict(about or {}), choice.table)
        return Pruning(plan, statistics, choice)
    joints = fitted_joints(statistics, chosen, fit, rank=rank)
    return Pruning(PrunePlan(layers, joints, fingerprint, score, dict(about or {})), statistics)


def rank_for(rank: int | None, width: int) -> int:
    """The rank that was asked for, else the default or what the width has room for."""
    return min(DEFAULT_RANK, width) if rank is None else rank


def check_rank(rank: int, width: int, fits: Sequence[str], score: str = "") -> None:
    """InputError where the rank is used, by a fit or by what the score heals with, and does not fit the width."""
    if score == LOSS or any(fit == AUTO or fit in RANKED_FITS for fit in fits):
        checked_rank(rank, width)


def _short_list(statistics: CalibrationStatistics, drop: int) -> list[Span]:
    """The best spans of the cosine, for the model itself to judge: running all of them would cost a pass each."""
    return list(score_spans(statistics, drop, "cosine"))[:_SHORT_LIST]


def _best_healed(
    model: PreTrainedModel,
    windows: Tensor,
    statistics: CalibrationStatistics,
    spans: Sequence[Span],
    rank: int,
    ranks: Ranks | None,
    progress: Progress | None,
) -> Span:
    """The span with the lowest held-out loss once a low-rank patch has healed it."""
    candidates = {span: fitted_joints(statistics, [span], _HEALER, rank=rank) for span in spans}
    named = {str(span): joints for span, joints in candidates.items()}
    found = compare_candidates(model, windows, named, description="choosing the span", ranks=ranks, progress=progress)
    return min(candidates, key=lambda span: found[str(span)].loss)


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One depth and one fit: the plan and its quality."""

    drop: int
    fit: str
    plan: PrunePlan
    quality: Quality


def sweep(
    model: PreTrainedModel,
    fit_windows: Tensor,
    evaluation_windows: Tensor,
    drops: Sequence[int],
    fits: Sequence[str],
    *,
    score: str = "cosine",
    rank: int = DEFAULT_RANK,
    statistics: CalibrationStatistics | None = None,
    keep: Callable[[CalibrationStatistics], None] | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> tuple[Quality, list[SweepPoint], CalibrationStatistics]:
    """Quality against depth: every n of ``drops`` with every fit, for two passes over the calibration text at most.

    The first pass serves all scores; the second collects the second moments of the spans that were chosen (``16 d^2``
    bytes each, all n together). Every (n, fit) is then evaluated once per window from the dense model's states.

    Args:
        statistics: of an earlier run over the same windows; what it holds is not collected again.
        keep: called with the statistics after every pass, for whoever wants to go on after a kill.

    Returns:
        The dense model's quality, the points in the order of ``drops`` and ``fits``, and the statistics.

    Raises:
        InputError: arguments that do not fit the model (before any pass), or what the passes raise.
    """
    layers = num_layers(model)
    if not drops or not fits:
        raise InputError("there is nothing to sweep: give at least one number of layers and one fit")
    for drop in drops:
        check_drop(drop, layers)
    check_score(score, SCORES)
    # A list, so that every name is checked.
    wanted = True in [needs_moments(fit) for fit in fits]
    if AUTO in fits:
        raise InputError("a sweep compares fits, so it cannot contain auto: name the fits")
    check_rank(rank, hidden_size(model), fits)
    for windows in (fit_windows, evaluation_windows):
        check_windows(model, windows)
    if statistics is None:
        statistics = calibrate(model, fit_windows.split(batch_size), progress=progress)
        _kept(statistics, keep)
    spans = {drop: choose_spans(statistics, drop, score) for drop in drops}
    missing = sorted({span for chosen in spans.values() for span in chosen} - set(statistics.moments))
    if wanted and missing:
        found = collect_moments(model, fit_windows.split(batch_size), missing, progress=progress)
        statistics = statistics.with_moments(found)
        _kept(statistics, keep)
    joints = {(drop, fit): fitted_joints(statistics, spans[drop], fit, rank=rank) for drop in drops for fit in fits}
    names = {key: f"{key[0]} layers dropped, {key[1]}" for key in joints}
    found_quality = compare_candidates(
        model,
        evaluation_windows,
        {names[key]: candidate for key, candidate in joints.items()},
        description="evaluating the sweep",
        progress=progress,
    )
    points = [
        SweepPoint(drop, fit, PrunePlan(layers, candidate, score=score), found_quality[names[drop, fit]])
        for (drop, fit), candidate in joints.items()
    ]
    return found_quality[DENSE], points, statistics


def _kept(statistics: CalibrationStatistics, keep: Callable[[CalibrationStatistics], None] | None) -> None:
    if keep is not None:
        keep(statistics)
