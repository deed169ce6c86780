"""Model directories that say more, or something else, than what would be loaded from them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import LoadedModel, ModelSource, load_model
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import DensePatch
from tests.support.field import IDS, SMALL, linearpatch, same, save_model, text_file, tiny
from tests.support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny(layers=3), tmp_path_factory.mktemp("saved") / "dense")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the directory, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(source: Path) -> str:
    """The one line with which a directory is refused, within a time in which nothing large can have been built."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        load_model(source, device="cpu")
    assert time.process_time() - began < 10
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800
    return message


def with_config(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entries))


def with_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(model: Path) -> Path:
    """As Trainer leaves it: a LoRA adapter in the directory of its model."""
    content = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps({**content, "task_type": "CAUSAL_LM", "lora_alpha": 4}))
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": torch.randn(shape, generator=draw)
        for layer in range(3)
        for name, shape in (("A", (2, 48)), ("B", (48, 2)))
    }
    save_file(weights, model / "adapter_model.safetensors")
    return model


@pytest.mark.parametrize("command", ["prune", "merge", "evaluate", "sweep"])
def test_an_adapter_beside_the_weights_is_refused(adapter: Path, tmp_path: Path, command: str) -> None:
    """Transformers loads the adapter as well: a cut ended with status 0 and an output that does not load
    (PrimeIntellect-ai/prime-rl #1707, cruijff_kit #495)."""
    flags: dict[str, list[object]] = {
        "prune": ["--drop", "1", "-o", tmp_path / "out", *SMALL],
        "merge": ["--layers", "2", "-o", tmp_path / "out"],
        "sweep": ["--drop", "1", "-o", tmp_path / "out"],
        "evaluate": ["--length", "16"],
    }
    error = linearpatch(command, adapter, "--text", text_file(tmp_path), *flags[command])
    assert isinstance(error, InputError)
    assert "merge_and_unload" in str(error)
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_or_damaged_is_refused_by_name(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[]")
    assert "adapter_config.json" in refusal(adapter)
    for name in ("config.json", "model.safetensors"):
        (adapter / name).unlink()
    assert "merge_and_unload" in refusal(adapter)


def test_an_adapter_among_the_weights_is_refused_by_name(model: Path) -> None:
    """What a save of a model with a loaded adapter looks like."""

    def wrap(weights: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.self_attn.q_proj"
        weights[f"{name}.base_layer.weight"] = weights.pop(f"{name}.weight")
        weights[f"{name}.lora_A.default.weight"] = torch.zeros(2, 48)

    with_weights(model, wrap)
    message = refusal(model)
    assert "merge_and_unload" in message
    assert "model.layers.1.self_attn.q_proj.base_layer.weight" in message


# --- weights and config ----------------------------------------------------------------------------------------------


def test_patched_weights_under_a_stock_config_are_refused(tmp_path: Path) -> None:
    """What converters, quantisers and hand edits make of a config: the model loaded without its patches."""
    cut = keep_layers(tiny(), [0, 1, 4, 5])
    directory = save_model(patched_model(cut, {2: DensePatch(48), 4: DensePatch(48)}), tmp_path / "patched")
    load_model(directory, device="cpu")
    config = json.loads((directory / "config.json").read_text())
    for name in ("auto_map", "linearpatch"):
        del config[name]
    config |= {"model_type": "llama", "hidden_act": "silu", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    message = refusal(directory)
    assert "patches (model.layers.2.patch.0.weight)" in message
    assert "unpatched" in message


def test_patches_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    """The same of a patched config that lost one of its joints."""
    cut = keep_layers(tiny(), [0, 1, 4, 5])
    directory = save_model(patched_model(cut, {2: DensePatch(48), 4: DensePatch(48)}), tmp_path / "patched")
    config = json.loads((directory / "config.json").read_text())
    del config["linearpatch"]["joints"]["4"]
    (directory / "config.json").write_text(json.dumps(config))
    assert "model.layers.3.output_patch.0.weight" in refusal(directory)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.bias", (48,)),
        ("model.layers.1.mlp.extra.weight", (3, 3)),
        ("score.weight", (2, 48)),
        ("lm_head.bias", (97,)),
        ("model.layers.0.self_attn.q_norm.weight", (12,)),
    ],
)
def test_a_weight_without_a_place_in_the_model_is_refused(model: Path, name: str, shape: tuple[int, ...]) -> None:
    with_weights(model, lambda weights: weights.update({name: torch.ones(shape)}))
    assert f"no place for, {name} for one" in refusal(model)


def test_what_old_checkpoints_hold_besides_is_no_reason(model: Path, tmp_path: Path) -> None:
    """Rotary tables are made anew; a repository holds its weights several times, under names of other tools."""
    wanted = load_model(model, device="cpu")[0](IDS).logits
    with_weights(model, lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": IDS for i in range(3)}))
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"not read")
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("[]")
    assert torch.equal(load_model(model, device="cpu")[0](IDS).logits, wanted)


def test_a_tied_head_may_be_there_or_not(tmp_path: Path) -> None:
    tied = tiny(layers=2, tie_word_embeddings=True)
    directory = save_model(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert same(load_model(directory, device="cpu")[0](IDS).logits, tied(IDS).logits)
    with_weights(directory, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"]}))
    assert same(load_model(directory, device="cpu")[0](IDS).logits, tied(IDS).logits)


def test_a_decoder_saved_alone_is_a_model_where_its_head_is_tied(tmp_path: Path) -> None:
    tied = tiny(layers=2, tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert same(load_model(tmp_path, device="cpu")[0](IDS).logits, tied(IDS).logits)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"num_hidden_layers": 10**9}, "weights of 3 layers and its config is of 1000000000"),
        ({"num_hidden_layers": 4}, "weights of 3 layers and its config is of 4"),
        ({"num_hidden_layers": 2}, "more layers than the 2 of its config"),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 96}, "vocab_size"),
        ({"intermediate_size": 10**12}, "mlp.down_proj.weight is [48, 80] and by its config [48, 1000000000000]"),
        ({"intermediate_size": 79}, "mlp.down_proj.weight"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [24, 48]"),
        ({"num_attention_heads": 2}, "o_proj.weight"),
        ({"head_dim": 10**9}, "self_attn"),
        ({"head_dim": 24}, "self_attn"),
        ({"attention_bias": True}, "bias"),
    ],
    ids=str,
)
def test_sizes_are_compared_before_they_are_believed(model: Path, entries: dict[str, int], says: str) -> None:
    """A number in a config made loading spin and fill the memory."""
    with_config(model, **entries)
    assert says in refusal(model)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mistral", "phi3", "qwen2"])
def test_the_depth_of_every_family_is_compared_before_it_is_believed(family: str, tmp_path: Path) -> None:
    """Most configs write a list with an entry a layer."""
    directory = save_model(tiny(family, layers=2), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    assert "1000000000" in refusal(directory)


@pytest.mark.parametrize(
    "entries",
    [
        {"dtype": "x"},
        {"dtype": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 0},
        {"head_dim": -12},
        {"hidden_size": "48"},
        {"hidden_size": 48.5},
        {"hidden_size": []},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": "nothing of the kind"}},
        {"auto_map": None},
        {"pad_token_id": 10**6},
        {"hidden_act": "nothing of the kind"},
        {"rope_parameters": {"rope_type": "nothing of the kind", "rope_theta": 1e4}},
        {"rope_parameters": "x"},
        {"rms_norm_eps": "x"},
        {"model_type": []},
        {"model_type": {}},
        {"transformers_weights": "other.safetensors"},
    ],
    ids=str,
)
def test_whatever_a_config_says_the_answer_is_one_line(model: Path, entries: dict[str, Any]) -> None:
    with_config(model, **entries)
    assert "model" in refusal(model)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[]", "[" * 100_000, "{", "5", "\x00\xff", ""], ids=lambda c: c[:3])
def test_whatever_a_file_holds_the_answer_is_one_line(model: Path, name: str, content: str) -> None:
    """Parsers fail in as many ways as there are formats: deep nesting is a RecursionError."""
    (model / name).write_text(content)
    assert "model" in refusal(model)


def test_a_quantised_checkpoint_is_known_as_one(model: Path) -> None:
    """Before its weights are loaded: nothing can be cut from it."""
    assert not ModelSource(model, device="cpu").is_quantised
    with_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert ModelSource(model, device="cpu").is_quantised


# --- indexes and sets of weights -------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    tiny(layers=3).save_pretrained(directory, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(directory)
    return directory


INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda index: [],
    "nothing": lambda index: {},
    "no map": lambda index: {**index, "weight_map": []},
    "an empty map": lambda index: {**index, "weight_map": {}},
    "a number as a shard": lambda index: {**index, "weight_map": index["weight_map"] | {"model.norm.weight": 5}},
    "nothing as a shard": lambda index: {**index, "weight_map": index["weight_map"] | {"model.norm.weight": ""}},
    "a shard elsewhere": lambda index: {
        **index,
        "weight_map": index["weight_map"] | {"model.norm.weight": "../../x.safetensors"},
    },
    "an absolute shard": lambda index: {**index, "weight_map": index["weight_map"] | {"model.norm.weight": "/x"}},
    "metadata a string": lambda index: {**index, "metadata": "x"},
    "a shard that is missing": lambda index: {**index, "weight_map": index["weight_map"] | {"x": "y.safetensors"}},
}


@pytest.mark.parametrize("case", list(INDEXES))
def test_whatever_an_index_says_the_answer_is_one_line(shards: Path, case: str) -> None:
    index = shards / "model.safetensors.index.json"
    assert load_model(shards, device="cpu")
    index.write_text(json.dumps(INDEXES[case](json.loads(index.read_text()))))
    message = refusal(shards)
    assert "model.safetensors.index.json" in message or "y.safetensors is missing" in message


def test_a_weight_in_two_shards_is_refused(shards: Path) -> None:
    files = sorted(shards.glob("model-*.safetensors"))
    weights = load_file(files[1])
    save_file(weights | load_file(files[0]), files[1], metadata={"format": "pt"})
    assert "twice" in refusal(shards)


def test_two_sets_of_weights_are_refused_and_a_stale_index_is_none(shards: Path) -> None:
    """Which of them is meant nobody can tell; Transformers takes one without a word."""
    save_model(tiny(layers=3, seed=1), shards.parent / "other")
    shutil.copy(shards.parent / "other" / "model.safetensors", shards)
    assert "two sets of weights" in refusal(shards)
    for file in shards.glob("model-*.safetensors"):
        file.unlink()
    assert same(load_model(shards, device="cpu")[0](IDS).logits, tiny(layers=3, seed=1)(IDS).logits)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(model: Path) -> None:
    """Transformers would read it instead of them."""
    shutil.copy(model / "model.safetensors", model / "shard-00000-model-00001-of-00001.safetensors")
    assert "distributed checkpoint" in refusal(model)


# --- what belongs to every model made from one -----------------------------------------------------------------------


def test_the_files_that_other_tools_ask_for_are_found(model: Path, tmp_path: Path) -> None:
    """`tokenizer.model`, which converters to GGUF ask for, and the licence (llama.cpp #19152, #6419, #3256)."""
    companions = {
        "tokenizer.model": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
        "spiece.model": b"pieces",
        "vocab.json": b"{}",
        "merges.txt": b"a b",
        "LICENSE": b"terms",
        "License-Apache.txt": b"more terms",
        "NOTICE.md": b"notice",
        "USE_POLICY.md": b"policy",
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
    }
    others = ["README.md", "notice.safetensors", "modeling_own.py", "license.bin", "train.txt", "optimizer.pt"]
    (model / "additional_chat_templates").mkdir()
    for name, content in [*companions.items(), *((name, b"other") for name in others)]:
        (model / name).write_bytes(content)
    (model / "huge.model").touch()
    with open(model / "huge.model", "r+b") as file:
        file.truncate(65 << 20)
    (model / "LICENSE-folder").mkdir()
    (model / "broken-LICENSE").symlink_to(model / "nowhere")
    found = ModelSource(model, device="cpu").companions
    assert found == companions | {"generation_config.json": (model / "generation_config.json").read_bytes()}
    assert "modeling_own.py" in ModelSource(model, device="cpu", trust_remote_code=True).companions


def test_a_model_of_the_hub_brings_what_is_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: that nothing can be fetched is no error."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    (snapshot / "LICENSE").write_text("terms")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ModelSource("owner/name", device="cpu").companions["LICENSE"] == b"terms"
    assert ModelSource("owner/other", device="cpu").companions == {}
    loaded, tokenizer = load_model(model, device="cpu")
    loaded.name_or_path = "owner/name"
    # It may be a directory that is gone.
    assert LoadedModel(loaded, tokenizer).companions == {}
    loaded.config._commit_hash = "0" * 40
    assert LoadedModel(loaded, tokenizer).companions["LICENSE"] == b"terms"


@pytest.mark.parametrize("command", [["prune", "--drop", 1], ["sweep", "--drop", "1"], ["merge", "--layers", 2]])
def test_a_quantised_model_is_refused_before_it_is_calibrated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[object]
) -> None:
    verb, *flags = command
    monkeypatch.setattr(ModelSource, "is_quantised", property(lambda _: True))
    monkeypatch.setattr(ModelSource, "load", lambda _: pytest.fail("loaded"))
    error = linearpatch(verb, model, *flags, "-o", tmp_path / "out", "--text", text_file(tmp_path), *SMALL)
    assert isinstance(error, InputError)
    assert "is quantised and cannot be cut" in str(error)
