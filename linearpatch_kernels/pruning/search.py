"""From a model and windows of text to a plan, and to the quality of many plans at once."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack, cast

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, calibrate, collect_moments
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.forward import Progress, Run, check_batch_size, check_windows
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.patterns import Pattern, pattern_of
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.fits import (
    AUTO,
    DEFAULT_RANK,
    UnusableFit,
    checked_rank,
    needs_moments,
    needs_normed_moments,
    takes_rank,
    too_little_text,
)
from linearpatch_kernels.pruning.plan import Joint, PrunePlan, checked_spans
from linearpatch_kernels.pruning.scores import SCORES, check_drop, choose_spans, scores_of_statistics, short_list
from linearpatch_kernels.pruning.selection import (
    DENSE,
    FitChoice,
    choose_fit,
    compare_candidates,
    fitted_joints,
    usable_candidates,
)
from linearpatch_kernels.span import Span
from linearpatch_kernels.text import some_windows
from linearpatch_kernels.torch_state import own_state

SCORED_WINDOWS = 48
"""Windows that scores and magnitudes are measured on: means over tens of thousands of tokens, which more would hardly
move, while every layer runs on each."""
# What heals the spans that a score runs the model on.
_HEALER = "shrunk-low-rank"


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A plan, the statistics it was made from (with the moments of its spans, where collected), and what auto saw."""

    plan: PrunePlan
    statistics: CalibrationStatistics
    choice: FitChoice | None = None


class _Keywords010(TypedDict, total=False):
    """What `plan_pruning` took in 0.1.0, and `run` and the plan's own fields hold now."""

    batch_size: int
    ranks: Processes | None
    progress: Progress | None
    about: Mapping[str, Any] | None
    fingerprint: str


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
    keep_pattern: bool = False,
    noted: Noted = warn,
    run: Run | None = None,
    **keywords: Unpack[_Keywords010],
) -> Pruning:
    """Decide what to remove and what heals it.

    One pass over at most `SCORED_WINDOWS` of ``fit_windows``, spread over all of them, for the scores and the channels'
    magnitudes; where the fit needs second moments, another one over all windows, up to the last span's end (the same
    one where the ``spans`` are given and the windows are no more). ``fit="auto"`` adds one over ``heldout_windows``,
    and so does a score that runs the model (``loss``): it heals the spans of a short list and keeps the one with the
    lowest held-out loss.

    Args:
        model: the dense causal LM; not changed.
        fit_windows: token ids [S, T] that scores and fits are computed on.
        heldout_windows: token ids [W, T], other text, that ``auto`` and the scores that run the model choose on.
        drop: how many layers go; or ``spans``: which. Exactly one of the two.
        score, fit, rank, structured: see :mod:`~linearpatch_kernels.pruning.scores`,
            :mod:`~linearpatch_kernels.pruning.fits` and :func:`~linearpatch_kernels.pruning.selection.choose_fit`.
        keep_pattern: whether the kinds of the layers that stay must repeat as those of the model do
            (:class:`~linearpatch_kernels.modeling.patterns.Pattern`).
        noted: told before any pass of too little text for the fit, and later of candidates that are left out.
        run: the windows per calibration pass (four by default), who is told of progress, and the processes that share
            the passes over both kinds of windows and the fits that ``auto`` compares; all of them get the same result.
        keywords: those of 0.1.0, deprecated: ``batch_size``, ``ranks`` and ``progress`` make a `run`; ``fingerprint``
            and ``about`` become ``plan.model`` and ``plan.calibration``, which `dataclasses.replace` sets as well.

    Raises:
        InputError: arguments that do not fit the model or each other (before any pass), or what the passes raise.
        UnusableFit: the text does not allow the fit that was asked for.
    """
    run, of_the_plan = _run_and_fields(run, keywords)
    _check_request(model, drop, spans, score, fit, rank, heldout=heldout_windows is not None)
    _check_text(model, [fit_windows, *([] if heldout_windows is None else [heldout_windows])], run.batch_size)
    pattern = _pattern_to_keep(model, drop, spans) if keep_pattern else None
    _note_little_text([fit], model, fit_windows, noted, instead="`fit` auto, which chooses on other text")
    layers, judged = num_layers(model), not spans and SCORES.named(score).runs_the_model
    moments = needs_moments(fit) or judged
    normed = needs_normed_moments(fit)
    # Comparing holds the logits of two models at once, so it takes one window at a time.
    comparing = dataclasses.replace(run, batch_size=1)
    text = fit_windows.split(run.batch_size)
    some = some_windows(fit_windows, max(SCORED_WINDOWS, run.batch_size * run.processes.count)).split(run.batch_size)
    at_once: Sequence[Span] = ()
    if spans:
        chosen, score = checked_spans(spans, layers), "given"
        # Where a second pass would be over the same windows, one does it all.
        at_once = chosen if moments and len(some) == len(text) else ()
        statistics = calibrate(model, some, moments=at_once, normed=normed, ranks=run.processes, progress=run.progress)
    else:
        statistics = calibrate(model, some, ranks=run.processes, progress=run.progress)
        chosen = (short_list if judged else choose_spans)(statistics, drop or 0, score, pattern)
    if moments and not at_once:
        found = collect_moments(model, text, chosen, normed=normed, ranks=run.processes, progress=run.progress)
        statistics = statistics.with_moments(found)
    if judged and heldout_windows is not None:
        chosen = [_best_healed(model, heldout_windows, statistics, chosen, fit, rank, noted, comparing)]
    if fit == AUTO and heldout_windows is not None:
        choice = choose_fit(
            model, heldout_windows, statistics, chosen, rank=rank, structured=structured, noted=noted, run=comparing
        )
        plan = PrunePlan(layers, choice.joints, score=score, candidates=choice.table, **of_the_plan)
        return Pruning(plan, statistics, choice)
    joints = fitted_joints(statistics, chosen, fit, rank=rank)
    return Pruning(PrunePlan(layers, joints, score=score, **of_the_plan), statistics)


def _run_and_fields(run: Run | None, keywords: _Keywords010) -> tuple[Run, dict[str, Any]]:
    """The run, and the fields of the plan, that a caller of `plan_pruning` asked for by the keywords of either version.

    Raises:
        InputError: the same thing by both.
        TypeError: a keyword that no version knows.
    """
    given = cast(dict[str, Any], keywords)
    if unknown := given.keys() - _Keywords010.__annotations__.keys():
        raise TypeError(f"plan_pruning() got an unexpected keyword argument {min(unknown)!r}")
    if given:
        # The caller, behind `own_state` and the two functions here.
        told = "plan_pruning: the keywords {} of 0.1.0 are deprecated: docs/reference/python.md says what replaces them"
        warnings.warn(told.format(", ".join(sorted(given))), DeprecationWarning, stacklevel=4)
    of_the_run = given.keys() & {"batch_size", "ranks", "progress"}
    if run is not None and of_the_run:
        raise InputError(f"`run` says {' and '.join(sorted(of_the_run))}, too: give one of them")
    if run is None:
        run = Run(given.get("batch_size", 4), given.get("ranks") or Processes(), given.get("progress"))
    return run, {"model": given.get("fingerprint", ""), "calibration": dict(given.get("about") or {})}


def _check_request(
    model: PreTrainedModel, drop: int | None, spans: Sequence[Span], score: str, fit: str, rank: int, *, heldout: bool
) -> None:
    """InputError where what is asked of `plan_pruning` does not fit the model or each other."""
    judged = SCORES.named(score).runs_the_model
    if SCORES[score].refits:
        raise InputError(
            f"the score {score} fits weights again, which a plan has none of: `prune` chooses by it, or give `spans`"
        )
    needs_moments(fit)
    if (drop is None) == (not spans):
        raise InputError("give either the number of layers to drop or the spans to remove")
    if not heldout and (fit == AUTO or judged):
        raise InputError(
            f"the fit {AUTO} and the score {' or '.join(_running())} choose on held-out windows: give some, or name "
            "others"
        )
    if spans:
        checked_spans(spans, num_layers(model))
    else:
        check_drop(drop, num_layers(model))
    check_rank(rank, hidden_size(model), [fit], score)


def _pattern_to_keep(model: PreTrainedModel, drop: int | None, spans: Sequence[Span]) -> Pattern:
    """The model's; InputError where what is to be removed cannot leave it as it is."""
    pattern = pattern_of(model)
    if spans:
        pattern.check_kept(spans)
    else:
        pattern.spans(drop or 0)
    return pattern


def _check_text(model: PreTrainedModel, texts: Sequence[Tensor], batch_size: int) -> None:
    check_batch_size(batch_size)
    for windows in texts:
        check_windows(model, windows)


def _note_little_text(
    fits: Sequence[str], model: PreTrainedModel, windows: Tensor, noted: Noted, *, instead: str = ""
) -> None:
    little = too_little_text(fits, hidden_size(model), windows, instead=instead)
    if little is not None:
        noted(little)


def rank_for(rank: int | None, width: int) -> int:
    """The rank that was asked for, else the default or what the width has room for."""
    return min(DEFAULT_RANK, width) if rank is None else rank


def check_rank(rank: int, width: int, fits: Sequence[str], score: str = "") -> None:
    """InputError where the rank is used, by a fit or by what the score heals with, and does not fit the width."""
    if score in _running() or any(map(takes_rank, fits)):
        checked_rank(rank, width)


def _running() -> list[str]:
    """The scores by which `plan_pruning` runs the model."""
    return [name for name, score in SCORES.items() if score.runs_the_model and not score.refits]


def _best_healed(
    model: PreTrainedModel,
    windows: Tensor,
    statistics: CalibrationStatistics,
    spans: Sequence[Span],
    fit: str,
    rank: int,
    noted: Noted,
    run: Run,
) -> Span:
    """The span with the lowest held-out loss once a low-rank patch has healed it, or without where that does harm.

    Only spans that ``fit`` can heal afterwards.
    """
    candidates: dict[str, tuple[Joint, ...]] = {}
    for span in spans:
        if fit == AUTO or usable_candidates(statistics, [span], {fit: fit}, rank=rank, noted=noted):
            ways = {f"{span}, {way}": way for way in ("none", _HEALER)}
            candidates |= usable_candidates(statistics, [span], ways, rank=rank, noted=noted)
    if not candidates:
        raise UnusableFit(f"the text does not allow the fit {fit} at any of {', '.join(map(str, spans))}: give another")
    found = compare_candidates(model, windows, candidates, description="choosing the span", noted=noted, run=run)
    usable = [name for name in candidates if name in found]
    if not usable:
        raise InputError(
            "without any of the spans, patched or not, the model's logits are not finite on the held-out windows: load "
            "it in bfloat16 or float32, or give another text"
        )
    return candidates[min(usable, key=lambda name: found[name].loss)][0].span


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
    pattern: Pattern | None = None,
    statistics: CalibrationStatistics | None = None,
    keep: Callable[[CalibrationStatistics], None] | None = None,
    noted: Noted = warn,
    run: Run | None = None,
) -> tuple[Quality, list[SweepPoint], CalibrationStatistics]:
    """Quality against depth: every n of ``drops`` with every fit, for two passes over the calibration text at most.

    The first pass serves all scores; the second collects the second moments of the spans that were chosen (``16 d^2``
    bytes each, all n together; ``32 d^2`` where a fit needs those of the normed stream). Every (n, fit) is then
    evaluated once per window from the dense model's states.

    Args:
        pattern: of the kinds of layers; then only spans that leave it as it is.
        statistics: of an earlier run over the same windows; what it holds is not collected again.
        keep: called with the statistics after every pass, for whoever wants to go on after a kill.
        noted: told before any pass of too little text for a fit, and later of points that are left out: a fit that the
            text does not allow there, logits that are not finite.
        run: the windows per calibration pass (four by default), and who is told of progress.

    Returns:
        The dense model's quality, the points in the order of ``drops`` and ``fits``, and the statistics.

    Raises:
        InputError: arguments that do not fit the model (before any pass), no point at all, or what the passes raise.
    """
    layers, run = num_layers(model), run or Run(4)
    if not drops or not fits:
        raise InputError("there is nothing to sweep: give at least one number of layers and one fit")
    for drop in drops:
        check_drop(drop, layers)
    SCORES.named(score, among=scores_of_statistics())
    # A list, so that every name is checked.
    wanted, normed = (True in [asks(fit) for fit in fits] for asks in (needs_moments, needs_normed_moments))
    if AUTO in fits:
        raise InputError("a sweep compares fits, so it cannot contain auto: name the fits")
    check_rank(rank, hidden_size(model), fits)
    _check_text(model, [fit_windows, evaluation_windows], run.batch_size)
    _note_little_text(fits, model, fit_windows, noted)
    if statistics is None:
        statistics = calibrate(model, fit_windows.split(run.batch_size), progress=run.progress)
        _kept(statistics, keep)
    spans = {drop: choose_spans(statistics, drop, score, pattern) for drop in drops}
    there = {span for span, found in statistics.moments.items() if found.normed is not None or not normed}
    missing = sorted({span for chosen in spans.values() for span in chosen} - there)
    if wanted and missing:
        text = fit_windows.split(run.batch_size)
        found = collect_moments(model, text, missing, normed=normed, progress=run.progress)
        statistics = statistics.with_moments(found)
        _kept(statistics, keep)
    names = {(drop, fit): f"{drop} layers dropped, {fit}" for drop in drops for fit in fits}
    candidates: dict[str, tuple[Joint, ...]] = {}
    for (drop, fit), name in names.items():
        candidates |= usable_candidates(statistics, spans[drop], {name: fit}, rank=rank, noted=noted)
    found_quality = compare_candidates(
        model,
        evaluation_windows,
        candidates,
        description="evaluating the sweep",
        noted=noted,
        run=Run(progress=run.progress),
    )
    points = [
        SweepPoint(drop, fit, PrunePlan(layers, candidates[name], score=score), found_quality[name])
        for (drop, fit), name in names.items()
        if name in found_quality
    ]
    if not points:
        raise InputError("no fit could be made and measured at any depth: give more text, or other fits")
    return found_quality[DENSE], points, statistics


def _kept(statistics: CalibrationStatistics, keep: Callable[[CalibrationStatistics], None] | None) -> None:
    if keep is not None:
        keep(statistics)
