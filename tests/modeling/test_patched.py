from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import STOCK_FAMILIES, family_of
from linearpatch_kernels.modeling.patched import PATCHED_CLASSES, carried_patches, patched_model, patches
from linearpatch_kernels.modeling.views import partial_decoder, suffix_model
from linearpatch_kernels.nn import HadamardPatch
from tests.support.tiny import normed_patches, random_patch, tiny_model, tiny_patched_model

KINDS = ("hadamard", "low-rank", "dense", "norm-linear", "norm-linear low-rank", "norm-linear hadamard")


def composed(model: PreTrainedModel, joints: dict[int, nn.Module], kept: list[int], ids: torch.Tensor) -> torch.Tensor:
    """The logits of the cut and patched model, layer by layer through views of the dense one."""
    stream = model.model.embed_tokens(ids)
    for index, layer in enumerate(kept):
        stream = joints.get(index, nn.Identity())(stream)
        stream = partial_decoder(model, layer, layer + 1)(inputs_embeds=stream).last_hidden_state
    stream = joints.get(len(kept), nn.Identity())(stream)
    return suffix_model(model, len(model.model.layers))(inputs_embeds=stream).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_patched_model_is_its_layers_and_patches(
    model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    joints = {
        0: random_patch("low-rank"),
        1: random_patch("norm-linear"),
        2: random_patch("hadamard"),
        4: random_patch("dense"),
    }
    kept = [0, 1, 4, 5]
    twin = patched_model(keep_layers(model, kept), joints)
    expected = composed(model, {joint: copy.deepcopy(patch).to(dtype) for joint, patch in joints.items()}, kept, ids)
    assert twin.dtype == dtype
    assert {parameter.dtype for parameter in twin.parameters()} == {dtype}
    assert torch.equal(twin(ids).logits, expected)
    assert list(patches(twin)) == [0, 1, 2, 4]


def test_where_the_patch_lives(patched: PreTrainedModel) -> None:
    names = {name for name, _ in patched.named_parameters() if "patch" in name}
    hadamard = {f"model.layers.2.patch.0.{name}" for name in ("scale", "pre_scale", "post_scale", "down", "up")}
    assert names == {*hadamard, "model.layers.3.output_patch.0.weight"}


def test_the_twin_shares_the_model_and_owns_its_patches(model: PreTrainedModel, ids: torch.Tensor) -> None:
    patch, before, config = random_patch("hadamard"), model(ids).logits, copy.deepcopy(model.config)
    twin = patched_model(model, {3: patch})
    stock = dict(model.named_parameters())
    assert all(twin.get_parameter(name) is parameter for name, parameter in stock.items())
    assert twin.model.layers[3].patch[0] is not patch
    assert torch.equal(twin.model.layers[3].patch[0].scale, patch.scale)
    assert model.config == config
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(twin(ids).logits, before)


def test_a_patched_model_caches_right(
    patched: PreTrainedModel, assert_cache_changes_nothing: Callable[..., None]
) -> None:
    assert_cache_changes_nothing(patched)


def test_a_model_with_norm_linear_patches_caches_right(
    model: PreTrainedModel, assert_cache_changes_nothing: Callable[..., None]
) -> None:
    assert_cache_changes_nothing(patched_model(keep_layers(model, [0, 1, 4, 5]), normed_patches()))


def test_names_and_registration(family: str, patched: PreTrainedModel) -> None:
    stock = family_of(family)
    config_class, decoder_class, causal_lm_class = PATCHED_CLASSES[family]
    assert type(patched) is causal_lm_class
    assert type(patched.model) is decoder_class
    assert type(patched.config) is config_class
    assert patched.config.model_type == f"linearpatch_{family}"
    assert causal_lm_class.__name__ == f"LinearPatch{stock.causal_lm_class.__name__}"
    assert isinstance(patched, stock.causal_lm_class)
    assert AutoConfig.for_model(f"linearpatch_{family}").__class__ is config_class
    assert type(AutoModelForCausalLM.from_config(patched.config)) is causal_lm_class
    assert type(AutoModel.from_config(patched.config)) is decoder_class


def test_a_config_survives_every_copy(patched: PreTrainedModel) -> None:
    config = patched.config
    assert config == copy.deepcopy(config)
    entries = json.loads(config.to_json_string())
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    again = type(config)(**entries)
    assert again.to_dict() == config.to_dict()
    assert again.linearpatch["joints"]["4"] == [{"kind": "dense", "dim": 48}]
    assert set(entries["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert type(config)().linearpatch == {"format": 2, "joints": {}}
    assert config.to_diff_dict()["linearpatch"] == config.linearpatch


def test_a_stock_class_refuses_the_config_file(family: str, patched: PreTrainedModel) -> None:
    stock = STOCK_FAMILIES[family]
    config = stock.config_class(**patched.config.to_dict())
    for stock_class in (stock.decoder_class, stock.causal_lm_class):
        with pytest.raises(KeyError, match=r"import linearpatch_kernels\.modeling.*trust_remote_code=True"):
            stock_class(config)


def test_a_model_from_its_config_alone_has_identity_patches(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    fresh = type(patched)(patched.config).eval()
    for patch in patches(fresh).values():
        torch.testing.assert_close(patch.to_dense(), torch.eye(48, dtype=torch.float64))
    assert fresh(ids).logits.isfinite().all()


def test_deepcopy_is_independent(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    before = patched(ids).logits
    twin = copy.deepcopy(patched)
    assert torch.equal(twin(ids).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(patched(ids).logits, before)


def test_torch_compile(family: str, ids: torch.Tensor) -> None:
    # Without inductor, which takes half a minute and would test torch; one whole graph is what is ours.
    model = patched_model(tiny_model(family, layers=2), {1: random_patch("hadamard")})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_casting_and_moving(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    wide = patched(ids).logits
    narrow = patched.to("cpu", torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.bfloat16
    # Two random networks of this size differ by about 6; bfloat16 moves the logits by a fraction of that.
    assert (narrow.float() - wide).abs().mean() < 0.3


def test_a_lora_step_trains_the_adapter_and_not_the_patch(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    before = patched(ids).logits.detach()
    scale = patches(patched)[2][0].scale.detach().clone()
    wrapped = get_peft_model(patched, LoraConfig(target_modules="all-linear", r=2)).train()
    assert torch.equal(wrapped.eval()(ids).logits, before)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = wrapped(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(patches(wrapped)[2][0].scale, scale)
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(patched)
    torch.testing.assert_close(merged(ids).logits, wrapped(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_covers_the_patch(patched: PreTrainedModel, ids: torch.Tensor, reentrant: bool) -> None:
    patched.train()
    calls = []
    patches(patched)[2].register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        patched.zero_grad()
        patched(ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in patched.parameters()]

    expected = gradients()
    assert len(calls) == 1
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert len(calls) == 3  # once in the forward pass and once when the backward pass repeats it
    assert all(grad.abs().sum() > 0 for grad in got)
    torch.testing.assert_close(got, expected)


def test_hidden_states_are_the_streams_before_the_patches(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    states = patched(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5
    assert torch.equal(states[2], partial_decoder(patched, 0, 2, embed=True)(ids).last_hidden_state)


@torch.no_grad()
def test_pruned_again_patches_stay_with_their_layers(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    """Of layers 0 1 [patch] 2 3 [patch], layer 1 goes."""
    again = keep_layers(patched, [0, 2, 3])
    assert type(again) is type(patched)
    assert again.config.linearpatch["joints"].keys() == {"1", "3"}
    stream = partial_decoder(patched, 0, 1, embed=True)(ids).last_hidden_state
    assert torch.equal(again(ids).logits, suffix_model(patched, 2)(inputs_embeds=stream).logits)


@torch.no_grad()
def test_a_new_patch_stands_before_the_one_that_is_there(
    patched: PreTrainedModel, ids: torch.Tensor, tmp_path: Any
) -> None:
    """Layer 1 goes, and joint 1 gets a patch that was fitted from the stream entering 1 to the stream entering 2."""
    new = random_patch("dense", seed=9)
    again = patched_model(keep_layers(patched, [0, 2, 3]), {1: new}, provenance={"spans": ["1:2"]})
    stream = partial_decoder(patched, 0, 1, embed=True)(ids).last_hidden_state
    expected = suffix_model(patched, 2)(inputs_embeds=new(stream)).logits
    assert torch.equal(again(ids).logits, expected)
    assert [link["kind"] for link in again.config.linearpatch["joints"]["1"]] == ["dense", "hadamard"]
    again.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_a_removed_layer_takes_its_patch_along(patched: PreTrainedModel) -> None:
    again = keep_layers(patched, [0, 1, 3])
    assert again.config.linearpatch["joints"].keys() == {"3"}
    assert keep_layers(patched, [0, 1]).config.linearpatch["joints"] == {}


@torch.no_grad()
def test_carried_patches_make_a_plain_removal_skip_the_layer_alone(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    kept = [0, 1, 3]
    carried = carried_patches(patched, kept)
    assert carried.keys() == {2}
    again = patched_model(keep_layers(patched, kept), carried)
    stream = partial_decoder(patched, 0, 2, embed=True)(ids).last_hidden_state
    stream = patches(patched)[2](stream)
    assert torch.equal(again(ids).logits, suffix_model(patched, 3)(inputs_embeds=stream).logits)

    behind = patched_model(keep_layers(patched, [0, 1]), carried_patches(patched, [0, 1]))
    assert len(behind.config.linearpatch["joints"]["2"]) == 2
    stream = partial_decoder(patched, 0, 2, embed=True)(ids).last_hidden_state
    for patch in patches(patched).values():
        stream = patch(stream)
    assert torch.equal(behind(ids).logits, suffix_model(patched, 4)(inputs_embeds=stream).logits)


def test_provenance_adds_up() -> None:
    model = tiny_model("llama")
    first = patched_model(model, {1: random_patch("dense")}, provenance={"dense_layers": 8, "spans": ["1:3"]})
    second = patched_model(first, {2: random_patch("dense")}, provenance={"spans": ["2:3"]})
    assert second.config.linearpatch["provenance"] == [{"dense_layers": 8, "spans": ["1:3"]}, {"spans": ["2:3"]}]
    assert len(first.config.linearpatch["provenance"]) == 1
    assert patched_model(second, {}).config.linearpatch == second.config.linearpatch


def test_a_foreign_auto_map_does_not_travel_along(ids: torch.Tensor) -> None:
    model = tiny_model("phi3")
    model.config.auto_map = {"AutoConfig": "configuration_phi3.Phi3Config"}
    twin = patched_model(model, {1: random_patch("dense")})
    assert twin.config.to_dict()["auto_map"]["AutoConfig"] == "modeling_linearpatch.LinearPatchPhi3Config"


@pytest.mark.parametrize(
    ("joint", "dim", "message"),
    [(-1, 48, "no joint -1"), (7, 48, "no joint 7 in a model with 6 layers"), (1, 32, "32 wide, the model 48")],
)
def test_patches_that_do_not_fit(joint: int, dim: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        patched_model(tiny_model("llama"), {joint: HadamardPatch(dim)})


def test_only_a_causal_lm_is_patched() -> None:
    with pytest.raises(InputError, match="only a LlamaForCausalLM can be patched, not a LlamaModel"):
        patched_model(tiny_model("llama").model, {1: random_patch("dense")})


def test_a_config_that_patches_a_joint_which_is_not_there() -> None:
    config = tiny_patched_model("llama").config
    config.num_hidden_layers = 3
    with pytest.raises(InputError, match=r"patches joints \[2, 4\] of a model with 3 layers"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_patch_is_built_from_its_description(kind: str, ids: torch.Tensor, tmp_path: Any) -> None:
    twin = patched_model(tiny_model("llama"), {3: random_patch(kind)})
    twin.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, twin(ids).logits)
