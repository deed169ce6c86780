"""Candidates compared on the dense model's states, against the pruned models themselves; and what is kept."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, evaluate_quality
from linearpatch_kernels.forward import Run
from linearpatch_kernels.nn import DensePatch, HadamardPatch, LowRankPatch, Patch
from linearpatch_kernels.pruning import selection
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import AUTO, FITS, fits_of
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.selection import (
    choose_fit,
    compare_candidates,
    cost,
    decide,
    fitted_joints,
)
from tests.support.tiny import random_patch, tiny_model, tiny_patched_model

RANK = 5


def assert_same_quality(actual: Quality, expected: Quality, rel: float = 1e-5) -> None:
    assert dataclasses.asdict(actual) == pytest.approx(dataclasses.asdict(expected), rel=rel, abs=1e-7)


@pytest.mark.parametrize(
    "spans",
    [[Span(2, 4)], [Span(1, 2), Span(3, 5)], [Span(4, 6)], [Span(1, 2), Span(4, 6)]],
    ids=["middle", "two", "end", "two-and-end"],
)
def test_a_candidate_is_as_good_as_the_model_that_is_built(
    dense: PreTrainedModel, heldout: Tensor, statistics: CalibrationStatistics, spans: list[Span]
) -> None:
    candidates = {fit: fitted_joints(statistics, spans, fit, rank=RANK) for fit in FITS}
    found = compare_candidates(dense, heldout, candidates, run=Run(2))
    assert list(found) == ["dense", *FITS]
    assert_same_quality(found["dense"], evaluate_quality(dense, heldout, dense))
    assert (found["dense"].top1_agreement, found["dense"].kl) == (1.0, 0.0)
    for fit, joints in candidates.items():
        pruned = apply_plan(dense, PrunePlan(6, joints))
        assert_same_quality(found[fit], evaluate_quality(pruned, heldout, dense))
    assert len({quality.loss for quality in found.values()}) == len(found), "a mix-up would show"


def test_candidates_of_different_spans_at_once(dense: PreTrainedModel, heldout: Tensor) -> None:
    candidates = {
        "late": (Joint(Span(4, 5), random_patch("low-rank")),),
        "early": (Joint(Span(0, 2), random_patch("hadamard")),),
        "two": (Joint(Span(1, 2), random_patch("dense")), Joint(Span(4, 6))),
        "three": (Joint(Span(0, 1)), Joint(Span(2, 3), random_patch("dense")), Joint(Span(4, 5))),
    }
    found = compare_candidates(dense, heldout, candidates)
    for name, joints in candidates.items():
        assert_same_quality(found[name], evaluate_quality(apply_plan(dense, PrunePlan(6, joints)), heldout, dense))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_other_families(family: str) -> None:
    """Sliding and full attention in turn, and embeddings that are scaled."""
    model = tiny_model(family)
    windows = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    joints = (Joint(Span(2, 4), random_patch("dense")),)
    pruned = apply_plan(model, PrunePlan(6, joints))
    found = compare_candidates(model, windows, {"patched": joints})
    assert_same_quality(found["patched"], evaluate_quality(pruned, windows, model))


@pytest.mark.parametrize("span", [Span(1, 2), Span(1, 3), Span(2, 3), Span(3, 4)], ids=str)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "plain"])
def test_pruning_a_patched_model(heldout: Tensor, span: Span, patched: bool) -> None:
    """Its own patches are at joint 2 and behind the last of its four layers."""
    model = tiny_patched_model("llama")
    joints = (Joint(span, random_patch("low-rank", seed=9) if patched else None),)
    found = compare_candidates(model, heldout, {"again": joints})
    assert_same_quality(found["again"], evaluate_quality(apply_plan(model, PrunePlan(4, joints)), heldout, model))


def test_a_low_precision_model_is_compared_as_it_will_be_saved(heldout: Tensor) -> None:
    """With its patches in the model's dtype."""
    model = tiny_model("llama").to(torch.bfloat16)
    joints = tuple(Joint(span, random_patch("dense", seed=span.start)) for span in (Span(1, 2), Span(4, 5)))
    found = compare_candidates(model, heldout, {"patched": joints})
    expected = evaluate_quality(apply_plan(model, PrunePlan(6, joints)), heldout, model)
    assert_same_quality(found["patched"], expected, rel=1e-6)
    assert all(parameter.dtype == torch.float32 for joint in joints for parameter in joint.patch.parameters())


def test_the_order_of_joints_does_not_matter(dense: PreTrainedModel, heldout: Tensor) -> None:
    joints = (Joint(Span(1, 2), random_patch("dense")), Joint(Span(3, 5), random_patch("low-rank")))
    found = compare_candidates(dense, heldout, {"sorted": joints, "reversed": joints[::-1]})
    assert found["sorted"] == found["reversed"]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 4])
def test_layers_run_once_a_window_and_behind_a_joint_once_a_candidate(
    dense: PreTrainedModel, heldout: Tensor, count: int, batch_size: int, count_calls: Callable[..., list[int]]
) -> None:
    candidates = {f"{i}": (Joint(Span(2, 4), random_patch("low-rank", seed=i)),) for i in range(count)}
    calls = count_calls(dense.model.layers)
    compare_candidates(dense, heldout, candidates, run=Run(batch_size))
    assert calls == [5, 5, 5, 5, 5 + 5 * count, 5 + 5 * count]


def test_bad_candidates(dense: PreTrainedModel, heldout: Tensor, count_calls: Callable[..., list[int]]) -> None:
    calls = count_calls(dense.model.layers)
    for joints, message in (
        ((), "no span to remove"),
        ((Joint(Span(2, 4)), Joint(Span(3, 5))), "overlap"),
        ((Joint(Span(5, 7)),), "does not fit a model of 6 layers"),
    ):
        with pytest.raises(InputError, match=message):
            compare_candidates(dense, heldout, {"good": (Joint(Span(1, 2)),), "bad": joints})
    with pytest.raises(InputError, match="vocabulary"):
        compare_candidates(dense, heldout + 97, {"good": (Joint(Span(1, 2)),)})
    assert calls == [0] * 6


def test_a_candidate_that_is_not_finite_is_named(dense: PreTrainedModel, heldout: Tensor) -> None:
    broken = random_patch("dense")
    with torch.no_grad():
        broken.weight[3, 4] = torch.nan
    with pytest.raises(InputError, match="least-squares gives logits that are not finite"):
        compare_candidates(dense, heldout, {"least-squares": (Joint(Span(1, 2), broken),)})


# --- the choice ------------------------------------------------------------------------------------------------------


def quality(loss: float) -> Quality:
    return Quality(float(torch.tensor(loss).exp()), loss, None, None, None, 10)


CANDIDATES: dict[str, Patch | None] = {
    "least-squares": DensePatch(48),
    "none": None,
    "low-rank": LowRankPatch(48, 16),
    "linearpatch": HadamardPatch(48),
}


def choice(**losses: float) -> str:
    """Dense 2.0, dropped 3.0 unless said otherwise: healing is the loss won back."""
    found = {name: quality(losses.get(name.replace("-", "_"), 3.0)) for name in CANDIDATES}
    found["dense"] = quality(2.0)
    return decide({name: (Joint(Span(2, 4), patch, name),) for name, patch in CANDIDATES.items()}, found).fit


def test_cost() -> None:
    assert cost((Joint(Span(1, 2)),)) == (0, 0)
    dense, low_rank = DensePatch(48), LowRankPatch(48, 4)
    assert cost((Joint(Span(1, 2), dense), Joint(Span(3, 4)), Joint(Span(5, 6), low_rank))) == (
        48 * 48 + 2 * 48 * 4,
        2 * 48 * 48 + 48 * 17,
    )


def test_the_lowest_loss_wins() -> None:
    assert choice(least_squares=2.1, low_rank=2.5, linearpatch=2.9) == "least-squares"
    assert choice(least_squares=2.5, low_rank=2.1, linearpatch=2.9) == "low-rank"


def test_a_cheaper_patch_wins_within_two_percent_of_the_healing() -> None:
    # The best one heals 0.5; 98 % of it is 0.49.
    assert choice(least_squares=2.5, low_rank=2.5099, linearpatch=2.9) == "low-rank"
    assert choice(least_squares=2.5, low_rank=2.5101, linearpatch=2.9) == "least-squares"
    assert choice(least_squares=2.5, low_rank=2.505, linearpatch=2.509) == "linearpatch"


def test_a_dearer_patch_does_not_win_by_being_nearly_as_good() -> None:
    assert choice(least_squares=2.5001, low_rank=2.5) == "low-rank"


def test_no_patch_where_none_heals() -> None:
    assert choice(least_squares=3.4, low_rank=3.1, linearpatch=3.2) == "none"
    assert choice(none=1.9, least_squares=1.95, low_rank=2.0, linearpatch=1.9) == "none"


def test_the_table() -> None:
    losses = {"dense": 2.0, "none": 3.0, "least-squares": 2.2, "low-rank": 2.4, "linearpatch": 3.3}
    found = {name: quality(loss) for name, loss in losses.items()}
    made = decide({name: (Joint(Span(2, 4), patch, name),) for name, patch in CANDIDATES.items()}, found)
    assert [row["fit"] for row in made.table] == ["least-squares", "low-rank", "none", "linearpatch"]
    assert [row["healed"] for row in made.table] == pytest.approx([0.8, 0.6, 0.0, -0.3])
    assert [row["kept"] for row in made.table] == [True, False, False, False]
    assert [row["parameters"] for row in made.table] == [48 * 48, 2 * 48 * 16, 0, 48]
    assert made.table[0]["perplexity"] == found["least-squares"].perplexity
    assert made.joints[0].fit == made.fit == "least-squares"

    structured = made.structured()
    assert structured.fit == "low-rank"
    assert [row["fit"] for row in structured.table] == ["low-rank", "none", "linearpatch"]


def test_choose_fit(dense: PreTrainedModel, heldout: Tensor, statistics: CalibrationStatistics) -> None:
    spans = [Span(3, 5), Span(1, 2)]
    made = choose_fit(dense, heldout, statistics, spans, rank=RANK, run=Run(2))
    assert set(made.candidates) == {fit.name for fit in fits_of(AUTO)}
    expected = {name: fitted_joints(statistics, spans, name, rank=RANK) for name in made.candidates}
    assert made.found == compare_candidates(dense, heldout, expected, run=Run(2))
    assert [joint.span for joint in made.joints] == sorted(spans)
    best = made.table[0]
    assert best["loss"] == min(quality.loss for name, quality in made.found.items() if name != "dense")

    structured = choose_fit(dense, heldout, statistics, spans, rank=RANK, structured=True)
    assert set(structured.candidates) == {fit.name for fit in fits_of(AUTO) if fit.structured}
    assert structured.fit == made.structured().fit
    assert not any(isinstance(joint.patch, DensePatch) for joint in structured.joints)


class Rank:
    """One of several processes, here threads, that exchange what they have."""

    def __init__(self, rank: int, together: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.count, self._together, self._table = rank, len(table), together, table

    def gather(self, one: Any) -> list[Any]:
        self._table[self.rank] = pickle.dumps(one)
        self._together.wait(timeout=60)
        found = [pickle.loads(other) for other in self._table]
        self._together.wait(timeout=60)
        return found


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ranks_share_the_work_and_the_result(
    dense: PreTrainedModel,
    heldout: Tensor,
    statistics: CalibrationStatistics,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    heldout = heldout[:3]
    alone = choose_fit(dense, heldout, statistics, [Span(2, 4)], rank=RANK)
    fitted: list[str] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        fitted.append(arguments[2])
        return fitted_joints(*arguments, **options)

    monkeypatch.setattr(selection, "fitted_joints", counted)
    together, table = threading.Barrier(count), [b""] * count
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        made = list(
            pool.map(
                lambda rank: choose_fit(
                    copy.deepcopy(dense),
                    heldout,
                    statistics,
                    [Span(2, 4)],
                    rank=RANK,
                    run=Run(processes=Rank(rank, together, table)),
                ),
                range(count),
            )
        )
    assert sorted(fitted) == sorted(fit.name for fit in fits_of(AUTO))
    for one in made:
        assert one.fit == alone.fit
        assert [row["fit"] for row in one.table] == [row["fit"] for row in alone.table]
        assert one.found == made[0].found
        for name, quality in alone.found.items():
            assert dataclasses.asdict(one.found[name]) == pytest.approx(dataclasses.asdict(quality), rel=1e-9)


def test_a_fit_that_the_text_does_not_allow_is_no_candidate(
    dense: PreTrainedModel, heldout: Tensor, statistics: CalibrationStatistics
) -> None:
    silent = statistics.mean_abs.clone()
    silent[..., 11] = 0
    with pytest.warns(UserWarning, match="not a candidate: the fit diagonal of 1:2 gave a value that is not finite"):
        made = choose_fit(dense, heldout, dataclasses.replace(statistics, mean_abs=silent), [Span(1, 2)], rank=RANK)
    assert set(made.candidates) == {fit.name for fit in fits_of(AUTO)} - {"diagonal"}
    with pytest.raises(InputError, match="were not collected"):
        choose_fit(dense, heldout, statistics, [Span(2, 3)], rank=RANK)
