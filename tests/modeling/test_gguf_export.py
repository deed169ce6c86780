"""Stock models as GGUF files: read back they are the same model and tokenizer; what a file cannot say is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import gguf_export, gguf_vocabulary
from linearpatch_kernels.modeling.gguf_file import read_file
from linearpatch_kernels.modeling.loading import load_model
from tests.support.field import failing
from tests.support.gguf_models import LLAMA3, ROPES, TOKENIZERS, byte_level, model_for, sentencepiece, with_rope
from tests.support.pages import ROOT
from tests.support.tiny import FAMILY_NAMES, tiny_model, tiny_patched_model, tiny_tokenizer

ODD = [
    "",
    "plain words, 12345 and 3.14",
    "don't WE'LL Straße naïve 漢字 हिन्दी 🙂👩\u200d👧",
    "a  b   c\n\n\td\r\n  e",
    "def f(x):\n    return x // 2  # ok",
    "<s>inside</s><s>",
    "\u0301 \u00a0 \ufeff",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))


def exported(model: PreTrainedModel, tokenizer: Any, file: Path, dtype: str = "f32") -> Path:
    result = lp.export(model, tokenizer=tokenizer, to="gguf", output=file, dtype=dtype)
    assert result.output == file
    assert result.summary["file_bytes"] == file.stat().st_size
    assert os.listdir(file.parent).count(file.name) == 1
    return file


def through_the_file(name: str, tensor: torch.Tensor, family: str) -> torch.Tensor:
    """What is left of a float32 weight: all of it, but Gemma's files hold the gain 1 + w of a norm."""
    return (tensor + 1) - 1 if family == "gemma3_text" and name.endswith("norm.weight") else tensor


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_read_back_it_is_the_same_model_and_tokenizer(family: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[family]()
    model = model_for(family, tokenizer)
    read, its = load_model(exported(model, tokenizer, tmp_path / "x.gguf"), device="cpu")
    weights = read.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], through_the_file(name, tensor, family)), name
    ids = torch.randint(3, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert_same_config(read.config, model.config)
    assert_same_tokenizer(its, tokenizer)


def assert_same_config(read: Any, config: Any) -> None:
    here, there = config.to_dict(), read.to_dict()
    if config.model_type == "mistral":
        assert read.model_type == "llama"
        there.pop("model_type")
    about_files = {"dtype", "_name_or_path", "architectures", "transformers_version", "use_sliding_window"}
    about_files |= {"initializer_range", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
    if config.model_type == "phi3" and config.rope_parameters["rope_type"] == "default":
        about_files.add("original_max_position_embeddings")
    keys = here.keys() & there.keys() - about_files
    assert {key: there[key] for key in keys} == {key: here[key] for key in keys}


def assert_same_tokenizer(read: Any, tokenizer: Any) -> None:
    for text in ODD:
        for around in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=around)
            assert read.encode(text, add_special_tokens=around) == ids, text
            assert read.decode(ids) == tokenizer.decode(ids), text
    talk = [{"role": "user", "content": "two  words"}, {"role": "assistant", "content": "naïve 漢字"}]
    assert read.apply_chat_template(talk, tokenize=False) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert read.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_name_of_a_split_is_found(split: str, tmp_path: Path) -> None:
    tokenizer = byte_level(split)
    file = exported(model_for("llama", tokenizer, layers=1), tokenizer, tmp_path / "x.gguf")
    metadata, _ = read_file(file)
    assert metadata["tokenizer.ggml.pre"] == split
    assert metadata["tokenizer.ggml.add_bos_token"] is (split == "llama-bpe")
    assert_same_tokenizer(load_model(file, device="cpu")[1], tokenizer)


def test_a_split_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("o", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert "in none of the ways that this package knows of llama.cpp" in refusal(
        model_for("llama", tokenizer), tokenizer, tmp_path
    )


def test_spaces_around_special_tokens_that_a_file_cannot_say_are_told(tmp_path: Path) -> None:
    tokenizer = sentencepiece("phi3")
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, special=True, rstrip=True)], special_tokens=True)
    with pytest.warns(UserWarning, match="spaces around special tokens are read otherwise"):
        exported(model_for("phi3", tokenizer, layers=1), tokenizer, tmp_path / "x.gguf")


def test_a_space_that_llama_cpp_puts_behind_a_special_token_is_told(tmp_path: Path) -> None:
    tokenizer = sentencepiece("llama")
    with pytest.warns(UserWarning, match="puts a space in front of what follows a special token"):
        exported(model_for("llama", tokenizer, layers=1), tokenizer, tmp_path / "x.gguf")


def test_a_name_by_which_llama_cpp_expects_other_tokens_is_left_out(tmp_path: Path) -> None:
    """It looks up `<|endoftext|>` in whatever is called Phi-3, and loads nothing that lacks it."""
    for family, named in (("phi3", False), ("llama", True)):
        tokenizer = byte_level()
        metadata, _ = read_file(exported(model_for(family, tokenizer, layers=1), tokenizer, tmp_path / "x.gguf"))
        assert ("general.name" in metadata) is named


def test_letters_that_are_composed_first_are_told(tmp_path: Path) -> None:
    tokenizer = byte_level("qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.warns(UserWarning, match="composes letters"):
        exported(model_for("qwen2", tokenizer, layers=1), tokenizer, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {"query_pre_attn_scalar": 12, "final_logit_softcapping": 5.0}),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma3_text", {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_what_a_config_says_is_what_is_computed(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = model_for(family, tokenizer, **changes)
    read, _ = load_model(exported(model, tokenizer, tmp_path / "x.gguf"), device="cpu")
    assert_same_config(read.config, model.config)
    assert_same_logits(read, model)


def assert_same_logits(read: PreTrainedModel, model: PreTrainedModel) -> None:
    ids = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", list(ROPES))
def test_scaled_rotary_embeddings_are_written(case: str, tmp_path: Path) -> None:
    family, rope = ROPES[case]
    tokenizer = byte_level()
    model = with_rope(family, tokenizer, rope)
    read, _ = load_model(exported(model, tokenizer, tmp_path / "x.gguf"), device="cpu")
    assert_same_logits(read, model)
    tables = [dict(one.get_decoder().rotary_emb.named_buffers()) for one in (read, model)]
    for name, table in tables[1].items():
        torch.testing.assert_close(tables[0][name], table, rtol=1e-6, atol=0)


# --- what matrices are stored as -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rounded_weights_are_the_nearest(family: str, dtype: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = model_for(family, tokenizer)
    read, _ = load_model(exported(model, tokenizer, tmp_path / "x.gguf", dtype), device="cpu")
    narrow = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in model.state_dict().items():
        wanted = tensor.to(narrow).float() if tensor.dim() == 2 else through_the_file(name, tensor, family)
        assert torch.equal(read.state_dict()[name], wanted), name


def test_eight_bits_are_within_half_a_step_of_every_block(tmp_path: Path) -> None:
    """Of 32 numbers: whole steps of the largest / 127, which is kept in float16."""
    tokenizer = byte_level()
    model = model_for("qwen2", tokenizer, hidden_size=64, head_dim=16, intermediate_size=80)
    file = exported(model, tokenizer, tmp_path / "x.gguf", "q8_0")
    kinds = {name: library.GGMLQuantizationType(tensor.kind).name for name, tensor in read_file(file)[1].items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"
    # 80 is no multiple of 32.
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    read = load_model(file, device="cpu")[0].state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2:
            assert torch.equal(read[name], tensor), name
        elif tensor.shape[-1] % 32:
            assert torch.equal(read[name], tensor.half().float()), name
        else:
            blocks, found = (one.reshape(-1, 32).double() for one in (tensor, read[name]))
            step = blocks.abs().amax(dim=1, keepdim=True) / 127
            room = step / 2 + 127 * (step - step.half().double()).abs()
            assert bool(((found - blocks).abs() <= room * (1 + 1e-6)).all()), name
            assert not torch.equal(found, blocks), name


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [(1e5, "f16", "too large for f16: say bf16"), (1e7, "q8_0", "too large for q8_0"), (float("nan"), "f32", "finite")],
)
def test_a_weight_that_cannot_be_written_leaves_nothing(value: float, dtype: str, says: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = model_for("qwen2", tokenizer, hidden_size=64, head_dim=16)
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[2, 3] = value
    message = refusal(model, tokenizer, tmp_path, dtype=dtype)
    assert "blk.1.ffn_up.weight" in message
    assert says in message


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(model: Any, tokenizer: Any, folder: Path, **settings: Any) -> str:
    """The line of an export that leaves nothing behind."""
    folder = folder / "empty"
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        lp.export(model, tokenizer=tokenizer, **{"to": "gguf", "output": folder / "x.gguf", **settings})
    assert os.listdir(folder) == []
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_patched_model_is_refused_with_the_alternative(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = tiny_patched_model("llama", vocab_size=len(tokenizer))
    message = refusal(model, tokenizer, tmp_path)
    assert "patched" in message
    assert "`heal` refit" in message


def test_weights_that_the_config_does_not_describe_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = model_for("llama", tokenizer)
    layer: Any = model.get_decoder().layers[1].mlp
    layer.up_proj.lora = torch.nn.Linear(4, 4)
    assert "up_proj.lora.bias, which its config does not describe" in refusal(model, tokenizer, tmp_path)
    del layer.up_proj.lora
    layer.to("meta")
    (tmp_path / "meta").mkdir()
    assert "is missing, quantised or not in memory" in refusal(model, tokenizer, tmp_path / "meta")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_head=2, n_layer=2)
    message = refusal(GPT2LMHeadModel(config), tokenizer, tmp_path)
    assert "is a gpt2, which cannot be exported to GGUF: give one of llama, mistral, qwen2" in message


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = model_for("llama", tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    assert "is quantised: export the full-precision" in refusal(tmp_path / "model", None, tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    model = model_for("llama", byte_level())
    model.save_pretrained(tmp_path / "model")
    assert "tokenizer" in refusal(tmp_path / "model", None, tmp_path)
    assert "is of the kind WordLevel" in refusal_of_words(tmp_path / "words")


def refusal_of_words(folder: Path) -> str:
    folder.mkdir()
    return refusal(tiny_model("llama", layers=2), tiny_tokenizer(), folder)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu"),
        ("mistral", {"sliding_window": 8}, "sliding_window is 8 of 128 tokens"),
        ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of the type dynamic cannot be said",
        ),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": 8.0, "rope_theta": 1e4, "high_freq_factor": 3.0}}, "rope_"),
    ],
    ids=str,
)
def test_what_a_file_cannot_say_is_refused_by_name(
    family: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    if "high_freq_factor" in str(changes):
        changes["rope_parameters"] |= {"original_max_position_embeddings": 64}
    assert says in refusal(model_for(family, tokenizer, **changes), tokenizer, tmp_path)


def test_unknown_settings_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    model = model_for("llama", tokenizer)
    for number, (settings, says) in enumerate(
        [({"to": "onnx"}, "`to` onnx is not known: choose one of gguf"), ({"dtype": "q4_k"}, "f32, f16, bf16, q8_0")]
    ):
        (tmp_path / str(number)).mkdir()
        assert says in refusal(model, tokenizer, tmp_path / str(number), **settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10))
    monkeypatch.setattr(gguf_export, "appearing", lambda _: pytest.fail("a file was begun"))
    assert "and the disk has 0.00 GB free" in refusal(model, tokenizer, tmp_path)


# --- what stands there -----------------------------------------------------------------------------------------------


def test_it_replaces_its_own_file_and_no_other(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model, file = model_for("llama", tokenizer), tmp_path / "x.gguf"
    file.touch()
    first = exported(model, tokenizer, file).read_bytes()
    assert exported(model, tokenizer, file, "f16").stat().st_size < len(first)

    def kept(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(InputError, match="is no file of linearpatch's") as caught:
            lp.export(model, tokenizer=tokenizer, to="gguf", output=file)
        assert file.read_bytes() == content
        return str(caught.value)

    kept(b"a person's")
    kept(first[:-1])
    # What another tool made of it has our keys and other tensors.
    exported(model, tokenizer, tmp_path / "ours.gguf")
    another = library.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for key, value in read_file(tmp_path / "ours.gguf")[0].items():
        if key.startswith("linearpatch."):
            (another.add_string if isinstance(value, str) else another.add_uint64)(key, value)
    another.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    another.write_header_to_file()
    another.write_kv_data_to_file()
    another.write_tensors_to_file()
    another.close()
    kept((tmp_path / "theirs.gguf").read_bytes())
    with pytest.raises(InputError, match="is a directory"):
        lp.export(model, tokenizer=tokenizer, to="gguf", output=tmp_path)
    with pytest.raises(InputError, match="is a device or a pipe"):
        lp.export(model, tokenizer=tokenizer, to="gguf", output="/dev/null")
    with pytest.raises(InputError, match="is what the run reads"):
        lp.export(tmp_path / "ours.gguf", to="gguf", output=tmp_path / "ours.gguf")
    with pytest.raises(InputError, match="in the cache"):
        lp.export(model, tokenizer=tokenizer, to="gguf", output=tmp_path / "cache" / "x.gguf")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=str)
def test_a_failed_write_leaves_what_was_there(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level()
    model, file = model_for("llama", tokenizer), tmp_path / "x.gguf"
    before = exported(model, tokenizer, file).read_bytes()
    packed, calls = gguf_export._packed, []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 7:
            raise error
        return packed(*arguments)

    monkeypatch.setattr(gguf_export, "_packed", fails)
    wanted = (InputError, "No space left on device") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(wanted[0], match=wanted[1]):
        lp.export(model, tokenizer=tokenizer, to="gguf", output=file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.gguf"]


def test_the_rename_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    monkeypatch.setattr(os, "replace", failing(errno.EIO)(os.replace))
    assert "could not be written (Input/output error)" in refusal(model_for("llama", tokenizer), tokenizer, tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
import linearpatch_kernels as lp
from linearpatch_kernels.modeling import gguf_export
from tests.support.gguf_models import byte_level, model_for

tokenizer = byte_level()
gguf_export._packed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
lp.export(model_for("llama", tokenizer), tokenizer=tokenizer, to="gguf", output=Path(sys.argv[1]))
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "out" / "x.gguf"
    file.parent.mkdir()
    run = subprocess.run([sys.executable, "-c", KILLED, file], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (left,) = os.listdir(file.parent)
    assert left.startswith(".x.gguf.")
    other = file.parent / f".y.gguf.{'0' * 32}.tmp"
    other.touch()
    tokenizer = byte_level()
    exported(model_for("llama", tokenizer), tokenizer, file)
    assert sorted(os.listdir(file.parent)) == [other.name, "x.gguf"]


def test_the_table_of_splits_is_the_readers() -> None:
    for name in gguf_vocabulary._SPLITS:
        said = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        assert gguf_vocabulary.reading.unknown_split(said) is None
