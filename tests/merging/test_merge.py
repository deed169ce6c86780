"""Merging as tensor surgery, against plain removal, the formulas of the public code, and the model itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import Run
from linearpatch_kernels.merging.merge import (
    Merge,
    check_mergeable,
    choose_units,
    gain_errors,
    merge_layers,
    unit_counts,
)
from linearpatch_kernels.merging.sensitivity import LayerScores, score_layers
from linearpatch_kernels.merging.settings import AUTHORS, EXACT
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.patterns import pattern_of
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.modeling.units import sublayers
from tests.support.tiny import FAMILY_NAMES, LAYERS, VOCABULARY, random_patch, tiny_model

BIASED = {"attention_bias": True, "mlp_bias": True}


def varied(family: str, **changes: object) -> PreTrainedModel:
    """A tiny model whose norms and biases are random: as initialised, they would all be equal."""
    model = tiny_model(family, **BIASED, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def random_scores(model: PreTrainedModel, seed: int = 0) -> LayerScores:
    generator = torch.Generator().manual_seed(seed)
    count = len(decoder_layers(model))
    sensitivity = {
        half.name: torch.rand(count, half.units, generator=generator, dtype=torch.float64) for half in sublayers(model)
    }
    return LayerScores(sensitivity, torch.ones(count, dtype=torch.float64), {}, {})


def random_stream(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, model.config.hidden_size, dtype=torch.float64, generator=generator)


def alike(model: PreTrainedModel) -> Span:
    """Two neighbours of one kind, away from the ends."""
    kinds = pattern_of(model).kinds
    start = next(i for i in range(1, len(kinds) - 1) if kinds[i] == kinds[i + 1])
    return Span(start, start + 2)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


# --- the exact rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_share_of_nothing_is_plain_removal(family: str, ids: Tensor) -> None:
    model, exact = varied(family), varied(family).double()
    span = alike(model)
    dense = logits(exact, ids)
    for shares, gone in (((1.0, 0.0), span.start + 1), ((0.0, 1.0), span.start)):
        kept = [i for i in range(LAYERS) if i != gone]
        merge = choose_units(random_scores(model), span, shares)
        removed = logits(keep_layers(exact, kept), ids)
        scale = float(removed.abs().max())
        assert float((removed - dense).abs().max()) > 0.01 * scale
        # Not better than 1e-7: the norms of Transformers compute in float32, whatever the model's dtype.
        assert float((logits(merge_layers(exact, merge), ids) - removed).abs().max()) <= 1e-6 * scale
        rounding = float((logits(keep_layers(model, kept), ids) - removed).abs().max())
        assert float((logits(merge_layers(model, merge), ids) - removed).abs().max()) <= 2 * rounding + 1e-6 * scale
        assert set(gain_errors(model, merge).values()) <= {0.0}


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "gemma3_text"])
def test_a_merged_layer_is_the_sum_of_its_units(family: str, ids: Tensor) -> None:
    """Each half of the merged layer, fed alone, against the two layers with every unit but the chosen ones silenced."""
    model = varied(family).double()
    span = alike(model)
    merge = choose_units(random_scores(model), span, (0.35, 0.65))
    merged = decoder_layers(merge_layers(model, merge))[span.start]
    layers = decoder_layers(model)[span.start : span.end]
    stream = torch.randn(
        2, 7, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    errors = gain_errors(model, merge)
    half = sublayers(model)[1]
    expected = torch.zeros_like(stream)
    for layer, neurons, weight in zip(layers, merge.units[half.name], merge.weights(half.name), strict=True):
        normed = layer.get_submodule(half.norm)(stream)
        hidden: list[Tensor] = []
        handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args, to=hidden: to.append(args[0]))
        with torch.no_grad():
            layer.mlp(normed)
        handle.remove()
        index = list(neurons)
        expected += hidden[0][..., index] @ layer.mlp.down_proj.weight[:, index].T
        if layer.mlp.down_proj.bias is not None:
            expected += weight * layer.mlp.down_proj.bias
    torch.testing.assert_close(merged.mlp(merged.get_submodule(half.norm)(stream)), expected, atol=1e-12, rtol=1e-12)
    assert not any(name.startswith(half.norm) for name in errors)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in ("qwen3", "gemma3_text")])
def test_every_group_keeps_its_query_heads(family: str) -> None:
    """The attention of a merged layer is the sum of what the chosen KV groups, query heads and all, give alone."""
    model = varied(family, attention_dropout=0.0).double()
    span = alike(model)
    merge = choose_units(random_scores(model, seed=4), span, (0.5, 0.5))
    shallower = merge_layers(model, merge)
    half = sublayers(model)[0]
    stream = torch.randn(
        1, 6, model.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    rotary = model.model.rotary_emb(stream, torch.arange(6).unsqueeze(0))

    def attention(layer: torch.nn.Module, units: tuple[int, ...] | None = None) -> Tensor:
        def silence(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            grouped = args[0].view(1, 6, half.units, -1).clone()
            grouped[:, :, [unit for unit in range(half.units) if unit not in units]] = 0
            return (grouped.flatten(2),)

        handle = layer.self_attn.o_proj.register_forward_pre_hook(silence) if units is not None else None
        with torch.no_grad():
            out = layer.self_attn(layer.get_submodule(half.norm)(stream), rotary, None)[0]
        if handle is not None:
            handle.remove()
        return out

    parts = zip(decoder_layers(model)[span.start : span.end], merge.units[half.name], strict=True)
    expected = torch.zeros_like(stream)
    for (layer, units), weight in zip(parts, merge.weights(half.name), strict=True):
        bias = layer.self_attn.o_proj.bias
        expected += attention(layer, units) - (0 if bias is None else (1 - weight) * bias)
    torch.testing.assert_close(attention(decoder_layers(shallower)[span.start]), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_error_of_a_gain_that_cannot_fold_is_said(family: str) -> None:
    model = varied(family)
    span = alike(model)
    errors = gain_errors(model, choose_units(random_scores(model), span, (0.5, 0.5)))
    shared = {path for half in sublayers(model) for path in half.shared_norms}
    assert set(errors) == shared != set()
    offset = 1.0 if family == "gemma3_text" else 0.0
    first, second = (offset + decoder_layers(model)[i].self_attn.q_norm.weight for i in range(*span))
    middle = (first + second) / 2
    expected = max(float((middle - gain).detach().norm() / gain.detach().norm()) for gain in (first, second))
    assert errors["self_attn.q_norm"] == pytest.approx(expected, rel=1e-6)


def test_more_than_two_layers_and_the_order_of_a_merge(ids: Tensor) -> None:
    model = varied("llama").double()
    merge = choose_units(random_scores(model), Span(1, 4), (0.0, 0.0, 1.0))
    removed = keep_layers(model, [0, 3, 4, 5])
    torch.testing.assert_close(logits(merge_layers(model, merge), ids), logits(removed, ids), atol=1e-12, rtol=1e-12)


# --- the rest of the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_result_is_a_stock_model_that_saves_and_generates(family: str, ids: Tensor, tmp_path: Path) -> None:
    model = varied(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    span = alike(model)
    merged = merge_layers(model, choose_units(random_scores(model), span, (0.6, 0.4)))
    assert type(merged) is type(model)
    assert merged.config.num_hidden_layers == len(decoder_layers(merged)) == LAYERS - 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_hidden_layers == LAYERS
    save_checkpoint(merged, None, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, ids), logits(merged, ids))
    expected = [*range(span.start), [span.start, span.start + 1], *range(span.end, LAYERS)]
    assert loaded.config.linearpatch_merge_tree == expected
    runs = [
        loaded.double().generate(ids[:, :5], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_the_tree_grows_and_follows_a_cut() -> None:
    model = varied("llama")
    once = merge_layers(model, choose_units(random_scores(model), Span(2, 4), (0.5, 0.5)))
    twice = merge_layers(once, choose_units(random_scores(once), Span(1, 3), (0.5, 0.5)))
    assert twice.config.linearpatch_merge_tree == [0, [1, [2, 3]], 4, 5]
    assert keep_layers(twice, [0, 1, 3]).config.linearpatch_merge_tree == [0, [1, [2, 3]], 5]
    assert getattr(model.config, "linearpatch_merge_tree", None) is None


def test_layers_of_different_kinds_are_refused() -> None:
    model = varied("gemma3_text")
    kinds = pattern_of(model).kinds
    start = next(i for i in range(LAYERS - 1) if kinds[i] != kinds[i + 1])
    with pytest.raises(InputError, match=r"different kinds \(sliding_attention, full_attention\)"):
        merge_layers(model, choose_units(random_scores(model), Span(start, start + 2), (0.5, 0.5)))


def test_a_patch_between_the_layers_is_refused_and_one_in_front_stays(ids: Tensor) -> None:
    model = patched_model(varied("llama"), {2: random_patch("dense"), 6: random_patch("low-rank")})
    for span in (Span(1, 3), Span(4, 6)):
        with pytest.raises(InputError, match="patch at joint"):
            check_mergeable(model, span)
    merged = merge_layers(model, choose_units(random_scores(model), Span(2, 4), (1.0, 0.0)))
    removed = keep_layers(model, [0, 1, 2, 4, 5])
    torch.testing.assert_close(logits(merged, ids), logits(removed, ids), atol=1e-4, rtol=1e-4)


def test_units_that_do_not_fit_are_refused() -> None:
    model = varied("llama")
    good = choose_units(random_scores(model), Span(1, 3), (0.5, 0.5))
    neurons = good.units["feed-forward"]
    for bad in (
        ((0,), neurons[1]),
        ((99, *neurons[0][1:]), neurons[1]),
        ((neurons[0][1], *neurons[0][1:]), neurons[1]),
    ):
        with pytest.raises(InputError, match="another model"):
            merge_layers(model, Merge(good.span, good.shares, {**good.units, "feed-forward": bad}))
    with pytest.raises(InputError, match="sum to 1"):
        choose_units(random_scores(model), Span(1, 3), (0.5, 0.6))
    with pytest.raises(InputError, match="nothing to merge"):
        Merge(Span(1, 2), (1.0,), {})
    with pytest.raises(InputError, match="no rule"):
        Merge(Span(1, 3), (0.5, 0.5), good.units, "best")


def test_counts() -> None:
    assert unit_counts(9, (0.5, 0.5)) == [5, 4]
    assert unit_counts(3, (0.34, 0.66)) == [1, 2]
    assert unit_counts(3, (0.3, 0.7)) == [0, 3]
    assert unit_counts(10, (0.25, 0.5, 0.25)) == [2, 6, 2]
    for first, total in itertools.product(range(21), (1, 3, 80)):
        count, rest = unit_counts(total, (first / 20, 1 - first / 20))
        assert count + rest == total
        assert abs(count - total * first / 20) <= 1


# --- the authors' rule -----------------------------------------------------------------------------------------------


def public_code(model: PreTrainedModel, scores: LayerScores, span: Span, shares: list[float]) -> dict[str, Tensor]:
    """The merged layer as WangFei-2019/CoMe makes it, after its formulas, with boolean masks and numpy."""
    config = model.config
    neurons, groups = config.intermediate_size, config.num_key_value_heads
    per_group, size = config.num_attention_heads // groups, model.model.layers[0].self_attn.head_dim

    def counts(total: int) -> list[int]:
        most = shares.index(max(shares))
        found = [0 if i == most else int(total * share) for i, share in enumerate(shares)]
        found[most] = total - sum(found)
        return found

    parts: dict[str, list[Tensor]] = {}
    layers = [dict(layer.named_parameters()) for layer in model.model.layers[span.start : span.end]]
    for i, layer in enumerate(layers):
        if counts(groups)[i]:
            order = np.argsort(scores.sensitivity["attention"][span.start + i].numpy())
            mask = torch.zeros(groups * size, dtype=torch.bool)
            for head in order[-counts(groups)[i] :]:
                mask[head * size : (head + 1) * size] = True
            tiled = mask.repeat(per_group)
            for letter, rows in (("q", tiled), ("k", mask), ("v", mask)):
                for kind in ("weight", "bias"):
                    name = f"self_attn.{letter}_proj.{kind}"
                    if name in layer:
                        parts.setdefault(name, []).append(layer[name][rows])
            parts.setdefault("self_attn.o_proj.weight", []).append(layer["self_attn.o_proj.weight"][:, tiled])
        if counts(neurons)[i]:
            order = np.argsort(scores.sensitivity["feed-forward"][span.start + i].numpy())
            mask = torch.zeros(neurons, dtype=torch.bool)
            mask[order[-counts(neurons)[i] :].copy()] = True
            for name in ("gate", "up"):
                parts.setdefault(f"mlp.{name}_proj.weight", []).append(layer[f"mlp.{name}_proj.weight"][mask])
            parts.setdefault("mlp.down_proj.weight", []).append(layer["mlp.down_proj.weight"][:, mask])
    merged = {
        name: torch.cat(values, dim=-1 if "o_proj" in name or "down" in name else 0) for name, values in parts.items()
    }
    for name in layers[0]:
        values = torch.stack([layer[name] for layer in layers])
        if name.endswith("layernorm.weight"):
            merged[name] = values.mean(dim=0)
        elif name in ("self_attn.o_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            merged[name] = (values * torch.tensor(shares).view(-1, 1)).sum(dim=0)
    return merged


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.2, 0.8], [0.75, 0.25]])
@pytest.mark.parametrize(("family", "groups"), [("llama", 4), ("llama", 2), ("qwen2", 2), ("qwen3", 2), ("mistral", 1)])
def test_the_authors_rule_is_their_code(family: str, groups: int, shares: list[float]) -> None:
    model = tiny_model(family, num_key_value_heads=groups, attention_bias=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    span = alike(model)
    scores = random_scores(model, seed=groups)
    merged = merge_layers(model, choose_units(scores, span, shares, AUTHORS))
    found = dict(decoder_layers(merged)[span.start].named_parameters())
    expected = public_code(model, scores, span, shares)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_the_two_rules_differ_where_heads_share_keys() -> None:
    for groups, same in ((4, True), (2, False)):
        model = tiny_model("llama", num_key_value_heads=groups)
        queries = [
            decoder_layers(merge_layers(model, choose_units(random_scores(model), Span(1, 3), (0.5, 0.5), rule)))[
                1
            ].self_attn.q_proj.weight
            for rule in (EXACT, AUTHORS)
        ]
        # Gains are 1 as initialised, so only the choice of heads can differ.
        assert torch.equal(*queries) == same


# --- sensitivity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_scores_are_their_definitions(family: str, hooked_states: object) -> None:
    model = varied(family)
    windows = torch.randint(3, VOCABULARY, (3, 300 if family == "llama" else 20))[:, :100]
    found = score_layers(model, windows, width=3, run=Run(2))
    inputs: dict[tuple[str, int], Tensor] = {}
    handles = []
    for half, path in (("attention", "self_attn.o_proj"), ("feed-forward", "mlp.down_proj")):
        for index, layer in enumerate(decoder_layers(model)):
            projection = layer.get_submodule(path)
            handles.append(
                projection.register_forward_pre_hook(
                    lambda _m, args, key=(half, index): inputs.__setitem__(key, args[0])
                )
            )
    states = hooked_states(model, windows)
    for handle in handles:
        handle.remove()
    for half, path, channels in (
        ("attention", "self_attn.o_proj", model.config.num_attention_heads // model.config.num_key_value_heads * 12),
        ("feed-forward", "mlp.down_proj", 1),
    ):
        for index, layer in enumerate(decoder_layers(model)):
            weight = layer.get_submodule(path).weight.detach().double()
            per_token = inputs[half, index].double().abs().unsqueeze(-2) * weight.abs()
            expected = per_token.sum(dim=-2).mean(dim=(0, 1)).view(-1, channels).mean(dim=1)
            torch.testing.assert_close(found.sensitivity[half][index], expected, atol=1e-6, rtol=1e-5)

    def cosine(start: int, end: int) -> Tensor:
        return torch.cosine_similarity(states[:, :, start], states[:, :, end], dim=-1).clamp(0, 1)

    for layer in range(LAYERS):
        assert float(found.influence[layer]) == pytest.approx(float((1 - cosine(layer, layer + 1)).mean()), abs=1e-6)
    assert list(found.span_influence) == [Span(i, i + 3) for i in range(LAYERS - 2)]
    for span, value in found.span_influence.items():
        assert value == pytest.approx(float((1 - cosine(*span)).mean()), abs=1e-6)
        angle = float((cosine(*span)[:, -1].arccos() / torch.pi).mean())
        assert found.last_token_angle[span] == pytest.approx(angle, abs=1e-5)


def test_scoring_refuses_what_it_cannot_use(ids: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="give 1 to 6"):
        score_layers(model, ids, width=7)
    with torch.no_grad():
        decoder_layers(model)[2].mlp.gate_proj.weight[0] = torch.nan
    with pytest.raises(InputError, match=r"of layer 2|of layer 3"):
        score_layers(model, ids)
