from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from linearpatch_kernels import modeling
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder, decoder_layers, family_of, hidden_size, num_layers
from tests.support.tiny import FAMILY_NAMES, LAYERS, tiny_model, tiny_patched_model


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
