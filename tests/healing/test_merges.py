"""Merged layers healed: by patches behind them, by new weights in them and behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import model_logits, residual_stream
from linearpatch_kernels.healing import merges
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.healing.merges import heal_merges, patch_merges, refit_merges
from linearpatch_kernels.healing.refit import PARTS
from linearpatch_kernels.merging.merge import choose_units, merge_layers
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.closed_forms import SHRINKAGE
from linearpatch_kernels.span import Span
from tests.support.sink import token_windows
from tests.support.tiny import tiny_model


def distance(merged: PreTrainedModel, dense: PreTrainedModel, windows: Tensor) -> float:
    """Mean over the tokens of |x - y| / |y| at the end of both models."""
    ends = [model.model(input_ids=windows, use_cache=False).last_hidden_state for model in (merged, dense)]
    return float(((ends[0] - ends[1]).norm(dim=-1) / ends[1].norm(dim=-1)).mean())


def test_a_dense_patch_brings_the_stream_nearer_to_the_dense_models(dense: PreTrainedModel, windows: Tensor) -> None:
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=4, repeat=False))
    healed = patch_merges(dense, merged, windows, "least-squares")
    places = [index + 1 for index, node in enumerate(plan.tree) if isinstance(node, list)]
    assert sorted(patches(healed)) == places
    assert not patches(merged)
    with torch.no_grad():
        assert distance(healed, dense, windows) < 0.9 * distance(merged, dense, windows)


def test_what_was_not_merged_is_refused(dense: PreTrainedModel, windows: Tensor) -> None:
    merged, _ = plan_merging(dense, windows, None, MergeSettings(layers=5))
    for one, other in (
        (dense, dense),
        (dense, keep_layers(merged, [0, 1, 2])),
        (tiny_model("llama", layers=5), merged),
    ):
        with pytest.raises(InputError, match="with layers merged"):
            patch_merges(one, other, windows, "least-squares")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_refitted_projections_bring_the_stream_nearer(family: str, windows: Tensor) -> None:
    dense = tiny_model(family)
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=4, repeat=False))
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    refitted = refit_merges(dense, merged, windows).model
    places = [index for index, node in enumerate(plan.tree) if isinstance(node, list)]
    after = refitted.state_dict()
    # Only the down projections of merged layers, and those of the result alone.
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{place}.mlp.down_proj.weight" for place in places}
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in before.items())
    with torch.no_grad():
        assert distance(refitted, dense, windows) < 0.9 * distance(merged, dense, windows)


def test_a_refit_is_the_least_squares_solution(dense: PreTrainedModel, windows: Tensor) -> None:
    """Against a plain solution in float64 from whole-model passes, at the ridge that it took."""
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=5))
    (place,) = [index for index, node in enumerate(plan.tree) if isinstance(node, list)]
    refitted = refit_merges(dense, merged, windows).model
    inputs: list[Tensor] = []
    projection = merged.model.layers[place].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        x = residual_stream(merged, windows, [place + 1])[place + 1].flatten(0, 1).double()
        y = residual_stream(dense, windows, [place + 2])[place + 2].flatten(0, 1).double()
    handle.remove()
    roots = y.norm(dim=-1, keepdim=True)
    a, lacking = inputs[0] / roots, (y - x) / roots
    found = (refitted.model.layers[place].mlp.down_proj.weight - projection.weight).detach().double() / SHRINKAGE
    own = (a.T @ a).diagonal()
    solutions = [
        torch.linalg.lstsq(torch.cat([a, torch.diag((ridge * own).sqrt())]), torch.cat([lacking, torch.zeros(80, 48)]))
        for ridge in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    ]
    errors = [float((found - one.solution.T).norm() / one.solution.norm()) for one in solutions]
    assert min(errors) < 1e-3, errors
    assert float(((lacking - a @ found.T) ** 2).sum()) < float((lacking**2).sum())


def test_a_merged_model_can_be_merged_and_refitted_again(dense: PreTrainedModel, windows: Tensor) -> None:
    """The places are told by both trees; healing is toward the model that was given."""
    once, _ = plan_merging(dense, windows, None, MergeSettings(layers=5))
    twice, plan = plan_merging(once, windows, None, MergeSettings(layers=4))
    (place,) = [index for index, node in enumerate(plan.tree) if isinstance(node, list)]
    refitted = refit_merges(once, twice, windows).model.state_dict()
    changed = {name for name, tensor in twice.state_dict().items() if not torch.equal(tensor, refitted[name])}
    assert changed == {f"model.layers.{place}.mlp.down_proj.weight"}


def test_a_refit_that_is_refused(dense: PreTrainedModel, windows: Tensor) -> None:
    merged, _ = plan_merging(dense, windows, None, MergeSettings(layers=5))
    with pytest.raises(InputError, match="at least 4"):
        refit_merges(dense, merged, windows[:3])
    with pytest.raises(InputError, match="with layers merged"):
        refit_merges(dense, dense, windows)
    gemma = tiny_model("gemma3_text")
    merged, _ = plan_merging(gemma, windows, None, MergeSettings(layers=5))
    with pytest.raises(InputError, match="heal with a patch"):
        refit_merges(gemma, merged, windows)


BLOCK = Span(1, 3)


def merged_block(dense: PreTrainedModel, windows: Tensor, share: float = 0.7) -> PreTrainedModel:
    """The layers of `BLOCK` made one."""
    return merge_layers(dense, choose_units(score_layers(dense, windows), BLOCK, (share, 1 - share)))


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    weights = dict(after.named_parameters())
    return {name for name, weight in before.named_parameters() if not torch.equal(weight, weights[name])}


def weights_of(layer: int) -> set[str]:
    attention = {f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
    names = attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    return {f"model.layers.{layer}.{name}.weight" for name in names}


@pytest.fixture(scope="module")
def others() -> Tensor:
    return token_windows(6, 40, seed=3)


@pytest.fixture(scope="module")
def many() -> Tensor:
    return token_windows(24, 40, seed=0)


def test_the_layers_behind_are_refitted_too(dense: PreTrainedModel, many: Tensor, others: Tensor) -> None:
    merged = merged_block(dense, many)
    alone, more = (refit_merges(dense, merged, many, behind=behind) for behind in (0, 2))
    down = "model.layers.1.mlp.down_proj.weight"
    assert changed(merged, alone.model) == {down}
    assert changed(merged, more.model) == {down} | weights_of(2) | weights_of(3)
    assert [(row.layer, row.part) for row in more.rows] == [
        (1, "feed-forward-out"),
        *((layer, part) for layer in (2, 3) for part in PARTS),
    ]
    # What comes first is the same fit.
    assert more.rows[0] == alone.rows[0]
    with torch.no_grad():
        errors = [distance(model, dense, others) for model in (merged, alone.model, more.model)]
    assert errors[2] < 0.97 * errors[1] < errors[0], errors


@pytest.mark.parametrize("behind", [0, 2])
def test_with_an_infinite_ridge_nothing_changes(
    behind: int, dense: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merges, "_SETTINGS", dataclasses.replace(merges._SETTINGS, ridges=(1e15,)))
    merged = merged_block(dense, windows)
    refitted = refit_merges(dense, merged, windows, behind=behind)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(refitted.model.get_parameter(name), parameter, rtol=0, atol=1e-6)


def test_what_is_linear_in_what_the_merged_layer_wrote_is_restored(
    many: Tensor, others: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_model("llama")
    merged = merged_block(dense, many, share=1)
    written: list[Tensor] = []
    map_ = 0.3 * torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    first, second = decoder_layers(dense)[BLOCK.start : BLOCK.end]
    first.mlp.register_forward_hook(lambda _module, _args, output: written.append(output))
    second.forward = lambda hidden_states, *_, **__: hidden_states + written[-1] @ map_
    monkeypatch.setattr(merges, "_SETTINGS", dataclasses.replace(merges._SETTINGS, shrinkage=1.0, ridges=(1e-7,)))
    refitted = refit_merges(dense, merged, many).model
    with torch.no_grad():
        assert distance(merged, dense, others) > 0.05
        wanted = model_logits(dense, others)
        torch.testing.assert_close(
            model_logits(refitted, others), wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())
        )


def test_a_patch_takes_the_place_of_the_merged_layers_refit(
    dense: PreTrainedModel, many: Tensor, others: Tensor
) -> None:
    merged = merged_block(dense, many)
    fit = {"fit": "shrunk-least-squares"}
    patched = heal_merges(dense, merged, many, "patch", **fit)
    both = heal_merges(dense, merged, many, "patch+refit", behind=2, **fit)
    assert patched.rows == []
    assert weights_of(2) <= changed(merged, both.model) <= weights_of(2) | weights_of(3)
    assert sorted(patches(both.model)) == [2]
    for name, value in patches(patched.model)[2].state_dict().items():
        assert torch.equal(patches(both.model)[2].state_dict()[name], value)
    with torch.no_grad():
        assert distance(both.model, dense, others) < distance(patched.model, dense, others)
    assert heal_merges(dense, merged, many, "none", **fit).model is merged


def test_what_can_be_refitted_behind_a_patch_where_outputs_are_normed(many: Tensor) -> None:
    gemma = tiny_model("gemma3_text")
    merged, _ = plan_merging(gemma, many[:4], None, MergeSettings(layers=5))
    healed = heal_merges(gemma, merged, many, "patch+refit", fit="scalar", behind=1)
    assert {row.part for row in healed.rows if not row.projections} >= {"attention-out", "feed-forward-out"}
    assert any(row.projections for row in healed.rows)
    with pytest.raises(InputError, match="heal with a patch"):
        heal_merges(gemma, merged, many, "refit", fit="scalar", behind=1)


def test_an_unknown_way_is_refused(dense: PreTrainedModel, windows: Tensor) -> None:
    with pytest.raises(InputError, match="no way to heal is called 'low-rank'"):
        heal_merges(dense, merged_block(dense, windows), windows, "low-rank", fit="low-rank")
