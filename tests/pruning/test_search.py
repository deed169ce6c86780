"""From windows to a plan, and a sweep: what comes out, and how often the layers run for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span, calibrate, collect_moments
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import evaluate_quality
from linearpatch_kernels.forward import Run
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning import search
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import AUTO, fits_of
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.pruning.scores import choose_spans, score_spans, scores_of_statistics
from linearpatch_kernels.pruning.search import plan_pruning, sweep
from linearpatch_kernels.pruning.selection import choose_fit, fitted_joints
from linearpatch_kernels.text import some_windows
from tests.support.tiny import VOCABULARY, tiny_model

RANK = 5


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """Fourteen layers, of which twelve can go."""
    return tiny_model("llama", layers=14)


def assert_same_plan(actual: PrunePlan, expected: PrunePlan) -> None:
    assert [(joint.span, joint.fit) for joint in actual.joints] == [
        (joint.span, joint.fit) for joint in expected.joints
    ]
    assert actual.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(actual.tensors()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fit", ["none", "linearpatch", "low-rank", "least-squares", "norm-hadamard"])
@pytest.mark.parametrize("score", scores_of_statistics())
def test_the_plan_of_a_number_of_layers(dense: PreTrainedModel, windows: Tensor, score: str, fit: str) -> None:
    made = plan_pruning(dense, windows, drop=2, score=score, fit=fit, rank=RANK)
    spans = choose_spans(calibrate(dense, [windows]), 2, score)
    statistics = calibrate(dense, [windows], moments=spans, normed=True)
    assert_same_plan(made.plan, PrunePlan(6, fitted_joints(statistics, spans, fit, rank=RANK)))
    assert (made.plan.score, made.choice, made.plan.num_layers) == (score, None, 6)


def test_the_plan_of_given_spans(dense: PreTrainedModel, windows: Tensor) -> None:
    spans = [Span(4, 6), Span(1, 2)]
    made = plan_pruning(dense, windows, spans=spans, fit="low-rank", rank=RANK, run=Run(batch_size=2))
    statistics = calibrate(dense, [windows], moments=spans)
    assert_same_plan(made.plan, PrunePlan(6, fitted_joints(statistics, spans, "low-rank", rank=RANK)))
    assert (made.plan.score, made.plan.calibration, made.plan.model) == ("given", {}, "")
    assert set(made.statistics.moments) == set(spans)


@pytest.mark.parametrize("wanted", [{"drop": 2}, {"spans": [Span(2, 4)]}], ids=["a number", "spans"])
@pytest.mark.parametrize("fit", ["none", "linearpatch", "low-rank", "norm-hadamard"])
def test_of_many_windows_some_are_scored_and_the_fits_see_all(
    wanted: dict[str, Any], fit: str, dense: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCORED_WINDOWS", 4)
    assert len(windows) > 4
    made = plan_pruning(dense, windows, fit=fit, rank=RANK, run=Run(batch_size=2), **wanted)
    scored = calibrate(dense, [some_windows(windows, 4)])
    assert made.statistics.samples == 4
    torch.testing.assert_close(made.statistics.mean_token_cosine(), scored.mean_token_cosine())
    spans = wanted.get("spans") or choose_spans(scored, 2)
    moments = collect_moments(dense, [windows], spans, normed=True)
    expected = fitted_joints(scored.with_moments(moments), spans, fit, rank=RANK)
    assert_same_plan(made.plan, PrunePlan(6, expected))


def test_the_keywords_of_an_earlier_version(dense: PreTrainedModel, windows: Tensor) -> None:
    """What 0.1.0 took, and what says the same now."""
    about: dict[str, Any] = {"samples": 9, "source": "prose"}
    told: list[tuple[str, int, int]] = []
    earlier: dict[str, Any] = {"about": about, "fingerprint": "f", "batch_size": 2, "ranks": Processes()}
    names = "about, batch_size, fingerprint, progress, ranks of 0.1.0 are deprecated"
    with pytest.warns(DeprecationWarning, match=names) as caught:
        made = plan_pruning(dense, windows, drop=2, fit="none", progress=lambda *given: told.append(given), **earlier)
    assert caught[0].filename == __file__
    assert told == [("calibrating", done, 9) for done in (2, 4, 6, 8, 9)]
    assert (made.plan.calibration, made.plan.model) == (about, "f")
    again: list[tuple[str, int, int]] = []
    plan_pruning(dense, windows, drop=2, fit="none", run=Run(2, progress=lambda *given: again.append(given)))
    assert again == told
    with (
        pytest.warns(DeprecationWarning, match="batch_size of 0.1.0"),
        pytest.raises(InputError, match="`run` says batch_size, too"),
    ):
        plan_pruning(dense, windows, drop=2, fit="none", run=Run(2), batch_size=2)
    with pytest.raises(TypeError, match=r"plan_pruning\(\) got an unexpected keyword argument 'spanns'"):
        plan_pruning(dense, windows, fit="none", spanns=[Span(2, 4)])


@pytest.mark.parametrize("what", [{"drop": 2}, {"spans": [Span(2, 4)]}], ids=["drop", "spans"])
def test_auto_keeps_what_the_heldout_windows_say(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor, what: dict[str, Any]
) -> None:
    made = plan_pruning(dense, windows, heldout, rank=RANK, **what)
    spans = made.plan.spans
    expected = choose_fit(dense, heldout, calibrate(dense, [windows], moments=spans), spans, rank=RANK)
    assert made.choice is not None
    assert (made.choice.fit, [joint.fit for joint in made.plan.joints]) == (expected.fit, [expected.fit] * len(spans))
    assert made.plan.candidates == made.choice.table
    assert [row["fit"] for row in made.plan.candidates if row["kept"]] == [expected.fit]
    assert {row["fit"] for row in made.plan.candidates} == {fit.name for fit in fits_of(AUTO)}
    for row, other in zip(made.choice.table, expected.table, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    structured = plan_pruning(dense, windows, heldout, rank=RANK, structured=True, **what)
    assert "least-squares" not in {row["fit"] for row in structured.plan.candidates}


@pytest.mark.parametrize("fit", ["none", "linearpatch", "auto"])
def test_the_score_that_runs_the_model(deep: PreTrainedModel, windows: Tensor, heldout: Tensor, fit: str) -> None:
    """Of the five spans of the best cosine the one that a shrunk low-rank patch heals best, whatever the fit is."""
    statistics = calibrate(deep, [windows])
    short = list(score_spans(statistics, 3, "cosine"))[:5]
    statistics = calibrate(deep, [windows], moments=short)
    losses = {}
    for span in short:
        joints = fitted_joints(statistics, [span], "shrunk-low-rank", rank=RANK)
        losses[span] = evaluate_quality(apply_plan(deep, PrunePlan(14, joints)), heldout).loss
    best = min(losses, key=losses.__getitem__)
    assert best != short[0], "the cosine alone chooses another"
    made = plan_pruning(deep, windows, heldout, drop=3, score="loss", fit=fit, rank=RANK)
    assert made.plan.spans == [best]
    assert made.plan.score == "loss"
    expected = fitted_joints(statistics, [best], made.plan.joints[0].fit, rank=RANK)
    assert_same_plan(made.plan, PrunePlan(14, expected))


# --- how often the layers run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "passes"),
    [
        ({"spans": [Span(2, 4)], "fit": "linearpatch"}, [9, 9, 9, 9, 9, 9]),
        ({"spans": [Span(2, 4)], "fit": "low-rank", "rank": RANK}, [9, 9, 9, 9, 9, 9]),
        ({"drop": 2, "fit": "linearpatch"}, [9, 9, 9, 9, 9, 9]),
        ({"drop": 4, "fit": "low-rank", "rank": RANK}, [18, 18, 18, 18, 18, 9]),
    ],
    ids=["spans", "spans-with-moments", "drop", "drop-with-moments"],
)
def test_passes_over_the_text(
    dense: PreTrainedModel,
    windows: Tensor,
    arguments: dict[str, Any],
    passes: list[int],
    count_calls: Callable[..., list[int]],
) -> None:
    calls = count_calls(dense.model.layers)
    plan_pruning(dense, windows, **arguments)
    assert calls == passes


def test_passes_of_auto(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    calls = count_calls(dense.model.layers)
    plan_pruning(dense, windows, heldout, spans=[Span(2, 4)], rank=RANK)
    shared, behind = 9 + 5, 9 + 5 + 5 * len(fits_of(AUTO))
    assert calls == [shared, shared, shared, shared, behind, behind]


def test_passes_of_the_score_that_runs_the_model(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    """Three spans of two layers: 1:3, 2:4 and 3:5, each healed and plainly removed."""
    calls = count_calls(dense.model.layers)
    plan_pruning(dense, windows, heldout, drop=2, score="loss", fit="none", rank=RANK)
    candidates = [sum(end <= layer for end in (3, 4, 5)) for layer in range(6)]
    moments = [9, 9, 9, 9, 9, 0]
    assert calls == [9 + more + 5 + 2 * 5 * count for more, count in zip(moments, candidates, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either the number of layers to drop or the spans"),
        ({"drop": 2, "spans": [Span(2, 4)]}, "either the number of layers to drop or the spans"),
        ({"drop": 2, "fit": "auto"}, "the fit auto and the score loss choose on held-out windows"),
        ({"drop": 2, "fit": "none", "score": "loss"}, "the fit auto and the score loss choose on held-out windows"),
        ({"drop": 5, "fit": "none"}, "5 of 6 layers cannot be dropped"),
        ({"drop": 0, "fit": "none"}, "0 of 6 layers cannot be dropped"),
        ({"spans": [Span(2, 4), Span(3, 5)], "fit": "none"}, "overlap"),
        ({"spans": [Span(2, 9)], "fit": "none"}, "does not fit a model of 6 layers"),
        ({"drop": 2, "fit": "magic"}, "no fit is called 'magic'"),
        ({"drop": 2, "fit": "none", "score": "magic"}, "no score is called 'magic'"),
        ({"drop": 2, "fit": "low-rank", "rank": 49}, "a patch of rank 49 does not fit a width of 48"),
        ({"drop": 2, "fit": "shrunk-low-rank", "rank": 0}, "a patch of rank 0 does not fit a width of 48"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_any_pass(
    dense: PreTrainedModel,
    windows: Tensor,
    arguments: dict[str, Any],
    message: str,
    count_calls: Callable[..., list[int]],
) -> None:
    calls = count_calls(dense.model.layers)
    with pytest.raises(InputError, match=message) as caught:
        plan_pruning(dense, windows, **arguments)
    assert "\n" not in str(caught.value)
    assert calls == [0] * 6


def test_bad_heldout_windows_are_refused_before_any_pass(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    calls = count_calls(dense.model.layers)
    for bad in (heldout + VOCABULARY, heldout[:0], heldout[:, :1]):
        with pytest.raises(InputError):
            plan_pruning(dense, windows, bad, drop=2, rank=RANK)
        with pytest.raises(InputError):
            sweep(dense, windows, bad, [1, 2], ["none"])
    with pytest.raises(InputError, match="a patch of rank 64 does not fit"):
        plan_pruning(dense, windows, heldout, drop=2, rank=64)
    assert calls == [0] * 6


def test_a_rank_that_no_fit_uses_does_not_matter(dense: PreTrainedModel, windows: Tensor) -> None:
    """The default rank is 64 and the model 48 wide."""
    assert plan_pruning(dense, windows, drop=2, fit="linearpatch").plan.joints[0].fit == "linearpatch"
    assert len(sweep(dense, windows, windows, [1], ["none", "least-squares"])[1]) == 2


# --- sweep -----------------------------------------------------------------------------------------------------------


FOUR_FITS = ["none", "linearpatch", "low-rank", "least-squares"]


def evaluations(drops: Sequence[int], ends: Sequence[int], windows: int, fits: int) -> list[int]:
    """How often each of 14 layers runs while the dense model and one candidate per drop and fit are evaluated."""
    assert len(drops) == len(ends)
    return [windows + windows * fits * sum(end <= layer for end in ends) for layer in range(14)]


def test_a_sweep_costs_two_passes_and_one_evaluation_a_depth_and_fit(
    deep: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    drops = range(1, 13)
    calls, heads = count_calls(deep.model.layers), count_calls([deep.lm_head])
    quality, points, statistics = sweep(deep, windows, heldout, drops, FOUR_FITS, rank=RANK)
    spans = {point.drop: point.plan.spans for point in points}
    assert all(len(chosen) == 1 for chosen in spans.values())
    ends = [spans[drop][0].end for drop in drops]
    first = [9] * 14
    second = [9 * (layer < max(ends)) for layer in range(14)]
    evaluated = evaluations(drops, ends, windows=5, fits=4)
    assert calls == [sum(parts) for parts in zip(first, second, evaluated, strict=True)]
    assert heads == [5 * (1 + 12 * 4)]
    assert [(point.drop, point.fit) for point in points] == [(drop, fit) for drop in drops for fit in FOUR_FITS]
    assert quality.top1_agreement == 1.0
    assert set(statistics.moments) == {span for chosen in spans.values() for span in chosen}


def test_a_sweep_goes_on_with_a_fit_that_asks_for_more(
    deep: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    """Of the moments that are there those of the normed stream are missing: one more pass, and then none."""
    kept = sweep(deep, windows, heldout, [2], ["low-rank"], rank=RANK)[2]
    (span,) = kept.moments
    fits = ["low-rank", "norm-low-rank"]
    calls = count_calls(deep.model.layers)
    _, points, statistics = sweep(deep, windows, heldout, [2], fits, rank=RANK, statistics=kept)
    evaluated = evaluations([2], [span.end], windows=5, fits=2)
    assert calls == [9 * (layer < span.end) + count for layer, count in enumerate(evaluated)]
    again = count_calls(deep.model.layers)
    same = sweep(deep, windows, heldout, [2], fits, rank=RANK, statistics=statistics)[1]
    assert again == evaluated
    assert [point.quality for point in same] == [point.quality for point in points]
    joints = fitted_joints(calibrate(deep, [windows], moments=[span], normed=True), [span], "norm-low-rank", rank=RANK)
    assert_same_plan(points[1].plan, PrunePlan(14, joints))


def test_a_sweep_of_fits_without_moments_costs_one_pass(
    deep: PreTrainedModel, windows: Tensor, heldout: Tensor, count_calls: Callable[..., list[int]]
) -> None:
    calls = count_calls(deep.model.layers)
    _, points, statistics = sweep(deep, windows, heldout, [2, 5], ["none", "linearpatch"])
    ends = [point.plan.spans[0].end for point in points[::2]]
    assert calls == [9 + count for count in evaluations([2, 5], ends, windows=5, fits=2)]
    again = count_calls(deep.model.layers)
    sweep(deep, windows, heldout, [2, 5], ["none", "linearpatch"], statistics=statistics)
    assert again == evaluations([2, 5], ends, windows=5, fits=2)


@pytest.mark.parametrize("score", ["cosine", "bi"])
def test_a_sweep_gives_what_pruning_one_by_one_gives(
    deep: PreTrainedModel, windows: Tensor, heldout: Tensor, score: str
) -> None:
    quality, points, _ = sweep(deep, windows, heldout, [3, 6], ["linearpatch", "low-rank"], score=score, rank=RANK)
    assert quality == evaluate_quality(deep, heldout, deep)
    for point in points:
        alone = plan_pruning(deep, windows, drop=point.drop, fit=point.fit, rank=RANK, score=score).plan
        assert_same_plan(point.plan, alone)
        assert point.plan.score == score
        expected = evaluate_quality(apply_plan(deep, point.plan), heldout, deep)
        assert point.quality.loss == pytest.approx(expected.loss, rel=1e-5)
        assert point.quality.kl == pytest.approx(expected.kl, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drops": [2, 13]}, "13 of 14 layers cannot be dropped"),
        ({"drops": [0]}, "0 of 14 layers cannot be dropped"),
        ({"fits": ["none", "auto"]}, "auto"),
        ({"fits": ["low-rank", "magic"]}, "no fit is called 'magic'"),
        ({"score": "magic"}, "no score is called 'magic'"),
        ({"score": "loss"}, "no score is called 'loss'"),
        ({"fits": ["none", "low-rank"], "rank": 49}, "a patch of rank 49 does not fit a width of 48"),
        ({"drops": []}, "nothing to sweep"),
        ({"fits": []}, "nothing to sweep"),
    ],
    ids=str,
)
def test_bad_sweeps_are_refused_before_any_pass(
    deep: PreTrainedModel,
    windows: Tensor,
    heldout: Tensor,
    arguments: dict[str, Any],
    message: str,
    count_calls: Callable[..., list[int]],
) -> None:
    calls = count_calls(deep.model.layers)
    with pytest.raises(InputError, match=message):
        sweep(deep, windows, heldout, **{"drops": [2], "fits": ["none"], **arguments})
    assert calls == [0] * 14
