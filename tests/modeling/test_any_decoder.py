"""Architectures without a record: cut by what Transformers and the model show, and proved right or refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels.distillation.trainable import check_trainable
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import perplexity
from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.modeling import copies, keep_layers, layer_configs, load_model, patched_model, saving
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.loading import ModelSource
from linearpatch_kernels.nn import DensePatch, LowRankPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.selection import compare_candidates
from linearpatch_kernels.span import Span
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


# Those that are asked for most, and of every way to be refused one. All of them take minutes, so the others are slow.
ALWAYS = set(
    re.findall(
        r"\S+",
        """
        llama4_text mixtral ministral3 qwen2_moe qwen3_moe qwen3_next qwen3_5 qwen3_5_text gemma gemma2 gemma3 gemma4
        gemma4_text gpt_oss gpt2 gpt_neox olmo2 olmo3 olmoe granite granitemoehybrid smollm3 exaone4 glm4 glm4_moe
        deepseek_v3 ernie4_5_moe hunyuan_v1_dense seed_oss nemotron_h lfm2 bamba cohere2 falcon_h1 jamba mistral3
        llama4 bert rwkv xlstm beam deepseek_v4 qwen3_vl
        """,
    )
)


def by_turns(names: Iterable[str]) -> list[Any]:
    """The rows of the page: those of `ALWAYS`, and the others among the slow tests."""
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in names]


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
@pytest.mark.parametrize("name", by_turns(OUTCOMES))
def test_what_the_page_says(name: str) -> None:
    assert without_sizes(tried(name)) == without_sizes(OUTCOMES[name])


@of_the_pages_version
@pytest.mark.parametrize("name", by_turns([*REFITTED, *IN_PARTS, *NOT_REFITTED]))
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


@pytest.mark.parametrize(
    "name", ["granite", "gpt2", "bamba", "llama4_text", "modernbert-decoder", "gemma4_unified_text", "jamba"]
)
@torch.no_grad()
def test_parts_are_the_whole_model_whatever_the_decoder_does_in_front(name: str) -> None:
    """Scaled embeddings, positions that are added to them, tuples between the layers, decoders of other names, settings
    of single layers, layers whose kinds go by their numbers."""
    model = tiny_decoder(name)
    if name == "granite":
        model.config.embedding_multiplier = model.model.embedding_multiplier = 12.0
    ids = torch.randint(6, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    for depth in (0, 3, num_layers(model)):
        state = PartialRun(model, "tokens", depth)(ids)
        assert torch.equal(PartialRun(model, depth, "logits")(state), whole)


def gemma4(*, sharing: int = 0) -> Any:
    """Layers that take an embedding each, which are packed, and of which the last ones share keys and values."""
    return tiny_decoder("gemma4_text", num_kv_shared_layers=sharing)


@torch.no_grad()
def test_tensors_that_hold_the_parts_of_all_layers_are_sliced_and_all_others_shared() -> None:
    model, kept = gemma4(), [0, 1, 4, 5, 6, 7]
    cut: Any = keep_layers(model, kept)
    packed = {"model.embed_tokens_per_layer.weight": 1, "model.per_layer_model_projection.weight": 0}
    source, numbers = dict(model.named_parameters()), [8 * old + column for old in kept for column in range(8)]
    for name, parameter in cut.named_parameters():
        if name in packed:
            assert torch.equal(parameter, source[name].index_select(packed[name], torch.tensor(numbers)))
        elif ".layers." not in name:
            assert parameter is source[name]
    for new, old in enumerate(kept):
        held = dict(decoder_layers(model)[old].named_parameters())
        assert {name: id(one) for name, one in decoder_layers(cut)[new].named_parameters()} == {
            name: id(one) for name, one in held.items()
        }
    assert cut.model.embed_tokens_per_layer.embedding_dim == 48
    assert cut.config.per_layer_config[1].head_dim == model.config.per_layer_config[1].head_dim


@pytest.mark.parametrize("name", ["gemma4_text", "zamba"])
@torch.no_grad()
def test_layers_that_take_more_than_the_stream_run_from_the_tokens(name: str) -> None:
    model = tiny_decoder(name)
    ids = torch.randint(6, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids, use_cache=False).logits
    assert torch.equal(PartialRun(model, 8, "logits")(PartialRun(model, "tokens", 8)(ids)), whole)
    with pytest.raises(
        InputError, match=f"'{name}' do not run from a layer on: their layers (do not run on|run other)"
    ):
        PartialRun(model, 2, 8)
    with pytest.raises(InputError, match=f"'{name}' do not run from a layer on"):
        check_trainable(patched_model(model, {2: patch()}), 2, "patch")
    plans = {"healed": (Joint(Span(2, 3), patch()), Joint(Span(5, 6))), "none": (Joint(Span(2, 3)), Joint(Span(5, 6)))}
    found = compare_candidates(model, ids, plans)
    assert found["healed"].loss != pytest.approx(found["none"].loss, rel=1e-3)
    for name, joints in plans.items():
        assert found[name].perplexity == pytest.approx(perplexity(apply_plan(model, PrunePlan(8, joints)), ids))


def test_layers_that_use_the_keys_of_another_one_are_cut_where_it_stays() -> None:
    """Of eight layers the last four use the keys and values of 2 and 3."""
    model = gemma4(sharing=4)
    assert [layer.self_attn.is_kv_shared_layer for layer in decoder_layers(model)] == [False] * 4 + [True] * 4
    assert keep_layers(model, [0, 2, 3, 4, 7]).config.num_kv_shared_layers == 2
    assert keep_layers(model, [0, 1, 2, 3]).config.num_kv_shared_layers == 0
    with pytest.raises(InputError, match=r"the layers that stay need one that goes \(it has no 'full_attention'\)"):
        keep_layers(model, [0, 1, 2, 4, 5, 6, 7])
    with pytest.raises(InputError, match="'gemma4_unified_text' do not run from a layer on"):
        PartialRun(tiny_decoder("gemma4_unified_text", num_kv_shared_layers=2), 3, 8)


def test_a_pattern_that_a_config_cannot_name_is_cut_by_whole_repeats() -> None:
    """Jamba says that every fourth layer attends, and every second one is a mixture."""
    model = tiny_decoder("jamba", attn_layer_period=4, attn_layer_offset=2, expert_layer_period=2)
    cut = keep_layers(model, [0, 1, 6, 7])
    kinds = [type(layer).__name__ for layer in decoder_layers(cut)]
    assert kinds == ["JambaMambaDecoderLayer"] * 2 + ["JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"]
    pattern = r"as it has a pattern alone \(attn_layer_period, expert_layer_period\): remove as many as repeat it"
    for kept in ([0, 1, 4, 5, 6, 7], [0, 1, 2, 4, 5, 6, 7]):
        with pytest.raises(
            InputError, match=f"'jamba' cannot be cut like this: their config does not tell .*{pattern}"
        ):
            keep_layers(model, kept)


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


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral", "qwen3_next", "gemma4_text"])
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
    assert changed == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "transformer.ln_f"}
    made = lp.prune(model, drop=2, rank=4, output=tmp_path / "auto", **given)
    assert made.summary["heal_candidates"].keys() >= {"none", "refit"}
    for fit, kind in (("none", "GPT2LMHeadModel"), ("low-rank", "LinearPatchGPT2LMHeadModel")):
        made = lp.prune(model, drop=2, fit=fit, rank=4, output=tmp_path / fit, **given)
        assert made.written
        again, _ = load_model(tmp_path / fit, device="cpu")
        assert (type(again).__name__, num_layers(again)) == (kind, 6)


def test_a_twin_has_the_stock_names_in_its_files(tmp_path: Path) -> None:
    """Engines know no others. Before, it had those of the model in memory, and such files still load."""
    twin = patched_model(keep_layers(tiny_decoder("mixtral"), [0, 1, 4, 5, 6, 7]), {2: patch()})
    twin.save_pretrained(tmp_path / "before", save_original_format=False)
    loaded = ModelSource(tmp_path / "before", device="cpu").load()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for model in (twin, loaded):
        saving.save_checkpoint(model, None, tmp_path / "now", overwrite=True)
        keep_layers(tiny_decoder("mixtral"), range(6)).save_pretrained(tmp_path / "stock")
        names, stock = (set(load_file(tmp_path / made / "model.safetensors")) for made in ("now", "stock"))
        assert names - stock == {"model.layers.2.patch.0.weight"}
        assert stock <= names


@pytest.mark.parametrize("joints", [{}, {2: patch}], ids=["stock", "patched"])
def test_a_mixture_is_read_back_though_its_files_hold_the_experts_one_by_one(
    joints: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = keep_layers(tiny_decoder("mixtral"), [0, 1, 4, 5, 6, 7])
    if joints:
        cut = patched_model(cut, {joint: make() for joint, make in joints.items()})
    saving.save_checkpoint(cut, None, tmp_path / "made")
    with safe_open(tmp_path / "made" / "model.safetensors", framework="pt") as file:
        assert any("experts.3." in name for name in file.keys())  # noqa: SIM118 - not a mapping
    assert num_layers(ModelSource(tmp_path / "made", device="cpu").load()) == 6
    write = saving._write_model

    def write_another(model: PreTrainedModel, directory: Path) -> None:
        """One whose logits do not show it."""
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(one for name, one in other.named_parameters() if "experts" in name).view(-1)[0].add_(1e-6)
        write(other, directory)

    monkeypatch.setattr(saving, "_write_model", write_another)
    with pytest.raises(InputError, match=r"the weight .*experts\S* was written otherwise"):
        saving.save_checkpoint(cut, None, tmp_path / "other")


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
