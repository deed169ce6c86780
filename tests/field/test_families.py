"""What is particular to a family of models: tables that depend on the length, biases, kinds of layers, few layers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import perplexity
from linearpatch_kernels.merging.merge import choose_units, merge_layers
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.merging.settings import RULES
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.views import partial_decoder
from linearpatch_kernels.nn import HadamardPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.search import plan_pruning
from linearpatch_kernels.pruning.selection import compare_candidates
from tests.support.field import SMALL, linearpatch, logits, same, save_model, text_file, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def written_on(model: PreTrainedModel, prompt: Tensor, count: int, **more: Any) -> Tensor:
    """What the model adds to the prompt, greedily."""
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": count, "eos_token_id": None}
    found: Tensor = model.generate(prompt, do_sample=False, **options, **more)
    return found


# --- rotary tables that depend on the length -------------------------------------------------------------------------

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 7.0, 9.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": (
        "phi3",
        {
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 128,
            "sliding_window": None,
        },
    ),
    # The stretch of the table grows with the longest text so far beyond max_position_embeddings.
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
}
LONG = drawn(4, 48)
SHORT = LONG[:, :20]


def leaves_another_table(model: PreTrainedModel, windows: Tensor) -> None:
    """A call of the other length, whose table the model may keep."""
    logits(model, SHORT if windows is LONG else LONG)


@pytest.mark.parametrize(
    ("name", "windows"),
    [("phi3, longrope", LONG), ("phi3, longrope", SHORT), ("llama, dynamic", SHORT)],
    ids=["phi3, longrope, long", "phi3, longrope, short", "llama, dynamic, short"],
)
def test_a_table_by_length_is_the_dense_models(name: str, windows: Tensor, tmp_path: Path) -> None:
    """Beyond the original context another table holds, and a model remembers which it used last: transformers #33129.
    What is compared from the dense model's states must be what the built model does, whatever ran before."""
    family, changes = BY_LENGTH[name]
    model = tiny(family, **changes)
    assert not same(logits(model, LONG)[:, :20], logits(model, SHORT)), "the length makes no difference"
    leaves_another_table(model, windows)
    pruning = plan_pruning(model, windows[:2], drop=2, fit="least-squares")
    compared = compare_candidates(model, windows, {"it": pruning.plan.joints})["it"]
    leaves_another_table(model, windows)
    built = apply_plan(model, pruning.plan)
    assert compared.perplexity == pytest.approx(perplexity(built, windows), rel=1e-3)
    again, _ = load_model(save_model(built, tmp_path / "out"), device="cpu")
    for ids in (LONG, SHORT):
        assert same(logits(again, ids), logits(built, ids))


@pytest.mark.parametrize(("family", "changes"), BY_LENGTH.values(), ids=BY_LENGTH)
def test_generation_across_a_change_of_tables(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """With the cache and without it, as far as the dense model itself agrees with itself."""
    model = tiny(family, **changes)
    built = patched_model(keep_layers(model, [0, 1, 4, 5]), {2: HadamardPatch(48, 2)})
    again, _ = load_model(save_model(built, tmp_path / "out"), device="cpu")
    dense, found = (
        [written_on(one, LONG[:1, :28], 16, use_cache=cache) for cache in (True, False)] for one in (model, again)
    )
    assert torch.equal(*found) or not torch.equal(*dense)
    for cache, tokens in zip((True, False), found, strict=True):
        assert torch.equal(tokens, written_on(built, LONG[:1, :28], 16, use_cache=cache))


# --- merging: biases, heads ------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "narrow heads": {"head_dim": 6, "query_pre_attn_scalar": 6},
}


def _has(family: str, changes: dict[str, Any]) -> bool:
    """Whether this family's config knows what the shape is about."""
    known = {field.name for field in dataclasses.fields(tiny(family, layers=1).config)}
    return known.issuperset(set(changes) - {"query_pre_attn_scalar"})


MERGED = [(family, shape) for family in FAMILIES for shape, changes in SHAPES.items() if _has(family, changes)]


@pytest.mark.parametrize(("family", "shape"), MERGED, ids=[f"{family}, {shape}" for family, shape in MERGED])
def test_merging_with_all_or_nothing_is_removal(family: str, shape: str, tmp_path: Path) -> None:
    """Biases, single key/value heads and heads wider than the model were left out or mixed up: mlc-llm #3494, mergekit
    #569, #225. All of one layer and nothing of the other is the plain removal of the other."""
    sliding = {"sliding_window": 8 if family == "gemma3_text" else None, "use_sliding_window": False}
    model = tiny(family, layers=4, **sliding, **SHAPES[shape]).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.5)
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    ids = drawn(3, 20)
    kinds = model.config.layer_types if family == "gemma3_text" else [""] * 4
    span = Span(1, 3) if kinds[1] == kinds[2] else Span(0, 2)
    scores = score_layers(model, ids, width=2)
    for shares, gone in (((1.0, 0.0), span.start + 1), ((0.0, 1.0), span.start)):
        merged = merge_layers(model, choose_units(scores, span, shares))
        wanted = keep_layers(model, [layer for layer in range(4) if layer != gone])
        # Gemma's norms compute in float32.
        assert same(logits(merged, ids), logits(wanted, ids), 1e-5 if family == "gemma3_text" else 1e-9)
    for rule in RULES:
        merged = merge_layers(model, choose_units(scores, span, (0.5, 0.5), rule)).float()
        found = logits(merged, ids)
        assert bool(found.isfinite().all()), rule
        merged.save_pretrained(tmp_path / rule)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / rule).eval()
        assert same(logits(again, ids), found), rule


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_two_copies_of_a_layer(family: str) -> None:
    """Whatever is taken of the two, all of it is there: every rule's units are those of the one layer, at any shares
    that keep one copy whole, and finite between."""
    model = tiny(family, layers=4, sliding_window=None if family != "gemma3_text" else 8, use_sliding_window=False)
    twin = copy.deepcopy(model)
    twin.model.layers[1].load_state_dict(twin.model.layers[0].state_dict())
    ids = drawn(3, 20)
    scores = score_layers(twin, ids, width=2)
    for rule in RULES:
        whole = merge_layers(twin, choose_units(scores, Span(0, 2), (1.0, 0.0), rule))
        assert same(logits(whole, ids), logits(keep_layers(twin, [0, 2, 3]), ids), 1e-5)
        half = merge_layers(twin, choose_units(scores, Span(0, 2), (0.5, 0.5), rule))
        assert bool(logits(half, ids).isfinite().all())


# --- layers of one kind ----------------------------------------------------------------------------------------------

_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
}
MIXED: dict[str, dict[str, Any]] = {"gemma3_text": {"rope_parameters": _ROPES}, "qwen2": {}, "qwen3": {}}


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("family", MIXED)
def test_layers_of_one_kind_are_left(family: str, kind: str, patched: bool, tmp_path: Path) -> None:
    """All global, or all sliding, layers of a mixed model are gone; far beyond the window, with the cache and without:
    vllm #21863, lmdeploy #3772."""
    model = tiny(family, **MIXED[family])
    keep = [layer for layer, its in enumerate(model.config.layer_types) if its == kind]
    assert 0 < len(keep) < model.config.num_hidden_layers
    long, prompt = drawn(2, 40, seed=1), drawn(2, 5)
    with torch.no_grad():  # the dense model's own layers, one after the other
        state = partial_decoder(model, 0, 0, embed=True)(input_ids=long, use_cache=False).last_hidden_state
        for layer in keep:
            step = partial_decoder(model, layer, layer + 1)
            state = step(inputs_embeds=state, use_cache=False).last_hidden_state
        by_hand = model.lm_head(model.model.norm(state))
    cut = keep_layers(model, keep)
    assert same(logits(cut, long), by_hand)
    if patched:
        cut = patched_model(cut, {1: HadamardPatch(48, 2)})
    again, _ = load_model(save_model(cut, tmp_path / "out"), device="cpu")
    assert same(logits(again, long), by_hand)
    static = written_on(again, prompt, 30, cache_implementation="static")
    again = again.double()
    plain, cached = (written_on(again, prompt, 30, use_cache=cache) for cache in (False, True))
    assert torch.equal(plain, cached)
    assert torch.equal(plain, static)


# --- few layers ------------------------------------------------------------------------------------------------------

CUTS = {
    (1, "--drop", "1"): False,
    (2, "--drop", "1"): False,
    (3, "--drop", "1"): True,
    (3, "--drop", "2"): False,
    (2, "--spans", "0:1"): True,
    (2, "--spans", "1:2"): True,
    (3, "--spans", "0:2"): True,
    (3, "--spans", "1:3"): True,
    (3, "--spans", "0:1,2:3"): True,
    (1, "--spans", "0:1"): False,
    (3, "--spans", "0:3"): False,
    (3, "--spans", "2:9"): False,
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one, two and three layers, in folders of that name."""
    folder: Path = tmp_path_factory.mktemp("shallow")
    for layers in (1, 2, 3):
        save_model(tiny(layers=layers), folder / str(layers))
    text_file(folder)
    return folder


@pytest.mark.parametrize("fit", ["auto", "none"])
@pytest.mark.parametrize(("given", "works"), CUTS.items(), ids=[" ".join(map(str, given)) for given in CUTS])
def test_a_shallow_model_is_cut_or_refused(
    shallow: Path, given: tuple[int, str, str], works: bool, fit: str, tmp_path: Path
) -> None:
    """Cuts at either end, and all layers but one gone: as far as there is a model left, it generates."""
    layers, flag, value = given
    arguments = [shallow / str(layers), flag, value, "--fit", fit, "-o", tmp_path / "out"]
    error = linearpatch("prune", *arguments, "--text", shallow / "numbers.txt", *SMALL)
    if not works:
        assert isinstance(error, InputError)
        assert not (tmp_path / "out").exists()
        return
    assert error is None
    model, _ = load_model(tmp_path / "out", device="cpu")
    prompt = drawn(1, 17)
    plain, cached = (written_on(model, prompt, 5, use_cache=cache) for cache in (False, True))
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_model_is_merged_and_swept_or_refused(shallow: Path, layers: int, tmp_path: Path) -> None:
    """The other commands that make a model shallower, on one that is shallow already."""
    text = ["--text", shallow / "numbers.txt"]
    merging = ["--layers", 1, "-o", tmp_path / "merged", "--samples", 4, "--length", 16, "--device", "cpu"]
    merged = linearpatch("merge", shallow / str(layers), *merging, *text)
    swept = linearpatch("sweep", shallow / str(layers), "--drop", "1", "-o", tmp_path / "swept", *text, *SMALL)
    assert isinstance(merged, InputError) if layers == 1 else merged is None
    assert isinstance(swept, InputError) if layers < 3 else swept is None
