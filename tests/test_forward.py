"""Parts of a decoder, run on their own, are what the whole model does there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, PartialRun, Run, entering, leaving, residual_stream
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.torch_state import evaluation_mode
from tests.support.tiny import FAMILY_NAMES, LAYERS, VOCABULARY, tiny_model, tiny_patched_model

# Longer than the sliding window of the families that have one.
IDS = torch.randint(3, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[f"{kind} {name}" for kind in ("stock", "patched") for name in FAMILY_NAMES])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    kind, name = request.param.split()
    return tiny_model(name) if kind == "stock" else tiny_patched_model(name)


@torch.no_grad()
def test_parts_that_follow_on_each_other_are_the_whole_model(model: PreTrainedModel) -> None:
    whole = model(input_ids=IDS, use_cache=False).logits
    layers = num_layers(model)
    for cuts in ([], [0], [2], [layers], [1, 2, layers - 1]):
        places = ["tokens", *cuts, "logits"]
        assert torch.equal(
            nn.Sequential(*(PartialRun(model, *pair) for pair in itertools.pairwise(places)))(IDS), whole
        )
    hidden = nn.Sequential(PartialRun(model, "tokens", 1), PartialRun(model, 1, "hidden"))(IDS)
    assert torch.equal(hidden, model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state)
    assert torch.equal(hidden, PartialRun(model, "tokens", "hidden")(IDS))


@torch.no_grad()
def test_states_on_the_way(model: PreTrainedModel, hooked_states: Callable[..., Tensor]) -> None:
    layers = num_layers(model)
    wanted = hooked_states(model, IDS).unbind(dim=2)
    found = residual_stream(model, IDS, range(layers))
    assert all(torch.equal(found[depth].double(), wanted[depth]) for depth in range(layers))
    later = PartialRun(model, 1, layers).states(found[1], [1, layers - 1, layers])
    assert list(later) == [1, layers - 1, layers]
    assert torch.equal(later[1], found[1])
    assert torch.equal(later[layers - 1], found[layers - 1])
    assert torch.equal(PartialRun(model, 1, "logits").states(found[1], [2])[2], found[2])


def test_no_other_layer_runs(count_calls: Callable[[Any], list[int]]) -> None:
    model = tiny_model("llama")
    calls = count_calls(decoder_layers(model))
    with torch.no_grad():
        state = PartialRun(model, "tokens", 2)(IDS)
        assert calls == [2, 2, 0, 0, 0, 0]
        PartialRun(model, 4, "logits")(state)
    assert calls == [2, 2, 0, 0, 2, 2]


def test_what_is_trained_has_gradients_and_the_mode_stays() -> None:
    model = tiny_model("llama").train()
    run = PartialRun(model, 3, "logits")
    with evaluation_mode(run):
        assert not any(layer.training for layer in decoder_layers(model)[3:])
    assert all(module.training for module in model.modules())
    assert not PartialRun(model.eval(), 3, "logits").training
    run = PartialRun(model, 3, "logits")
    with evaluation_mode(run):
        run(torch.ones(1, 4, model.config.hidden_size)).sum().backward()
    assert not any(module.training for module in model.modules())
    reached = [layer.mlp.down_proj.weight.grad is not None for layer in decoder_layers(model)]
    assert reached == [False] * 3 + [True] * 3
    assert {id(parameter) for parameter in run.parameters()} <= {id(parameter) for parameter in model.parameters()}


def test_depths_that_are_not_there() -> None:
    model = tiny_model("llama")
    for start, end in ((3, 2), (-1, 2), (0, LAYERS + 1), (LAYERS + 1, "logits"), ("tokens", -1)):
        with pytest.raises(InputError, match="are not in this model"):
            PartialRun(model, start, end)
    with pytest.raises(KeyError):
        PartialRun(model, 2, 4).states(torch.zeros(1, 2, model.config.hidden_size), [1])


def test_what_enters_and_leaves_a_module_is_told_while_it_is_open() -> None:
    model = tiny_model("llama")
    norm, seen = model.model.norm, []
    with torch.no_grad():
        with entering([(norm, seen.append)]), leaving([(norm, seen.append)]):
            PartialRun(model, "tokens", "hidden")(IDS)
        before, after = seen
        PartialRun(model, "tokens", "hidden")(IDS)
        assert torch.equal(norm(before), after)
    assert len(seen) == 2
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks


def test_a_run_makes_batches_and_tells_of_each_once_it_is_done() -> None:
    told: list[tuple[str, int, int]] = []
    run = Run(2, progress=lambda *words: told.append(words))
    windows = IDS.expand(5, 2, -1)[:, 0]
    seen = []
    for start, batch in run.batches(windows, "running"):
        assert len(told) == len(seen)
        seen.append((start, len(batch)))
    assert seen == [(0, 2), (2, 2), (4, 1)]
    assert told == [("running", 2, 5), ("running", 4, 5), ("running", 5, 5)]
    assert [len(batch) for _, batch in PLAIN.batches(windows, "running")] == [1] * 5
    PLAIN.report("running", 1, 1)
    assert len(told) == 3
    with pytest.raises(InputError, match="batch size"):
        next(Run(0).batches(windows, "running"))
