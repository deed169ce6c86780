"""GGUF files as models; what their metadata can say is tried in tests/field/test_gguf.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from field.gguf_files import write
from transformers import LlamaForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import gguf
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.saving import save_checkpoint

from .tiny import FAMILY_NAMES, VOCABULARY, tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(source, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_gguf_file_is_converted_once(
    cache: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = tiny_model("llama", layers=2), tmp_path / "tiny.gguf"
    write(path, model)
    loaded, tokenizer = load_model(path, device="cpu")
    assert type(loaded) is LlamaForCausalLM
    assert tokenizer.vocab_size == VOCABULARY
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert "quantization_config" not in loaded.config.to_dict()
    save_checkpoint(loaded, tokenizer, tmp_path / "out")
    assert len(list((cache / "gguf").iterdir())) == 1
    assert capfd.readouterr().err == ""

    converted: list[Path] = []
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda *args: (converted.append(args[0].path), convert(*args)))
    assert torch.equal(load_model(path, device="cpu")[0](ids).logits, loaded(ids).logits)
    assert not converted
    another = tiny_model("llama", layers=2, seed=1)
    write(path, another)
    torch.testing.assert_close(load_model(path, device="cpu")[0](ids).logits, another(ids).logits)
    assert converted == [path]


def test_a_gguf_file_that_is_cut_short(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, tiny_model("llama", layers=2))
    whole = path.read_bytes()
    for size in (4, 8, 24, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "tiny.gguf is damaged or cut short" in refusal(path)
    path.write_bytes(b"")
    assert "is not a GGUF file" in refusal(path)
    assert not cache.exists()


def test_a_gguf_file_of_an_unknown_architecture(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, tiny_model("llama", layers=2), architecture="rwkv6")
    assert "architecture 'rwkv6', which is not supported: use one of llama, qwen2" in refusal(path)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "file"))
    path = tmp_path / "tiny.gguf"
    write(path, tiny_model("llama", layers=2))
    message = refusal(path)
    assert "not a directory one may write to" in message
    assert "LINEARPATCH_CACHE" in message


def test_every_family_that_a_gguf_may_hold_is_one_of_ours() -> None:
    assert {*gguf.ARCHITECTURES.values(), "mistral"} == set(FAMILY_NAMES)
