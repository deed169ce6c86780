"""A plan applied, against the layers called by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.selection import compare_candidates
from tests.support.tiny import VOCABULARY, random_patch, tiny_model

JOINTS = {
    "middle": [Joint(Span(2, 4), random_patch("hadamard"))],
    "two": [Joint(Span(1, 2), random_patch("dense")), Joint(Span(3, 5), random_patch("low-rank"))],
    "start": [Joint(Span(0, 2), random_patch("dense"))],
    "end": [Joint(Span(4, 6), random_patch("hadamard"))],
    "without": [Joint(Span(2, 4)), Joint(Span(5, 6))],
    "mixed": [Joint(Span(1, 3)), Joint(Span(4, 6), random_patch("low-rank"))],
    "one-layer-left": [Joint(Span(1, 6), random_patch("dense"))],
}
joints_of_one_model = pytest.mark.parametrize("joints", JOINTS.values(), ids=JOINTS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama").double()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: Tensor, joints: list[Joint]) -> Tensor:
    """The logits of the pruned model, its layers called one after the other."""
    stack = model.model
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    hidden = stack.embed_tokens(ids)
    rotary = stack.rotary_emb(hidden, positions)
    removed = {layer for joint in joints for layer in range(*joint.span)}
    patches = {joint.span.end: joint.patch for joint in joints if joint.patch is not None}
    for index, layer in enumerate([*stack.layers, None]):
        if index in patches:
            hidden = hidden @ patches[index].to_dense()
        if layer is not None and index not in removed:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.lm_head(stack.norm(hidden))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@joints_of_one_model
def test_the_pruned_model_is_the_layers_with_the_patch_between(
    model: PreTrainedModel, ids: Tensor, joints: list[Joint]
) -> None:
    pruned = apply_plan(model, PrunePlan(6, tuple(joints)))
    expected = by_hand(model, ids, joints)
    assert (expected - by_hand(model, ids, [])).abs().max() > 0.1
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-9, atol=1e-9)


@joints_of_one_model
def test_layers_are_renumbered_and_the_cache_follows(model: PreTrainedModel, ids: Tensor, joints: list[Joint]) -> None:
    plan = PrunePlan(6, tuple(joints))
    pruned = apply_plan(model, plan)
    left = len(plan.kept_layers)
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == left
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == list(range(left))
    whole = logits(pruned, ids)
    with torch.no_grad():
        first = pruned(input_ids=ids[:, :9], use_cache=True)
        assert len(first.past_key_values.layers) == left
        rest = pruned(input_ids=ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, rtol=1e-9, atol=1e-9)


def test_the_model_stays_as_it_is(model: PreTrainedModel, ids: Tensor) -> None:
    before, config = logits(model, ids), model.config.to_dict()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = PrunePlan(6, tuple(JOINTS["two"]))
    patches = plan.tensors()
    pruned = apply_plan(model, plan)
    with torch.no_grad():
        for parameter in pruned.model.layers[1].patch.parameters():
            parameter += 1
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids), before)
    for name, tensor in plan.tensors().items():
        assert torch.equal(tensor, patches[name]), "the plan keeps its own patches"


def test_parameters_are_shared(model: PreTrainedModel) -> None:
    pruned = apply_plan(model, PrunePlan(6, tuple(JOINTS["middle"])))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    added = [name for name, parameter in pruned.named_parameters() if parameter.data_ptr() not in own]
    assert added
    assert all(".patch." in name for name in added)


def test_a_pruned_model_is_pruned_again(model: PreTrainedModel, ids: Tensor) -> None:
    """Of the layers 0 1 (2 3) 4 5, layer 1 goes as well: number 1 in the pruned model."""
    first, second = Joint(Span(2, 4), random_patch("dense")), Joint(Span(1, 2), random_patch("low-rank", seed=5))
    once = apply_plan(model, PrunePlan(6, (first,)))
    twice = apply_plan(once, PrunePlan(4, (second,)))
    # The second patch leads up to what the first one expects.
    patch = second.patch.to_dense() @ first.patch.to_dense()
    both = random_patch("dense").double()
    with torch.no_grad():
        both.weight.copy_(patch)
    expected = by_hand(model, ids, [Joint(Span(1, 4), both)])
    torch.testing.assert_close(logits(twice, ids), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(once, ids), logits(apply_plan(model, PrunePlan(6, (first,))), ids))


def test_without_a_patch_the_class_is_the_stock_one(model: PreTrainedModel) -> None:
    assert type(apply_plan(model, PrunePlan(6, tuple(JOINTS["without"])))) is type(model)
    patched = apply_plan(model, PrunePlan(6, tuple(JOINTS["middle"])))
    assert patched.config.model_type == "linearpatch_llama"


def test_plans_for_another_model(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="the plan is for a model of 7 layers and this one has 6"):
        apply_plan(model, PrunePlan(7, tuple(JOINTS["middle"])))
    with pytest.raises(InputError, match="the plan's patches have width 64 and the model 48"):
        apply_plan(model, PrunePlan(6, (Joint(Span(2, 4), random_patch("dense", dim=64)),)))


def test_plain_removal_keeps_what_heals_an_earlier_cut(model: PreTrainedModel, ids: Tensor) -> None:
    first = Joint(Span(2, 4), random_patch("dense"))
    once = apply_plan(model, PrunePlan(6, (first,)))
    # Layer 2 of the pruned model, layer 4 of the dense one, carries the patch: removing it must not undo the healing.
    again = Joint(Span(2, 3))
    twice = apply_plan(once, PrunePlan(4, (again,)))
    torch.testing.assert_close(logits(twice, ids), by_hand(model, ids, [Joint(Span(2, 5), first.patch)]))
    found = compare_candidates(once, ids, {"again": [again]})["again"]
    assert found.loss == pytest.approx(perplexity_loss(twice, ids), rel=1e-9)


def perplexity_loss(model: PreTrainedModel, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
