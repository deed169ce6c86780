"""Neurons of removed layers in the place of a layer's own: what must be found exactly, and what must stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearpatch_kernels.forward import Run, model_logits
from linearpatch_kernels.healing.absorption import explained, most_useful, neurons_that_can_move, weights_of_inputs
from linearpatch_kernels.healing.least_squares import NormalEquations
from linearpatch_kernels.healing.refit import refit, steps_of_cut
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.modeling.halves import layer_halves
from linearpatch_kernels.modeling.units import sublayers
from tests.healing.test_refit import EXACT, FIT, HELD, KEPT, OTHER
from tests.support.sink import token_windows
from tests.support.tiny import tiny_model
from tools.models_reference import tiny_decoder

# A quarter of them ranks the neurons.
MORE = token_windows(96, 40, 0)
STEP = steps_of_cut(KEPT, 6, 0, in_front=True)
RIDGES = (1e-9, 1e-3)


def equations(a: Tensor, r: Tensor) -> NormalEquations:
    return NormalEquations(a.T @ a, a.T @ r, float(r.square().sum()), len(a))


def problem(seed: int, wanted: Tensor, weight: Tensor) -> NormalEquations:
    """Correlated inputs; what a map with ``weight`` [d, N] lacks of one with ``wanted``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    a = torch.randn(200, 9, dtype=torch.float64, generator=generator) @ (mix + 3 * torch.eye(9, dtype=torch.float64))
    return equations(a, a @ (wanted - weight).T)


def test_the_inputs_that_a_map_is_made_of_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, weight = torch.randn(2, 4, 9, dtype=torch.float64, generator=generator)
    weight[:, 5:] = 0
    wanted[:, [0, 2, 3, 6, 8]] = 0
    fit, held = (problem(seed, wanted, weight) for seed in (0, 1))
    told: list[tuple[int, int]] = []
    run = Run(progress=lambda _, done, total: told.append((done, total)))
    inputs = most_useful(fit, weight, 4, RIDGES[0], run)
    assert inputs.tolist() == [1, 4, 5, 7]
    assert told == [(0, 5), (3, 5)]
    found = weights_of_inputs(fit, held, weight, inputs, RIDGES)
    torch.testing.assert_close(found.weight, wanted[:, [1, 4, 5, 7]], rtol=1e-5, atol=1e-6)
    assert found.after < 1e-9


def test_a_part_of_the_change_is_kept_and_all_of_the_map_before() -> None:
    """Inputs that are copies of those given up take over what these wrote, however little of the change is kept."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    a = torch.cat([a, 2 * a], 1)
    weight = torch.cat([torch.randn(4, 3, dtype=torch.float64, generator=generator), torch.zeros(4, 3).double()], 1)
    change = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    both = equations(a, a[:, :3] @ change.T)
    inputs = most_useful(both, weight, 3, 1e-9)
    found = weights_of_inputs(both, both, weight, inputs, (1e-9,), kept=0.25)
    # Of every input one copy stays.
    assert sorted(one % 3 for one in found.inputs.tolist()) == [0, 1, 2]
    as_the_first = torch.stack([found.weight[:, i] * (2 if c > 2 else 1) for i, c in enumerate(found.inputs.tolist())])
    order = [one % 3 for one in found.inputs.tolist()]
    torch.testing.assert_close(as_the_first.T, (weight[:, :3] + 0.25 * change)[:, order], rtol=1e-5, atol=1e-6)


def test_what_an_input_explains_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, r = torch.randn(50, 6, generator=generator), torch.randn(50, 3, generator=generator)
    a[:, 2] = 0
    found = explained(a.T @ r, a.square().sum(0))
    for column in (0, 1, 3, 4, 5):
        fitted = torch.linalg.lstsq(a[:, [column]], r).solution
        less = r.square().sum() - (r - a[:, [column]] @ fitted).square().sum()
        torch.testing.assert_close(found[column], less, rtol=1e-4, atol=1e-5)
    assert found[2] == 0


def with_layers_of_neurons(family: str) -> PreTrainedModel:
    """What layers 2 and 3 add to the stream is what some of their neurons, and none of layer 1's, write; all of them
    read the stream behind the attention of layer 1."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    layers: Any = decoder_layers(model)
    with torch.no_grad():
        for layer in layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(torch.rand(48, generator=generator) + 0.5)
        layers[1].mlp.down_proj.weight.zero_()
        layers[3].mlp.down_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.mul_(3)
        layers[2].mlp.down_proj.weight[:, ::2] = 0
        for index in (2, 3):
            layers[index].self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_removed_layers_whose_neurons_read_the_same_stream_are_restored(family: str) -> None:
    dense = with_layers_of_neurons(family)
    student = keep_layers(dense, KEPT)
    with torch.no_grad():
        wanted = model_logits(dense, OTHER)
        errors = {}
        for neurons in (4096, 0):
            settings = RefitSettings(shrinkage=1.0, ridges=(1e-7,), neurons=neurons)
            made = refit(dense, student, STEP, MORE, HELD, settings=settings)
            errors[neurons] = float((model_logits(made.model, OTHER) - wanted).abs().max() / wanted.abs().max())
            assert (made.rows[0].absorbed > 0) == (neurons > 0)
            assert "mlp.down_proj" in made.rows[0].projections
            assert type(made.model) is type(dense)
    assert errors[4096] < 1e-3 < 20e-3 < errors[0]


def test_a_layer_that_does_best_with_its_own_neurons_keeps_them() -> None:
    """Nothing of it moves: not the gain of its norm, which would be folded for neurons of other layers."""
    dense = tiny_model("llama")
    layers: Any = decoder_layers(dense)
    with torch.no_grad():
        for index in (2, 3):
            layers[index].self_attn.o_proj.weight.zero_()
            layers[index].mlp.down_proj.weight.zero_()
            layers[index].mlp.gate_proj.weight.zero_()
        # The removed layers add nothing, and their neurons are silent: the target is what is there, but for a scale.
        layers[1].mlp.down_proj.weight.mul_(2)
    student = keep_layers(dense, KEPT)
    decoder_layers(student)[1].mlp.down_proj.weight = torch.nn.Parameter(layers[1].mlp.down_proj.weight.detach() / 2)
    made = refit(dense, student, STEP, FIT, HELD, settings=EXACT)
    assert made.rows[0].projections == ("mlp.down_proj",)
    assert made.rows[0].absorbed == 0
    layer: Any = decoder_layers(made.model)[1]
    assert layer.post_attention_layernorm.weight is layers[1].post_attention_layernorm.weight


def test_neurons_move_only_where_their_norm_can_be_folded_and_nothing_stands_behind_them() -> None:
    dense = tiny_model("llama")
    half, units = layer_halves(dense, [1])[1][-1], sublayers(dense)[1]
    assert neurons_that_can_move(dense, half, RefitSettings()) == units
    assert neurons_that_can_move(dense, half, RefitSettings(neurons=0)) is None
    assert neurons_that_can_move(dense, half, RefitSettings(shrinkage=0.0)) is None
    layer: Any = decoder_layers(dense)[0]
    layer.post_attention_layernorm = torch.nn.LayerNorm(48)  # its bias cannot be folded into projections without one
    assert neurons_that_can_move(dense, half, RefitSettings()) is None
    gemma = tiny_model("gemma3_text")
    assert neurons_that_can_move(gemma, layer_halves(gemma, [1])[1][-1], RefitSettings()) is None


@pytest.mark.parametrize("name", ["arcee", "starcoder2", "gpt2", "granite", "cohere", "mixtral"])
def test_neurons_of_layers_without_a_record_move_where_they_show_themselves(name: str) -> None:
    """Also with biases, and norms that have one. In Granite a factor stands behind them, in Cohere both halves read one
    norm, in Mixtral there are experts, in GPT-2 the projections lie the other way: those keep their own."""
    dense = tiny_decoder(name)
    kept = [0, 1, 4, 5, 6, 7]
    fit, held = (
        torch.randint(6, 128, (count, 24), generator=torch.Generator().manual_seed(count)) for count in (160, 6)
    )
    if name == "granite":
        for one in (dense.config, *decoder_layers(dense)):
            one.residual_multiplier = 0.5
    with torch.no_grad():
        # What the removed layers write is what half of the neurons of layer 2 do, and those of layer 1 write nothing.
        for index, halves in layer_halves(dense, [1, 2, 3]).items():
            for half in halves:
                for write in half.writes:
                    if index == 1 and half is halves[0]:
                        continue
                    module: Any = decoder_layers(dense)[index].get_submodule(write.projection)
                    columns = module.weight if isinstance(module, Conv1D) else module.weight.T
                    columns[::2] = 0
                    columns[1::2] *= 5 if index == 2 and half is halves[-1] else 0
                    if module.bias is not None:
                        module.bias.zero_()
    student, steps = keep_layers(dense, kept), steps_of_cut(kept, 8, 0, in_front=True)
    made = refit(dense, student, steps, fit, held, settings=EXACT)
    if name in ("arcee", "starcoder2"):
        own = refit(dense, student, steps, fit, held, settings=dataclasses.replace(EXACT, neurons=0))
        assert made.rows[0].absorbed > 0
        wanted = model_logits(dense, held)
        with torch.no_grad():
            error, without = (float((model_logits(one.model, held) - wanted).norm()) for one in (made, own))
        assert error < 0.3 * without
    else:
        assert made.rows[0].absorbed == 0
