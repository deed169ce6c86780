"""Fingerprints of texts, tokenizers and models, and what tells two models apart."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from linearpatch_kernels.fingerprints import (
    fingerprint_model,
    fingerprint_text,
    fingerprint_tokenizer,
    model_difference,
)
from tests.support.tokenizers import byte_tokenizer, word_tokenizer


def test_fingerprint_of_a_text() -> None:
    assert fingerprint_text("ab") == fingerprint_text(["ab"])
    different = [fingerprint_text(t) for t in ("ab", "abc", ["a", "b"], ["a", "", "b"], [])]
    assert len(set(different)) == 5
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in different)


def test_fingerprint_of_a_tokenizer_survives_saving_and_sees_a_bos(tmp_path: Path) -> None:
    plain, with_bos = word_tokenizer(), word_tokenizer(bos=True)
    plain.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint_tokenizer(plain)
    assert len({fingerprint_tokenizer(t) for t in (plain, with_bos, byte_tokenizer())}) == 3


def tiny_model(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | changes
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **config))


def test_fingerprint_of_a_model_survives_saving(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert fingerprint_model(LlamaForCausalLM.from_pretrained(tmp_path)) == fingerprint_model(model)


def test_fingerprint_of_a_model_sees_weights_depth_dtype_and_config() -> None:
    trained = tiny_model()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    other_config = tiny_model()
    other_config.config.rope_parameters["rope_theta"] = 5e5
    variants = [tiny_model(), trained, tiny_model(num_hidden_layers=3), tiny_model().bfloat16(), other_config]
    assert len({fingerprint_model(model) for model in variants}) == len(variants)


def test_a_difference_from_a_fingerprint_is_named() -> None:
    model = tiny_model()
    trained, scaled, renamed = tiny_model(), tiny_model(), tiny_model()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    scaled.config.rope_parameters["rope_theta"] = 5e5
    renamed.config.rms_norm_eps = 1e-3
    said = {
        "other layers or sizes": tiny_model(num_hidden_layers=3),
        "other `dtype`": tiny_model().bfloat16(),
        "other weights": trained,
        "other config (rope, norms, attention, patches)": scaled,
    }
    assert {model_difference(fingerprint_model(model), other) for other in said.values()} == set(said)
    for difference, other in said.items():
        assert model_difference(fingerprint_model(model), other) == difference
    assert "config" in model_difference(fingerprint_model(model), renamed)
    assert model_difference(fingerprint_model(model), tiny_model()) == ""
    assert model_difference("a-b-c", model) != ""


BESIDE = {
    "pad_token_id": 5,
    "eos_token_id": [2, 7],
    "bos_token_id": None,
    "use_cache": False,
    "initializer_range": 0.5,
    "pretraining_tp": 4,
    "transformers_version": "4.40.0",
    "architectures": ["Something"],
    "dtype": "float16",
    "name_or_path": "owner/name",
    "unsloth_version": "2025.1",
    "id2label": {0: "a"},
    "output_hidden_states": True,
    "return_dict": False,
    "linearpatch_merge_tree": [0, 1],
}


@pytest.mark.parametrize("name", list(BESIDE))
def test_what_a_config_says_beside_makes_no_other_model(name: str) -> None:
    changed = tiny_model()
    setattr(changed.config, name, BESIDE[name])
    assert model_difference(fingerprint_model(tiny_model()), changed) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("attention_dropout", 0.1), ("max_position_embeddings", 7)],
)
def test_what_computes_makes_another_model(name: str, value: object) -> None:
    changed = tiny_model()
    setattr(changed.config, name, value)
    assert "config" in model_difference(fingerprint_model(tiny_model()), changed)


def test_numbers_are_one_however_they_are_written() -> None:
    changed = tiny_model()
    changed.config.rope_parameters["rope_theta"] = 10_000
    plain = tiny_model()
    plain.config.rope_parameters["rope_theta"] = 10_000.0
    assert fingerprint_model(changed) == fingerprint_model(plain)


def test_windows_that_no_layer_has_make_no_other_model() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}

    def made(**changes: int) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(num_attention_heads=2, num_key_value_heads=1, **sizes, **changes))

    used = fingerprint_model(made(use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert fingerprint_model(made()) == fingerprint_model(made(max_window_layers=1, sliding_window=4)) != used


def fingerprint_of_version_0_1(model: LlamaForCausalLM) -> str:
    """As it was written."""
    beside = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
    described = {k: v for k, v in model.config.to_dict().items() if k not in beside and not k.startswith("_")}
    parts = [json.dumps(described, sort_keys=True, default=str).encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        step = max(1, tensor.numel() // 32)
        parts.append(tensor.detach().flatten()[::step][:32].to("cpu", torch.float64).numpy().tobytes())
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]


def test_what_version_0_1_wrote_is_still_known() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    other.config.pad_token_id = 3
    assert model_difference(fingerprint_of_version_0_1(model), model) == ""
    assert model_difference(fingerprint_of_version_0_1(model), tiny_model(num_hidden_layers=3)) != ""
    # It counted what is written beside.
    assert model_difference(fingerprint_of_version_0_1(model), other) != ""
