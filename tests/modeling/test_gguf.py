"""GGUF files as models; what their metadata can say is tried in tests/field/test_gguf.py."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import gguf
from linearpatch_kernels.modeling.gguf_file import read_file
from linearpatch_kernels.modeling.loading import ModelSource, load_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.support.gguf_files import write
from tests.support.tiny import FAMILY_NAMES, VOCABULARY, tiny_model


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


def test_whoever_waits_is_told_of_a_conversion(cache: Path, tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tiny_model("llama", layers=2))
    told: list[str] = []
    for _ in range(2):
        ModelSource(tmp_path / "tiny.gguf", device="cpu", mention=told.append).load()
    (line,) = told
    assert line.startswith(f"converting tiny.gguf, once: 0.0 GB in {cache}")


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


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("alignment", [32, 64])
def test_tensors_of_every_type_are_unpacked(tmp_path: Path, kind: str, alignment: int) -> None:
    number = library.GGMLQuantizationType[kind]
    values = {
        f"blk.{i}.x": np.random.default_rng(i).standard_normal(shape)
        for i, shape in enumerate([(3, 64), (32,), (2, 5, 96), (1, 32)])
    }
    writer = library.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_custom_alignment(alignment)
    for name, array in values.items():
        plain = kind in ("F32", "F16")
        stored = array.astype(f"float{kind[1:]}") if plain else library.quantize(array.astype(np.float32), number)
        writer.add_tensor(name, stored, raw_dtype=None if plain else number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_file(tmp_path / "x.gguf")
    assert metadata["general.alignment"] == alignment
    assert tensors.keys() == values.keys()
    theirs = {tensor.name: tensor for tensor in library.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, tensor in tensors.items():
        found = tensor.read()
        assert found.dtype == torch.float32
        assert tensor.shape == found.shape == values[name].shape
        wanted = library.dequantize(theirs[name].data, number).reshape(values[name].shape)
        assert np.array_equal(found.numpy(), wanted)
        assert np.allclose(wanted, values[name], atol=0.3)


@pytest.mark.parametrize(
    ("at", "bytes_there", "says"),
    [
        (4, struct.pack("<I", 99), "version"),
        (-12, struct.pack("<I", 77), "77"),
        (-12, struct.pack("<I", 2), "not a multiple"),
        (-8, struct.pack("<Q", 1 << 40), "ends before its tensor t does"),
        (-24, struct.pack("<I", 40), "40 dimensions"),
    ],
)
def test_a_head_that_cannot_be_is_refused(tmp_path: Path, at: int, bytes_there: bytes, says: str) -> None:
    head = library.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    head.add_tensor("t", np.ones(16, dtype=np.float32))
    head.write_header_to_file()
    head.write_kv_data_to_file()
    head.write_ti_data_to_file()
    head.close()
    # The one tensor's entry is the end of the head: its dimensions, their number, its type and its place.
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    at += len(content) if at < 0 else 0
    content[at : at + len(bytes_there)] = bytes_there
    (tmp_path / "x.gguf").write_bytes(bytes(content) + bytes(200))
    with pytest.raises(ValueError, match=says):
        read_file(tmp_path / "x.gguf")
