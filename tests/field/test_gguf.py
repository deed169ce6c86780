"""GGUF files: what one says is taken over or refused by name, and nothing beside it is read."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import gguf as conversion
from linearpatch_kernels.modeling.loading import ModelSource, load_model
from tests.support import gguf_files
from tests.support.field import SMALL, linearpatch, same, save_model, tiny

LONG = torch.randint(3, 97, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def logits(source: PreTrainedModel | Path, ids: torch.Tensor = LONG) -> torch.Tensor:
    model = source if isinstance(source, PreTrainedModel) else load_model(source, device="cpu")[0]
    return model(ids).logits


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        ModelSource(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_rope(family: str = "llama", **rope: Any) -> PreTrainedModel:
    """A model whose rotary embeddings are scaled."""
    plain = {"rope_type": "default", "rope_theta": 1e4}
    if family == "gemma3_text":
        both = {"full_attention": {**plain, **rope}, "sliding_attention": dict(plain)}
        return tiny(family, layers=3, rope_parameters=both)
    return tiny(family, layers=3, rope_parameters={**plain, **rope}, use_sliding_window=False)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_one_part_of_a_split_model_is_refused_in_words(tmp_path: Path, number: int) -> None:
    """ "18 weights are missing" (transformers #32266, sglang #28209, vllm-metal #720)."""
    model = tiny(layers=4)
    part = tmp_path / f"tiny-{number + 1:05}-of-00002.gguf"
    gguf_files.write(part, model, only=lambda name: (".2." in name) == bool(number), split=(number, 2, 39))
    message = refusal(part)
    assert f"is part {number + 1} of 2" in message
    assert f"tiny-{2 - number:05}-of-00002.gguf is the rest" in message
    assert "llama-gguf-split --merge" in message
    error = linearpatch("prune", part, "--drop", "1", "-o", tmp_path / "out", *SMALL)
    assert isinstance(error, InputError)


def test_a_part_under_any_name_and_a_whole_model_that_says_it_is_one_part(tmp_path: Path) -> None:
    model = tiny(layers=2)
    assert "part 3 of 900" in refusal(gguf_files.write(tmp_path / "x.gguf", model, split=(2, 900, 39)))
    whole = gguf_files.write(tmp_path / "whole.gguf", model, split=(0, 1, 21))
    assert same(logits(whole), logits(model))


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def test_the_frequencies_of_llama_3_are_taken_over(tmp_path: Path) -> None:
    """Llama 3.1 and later have the scaling in a tensor of its own; the unscaled model was loaded (llama.cpp #8676,
    vllm #7268)."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for original, keys in ((8192, {}), (64, {"llama.rope.scaling.original_context_length": 64})):
        scaled = with_rope(**scaling, original_max_position_embeddings=original)
        plain = with_rope()
        factors = (plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq).numpy()
        extra = {"rope_freqs.weight": factors.astype(np.float32)}
        path = gguf_files.write(tmp_path / f"{original}.gguf", plain, extra=extra, keys=keys)
        assert (factors != 1).any()
        assert same(logits(path), logits(scaled))
        if original == 64:
            assert not same(logits(plain), logits(scaled))


@pytest.mark.parametrize("factors", [[1, 1, 2, 4, 8, 8], [8, 8, 8, 8, 8, 8], [1, 1, 1, 1, 1, 0.5], [2, 2]], ids=str)
def test_other_factors_are_refused_by_the_tensors_name(tmp_path: Path, factors: list[float]) -> None:
    model = tiny(layers=2)
    extra = {"rope_freqs.weight": np.array(factors, dtype=np.float32)}
    assert "rope_freqs.weight" in refusal(gguf_files.write(tmp_path / "x.gguf", model, extra=extra))


def test_factors_of_one_are_none(tmp_path: Path) -> None:
    model = tiny(layers=2)
    path = gguf_files.write(tmp_path / "x.gguf", model, extra={"rope_freqs.weight": np.ones(6, dtype=np.float32)})
    assert same(logits(path), logits(model))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "no type": ("qwen2", {"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "not used": ("llama", {}, {"type": "none", "factor": 4.0}),
    "yarn": ("qwen3", YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 64}),
    "yarn, all": (
        "llama",
        YARN | {"attention_factor": 1.5 * (1 + 0.1 * math.log(4)), "beta_fast": 16, "beta_slow": 2},
        {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 64,
            "yarn_attn_factor": 1.5,
            "yarn_beta_fast": 16.0,
            "yarn_beta_slow": 2.0,
        },
    ),
    "gemma": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}, {"type": "linear", "factor": 8.0}),
}


@pytest.mark.parametrize("case", list(ROPES))
def test_scaled_rotary_embeddings_are_taken_over(tmp_path: Path, case: str) -> None:
    """The keys were dropped: Gemma 3 from 4B on, long Qwens, and others computed something else."""
    family, rope, keys = ROPES[case]
    scaled = with_rope(family, **rope)
    name = gguf_files.ARCHITECTURES[family]
    keys = {f"{name}.rope.scaling.{key}": value for key, value in keys.items()}
    path = gguf_files.write(tmp_path / "x.gguf", scaled, keys=keys)
    assert same(logits(path), logits(scaled))
    assert bool(rope) != same(logits(with_rope(family)), logits(scaled))


def test_long_factors_and_part_of_a_head_are_taken_over(tmp_path: Path) -> None:
    """Phi-3 and Phi-4-mini: two tensors of factors, three quarters of a head rotated."""
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "partial_rotary_factor": 0.75}
    config = {"original_max_position_embeddings": 64, "sliding_window": 100, "hidden_size": 64}
    scaled = tiny("phi3", layers=3, rope_parameters={**rope, "rope_theta": 1e4, "attention_factor": 1.25}, **config)
    factors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = gguf_files.write(
        tmp_path / "x.gguf",
        scaled,
        extra={name: np.array(values, dtype=np.float32) for name, values in factors.items()},
        keys={"phi3.rope.scaling.attn_factor": 1.25, "phi3.rope.scaling.original_context_length": 64},
    )
    for ids in (LONG, LONG[:, :40]):
        assert same(logits(path, ids), logits(scaled, ids))


# --- the other keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("llama", {"head_dim": 16}, {"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
        ("qwen2", {}, {"qwen2.rope.dimension_count": 12}),
        ("qwen3", {"head_dim": 16}, {}),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, {"gemma3.attention.scale": 0.25}),
        ("gemma3_text", {"final_logit_softcapping": 5.0}, {"gemma3.final_logit_softcapping": 5.0}),
        (
            "gemma3_text",
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            {"gemma3.attention.sliding_window_pattern": 2},
        ),
        ("phi3", {"sliding_window": None}, {}),
        ("phi3", {"sliding_window": 8}, {}),
        ("llama", {"tie_word_embeddings": True}, {}),
    ],
    ids=str,
)
def test_what_the_metadata_says_is_what_is_computed(
    tmp_path: Path, family: str, changes: dict[str, Any], keys: dict[str, Any]
) -> None:
    model = tiny(family, layers=4, use_sliding_window=False, **changes)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.copy_(torch.rand(parameter.shape, generator=draw))
    path = gguf_files.write(tmp_path / "x.gguf", model, keys=keys)
    loaded = load_model(path, device="cpu")[0]
    assert type(loaded) is type(model)
    assert same(logits(loaded), logits(model))


REFUSED: dict[str, Any] = {
    "rope.scaling.type": "longrope",
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.dimension_count": 6,
    "rope.dimension_sections": [1, 2, 3, 0],
    "attention.sliding_window": 8,
    "attention.scale": 0.5,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.causal": False,
    "attention.value_length": 6,
    "attention.key_length": 0,
    "attention.head_count": [4, 4, 2],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "expert_count": 8,
    "logit_scale": 0.5,
    "residual_scale": 0.5,
    "embedding_scale": 12.0,
    "block_count": 2**31,
    "context_length": 0,
    "vocab_size": 96,
    "embedding_length": 2**31,
    "rope.freq_base": float("nan"),
    "something_new": 1,
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_a_key_that_cannot_be_taken_over_is_refused_by_name(tmp_path: Path, key: str) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=3), keys={f"llama.{key}": REFUSED[key]})
    message = refusal(path)
    named = {"block_count": "layers", "vocab_size": "embedding", "embedding_length": "llama."}
    assert named.get(key, f"llama.{key}") in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "key", ["context_length", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"]
)
def test_a_key_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=3), keys={f"llama.{key}": None})
    assert f"does not say its llama.{key}" in refusal(path)


def test_keys_that_change_nothing_are_no_reason(tmp_path: Path) -> None:
    keys = {
        "expert_count": 0,
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.sliding_window": 4096,
        "attention.scale": 12**-0.5,
        "attention.value_length": [12, 12, 12],
        "logit_scale": 1.0,
        "rope.scaling.finetuned": True,
        "rope.scaling.attn_factor": 1.0,
        "tensor_data_layout": "Meta AI original pth",
        "use_parallel_residual": True,
        "vision.block_count": 27,
        "mm.tokens_per_image": 256,
    }
    model = tiny(layers=3)
    others = {"general.name": "mistral", "general.quantized_by": "somebody", "quantize.imatrix.file": "x.dat"}
    path = gguf_files.write(tmp_path / "x.gguf", model, keys={f"llama.{k}": v for k, v in keys.items()} | others)
    assert same(logits(path), logits(model))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blk.0.attn_q.bias": (48,)}, "weights are missing, blk."),
        ({"blk.1.attn_sinks.weight": (4,)}, "blk.1.attn_sinks.weight"),
        ({"blk.0.ffn_gate_inp.weight": (8, 48)}, "blk.0.ffn_gate_inp.weight"),
        ({"output.bias": (97,)}, "output.bias"),
        ({"blk.3.attn_norm.weight": (48,)}, "says it has 3 layers and holds 4"),
        ({"rope_factors_long.weight": (6,)}, "rope_factors_"),
    ],
    ids=str,
)
def test_a_tensor_without_a_place_is_refused_by_name(
    tmp_path: Path, extra: dict[str, tuple[int, ...]], says: str
) -> None:
    arrays = {name: np.ones(shape, dtype=np.float32) for name, shape in extra.items()}
    assert says in refusal(gguf_files.write(tmp_path / "x.gguf", tiny(layers=3), extra=arrays))


def test_missing_and_misshaped_tensors_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny(layers=3)
    path = gguf_files.write(tmp_path / "x.gguf", model, only=lambda name: "layers.1.mlp.up" not in name)
    assert "1 weights are missing, blk.1.ffn_up.weight for one" in refusal(path)
    path = gguf_files.write(tmp_path / "x.gguf", model, keys={"llama.feed_forward_length": 79})
    assert "blk.0.ffn_down.weight is [48, 80] and by its metadata [48, 79]" in refusal(path)


@pytest.mark.parametrize("keys", [{"general.type": "adapter"}, {"general.type": "mmproj"}, {"adapter.type": "lora"}])
def test_what_is_no_model_is_refused(tmp_path: Path, keys: dict[str, str]) -> None:
    assert "holds no model" in refusal(gguf_files.write(tmp_path / "x.gguf", tiny(layers=2), keys=keys))


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
LIES = {
    "an array": (0, 2, ARCHITECTURE + text(b"x") + struct.pack("<IIQ", 9, 0, 2**40)),
    "texts": (0, 2, ARCHITECTURE + text(b"x") + struct.pack("<IIQ", 9, 8, 2**40)),
    "entries": (0, 2**60, ARCHITECTURE),
    "tensors": (2**60, 1, ARCHITECTURE),
    "dimensions": (1, 1, ARCHITECTURE + text(b"t") + struct.pack("<I", 2**31)),
    "a name": (1, 1, ARCHITECTURE + struct.pack("<Q", 2**60)),
}


@pytest.mark.parametrize("case", list(LIES))
def test_a_count_is_compared_with_the_file_before_it_is_believed(tmp_path: Path, case: str) -> None:
    """gguf's own reader counts to 2**40."""
    tensors, entries, content = LIES[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + content + bytes(100))
    assert "damaged or cut short" in refusal(path)


# --- what lies beside ------------------------------------------------------------------------------------------------


def test_neighbours_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour's tokenizer was taken, and cached for ever (unsloth #10357, vllm #29137)."""
    model, crowd = tiny(layers=3), tmp_path / "crowd"
    alone = gguf_files.write(tmp_path / "alone.gguf", model)
    save_model(tiny("qwen3", layers=5, seed=4), crowd)
    (crowd / "adapter_config.json").write_text('{"base_model_name_or_path": "nobody/nothing"}')
    gguf_files.write(crowd / "other.gguf", tiny(layers=2, seed=9))
    among = gguf_files.write(crowd / "tiny.gguf", model)
    found, tokenizer = load_model(among, device="cpu")
    wanted, its = load_model(alone, device="cpu")
    assert type(found) is type(wanted)
    assert torch.equal(logits(found), logits(wanted))
    sample = "abc 12 xyz <s> 5 9"
    assert tokenizer(sample)["input_ids"] == its(sample)["input_ids"]
    # A file of the same name where the command runs was read for its weights.
    here = tmp_path / "here"
    here.mkdir()
    gguf_files.write(here / "third.gguf", tiny(layers=3, seed=7))
    third = gguf_files.write(tmp_path / "third.gguf", tiny(layers=3, seed=5))
    monkeypatch.chdir(here)
    assert same(logits(third), logits(tiny(layers=3, seed=5)))


# --- tokenizers ------------------------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(64)), *"▁abcdefgh", "▁a", "ab", "▁ab"]
PIECES += [f"x{i}" for i in range(97 - len(PIECES))]
SENTENCEPIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.scores": [-float(i) for i in range(97)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 64 + [1] * 30,
    "tokenizer.ggml.unknown_token_id": 0,
}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({}, ["<s>", "▁ab", "▁a"]),
        ({"add_space_prefix": True}, ["<s>", "▁ab", "▁a"]),
        ({"add_space_prefix": False}, ["<s>", "ab", "▁a"]),
        ({"add_space_prefix": False, "add_bos_token": False}, ["ab", "▁a"]),
        ({"add_eos_token": True}, ["<s>", "▁ab", "▁a", "</s>"]),
    ],
    ids=str,
)
def test_a_sentencepiece_tokenizer_begins_as_the_file_says(
    tmp_path: Path, family: str, keys: dict[str, bool], tokens: list[str]
) -> None:
    said = SENTENCEPIECE | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = ModelSource(gguf_files.write(tmp_path / "x.gguf", tiny(family, layers=2), keys=said)).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a")["input_ids"]) == tokens


@pytest.mark.parametrize(
    ("split", "tokens"),
    [
        (None, ["12", "a"]),
        ("default", ["12", "a"]),
        ("gpt-2", ["12", "a"]),
        ("smollm", ["1", "2", "a"]),
        ("refact", ["1", "2", "a"]),
        ("qwen2", ["1", "2", "a"]),
        ("llama-bpe", ["!", "12", "a"]),
    ],
)
def test_texts_are_split_as_the_file_says(tmp_path: Path, split: str | None, tokens: list[str]) -> None:
    """SmolLM splits digits, and its file says so; Llama 3's says it begins with a BOS by its name alone."""
    words = [*(chr(ord("!") + i) for i in range(95)), "12", "ab"]
    keys = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["1 2"], "tokenizer.ggml.pre": split}
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2), keys={**keys, "tokenizer.ggml.bos_token_id": 0})
    tokenizer = ModelSource(path).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("12a")["input_ids"]) == tokens


def test_words_that_no_merges_lead_to_are_whole_where_the_file_says_so(tmp_path: Path) -> None:
    words = [*(chr(ord("!") + i) for i in range(94)), "12", "abc", "ab"]
    keys = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": ["1 2"], "tokenizer.ggml.add_bos_token": False}
    for split, tokens in (("llama-bpe", ["abc"]), ("smaug-bpe", ["a", "b", "c"])):
        path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2), keys={**keys, "tokenizer.ggml.pre": split})
        tokenizer = ModelSource(path).tokenizer
        assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == tokens


def test_tokens_keep_their_numbers_and_none_is_added(tmp_path: Path) -> None:
    """Transformers' reader spelled special tokens of other scripts in bytes and gave them new numbers (those of the
    DeepSeek distillations of Qwen), and added the special tokens of another model, past the end of the embedding."""
    words = [*(chr(ord("!") + i) for i in range(92)), "<｜User｜>", "<｜begin▁of▁sentence｜>", "</think>", "12", "ab"]
    keys = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["1 2", "a b"],
        "tokenizer.ggml.pre": "deepseek-r1-qwen",
        "tokenizer.ggml.token_type": [1] * 92 + [3, 3, 4, 1, 1],
        "tokenizer.ggml.bos_token_id": 93,
        "tokenizer.ggml.add_bos_token": True,
    }
    tokenizer = ModelSource(gguf_files.write(tmp_path / "x.gguf", tiny("qwen2", layers=2), keys=keys)).tokenizer
    assert tokenizer("<｜User｜>ab</think>")["input_ids"] == [93, 92, 96, 94]
    assert tokenizer.decode([93, 92, 96, 94], skip_special_tokens=True) == "ab</think>"
    assert len(tokenizer) == tokenizer.vocab_size == len(words)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_what_the_vocabulary_lacks_is_spelled_in_bytes_or_unknown(tmp_path: Path, family: str) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny(family, layers=2), keys=SENTENCEPIECE)
    tokenizer = ModelSource(path).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("a1aéa", add_special_tokens=False)["input_ids"])[-4:] == [
        "<0x31>",
        "a",
        "<unk>",
        "a",
    ]
    assert len(tokenizer) == len(PIECES)


@pytest.mark.parametrize("mark", [1, 4], ids=["plain", "user-defined"])
def test_gemmas_runs_of_spaces_are_one_token(mark: int, tmp_path: Path) -> None:
    """The file has them as they read; in a text they are marked. Its order is that of the merges, not its scores."""
    pieces = ["  " if piece == "▁a" else piece for piece in PIECES]
    types = [
        mark if piece == "  " else kind
        for piece, kind in zip(pieces, SENTENCEPIECE["tokenizer.ggml.token_type"], strict=True)
    ]
    keys = SENTENCEPIECE | {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(i) for i in range(97)],
        "tokenizer.ggml.token_type": types,
    }
    tokenizer = ModelSource(gguf_files.write(tmp_path / "x.gguf", tiny("gemma3_text", layers=2), keys=keys)).tokenizer
    ids = tokenizer("a  ab", add_special_tokens=False)["input_ids"]
    assert ids == [pieces.index("a"), pieces.index("  "), pieces.index("ab")]
    assert tokenizer.decode(ids) == "a  ab"
    assert len(tokenizer) == len(pieces)


@pytest.mark.parametrize("keys", [{"pre": "deepseek-coder"}, {"model": "bert"}, {"tokens": None}], ids=str)
def test_a_tokenizer_that_cannot_be_taken_over_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    said = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2), keys=said)
    with pytest.raises(InputError, match="tokenizer"):
        load_model(path, device="cpu")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- the cache -------------------------------------------------------------------------------------------------------


def only_entry(cache: Path) -> Path:
    (entry,) = (cache / "gguf").iterdir()
    return entry


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut short": lambda entry: os.truncate(entry / "model.safetensors", 1000),
    "weights gone": lambda entry: (entry / "model.safetensors").unlink(),
    "one bit of the weights": lambda entry: flip(entry / "model.safetensors"),
    "config": lambda entry: (entry / "config.json").write_text("[]"),
    "one bit of the config": lambda entry: flip(entry / "config.json"),
    "tokenizer": lambda entry: (entry / "tokenizer.json").write_text("{"),
    "one bit of the tokenizer": lambda entry: flip(entry / "tokenizer.json"),
    "marker": lambda entry: (entry / "linearpatch.json").unlink(),
    "seal": lambda entry: (entry / "conversion.json").write_text('{"files": 5}'),
    "everything": lambda entry: [file.unlink() for file in entry.iterdir()],
    "an earlier version's": lambda entry: (entry / "conversion.json").unlink(),
    "another Transformers'": lambda entry: (entry / "conversion.json").write_text(
        (entry / "conversion.json").read_text().replace("transformers 5", "transformers 4")
    ),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("case", list(DAMAGES))
def test_a_conversion_that_is_not_as_it_was_made_is_made_again(cache: Path, tmp_path: Path, case: str) -> None:
    """The message blamed the GGUF, for ever; what an earlier version had converted wrongly was used for ever."""
    model = tiny(layers=2)
    path = gguf_files.write(tmp_path / "x.gguf", model)
    load_model(path, device="cpu")
    before = {file.name: file.read_bytes() for file in only_entry(cache).iterdir()}
    DAMAGES[case](only_entry(cache))
    assert same(logits(path), logits(model))
    assert {file.name: file.read_bytes() for file in only_entry(cache).iterdir()} == before


def test_a_sound_conversion_is_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2))
    load_model(path, device="cpu")
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    assert same(logits(path), logits(tiny(layers=2)))


def test_of_large_files_the_size_and_both_ends_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_WHOLE", 1000)
    monkeypatch.setattr(conversion, "_ENDS", 200)
    file = tmp_path / "file"
    content = bytes(range(256)) * 8
    file.write_bytes(content)
    digest = conversion._digest(file)
    for place, same_one in ((0, False), (199, False), (1000, True), (2047, False)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        assert (conversion._digest(file) == digest) is same_one
    file.write_bytes(content[:-1])
    assert conversion._digest(file) != digest


def convert_in(folder: str, path: str, barrier: Any, results: Any) -> None:
    os.environ["LINEARPATCH_CACHE"] = folder
    torch.set_num_threads(1)
    count = [0]
    convert = conversion._convert

    def counting(*arguments: Any) -> None:
        count[0] += 1
        convert(*arguments)

    conversion._convert = counting
    source = ModelSource(Path(path), device="cpu")
    barrier.wait()
    source.load()
    results.put(count[0])


@pytest.mark.slow
def test_two_processes_convert_once(cache: Path, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(cache), str(path), barrier, results)
    processes = [context.Process(target=convert_in, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=120) for _ in processes) == [0, 1]
    for process in processes:
        process.join()
    assert same(logits(path), logits(tiny(layers=2)))


def test_a_file_system_without_locks_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    done = []
    for folder in (tmp_path / "new", tmp_path / "x.gguf" / "no folder"):
        (tmp_path / "x.gguf").touch()
        with conversion._in_turn(folder):
            done.append(folder)
    assert len(done) == 2


def test_the_message_names_the_conversion_where_it_is_what_is_wrong(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged between being looked at and being loaded."""
    path = gguf_files.write(tmp_path / "x.gguf", tiny(layers=2))
    source = ModelSource(path, device="cpu")
    assert source.config.num_hidden_layers == 2
    shutil.rmtree(only_entry(cache))
    with pytest.raises(InputError) as caught:
        source.load()
    assert str(cache / "gguf") in str(caught.value)
    assert "converted from" in str(caught.value)


def test_a_gguf_brings_no_companions(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("a neighbour's")
    source = ModelSource(gguf_files.write(tmp_path / "x.gguf", tiny(layers=2)), device="cpu")
    assert source.companions == {}
