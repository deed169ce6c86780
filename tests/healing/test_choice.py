"""The ways to heal a cut, and the one that ``auto`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import calibrate, joint_statistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.forward import Stream
from linearpatch_kernels.healing.choice import decide, heal_cut
from linearpatch_kernels.healing.refit import RefitRow, Step
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.selection import fitted_joints
from linearpatch_kernels.span import Span
from tests.support.sink import token_windows
from tests.support.tiny import tiny_model

FIT, HELD = token_windows(24, 40, 0), token_windows(6, 40, 1)
SPAN = Span(2, 4)


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plan(dense: PreTrainedModel) -> PrunePlan:
    statistics = calibrate(dense, FIT.split(4), moments=[SPAN])
    return PrunePlan(6, fitted_joints(statistics, [SPAN], "shrunk-least-squares"))


@pytest.mark.parametrize("heal", HEALS)
def test_each_way_gives_what_it_says(heal: str, dense: PreTrainedModel, plan: PrunePlan) -> None:
    healed = heal_cut(dense, plan, FIT, HELD, heal=heal)
    way = HEALS[heal]
    assert healed.heal is way
    assert bool(patches(healed.model)) == way.patched
    assert (type(healed.model) is type(dense)) == way.stock
    assert bool(healed.rows) == way.refitted
    assert [joint.patch is not None for joint in healed.plan.joints] == [way.patched]
    kept = [dense.model.layers[layer].mlp.down_proj.weight for layer in plan.kept_layers]
    same = [
        torch.equal(layer.mlp.down_proj.weight, old) for layer, old in zip(healed.model.model.layers, kept, strict=True)
    ]
    # A patch leaves all weights as they are; a refit changes those behind the joint, and in front of it.
    assert [index for index, equal in enumerate(same) if not equal] == [1, 2, 3] * way.refitted


def test_a_patch_is_fitted_again_behind_the_layer_that_was(dense: PreTrainedModel, plan: PrunePlan) -> None:
    healed = heal_cut(dense, plan, FIT, HELD, heal="patch+refit")
    assert healed.rows[0].layer == 1
    assert healed.plan.refitted == (1, 2, 3)
    (planned,), (first,) = healed.plan.joints, plan.joints
    assert planned.patch is not None
    assert first.patch is not None
    matrix, there = (chain[0].weight for chain in (planned.patch, patches(healed.model)[2]))
    assert torch.equal(matrix, there)
    assert not torch.equal(matrix, first.patch[0].weight)
    # It is that of the plan's fit for the stream that the refitted layer leaves.
    fit_windows: list[Any] = []
    for model, depth in ((healed.model, 2), (dense, 4)):
        stream = Stream(FIT)
        stream.advance(model, depth)
        fit_windows.append(stream.states)
    again = fit_patch(joint_statistics(zip(*fit_windows, strict=True), "the joint"), first.fit)
    assert isinstance(again, DensePatch)
    torch.testing.assert_close(again.weight, matrix, rtol=0, atol=1e-5)


def test_a_patch_that_another_layer_in_front_would_not_help_stays() -> None:
    """The removed layers are a linear map of the stream, which the patch is already."""
    dense = tiny_model("llama")
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]
    layers: Any = decoder_layers(dense)
    layers[2].forward = lambda hidden_states, *_, **__: hidden_states @ turn
    layers[3].forward = lambda hidden_states, *_, **__: hidden_states
    statistics = calibrate(dense, FIT.split(4), moments=[SPAN])
    plan = PrunePlan(6, fitted_joints(statistics, [SPAN], "least-squares"))
    healed = heal_cut(dense, plan, FIT, HELD, heal="patch+refit")
    assert healed.rows[0].projections == ()
    assert "does better with the layer as it was" in healed.rows[0].why
    for name, parameter in decoder_layers(healed.model)[1].named_parameters():
        assert torch.equal(parameter, dict(layers[1].named_parameters())[name]), name
    (old,), (new,) = plan.joints, healed.plan.joints
    assert old.patch is not None
    assert new.patch is not None
    assert torch.equal(old.patch[0].weight, new.patch[0].weight)


def test_auto_compares_them_and_takes_what_it_measured(dense: PreTrainedModel, plan: PrunePlan) -> None:
    healed = heal_cut(dense, plan, FIT, HELD)
    assert healed.found.keys() == {"dense", *HEALS}
    assert healed.heal.name == decide(healed.found)
    # A random model predicts nothing, so no way need be better than none on its text; none that is worse is taken.
    assert healed.found[healed.heal.name].loss <= healed.found["none"].loss
    alone = heal_cut(dense, plan, FIT, HELD, heal=healed.heal.name)
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, healed.model.get_parameter(name)), name


def quality(loss: float) -> Quality:
    return Quality(2.7**loss, loss, None, None, None, 100)


@pytest.mark.parametrize(
    ("losses", "taken"),
    [
        ({"none": 4.0, "patch": 3.5, "refit": 3.4, "patch+refit": 3.38}, "refit"),
        ({"none": 4.0, "patch": 3.5, "refit": 3.4, "patch+refit": 3.3}, "patch+refit"),
        ({"none": 4.0, "patch": 3.3, "refit": 3.4}, "patch"),
        ({"none": 4.0, "patch": 4.5, "refit": 4.2, "patch+refit": 5.0}, "none"),
        ({"none": 4.0, "patch": 3.99, "refit": 5.0, "patch+refit": 3.985}, "none"),
        ({"patch": 3.3, "refit": 3.4}, "patch"),
    ],
)
def test_a_stock_model_is_taken_where_it_is_nearly_as_good(losses: Mapping[str, float], taken: str) -> None:
    assert decide({"dense": quality(3.0)} | {name: quality(loss) for name, loss in losses.items()}) == taken


def test_a_killed_run_goes_on_by_way(dense: PreTrainedModel, plan: PrunePlan) -> None:
    kept: dict[str, dict[str, Tensor]] = {}

    def keep(way: str, _: Step, weights: Mapping[str, Tensor], __: Sequence[RefitRow]) -> None:
        kept.setdefault(way, {}).update(weights)

    whole = heal_cut(dense, plan, FIT, HELD, keep=keep)
    assert kept.keys() == {"refit", "patch+refit"}
    resumed = heal_cut(dense, plan, FIT, HELD, done={"refit": kept["refit"], "patch+refit": {}})
    assert resumed.found == whole.found
    # The patch that was fitted again is among what is kept.
    assert any(".patch." in name for name in kept["patch+refit"])
    resumed = heal_cut(dense, plan, FIT, HELD, heal="patch+refit", done=kept)
    alone = heal_cut(dense, plan, FIT, HELD, heal="patch+refit")
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    assert all(one.equal(resumed.plan.tensors()[name]) for name, one in alone.plan.tensors().items())


@pytest.mark.parametrize(
    ("heal", "joints", "words"),
    [("pathc", None, "no way to heal is called 'pathc'"), ("patch+refit", (Joint(SPAN),), "has no patch")],
)
def test_what_cannot_be_done_is_refused(
    heal: str, joints: Any, words: str, dense: PreTrainedModel, plan: PrunePlan
) -> None:
    with pytest.raises(InputError, match=words):
        heal_cut(dense, PrunePlan(6, joints or plan.joints), FIT, HELD, heal=heal)
