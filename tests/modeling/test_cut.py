from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.views import partial_decoder
from tests.support.tiny import LAYERS, tiny_model

KEPT = [0, 2, 3, 5]


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
