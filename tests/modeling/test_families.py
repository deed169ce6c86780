from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from linearpatch_kernels import modeling
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import (
    decoder,
    decoder_layers,
    embedding,
    family_of,
    hidden_size,
    num_layers,
)
from linearpatch_kernels.modeling.units import sublayers
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


def test_a_family_without_a_record_is_what_transformers_says_of_it() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11))
    assert decoder_layers(model) is model.transformer.h
    assert (num_layers(model), hidden_size(model), embedding(model)) == (2, 8, model.transformer.wte)
    family = family_of(model)
    assert (family.model_type, family.causal_lm_class, family.is_recorded) == ("gpt2", GPT2LMHeadModel, False)
    assert "gpt2" not in modeling.FAMILIES
    with pytest.raises(InputError, match=r"type 'gpt2' can be removed, not merged: the weights of attn.c_proj lie"):
        sublayers(model)


@pytest.mark.parametrize("name", ["t5", "chameleon", "vit", "nothing", "None"])
def test_what_has_no_single_decoder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' are not supported: Transformers has no causal LM of that type"):
        family_of(name)


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}
    with pytest.raises(InputError, match="'bert' cannot be cut: the BertModel holds 0 lists of modules that"):
        decoder_layers(BertLMHeadModel(BertConfig(**sizes, intermediate_size=8, is_decoder=True)))
