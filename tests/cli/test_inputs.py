"""Models and texts that the commands refuse: missing, damaged, of another kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from tests.support.command import (
    LAYERS,
    NO_MODEL,
    SMALL,
    VOCABULARY,
    WIDTH,
    Run,
    World,
    gguf_file,
    refusal,
    trained_tokenizer,
    with_nan,
)


@pytest.mark.parametrize("command", ["prune", "sweep", "evaluate"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"PK\x03\x04\x00\x00\x00\x00 a binary file", "binary"),
        ("Ça va ?".encode("latin-1"), "not UTF-8"),
        ("directory", "is a directory"),
    ],
)
def test_texts_are_refused_before_the_model(
    run: Run, empty: Path, tmp_path: Path, command: str, content: bytes | str | None, says: str
) -> None:
    text = tmp_path / "bad text"
    if content == "directory":
        text.mkdir()
    elif isinstance(content, bytes):
        text.write_bytes(content)
    writing = [] if command == "evaluate" else ["--drop", 2, "-o", empty / "out"]
    line = refusal(run(command, NO_MODEL, "--text", text, *writing))
    assert "bad text" in line
    assert says in line


def foreign_family(world: World, place: Path) -> Path:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).save_pretrained(place)
    for file in world.model.glob("tokenizer*"):
        shutil.copy(file, place)
    return place


def without(name: str) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        (place / name).unlink()
        return place

    return build


def with_content(name: str, change: Callable[[bytes], bytes]) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        (place / name).write_bytes(change((place / name).read_bytes()))
        return place

    return build


def without_a_weight(world: World, place: Path) -> Path:
    world.copy(place)
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def too_large_a_vocabulary(world: World, place: Path) -> Path:
    world.copy(place)
    trained_tokenizer(world.text.read_text(), VOCABULARY + 20).save_pretrained(place)
    return place


def added_tokens(world: World, place: Path) -> Path:
    """Tokens beyond the embeddings, which only show where the text holds one."""
    world.copy(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(world.text.read_text().split()[:1])
    tokenizer.save_pretrained(place)
    return place


def cut_gguf(kept: float) -> Callable[[World, Path], Path]:
    def build(_: World, place: Path) -> Path:
        whole = gguf_file(place.with_suffix(".gguf"))
        whole.write_bytes(whole.read_bytes()[: int(kept * whole.stat().st_size)])
        return whole

    return build


def file_with(content: bytes, suffix: str = ".gguf") -> Callable[[World, Path], Path]:
    def build(_: World, place: Path) -> Path:
        place = place.with_suffix(suffix)
        place.write_bytes(content)
        return place

    return build


def empty_directory(_: World, place: Path) -> Path:
    place.mkdir()
    return place


BAD_MODELS: dict[str, tuple[Callable[[World, Path], Path], str]] = {
    "nowhere": (lambda _, place: place, "does not exist"),
    "empty directory": (empty_directory, "no config.json"),
    "another family": (foreign_family, "'t5' are not supported"),
    "config: cut": (with_content("config.json", lambda old: old[:40]), "config.json"),
    "config: binary": (with_content("config.json", lambda _: b"\xff\xfe\x00"), "config.json"),
    "config: a list": (with_content("config.json", lambda _: b"[1, 2]"), "config.json"),
    "config: no model": (with_content("config.json", lambda _: b'{"name": "x"}'), "model_type"),
    "config: nonsense": (
        with_content("config.json", lambda old: old.replace(b'"hidden_size": 48', b'"hidden_size": "wide"')),
        "hidden_size",
    ),
    "weights: none": (without("model.safetensors"), "safetensors"),
    "weights: cut": (with_content("model.safetensors", lambda old: old[: len(old) // 2]), "damaged or cut short"),
    "weights: garbage": (with_content("model.safetensors", lambda old: b"\x17" * len(old)), "damaged or cut short"),
    "weights: empty": (with_content("model.safetensors", lambda _: b""), "damaged or cut short"),
    "weights: of another width": (
        with_content("config.json", lambda old: old.replace(b'"hidden_size": 48', b'"hidden_size": 96')),
        "",
    ),
    "weights: one missing": (without_a_weight, "model.layers.3.mlp.up_proj.weight"),
    "tokenizer: none": (without("tokenizer.json"), "tokenizer"),
    "tokenizer: cut": (with_content("tokenizer.json", lambda old: old[:100]), "tokenizer"),
    "tokenizer: of a larger model": (too_large_a_vocabulary, "belongs to another model"),
    "tokenizer: with added tokens": (added_tokens, "does not belong to this model"),
    "gguf: nowhere": (lambda _, place: place.with_suffix(".gguf"), "does not exist"),
    "gguf: empty": (file_with(b""), "not a GGUF file"),
    "gguf: only the magic": (file_with(b"GGUF"), "cut short"),
    "gguf: something else": (file_with(b"PK\x03\x04" + b"\x00" * 100), "not a GGUF file"),
    "gguf: cut in the header": (cut_gguf(0.002), "cut short"),
    "gguf: cut in the weights": (cut_gguf(0.5), "cut short"),
    "gguf: another architecture": (lambda _, place: gguf_file(place.with_suffix(".gguf"), "mamba"), "mamba"),
    "a text file": (file_with(b"hello", ".txt"), "not a GGUF file"),
}


@pytest.mark.parametrize("case", list(BAD_MODELS))
def test_a_bad_model_is_refused(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    build, says = BAD_MODELS[case]
    model = build(world, tmp_path / "given")
    done = run("prune", model, "--drop", 2, "--fit", "scalar", "-o", empty / "out", "--text", world.text, *SMALL)
    line = refusal(done)
    assert says in line
    assert "given" in line or says in ("'t5' are not supported", "does not belong to this model")
    assert done.progress == []
    assert not (tmp_path / "cache").exists() or not [*(tmp_path / "cache").rglob("*.safetensors")]


@pytest.mark.parametrize("name", ["no-such-directory", "./no-such-directory", "../no-such-directory"])
def test_a_mistyped_directory_is_not_looked_up(
    world: World, run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(empty)

    def no_network(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    line = refusal(run("prune", name, "--drop", 2, "-o", "out", "--text", world.text))
    assert name in line
    assert "does not exist" in line


def test_the_hub_cannot_be_reached(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    done = run("prune", "nobody/nothing-of-the-kind", "--drop", 2, "-o", empty / "out", "--text", world.text)
    assert "nobody/nothing-of-the-kind" in refusal(done)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.4.mlp.down_proj.weight", "layer 4"),
        ("model.layers.0.self_attn.q_proj.weight", "layer 0"),
        (f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight", f"layer {LAYERS - 1}"),
        ("lm_head.weight", "logits"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_a_nan_names_the_layer(
    world: World, run: Run, empty: Path, tmp_path: Path, name: str, says: str, command: str
) -> None:
    model = with_nan(name)(world, tmp_path / "given")
    out = empty / "out" if command == "prune" else empty / "new" / "out"
    assert says in refusal(run(command, model, "--drop", 2, "-o", out, "--text", world.text, *SMALL))
