"""Merges of models without a record, whose layers show that they are sums over units; or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.merging.merge import Merge, check_mergeable, merge_layers
from linearpatch_kernels.modeling import units
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, recorded_sublayers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.nn import DensePatch
from linearpatch_kernels.span import Span
from tests.support.tiny import FAMILY_NAMES, tiny_model
from tools.models_reference import tiny_decoder

IDS = torch.randint(6, 128, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_FOUND", {})


def with_random_gains(name: str) -> PreTrainedModel:
    model = tiny_decoder(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def split(model: PreTrainedModel, span: Span, rule: str = "exact", *, first: float = 0.5) -> Merge:
    """Units of both layers, none of them twice."""
    generator = torch.Generator().manual_seed(2)
    chosen = {}
    for half in sublayers(model):
        order = torch.randperm(half.units, generator=generator).tolist()
        count = round(first * half.units)
        chosen[half.name] = (tuple(sorted(order[:count])), tuple(sorted(order[count:])))
    return Merge(span, (first, 1 - first), chosen, rule)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_is_recorded_is_what_is_found(name: str) -> None:
    model = tiny_model(name)
    for told, found in zip(recorded_sublayers(model), units._found(model), strict=True):
        assert {**vars(told), "shared_norms": set(told.shared_norms)} == {
            **vars(found),
            "shared_norms": set(found.shared_norms),
        }


@pytest.mark.parametrize(
    "name", ["arcee", "cohere", "ernie4_5", "gemma", "glm", "granite", "gpt_neox", "opt", "phi", "starcoder2", "olmo"]
)
def test_a_layer_and_its_copy_are_that_layer(name: str) -> None:
    """With whatever units of either: gains, biases and biases of norms go where they belong."""
    model = with_random_gains(name)
    first, second = decoder_layers(model)[2:4]
    second.load_state_dict(first.state_dict())
    merged = merge_layers(model, split(model, Span(2, 4)))
    wanted = logits(keep_layers(model, [0, 1, 2, 4, 5, 6, 7]))
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert merged.config.linearpatch_merge_tree[2] == [2, 3]
    assert torch.isfinite(logits(merge_layers(model, split(model, Span(2, 4), "authors")))).all()


@pytest.mark.parametrize("name", ["arcee", "cohere", "glm4", "granite", "starcoder2"])
def test_a_merge_with_all_units_of_one_layer_is_that_layer(name: str) -> None:
    model = with_random_gains(name)
    for share, kept in ((1.0, [0, 1, 2, 4, 5, 6, 7]), (0.0, [0, 1, 3, 4, 5, 6, 7])):
        wanted = logits(keep_layers(model, kept))
        found = logits(merge_layers(model, split(model, Span(2, 4), first=share)))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_a_patch_in_front_of_the_layers_stays() -> None:
    model = patched_model(with_random_gains("arcee"), {2: patch(), 5: patch()})
    first, second = decoder_layers(model)[2:4]
    second.load_state_dict({n: one for n, one in first.state_dict().items() if not n.startswith("patch.")})
    merged = merge_layers(model, split(model, Span(2, 4)))
    wanted = logits(keep_layers(model, [0, 1, 2, 4, 5, 6, 7]))
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    with pytest.raises(InputError, match="a patch at joint 5 inside the layers 4:6"):
        check_mergeable(model, Span(4, 6))


def patch() -> DensePatch:
    found = DensePatch(64)
    with torch.no_grad():
        found.weight += 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "the weights of attn.c_proj lie with their inputs in front"),
        ("mixtral", "mlp.gate, mlp.experts read what post_attention_layernorm gives and are no projections"),
        ("olmo2", "the attention is no sum over 2 groups of heads, each with rows of its own"),
        ("bitnet", "the attention is no sum over 2 groups of heads"),
        ("stablelm", "self_attn.q_proj has no bias that could take over that of input_layernorm"),
        # The heads have slopes by their number.
        ("bloom", "with their units in another order they compute something else"),
        ("granite_swa", "self_attn.sinks is neither in a row or column of theirs nor a gain that they share"),
        ("deepseek_v3", "they are not all made of the same parts"),
        ("mamba2", "their config does not say how many heads they have"),
        ("cohere2_moe", "they are no attention and a feed-forward half"),
        ("minimax", "in layer 0 no projection was found"),
    ],
)
def test_what_is_no_sum_over_units_is_refused(name: str, why: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' can be removed, not merged: .*{why}"):
        check_mergeable(tiny_decoder(name), Span(2, 4))


def test_layers_of_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"different kinds \(sliding_attention, full_attention\)"):
        check_mergeable(tiny_decoder("gemma2"), Span(2, 4))
    model: Any = tiny_decoder("arcee")
    layer = model.model.layers[3].self_attn
    check_mergeable(model, Span(2, 4))
    layer.scaling *= 2
    with pytest.raises(
        InputError, match="the layers 2 and 3 are of different kinds: with the same weights they compute"
    ):
        check_mergeable(model, Span(2, 4))
