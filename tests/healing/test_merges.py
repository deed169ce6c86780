"""Patches behind merged layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import residual_stream
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.healing.merges import heal_merges, refit_merges
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.families import keep_layers
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.closed_forms import SHRINKAGE
from tests.support.tiny import tiny_model


def distance(merged: PreTrainedModel, dense: PreTrainedModel, windows: Tensor) -> float:
    """Mean over the tokens of |x - y| / |y| at the end of both models."""
    ends = [model.model(input_ids=windows, use_cache=False).last_hidden_state for model in (merged, dense)]
    return float(((ends[0] - ends[1]).norm(dim=-1) / ends[1].norm(dim=-1)).mean())


def test_a_dense_patch_brings_the_stream_nearer_to_the_dense_models(dense: PreTrainedModel, windows: Tensor) -> None:
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=4, repeat=False))
    healed = heal_merges(dense, merged, windows, "least-squares")
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
            heal_merges(one, other, windows, "least-squares")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_refitted_projections_bring_the_stream_nearer(family: str, windows: Tensor) -> None:
    dense = tiny_model(family)
    merged, plan = plan_merging(dense, windows, None, MergeSettings(layers=4, repeat=False))
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    refitted = refit_merges(dense, merged, windows)
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
    refitted = refit_merges(dense, merged, windows)
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
    refitted = refit_merges(once, twice, windows).state_dict()
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
