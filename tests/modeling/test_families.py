from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from linearpatch_kernels import modeling
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import (
    decoder,
    decoder_layers,
    family_of,
    hidden_size,
    keep_layers,
    num_layers,
    partial_decoder,
    suffix_model,
)
from tests.support.tiny import FAMILY_NAMES, LAYERS, WINDOW, tiny_model, tiny_patched_model

KEPT = [0, 2, 3, 5]


def stream_entering(model: PreTrainedModel, layer: int, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    hook = decoder_layers(model)[layer].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    decoder(model)(ids, use_cache=False, **inputs)
    hook.remove()
    return caught[0]


def test_every_family_and_its_twin_is_listed() -> None:
    assert list(modeling.FAMILIES) == FAMILY_NAMES + [f"linearpatch_{name}" for name in FAMILY_NAMES]


def test_where_things_are(family: str, model: PreTrainedModel) -> None:
    assert decoder(model) is model.model
    assert decoder_layers(model) is model.model.layers
    assert (num_layers(model), hidden_size(model)) == (LAYERS, 48)
    assert decoder(model.model) is model.model
    twin = tiny_patched_model(family)
    for source in (model, model.config, family, twin, twin.config):
        assert family_of(source).model_type == family


def test_a_peft_wrapper_is_looked_through() -> None:
    inner = tiny_model("llama")
    wrapped = get_peft_model(inner, LoraConfig(target_modules=["q_proj"], r=2))
    assert decoder(wrapped) is inner.model


def test_another_family_is_named_with_those_that_are_supported() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(InputError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3, gemma3_text, phi3"):
        decoder_layers(other)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_two_parts_equal_the_whole_bit_for_bit(model: PreTrainedModel, ids: torch.Tensor, padded: bool) -> None:
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, : WINDOW + 1] = 0
    whole = model.model(ids, use_cache=False, **inputs).last_hidden_state
    for split in range(LAYERS + 1):
        head = partial_decoder(model, 0, split, embed=True)
        tail = partial_decoder(model, split, LAYERS, norm=True)
        stream = head(ids, use_cache=False, **inputs).last_hidden_state
        if split < LAYERS:
            assert torch.equal(stream, stream_entering(model, split, ids, **inputs))
        assert torch.equal(tail(inputs_embeds=stream, use_cache=False, **inputs).last_hidden_state, whole)
        logits = suffix_model(model, split)(inputs_embeds=stream, use_cache=False, **inputs).logits
        assert torch.equal(logits, model(ids, use_cache=False, **inputs).logits)


@torch.no_grad()
def test_the_middle_of_a_patched_model_is_exact(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    stream = partial_decoder(patched, 0, 2, embed=True)(ids).last_hidden_state
    assert torch.equal(stream, stream_entering(patched, 2, ids))
    stream = partial_decoder(patched, 2, 3)(inputs_embeds=stream).last_hidden_state
    assert torch.equal(stream, stream_entering(patched, 3, ids))
    assert torch.equal(suffix_model(patched, 3)(inputs_embeds=stream).logits, patched(ids).logits)


def test_a_view_shares_parameters_and_changes_nothing(model: PreTrainedModel, ids: torch.Tensor) -> None:
    config = copy.deepcopy(model.config)
    before = model(ids).logits
    view = partial_decoder(model, 2, 4)
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.model.layers[2:4].parameters()}
    view.register_forward_hook(lambda *_: pytest.fail("a hook of the view ran in the model"))
    view.requires_extra = True
    assert model.config == config
    assert len(model.model.layers) == LAYERS
    assert not hasattr(model.model, "requires_extra")
    assert torch.equal(model(ids).logits, before)


def test_a_view_without_embedding_takes_no_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with pytest.raises(TypeError):
        partial_decoder(model, 0, 2)(ids)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, LAYERS + 1)])
def test_a_span_outside_the_model_is_refused(start: int, end: int) -> None:
    with pytest.raises(InputError, match=f"layers {start}:{end} are not in this model: it has layers 0:{LAYERS}"):
        partial_decoder(tiny_model("llama"), start, end)


@torch.no_grad()
def test_kept_layers_run_as_they_did(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Layer by layer through views of the whole model, which keep every layer's own window and rotary table."""
    stream = model.model.embed_tokens(ids)
    for layer in KEPT:
        stream = partial_decoder(model, layer, layer + 1)(inputs_embeds=stream).last_hidden_state
    expected = model.lm_head(model.model.norm(stream))
    assert torch.equal(keep_layers(model, KEPT)(ids).logits, expected)


def test_kept_layers_are_numbered_and_configured_anew(model: PreTrainedModel, ids: torch.Tensor) -> None:
    config, before = copy.deepcopy(model.config), model(ids).logits
    cut = keep_layers(model, KEPT)
    assert type(cut) is type(model)
    assert cut.config.num_hidden_layers == len(cut.model.layers) == len(KEPT)
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == list(range(len(KEPT)))
    for old, layer in zip(KEPT, cut.model.layers, strict=True):
        source = model.model.layers[old]
        assert getattr(layer.self_attn, "sliding_window", None) == getattr(source.self_attn, "sliding_window", None)
        assert layer.self_attn.config is cut.config
        assert all(a is b for a, b in zip(layer.parameters(), source.parameters(), strict=True))
    types = getattr(config, "layer_types", None)
    assert getattr(cut.config, "layer_types", None) == (types and [types[i] for i in KEPT])
    assert not any(tensor.is_meta for tensor in (*cut.parameters(), *cut.buffers()))
    assert model.config == config
    assert torch.equal(model(ids).logits, before)


def test_a_cut_model_caches_right(model: PreTrainedModel, assert_cache_changes_nothing: Callable[..., None]) -> None:
    cut = keep_layers(model, KEPT)
    cache = cut(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert len(cache.layers) == len(KEPT)
    assert_cache_changes_nothing(cut)


@pytest.mark.parametrize("kept", [[5], [0, 1], KEPT])
def test_a_cut_model_survives_its_config_file(
    model: PreTrainedModel, ids: torch.Tensor, kept: list[int], tmp_path: Any
) -> None:
    cut = keep_layers(model, kept)
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, cut(ids).logits)


def test_per_layer_entries_are_sliced_and_lookalikes_are_not() -> None:
    model = tiny_model("qwen3", eos_token_id=[2, 3, 4, 5, 6, 7])
    assert model.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    cut = keep_layers(model, [1, 2, 4])
    assert cut.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert cut.config.max_window_layers == 2
    assert cut.config.eos_token_id == [2, 3, 4, 5, 6, 7]


def test_gemma_keeps_no_pattern_that_its_layers_do_not_follow() -> None:
    model = tiny_model("gemma3_text")
    assert model.config.layer_types[2] == model.config.layer_types[5] == "full_attention"
    cut = keep_layers(model, [0, 2, 5])
    assert cut.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert "sliding_window_pattern" not in cut.config.to_json_string()


@pytest.mark.parametrize("kept", [[], [1, 1], [2, 1], [-1, 0], [0, LAYERS]])
def test_layers_that_cannot_be_kept(kept: list[int]) -> None:
    with pytest.raises(InputError, match="increasing numbers from 0 to 5"):
        keep_layers(tiny_model("llama"), kept)


def test_models_that_cannot_be_cut() -> None:
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(InputError, match="merge or unload"):
        keep_layers(wrapped, [0, 1])
    quantised = tiny_model("llama")
    quantised.hf_quantizer = object()
    with pytest.raises(InputError, match="quantised"):
        keep_layers(quantised, [0, 1])
    dispatched = tiny_model("llama")
    dispatched.model.layers[1]._hf_hook = object()
    with pytest.raises(InputError, match="one device"):
        keep_layers(dispatched, [0, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tied: bool) -> None:
    cut = keep_layers(tiny_model("llama", tie_word_embeddings=tied), [0, 5])
    assert (cut.lm_head.weight is cut.model.embed_tokens.weight) == tied


def test_mode_and_generation_settings_stay() -> None:
    model = tiny_model("llama").train()
    model.generation_config.max_new_tokens = 7
    cut = keep_layers(model, [0, 1])
    assert cut.training
    assert cut.model.layers[0].training
    assert cut.generation_config.max_new_tokens == 7
    cut.eval()
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in keep_layers(cut, [1]).modules())
