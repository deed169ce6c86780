"""Architectures without a record: cut by what Transformers and the model show, and proved right or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.modeling import copies, keep_layers, layer_configs, load_model, patched_model
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.loading import ModelSource
from linearpatch_kernels.nn import DensePatch, LowRankPatch
from tests.support.field import text_file
from tests.support.pages import run_program
from tests.support.tiny import tiny_tokenizer
from tools.models_reference import (
    IN_PART,
    MADE_BY,
    PAGE,
    PATCHED,
    WORKS,
    merged,
    model_types,
    tiny_decoder,
    tried,
)

TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*)\n\n((?:.*\n)*?)(?=\n## |\Z)", TEXT, flags=re.MULTILINE))
REFITTED, MERGED = (re.findall(r"`([\w.-]+)`(?=[,.]|$)", SECTIONS[name]) for name in ("Refitted", "Merged"))
IN_PARTS, NOT_REFITTED, NOT_MERGED, REFUSED, UNTRIED = (
    dict(re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", SECTIONS[name], flags=re.MULTILINE))
    for name in ("Refitted in part", "Removal and patches", "Not merged", "Refused", "Not tried")
)
OUTCOMES = {
    **dict.fromkeys(REFITTED, WORKS),
    **{name: f"{IN_PART}: {why}" for name, why in IN_PARTS.items()},
    **{name: f"{PATCHED}: {why}" for name, why in NOT_REFITTED.items()},
    **{name: f"refused: {why}" for name, why in REFUSED.items()},
}


def without_sizes(text: str) -> str:
    """What is refused without how much differs, which depends on the processor."""
    return re.sub(r"\d\.\de[+-]\d\d", "", text)


# Another version has other types, and configs with other defaults.
of_the_pages_version = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in TEXT,
    reason=f"docs/reference/models.md is not about transformers {transformers.__version__}",
)


@of_the_pages_version
def test_the_page_has_every_type_once() -> None:
    assert TEXT.startswith(MADE_BY)
    assert sorted([*OUTCOMES, *UNTRIED]) == model_types()
    assert set(SECTIONS) == {
        *("Refitted", "Refitted in part", "Removal and patches", "Merged", "Not merged", "Refused", "Not tried"),
    }


@of_the_pages_version
@pytest.mark.parametrize("name", OUTCOMES)
def test_what_the_page_says(name: str) -> None:
    assert without_sizes(tried(name)) == without_sizes(OUTCOMES[name])


@of_the_pages_version
@pytest.mark.parametrize("name", [*REFITTED, *IN_PARTS, *NOT_REFITTED])
def test_what_the_page_says_of_merges(name: str) -> None:
    assert merged(name) == (WORKS if name in MERGED else f"refused: {NOT_MERGED[name]}")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_next", "bloom"])
def test_every_weight_and_buffer_of_a_layer_that_stays_is_shared(name: str) -> None:
    """Also those of modules that have children: the experts' tensors, sinks, decays."""
    model = tiny_decoder(name)
    cut = keep_layers(model, [0, 1, 4, 5, 6, 7])
    assert not any(tensor.is_meta for tensor in (*cut.parameters(), *cut.buffers()))
    for old, layer in zip([0, 1, 4, 5, 6, 7], decoder_layers(cut), strict=True):
        source = dict(decoder_layers(model)[old].named_parameters())
        assert source
        assert {name: id(one) for name, one in layer.named_parameters()} == {n: id(one) for n, one in source.items()}


@pytest.mark.parametrize("name", ["granite", "gpt2", "bamba", "llama4_text", "modernbert-decoder"])
@torch.no_grad()
def test_parts_are_the_whole_model_whatever_the_decoder_does_in_front(name: str) -> None:
    """Scaled embeddings, positions that are added to them, tuples between the layers, decoders of other names."""
    model = tiny_decoder(name)
    if name == "granite":
        model.config.embedding_multiplier = model.model.embedding_multiplier = 12.0
    ids = torch.randint(6, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    for depth in (0, 3, num_layers(model)):
        state = PartialRun(model, "tokens", depth)(ids)
        assert torch.equal(PartialRun(model, depth, "logits")(state), whole)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_next", "granitemoehybrid"])
def test_a_right_cut_is_not_refused_for_what_bfloat16_rounds(name: str) -> None:
    assert keep_layers(tiny_decoder(name).bfloat16(), [0, 1, 4, 5, 6, 7]).dtype == torch.bfloat16


def shifted(config: Any, kept: Any) -> Any:
    """A config of fewer layers whose kinds are those of other layers."""
    sliced = of_fewer(config, kept)
    sliced.layer_types = [*sliced.layer_types[1:], sliced.layer_types[0]]
    return sliced


of_fewer = layer_configs.config_for_layers


def test_a_cut_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder("gemma2")
    assert len(set(model.config.layer_types)) == 2
    monkeypatch.setattr("linearpatch_kernels.modeling.cut.config_for_layers", shifted)
    with pytest.raises(InputError, match="type 'gemma2' cannot be cut like this: the model of the shorter config comp"):
        keep_layers(model, [0, 1, 4, 5, 6, 7])


def test_a_cut_whose_layers_share_a_place_in_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are right, and what it writes with a cache is not."""
    model = tiny_decoder("gemma2")
    carry_over = copies.carry_over

    def with_the_old_numbers(pair: Any) -> None:
        carry_over(pair)
        if hasattr(pair.new, "layer_idx"):
            pair.new.layer_idx = 0

    monkeypatch.setattr("linearpatch_kernels.modeling.cut.carry_over", with_the_old_numbers)
    with pytest.raises(InputError, match=r"with a cache it generates something else|does not generate with a cache"):
        keep_layers(model, [0, 1, 4, 5, 6, 7])


def test_a_model_that_was_changed_is_told_as_such() -> None:
    model: Any = tiny_decoder("gemma2")
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(64, 96))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj is not the Linear of Transformers"):
        keep_layers(model, [0, 1, 4])


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager")
ids, logits = torch.load(sys.argv[1] + "/logits.pt")
with torch.no_grad():
    error = float((model(ids, use_cache=False).logits - logits).abs().max())
print(type(model).__module__.startswith("transformers_modules"), error < 1e-4)
"""


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "qwen3_next"])
def test_a_patched_twin_loads_where_the_package_is_not_imported(name: str, tmp_path: Path) -> None:
    patched = patched_model(keep_layers(tiny_decoder(name), [0, 1, 4, 5, 6, 7]), {2: LowRankPatch(64, 2), 6: patch()})
    assert type(patched).__name__.startswith("LinearPatch")
    patched.save_pretrained(tmp_path / "made")
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        torch.save((ids, patched(ids, use_cache=False).logits), tmp_path / "made" / "logits.pt")
    (tmp_path / "alone.py").write_text(ALONE)
    printed = run_program(tmp_path / "alone.py", tmp_path / "made", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert printed.split() == ["True", "True"]


@pytest.mark.parametrize("name", ["gpt2", "falcon", "nemotron_h", "openai-gpt", "bloom", "lfm2"])
def test_a_stock_class_never_loads_a_twin_without_its_patches(name: str, tmp_path: Path) -> None:
    """Of the last two the config names no activation."""
    model = tiny_decoder(name)
    patched_model(model, {2: LowRankPatch(64, 2)}).save_pretrained(tmp_path)
    # Each class says in its own way that it does not know the name.
    with pytest.raises((KeyError, AttributeError, ValueError), match="some layers are patched"):
        type(model).from_pretrained(tmp_path)
    assert ModelSource(tmp_path, device="cpu").load().dtype == model.dtype


def patch() -> DensePatch:
    found = DensePatch(64)
    with torch.no_grad():
        found.weight += 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return found


def test_a_patch_behind_the_last_layer_of_a_twin_acts_on_what_leaves_it() -> None:
    """Also where layers return tuples, and where they go on with the cache."""
    model = keep_layers(tiny_decoder("bloom"), range(6))
    twin = patched_model(model, {6: patch()})
    state = PartialRun(model, "tokens", 6)(torch.arange(8, 20)[None])
    expected = PartialRun(model, 6, "logits")(state @ patch().weight)
    torch.testing.assert_close(twin(torch.arange(8, 20)[None], use_cache=False).logits, expected)


def test_the_command_refits_what_has_no_record_and_merges_only_what_has(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_decoder("gpt2")
    given: Any = {"tokenizer": tiny_tokenizer(128), "text": text_file(tmp_path), "samples": 4, "length": 16}
    with pytest.raises(InputError, match="'gpt2' can be removed, not merged"):
        lp.merge(model, layers=6, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    made = lp.prune(model, drop=2, heal="refit", output=tmp_path / "refit", **given)
    changed = {path for row in made.summary["refit"] for path in row["projections"]}
    assert changed == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    made = lp.prune(model, drop=2, rank=4, output=tmp_path / "auto", **given)
    assert made.summary["heal_candidates"].keys() >= {"none", "refit"}
    for fit, kind in (("none", "GPT2LMHeadModel"), ("low-rank", "LinearPatchGPT2LMHeadModel")):
        made = lp.prune(model, drop=2, fit=fit, rank=4, output=tmp_path / fit, **given)
        assert made.written
        again, _ = load_model(tmp_path / fit, device="cpu")
        assert (type(again).__name__, num_layers(again)) == (kind, 6)


def test_the_command_refuses_to_refit_what_does_not_show_how(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_decoder("minimax")
    given: Any = {"tokenizer": tiny_tokenizer(128), "text": text_file(tmp_path), "samples": 4, "length": 16}
    why = "'minimax' cannot be fitted again: in layer 0 no projection"
    with pytest.raises(InputError, match=rf"{why}.*: give `heal` patch or none"):
        lp.prune(model, drop=2, heal="refit", output=tmp_path / "out", **given)
    for search in ({"drop": 2, "score": "healability"}, {"target": "2x-ppl"}):
        with pytest.raises(InputError, match=why):
            lp.prune(model, fit="none", output=tmp_path / "out", **search, **given)
    assert not (tmp_path / "out").exists()
    with pytest.warns(match=f"{why}.*: `heal` auto stands for patch here"):
        made = lp.prune(model, drop=2, rank=4, output=tmp_path / "auto", **given)
    assert made.summary["heal"] in ("patch", "none")
    assert made.plan.candidates


def test_the_command_merges_what_shows_its_units(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_decoder("arcee")
    given: Any = {"tokenizer": tiny_tokenizer(128), "text": text_file(tmp_path), "samples": 4, "length": 16}
    lp.merge(model, layers=6, variant="come", output=tmp_path / "out", **given)
    again, _ = load_model(tmp_path / "out", device="cpu")
    assert (type(again).__name__, num_layers(again)) == ("ArceeForCausalLM", 6)
