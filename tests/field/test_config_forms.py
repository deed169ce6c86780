"""Configs that Transformers 4, 5 and the engines read as the same model: both names of what 5 renamed are written.

What was found: a stock output of a model with a ``rope_theta`` other than 10,000 was read by Transformers 4.57 with
10,000, and without its scaling, without a word (vllm #44158, #42624, lmdeploy #4304).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.config_forms import both_forms, one_form, write_both_forms
from linearpatch_kernels.modeling.patched import PATCHED_CLASSES
from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.field.rope_cases import CASES, KINDS, LENGTHS, LLAMA3, UNSAYABLE, longrope, made, rope
from tests.support.field import IDS, linearpatch, same, save_model, text_file, tiny
from tests.support.tiny import tiny_tokenizer


def entries_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


def computing(config: Any) -> dict[str, Any]:
    """A config without what says where it came from, and without the names that only an older Transformers needs."""
    apart = ("_name_or_path", "architectures", "dtype", "_sliding_window_pattern")
    return {name: value for name, value in config.to_dict().items() if name not in apart}


def without_type(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    # Phi-3 reads "type" before Transformers 5; it says what "rope_type" says.
    return {name: value for name, value in rope_parameters.items() if name != "type"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CASES, *UNSAYABLE])
def test_what_is_written_is_read_back_unchanged(name: str, kind: str, tmp_path: Path) -> None:
    model = made(name, kind)
    save_checkpoint(model, None, tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    found, wanted = computing(config), computing(model.config)
    assert without_type(found.pop("rope_parameters")) == without_type(wanted.pop("rope_parameters"))
    assert wanted.items() <= found.items()
    assert found.keys() - wanted.keys() <= {"partial_rotary_factor", "original_max_position_embeddings"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    # Once more, and nothing changes (but a number that Gemma notes down for its own use).
    save_checkpoint(again, None, tmp_path / "again")
    once, twice = (entries_of(tmp_path / name) for name in ("saved", "again"))
    noted = {"_sliding_window_pattern": 6}
    assert {**twice, **noted} == {**once, **noted}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_written_and_say_the_same(name: str, kind: str, tmp_path: Path) -> None:
    model = made(name, kind)
    if kind == "stock":
        save_checkpoint(model, None, tmp_path)
    else:  # by Transformers' own method, too
        model.save_pretrained(tmp_path)
    entries = entries_of(tmp_path)
    assert entries["torch_dtype"] == entries["dtype"] == "float32"
    parameters = entries["rope_parameters"]
    full = parameters.get("full_attention", parameters)
    assert entries["rope_theta"] == full["rope_theta"]
    if full["rope_type"] == "default":
        assert entries["rope_scaling"] is None
    else:
        scaling = entries["rope_scaling"]
        assert scaling.get("rope_type", scaling.get("type")) == full["rope_type"]
        assert scaling.items() <= full.items()
    if full is not parameters:
        assert entries["rope_local_base_freq"] == parameters["sliding_attention"]["rope_theta"]
    if full.get("partial_rotary_factor", 1.0) != 1.0:
        assert entries["partial_rotary_factor"] == full["partial_rotary_factor"]
    if full["rope_type"] == "longrope":
        assert entries["original_max_position_embeddings"] == full["original_max_position_embeddings"]
    # A reader that knows the old names only has all that the new ones say.
    old = {key: value for key, value in entries.items() if key not in ("rope_parameters", "dtype")}
    config_class = type(model.config)
    assert without_type(config_class(**old).rope_parameters) == without_type(model.config.rope_parameters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_the_old_form_cannot_say_has_no_theta_there(name: str, kind: str, tmp_path: Path) -> None:
    save_checkpoint(made(name, kind), None, tmp_path)
    entries = entries_of(tmp_path)
    assert entries["rope_theta"] is None
    with pytest.raises(InputError, match="transformers < 5 cannot compute this model's rope_parameters"):
        one_form(entries, new=False)


def test_the_command_writes_both_forms(tmp_path: Path) -> None:
    """A source in the old form, as every hub repository of the family has it."""
    save_model(tiny("llama", rope_parameters=rope("llama3", 500000.0, **LLAMA3)), tmp_path / "dense")
    entries = entries_of(tmp_path / "dense")
    parameters = entries.pop("rope_parameters")
    entries |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    entries["torch_dtype"] = entries.pop("dtype")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(entries))
    text = text_file(tmp_path)
    given = ["--spans", "2:4", "--fit", "none", "--text", text, "--samples", "4", "--length", "16", "--device", "cpu"]
    assert linearpatch("prune", tmp_path / "dense", "-o", tmp_path / "out", *given) is None
    written = entries_of(tmp_path / "out")
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert written["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}
    assert written["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"rope_parameters": None, "dtype": None},
        {"rope_parameters": {}},
        {"rope_parameters": "x"},
        {"rope_parameters": [1]},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"},
    ],
)
def test_what_has_nothing_to_say_twice_stays(entries: dict[str, Any]) -> None:
    assert both_forms(entries) == entries
    assert one_form(entries, new=True) == entries


def test_a_gemma_without_one_kind_of_rotary_embedding() -> None:
    """None stands for a kind of layer that has none."""
    entries = both_forms({"rope_parameters": {"full_attention": None, "sliding_attention": rope()}})
    assert (entries["rope_theta"], entries["rope_local_base_freq"]) == (None, 500.0)
    entries = both_forms({"rope_parameters": {"full_attention": rope(), "sliding_attention": None}})
    assert (entries["rope_theta"], entries["rope_local_base_freq"]) == (500.0, None)


def test_phi3_gets_the_three_fields_that_it_takes() -> None:
    entries = both_forms({"model_type": "phi3", "rope_parameters": {**longrope(3), "type": "su"}, **LENGTHS})
    assert entries["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert entries["rope_scaling"]["type"] == entries["rope_parameters"]["type"] == "longrope"
    more = both_forms({"model_type": "phi3", "rope_parameters": longrope(3, attention_factor=2.0), **LENGTHS})
    # With a field more an older Phi-3 refuses it; without it, it would compute another model.
    assert more["rope_scaling"]["attention_factor"] == 2.0


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_local_base_freq": 1.0},
    ],
)
def test_forms_that_contradict_each_other_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Somebody changed one of the two; Transformers 4 and 5 would compute different models."""
    save_checkpoint(made("gemma3", "patched"), None, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**entries_of(tmp_path), **change}))
    with pytest.raises(InputError, match=rf"the config's {next(iter(change))} and its rope_parameters say different"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(InputError):
        PATCHED_CLASSES["gemma3_text"][0].from_pretrained(tmp_path)


def test_a_patched_model_that_was_saved_before_both_forms_loads(tmp_path: Path) -> None:
    model = made("llama3", "patched")
    save_checkpoint(model, None, tmp_path)
    added = ("rope_theta", "rope_scaling", "torch_dtype")
    old = {name: value for name, value in entries_of(tmp_path).items() if name not in added}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with torch.no_grad():
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    assert one_form(old, new=False)["rope_theta"] == 500000.0


def test_a_dtype_that_is_asked_for_is_no_contradiction(tmp_path: Path) -> None:
    save_checkpoint(made("qwen3", "patched"), None, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    assert entries_of(tmp_path / "half")["torch_dtype"] == entries_of(tmp_path / "half")["dtype"] == "bfloat16"


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"extra_special_tokens": {"a": "<a>"}, "tokenizer_class": 5}'])
def test_a_tokenizers_config_of_another_form_stays(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    write_both_forms(tmp_path)
    assert "".join((tmp_path / "tokenizer_config.json").read_text().split()) == "".join(content.split())


def test_a_tokenizers_config_is_written_for_both(tmp_path: Path) -> None:
    """Transformers 5 calls a plain tokenizer's class by a name that 4 does not know, and lists its special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<néw>", "<more>"]})
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    save_checkpoint(tiny(), tokenizer, tmp_path / "saved")
    tmp_path = tmp_path / "saved"
    entries = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert entries["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert entries["additional_special_tokens"] == ["<néw>", "<more>"]
    assert "extra_special_tokens" not in entries
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert type(after) is type(before)
    assert after.extra_special_tokens == before.extra_special_tokens == ["<néw>", "<more>"]
    assert after("5 <néw> 6").input_ids == before("5 <néw> 6").input_ids
    assert after.all_special_ids == before.all_special_ids
