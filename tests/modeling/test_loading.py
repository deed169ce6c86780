from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.distillation.teacher_store import write_teacher_store
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import perplexity
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.support.tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "llama"
    save_checkpoint(tiny_model("llama", layers=2), tiny_tokenizer(), path)
    return path


@pytest.fixture
def copied(stock: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(stock, tmp_path / "copied"))


def refusal(source: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_directory(stock: Path, ids: torch.Tensor) -> None:
    model, tokenizer = load_model(str(stock), device="cpu")
    assert torch.equal(model(ids).logits, tiny_model("llama", layers=2)(ids).logits)
    assert not model.training
    assert len(tokenizer) == VOCABULARY


SPREAD = [
    {"": "disk"},
    {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    | {f"model.layers.{i}": ("cpu", "disk")[i] for i in range(2)},
]


@pytest.mark.parametrize("device_map", [*SPREAD, "auto"], ids=["disk", "mixed", "auto"])
def test_spread_over_memory_and_disk(
    stock: Path, ids: torch.Tensor, device_map: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path))
    whole, _ = load_model(stock, device="cpu")
    spread, _ = load_model(stock, device_map=device_map)
    kept = {parameter.device.type for parameter in spread.parameters()}
    assert kept == ({"meta"} if device_map == {"": "disk"} else {"cpu"} if device_map == "auto" else {"cpu", "meta"})
    assert torch.equal(spread(ids).logits, whole(ids).logits)
    assert fingerprint_model(spread) == fingerprint_model(whole)
    windows = ids.repeat(3, 1)
    assert perplexity(spread, windows) == perplexity(whole, windows)
    ours, theirs = (calibrate(model, [windows], moments=[Span(0, 1)]) for model in (spread, whole))
    assert torch.equal(ours.token_cosine, theirs.token_cosine)
    assert torch.equal(ours.moments[Span(0, 1)].xy, theirs.moments[Span(0, 1)].xy)
    stores = [
        write_teacher_store(model, windows, tmp_path / name, top_k=5, depths=[1])
        for name, model in (("spread", spread), ("whole", whole))
    ]
    assert (stores[0].directory / "index.json").read_bytes() == (stores[1].directory / "index.json").read_bytes()
    if device_map != "auto":
        with pytest.raises(InputError, match="dispatched by accelerate"):
            keep_layers(spread, [0])


def test_no_such_device_map(stock: Path) -> None:
    with pytest.raises(InputError, match="no device map is called 'everywhere': choose one of auto"):
        load_model(stock, device_map="everywhere")


def test_dtype_and_device(stock: Path) -> None:
    model, _ = load_model(stock, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    for device in (None, "auto"):
        model, _ = load_model(stock, device=device)
        assert model.device.type == best.type
        assert model.dtype == torch.float32
    with pytest.raises(InputError, match="there is no device 'gpu'"):
        load_model(stock, device="gpu")


def test_a_cut_model_of_every_family(family: str, ids: torch.Tensor, tmp_path: Path) -> None:
    cut = keep_layers(tiny_model(family), [0, 2, 5])
    save_checkpoint(cut, tiny_tokenizer(), tmp_path / "cut")
    model, _ = load_model(tmp_path / "cut", device="cpu")
    assert type(model) is type(cut)
    assert torch.equal(model(ids).logits, cut(ids).logits)


def test_shards(copied: Path, ids: torch.Tensor) -> None:
    model, tokenizer = load_model(copied, device="cpu")
    shutil.rmtree(copied)
    model.save_pretrained(copied, max_shard_size="60KB")
    tokenizer.save_pretrained(copied)
    shards = sorted(copied.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_model(copied, device="cpu")[0](ids).logits, model(ids).logits)
    shards[0].unlink()
    assert f"{shards[0].name} is missing" in refusal(copied)
    (copied / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read" in refusal(copied)


def test_what_is_not_a_model(tmp_path: Path, copied: Path) -> None:
    assert refusal(tmp_path).endswith("is not a model: it has no config.json")
    (copied / "config.json").write_text('{"model_type": "lla')
    assert "config.json cannot be read" in refusal(copied)
    (copied / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(copied)
    (copied / "config.json").write_text('{"name": "x"}')
    assert "names no model_type" in refusal(copied)
    assert "give a model directory, a .gguf file, or a hub id" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("nowhere.gguf")
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    assert "is not a GGUF file" in refusal(tmp_path / "model.bin")


def test_a_family_that_is_not_supported(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 11}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    assert "'t5' are not supported: Transformers has no causal LM of that type" in refusal(tmp_path)


def test_damaged_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert "model.safetensors is damaged or cut short" in refusal(copied)
    weights.unlink()
    assert "has no safetensors weights" in refusal(copied)


def test_weights_that_are_missing_or_of_another_shape(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    removed = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "incomplete: 1 weights are missing, model.layers.1.mlp.up_proj.weight for one" in refusal(copied)
    weights["model.layers.1.mlp.up_proj.weight"] = removed[1:].contiguous()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight is [79, 48] and by its config [80, 48]" in refusal(copied)


def test_a_config_of_fewer_layers_than_the_weights(copied: Path) -> None:
    """Transformers would load the first layers and say nothing that stops anyone: a silently cut model."""
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (copied / "config.json").write_text(json.dumps(config))
    assert "weights of more layers than the" in refusal(copied)


def test_a_tokenizer_of_another_model(copied: Path) -> None:
    tiny_tokenizer(VOCABULARY + 1).save_pretrained(copied)
    assert f"has {VOCABULARY + 1} tokens and the model {VOCABULARY} embeddings" in refusal(copied)


def test_added_tokens_beyond_the_embedding_are_no_reason_to_refuse(copied: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])  # as Gemma 3 has it
    tokenizer.save_pretrained(copied)
    assert len(load_model(copied, device="cpu")[1]) == VOCABULARY + 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: [file.unlink() for file in path.glob("tokenizer*")],
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / "tokenizer.json").write_text('{"version": "1.0"'),
    ],
    ids=["none", "half", "damaged"],
)
def test_a_tokenizer_that_cannot_be_loaded(copied: Path, damage: Callable[[Path], object]) -> None:
    damage(copied)
    assert "has no tokenizer that can be loaded" in refusal(copied)


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal("nobody/nothing").startswith("nobody/nothing cannot be loaded: ")
