"""Where to merge and how much of each layer: against exhaustive search, counted, and after a kill."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import evaluate_quality
from linearpatch_kernels.healing.merge_search import (
    PrefixLosses,
    default_variant,
    influence_shares,
    most_looks,
    plan_merging,
    search_share,
)
from linearpatch_kernels.healing.merges import CandidateRefits, refit_merges
from linearpatch_kernels.merging.merge import choose_units, merge_layers, unit_counts
from linearpatch_kernels.merging.plan import MergePlan, apply_merges, leaves
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.merging.settings import VARIANTS, MergeSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from tests.support.tiny import LAYERS, VOCABULARY, tiny_model


def written_by(model: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    """Windows that the model itself wrote: text on which no other model does better."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), 1)
    with torch.no_grad():
        return model.generate(start, max_new_tokens=length - 1, do_sample=True, eos_token_id=None, pad_token_id=0)


def loss_of(model: PreTrainedModel, windows: Tensor) -> float:
    return evaluate_quality(model, windows).loss


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_model("llama", initializer_range=0.15, seed=2)


@pytest.fixture(scope="module")
def windows(dense: PreTrainedModel) -> Tensor:
    return written_by(dense, 12, 40, seed=0)


@pytest.fixture(scope="module")
def heldout(dense: PreTrainedModel) -> Tensor:
    return written_by(dense, 8, 40, seed=1)


# --- shares ----------------------------------------------------------------------------------------------------------


def test_shares_of_influence() -> None:
    assert influence_shares([1.0, 3.0]) == [0.25, 0.75]
    assert influence_shares([1.0, 3.0], power=2) == [pytest.approx(0.1), pytest.approx(0.9)]
    assert influence_shares([1.0, 3.0], floor=0.8) == [pytest.approx(0.2), 0.8]
    assert influence_shares([2.0, 5.0, 3.0], floor=0.7) == [pytest.approx(0.12), 0.7, pytest.approx(0.18)]
    assert influence_shares([0.0, 0.0]) == [0.5, 0.5]


@pytest.mark.parametrize("lowest", range(21))
def test_the_search_finds_the_bottom_of_a_valley(lowest: int) -> None:
    calls: list[bool] = []

    def loss(point: int, quick: bool) -> float:
        calls.append(quick)
        return abs(point - lowest) ** 1.5

    best, found = search_share(loss, 0, 20)
    assert best == lowest
    assert found[best] == 0
    # Quick ones take a quarter of the windows: the authors' 21 full evaluations are more than three times as much.
    assert calls.count(True) * 0.25 + calls.count(False) <= 21 / 3


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (3, 5), (0, 7), (2, 40)])
def test_the_search_stays_in_its_range(low: int, high: int) -> None:
    for lowest in range(low, high + 1):
        looks: list[int] = []

        def loss(point: int, _: bool, at: int = lowest, looks: list[int] = looks) -> int:
            looks.append(point)
            return abs(point - at)

        best, found = search_share(loss, low, high)
        assert best == lowest
        assert len(looks) <= most_looks(low, high)
        assert all(low <= point <= high for point in found)


def half_silent(layers: int, of_first: float) -> PreTrainedModel:
    """A model of which layers 5 and 6 use only some of their units, together as many as one layer has: the merge with
    the share ``of_first`` loses nothing but that both layers read the same stream."""
    model = tiny_model("llama", layers=layers, seed=3, num_attention_heads=24, num_key_value_heads=24, head_dim=4)
    groups, neurons = (unit_counts(total, (of_first, 1 - of_first)) for total in (24, 80))
    with torch.no_grad():
        for layer, used_groups, used_neurons in zip(decoder_layers(model)[5:7], groups, neurons, strict=True):
            layer.self_attn.o_proj.weight[:, used_groups * 4 :] = 0
            layer.mlp.down_proj.weight[:, used_neurons:] = 0
    return model


@pytest.mark.parametrize("of_first", [0.0, 0.3, 0.55, 1.0])
def test_the_searched_share_is_the_authors_answer_at_a_fifth_of_their_cost(of_first: float) -> None:
    model = half_silent(12, of_first)
    heldout = written_by(model, 8, 60, seed=5)
    span = Span(5, 7)
    scores = score_layers(model, heldout)

    def merged(point: int) -> PreTrainedModel:
        return merge_layers(model, choose_units(scores, span, (point / 20, 1 - point / 20)))

    seen = count_layer_runs(model)
    naive = {point: loss_of(merged(point), heldout) for point in range(21)}
    naive_runs = sum(seen)
    assert naive_runs == 21 * 11 * len(heldout)
    seen.clear()
    losses = PrefixLosses(model, heldout, [span.start])
    best, found = search_share(lambda point, quick: losses(merged(point), span.start, 0.25 if quick else 1.0), 0, 20)
    assert best == min(naive, key=lambda point: naive[point])
    assert found[best] == pytest.approx(naive[best], abs=1e-5)
    assert 0 < sum(seen) <= naive_runs / 5


def count_layer_runs(model: PreTrainedModel) -> list[int]:
    """Grows by the number of windows whenever a layer runs, of the model or of one that is merged from it later: the
    copies of a norm carry its hooks."""
    seen: list[int] = []
    for layer in decoder_layers(model):
        layer.get_submodule("input_layernorm").register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    return seen


# --- places ----------------------------------------------------------------------------------------------------------


def test_prefix_losses_are_those_of_the_whole_model(dense: PreTrainedModel, heldout: Tensor) -> None:
    losses = PrefixLosses(dense, heldout, [2, 4], batch_size=3)
    for depth, kept in ((2, [0, 1, 4, 5]), (4, [0, 1, 2, 3])):
        cut = keep_layers(dense, kept)
        assert losses(cut, depth) == pytest.approx(loss_of(cut, heldout), abs=1e-6)
        assert losses(cut, depth, 0.25) == pytest.approx(loss_of(cut, heldout[:3]), abs=1e-6)


@pytest.mark.parametrize("score", ["angular", "bi", "sleb", "loss", "refit"])
def test_the_place_with_the_highest_score_is_merged(
    score: str, dense: PreTrainedModel, windows: Tensor, heldout: Tensor
) -> None:
    scores = score_layers(dense, windows)
    spans = list(scores.span_influence)

    def value(span: Span) -> float:
        if score == "sleb":
            return -loss_of(keep_layers(dense, [i for i in range(LAYERS) if i not in range(*span)]), heldout)
        if score in ("loss", "refit"):
            shares = influence_shares(scores.influence[span.start : span.end].tolist())
            merged = merge_layers(dense, choose_units(scores, span, shares))
            return -loss_of(refit_merges(dense, merged, windows).model if score == "refit" else merged, heldout)
        return -{"angular": scores.last_token_angle, "bi": scores.span_influence}[score][span]

    _, plan = plan_merging(dense, windows, heldout, MergeSettings(layers=5, skip_score=score))
    assert plan.merges[0].span == max(spans, key=value)
    ranking = plan.records[0]["ranking"]
    assert {Span.parse(name) for name in ranking} == set(spans)
    for name, found in ranking.items():
        assert found == pytest.approx(value(Span.parse(name)), abs=1e-5)


def test_a_later_merge_is_judged_with_its_own_layer_refitted(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor
) -> None:
    first, plan = plan_merging(dense, windows, None, MergeSettings(layers=5))
    _, plan = plan_merging(dense, windows, heldout, MergeSettings(layers=4, skip_score="refit"), plan=plan)
    merge, ranking = plan.merges[1], plan.records[1]["ranking"]
    # The layers of the first merge are taken as they are, the stream behind the second one's is the first model's.
    refitted = CandidateRefits(dense, first, windows, {merge.span: leaves(plan.tree[merge.span.start])[-1] + 1})
    expected = -loss_of(refitted(merge_layers(first, merge), merge.span), heldout)
    assert ranking[str(merge.span)] == max(ranking.values()) == pytest.approx(expected, abs=1e-5)
    untouched = loss_of(merge_layers(first, merge), heldout)
    assert abs(untouched - expected) > 1e-3


def test_a_block_is_one_merge_of_its_first_and_last_layer(
    dense: PreTrainedModel, windows: Tensor, heldout: Tensor
) -> None:
    assert default_variant(dense, 3) == "come-block"
    told: list[tuple[Any, ...]] = []
    settings = MergeSettings(layers=3, **VARIANTS["come-block"])
    merged, plan = plan_merging(dense, windows, heldout, settings, progress=lambda *one: told.append(one))
    (merge,), (record,) = plan.merges, plan.records
    assert num_layers(merged) == 3
    assert merge.span.length == 4
    assert merge.shares[1:3] == (0, 0)
    assert all(given[1] == given[2] == () for given in merge.units.values())
    found = record["losses"]
    assert found[f"{merge.shares[0]:g}"] == min(found.values())
    # Every look is a refit, which takes half a minute of a model of some size.
    looks = [one for one in told if one[0] == "choosing the shares"]
    assert len(found) <= len(looks) <= looks[0][2] == 10
    refitted = refit_merges(dense, merged, windows).model
    assert min(found.values()) == pytest.approx(loss_of(refitted, heldout), abs=1e-5)


def test_where_no_block_is_possible(windows: Tensor, heldout: Tensor) -> None:
    gemma = tiny_model("gemma3_text")
    assert default_variant(gemma, 5) == "come-loss"
    # Sliding and full attention take turns.
    assert default_variant(gemma, 1) == "come-loss"
    with pytest.raises(InputError, match="heal with a patch"):
        plan_merging(gemma, windows, heldout, MergeSettings(layers=5, skip_score="refit"))


def test_every_merge_is_scored_on_the_model_before_it(dense: PreTrainedModel, windows: Tensor) -> None:
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=3))
    current = dense
    for merge in plan.merges:
        scores = score_layers(current, windows)
        assert merge.span == min(scores.last_token_angle, key=lambda span: scores.last_token_angle[span])
        shares = influence_shares(scores.influence[merge.span.start : merge.span.end].tolist())
        assert merge.shares == pytest.approx(shares)
        assert merge.units == choose_units(scores, merge.span, shares).units
        current = merge_layers(current, merge)
    assert num_layers(merged) == plan.layers == 3
    assert merged.config.linearpatch_merge_tree == plan.tree
    assert leaves(plan.tree) == list(range(LAYERS))


def test_no_repeat_and_width(dense: PreTrainedModel, windows: Tensor) -> None:
    _, plan = plan_merging(dense, windows, None, MergeSettings(layers=3, repeat=False))
    assert sorted(len(node) if isinstance(node, list) else 1 for node in plan.tree) == [2, 2, 2]
    assert all(not isinstance(child, list) for node in plan.tree for child in node)
    with pytest.raises(InputError, match="without merging a merged layer again"):
        plan_merging(dense, windows, None, MergeSettings(layers=2, repeat=False))
    _, plan = plan_merging(dense, windows, None, MergeSettings(layers=3, width=3))
    assert [merge.span.length for merge in plan.merges] == [3, 2]


def test_neighbours_of_different_kinds_are_passed_over(windows: Tensor) -> None:
    model = tiny_model("gemma3_text")
    merged, plan = plan_merging(model, windows, None, MergeSettings(layers=4))
    kinds = model.config.layer_types
    for node in plan.tree:
        assert len({kinds[leaf] for leaf in leaves(node)}) == 1
    with pytest.raises(InputError, match="different kinds"):
        plan_merging(merged, windows, None, MergeSettings(layers=1))


@pytest.mark.parametrize("least", [0.0, 0.1, 0.5])
def test_the_posterior_keeps_to_the_least_share_and_is_no_worse_than_its_neighbours(
    least: float, dense: PreTrainedModel, windows: Tensor, heldout: Tensor
) -> None:
    settings = MergeSettings(layers=4, posterior=True, least_share=least)
    merged, plan = plan_merging(dense, windows, heldout, settings)
    for merge, record in zip(plan.merges, plan.records, strict=True):
        assert min(merge.shares) >= least - 1e-9
        assert record["losses"][f"{merge.shares[0]:g}"] == min(record["losses"].values())
    last = plan.records[-1]["losses"][f"{plan.merges[-1].shares[0]:g}"]
    assert last == pytest.approx(loss_of(merged, heldout), abs=1e-5)


# --- the plan --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_to_the_same_model(
    variant: str, dense: PreTrainedModel, windows: Tensor, heldout: Tensor, tmp_path: Path
) -> None:
    settings = MergeSettings(layers=3, **VARIANTS[variant])
    expected, whole = plan_merging(dense, windows, heldout, settings)

    # The block is one merge; the others are killed before their last.
    survived = min(2, len(whole.merges))

    def kill(plan: MergePlan) -> None:
        plan.save(tmp_path / "merge.json")
        if len(plan.merges) == survived:
            raise Killed

    with pytest.raises(Killed):
        plan_merging(dense, windows, heldout, settings, keep=kill)
    kept = MergePlan.load(tmp_path / "merge.json")
    assert kept.merges == whole.merges[:survived]
    resumed, plan = plan_merging(dense, windows, heldout, settings, plan=kept)
    assert plan == whole
    again = apply_merges(dense, plan)
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
        assert torch.equal(again.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["merge.json"]


def test_broken_and_foreign_plans(tmp_path: Path, dense: PreTrainedModel, windows: Tensor) -> None:
    _, plan = plan_merging(dense, windows, None, MergeSettings(layers=5))
    file = tmp_path / "merge.json"
    with pytest.raises(InputError, match="there is no plan"):
        MergePlan.load(file)
    for content, complaint in (
        ("{", "cannot be read"),
        ("[1]", "not a plan of merges"),
        ('{"format": "linearpatch-merge", "version": 1}', "not as it was written"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=complaint):
            MergePlan.load(file)
    plan.save(file)
    assert MergePlan.load(file) == plan
    with pytest.raises(InputError, match="of a model of 6 layers and this one has 5"):
        apply_merges(keep_layers(dense, range(5)), plan)
    with pytest.raises(InputError, match="leaves 5 layers and 6 are asked for"):
        plan_merging(tiny_model("llama", layers=7), windows, None, MergeSettings(layers=6), plan=_shorter_by_two(plan))
    assert plan.belongs_to(MergePlan(6))
    assert not plan.belongs_to(MergePlan(6, model="another"))


def _shorter_by_two(plan: MergePlan) -> MergePlan:
    return dataclasses.replace(plan, num_layers=7, merges=plan.merges * 2, records=plan.records * 2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers": 6}, "give 1 to 5"),
        ({"layers": 0}, "give 1 to 5"),
        ({"rule": "best"}, "no rule"),
        ({"skip_score": "best"}, "no skip score"),
        ({"width": 1}, "at least 2"),
        ({"posterior": True}, "give held-out windows"),
        ({"least_share": 0.6}, "least share"),
        ({"grid": 0}, "grid"),
    ],
)
def test_settings_that_make_no_sense(
    changes: dict[str, Any], complaint: str, dense: PreTrainedModel, windows: Tensor
) -> None:
    with pytest.raises(InputError, match=complaint):
        plan_merging(dense, windows, None, MergeSettings(**{"layers": 4, **changes}))


def test_a_text_of_another_model_is_refused(dense: PreTrainedModel, windows: Tensor) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        plan_merging(dense, windows + VOCABULARY, None, MergeSettings(layers=4))
    assert math.isfinite(loss_of(dense, windows))
