"""What of a layer reads the stream and what writes to it, as the layer shows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import cut, patched
from linearpatch_kernels.modeling.families import STOCK_FAMILIES, LayerModules, decoder_layers, embedding
from linearpatch_kernels.modeling.halves import (
    Half,
    Write,
    kinds_of_halves,
    layer_halves,
    measured_halves,
    recorded_halves,
)
from tests.support.tiny import FAMILY_NAMES, random_patch, tiny_model
from tools.models_reference import tiny_decoder

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATES = ("mlp.gate_proj", "mlp.up_proj")


def without_reasons(halves: tuple[Half, ...]) -> list[Half]:
    return [dataclasses.replace(half, reads=tuple(sorted(half.reads)), unread="", unwritten="") for half in halves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_is_recorded_is_what_the_layers_show(name: str, dtype: torch.dtype) -> None:
    """Also where one channel of the stream is a thousand times as loud as the others, as in trained models."""
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        embedding(model).weight[:, 5] = 1000
    measured = measured_halves(model, range(6))
    assert set(map(tuple, map(without_reasons, measured.values()))) == {tuple(without_reasons(recorded_halves(model)))}
    left = {half.unwritten for half in recorded_halves(model)}
    assert {half.unwritten for halves in measured.values() for half in halves} == left


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_stream_that_is_small_beside_what_is_written_is_found(name: str) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    with torch.no_grad():
        embedding(model).weight *= 1e-5
    assert without_reasons(measured_halves(model, [0])[0]) == without_reasons(recorded_halves(model))


def test_patches_in_front_and_behind_are_no_part_of_it() -> None:
    model = patched.patched_model(
        cut.keep_layers(tiny_model("llama"), range(4)), {2: random_patch("dense"), 4: random_patch("dense")}
    )
    found = measured_halves(model, [1, 2, 3])
    assert without_reasons(found[1]) == without_reasons(found[2]) == without_reasons(found[3])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "gpt2",
            [
                Half("attention", "ln_1", ("attn.c_attn",), (Write("attn.c_proj"),), "ln_2"),
                Half("feed-forward", "ln_2", ("mlp.c_fc",), (Write("mlp.c_proj"),), None),
            ],
        ),
        (
            "gpt_neox",
            [
                Half("attention", "input_layernorm", ("attention.query_key_value",), (Write("attention.dense"),), None),
                Half(
                    "feed-forward",
                    "post_attention_layernorm",
                    ("mlp.dense_h_to_4h",),
                    (Write("mlp.dense_4h_to_h"),),
                    None,
                ),
            ],
        ),
        (
            "cohere",
            [
                Half("attention", "input_layernorm", QKV, (Write("self_attn.o_proj"),), None),
                Half("feed-forward", "input_layernorm", GATES, (Write("mlp.down_proj"),), None),
            ],
        ),
        (
            "olmo2",
            [
                Half(
                    "attention",
                    None,
                    QKV,
                    (),
                    "mlp.gate_proj",
                    unwritten="post_attention_layernorm norms what comes out of self_attn.o_proj",
                    behind=("self_attn.o_proj", "post_attention_layernorm"),
                ),
                Half(
                    "feed-forward",
                    None,
                    GATES,
                    (),
                    None,
                    unwritten="post_feedforward_layernorm norms what comes out of mlp.down_proj",
                    behind=("mlp.down_proj", "post_feedforward_layernorm"),
                ),
            ],
        ),
        (
            "mixtral",
            [
                Half("attention", "input_layernorm", QKV, (Write("self_attn.o_proj"),), "post_attention_layernorm"),
                Half(
                    "feed-forward",
                    "post_attention_layernorm",
                    (),
                    (),
                    None,
                    "mlp.gate, mlp.experts read what post_attention_layernorm gives and are no projections",
                    "no projection's output is added to the stream as it is, in the feed-forward",
                ),
            ],
        ),
        ("mamba2", [Half("layer", "norm", ("mixer.in_proj",), (Write("mixer.out_proj"),), None)]),
    ],
)
def test_what_layers_without_a_record_show(name: str, expected: list[Half]) -> None:
    assert [*layer_halves(tiny_decoder(name), [2])[2]] == expected


def test_the_factor_on_what_is_written_is_measured() -> None:
    model: Any = tiny_decoder("granite")
    for layer in decoder_layers(model):
        layer.residual_multiplier = 0.22
    for half in layer_halves(model, [2])[2]:
        assert [write.factor for write in half.writes] == [pytest.approx(0.22, rel=1e-6)]


class Squashed(nn.Linear):
    """A projection of weights that its output is no linear map by."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return super().forward(given).tanh()


def test_what_is_no_linear_map_of_its_input_is_left_alone() -> None:
    model: Any = tiny_decoder("starcoder2")
    model.model.layers[2].mlp.c_proj.__class__ = Squashed
    _, feed_forward = layer_halves(model, [2])[2]
    assert (feed_forward.reads, feed_forward.writes) == (("mlp.c_fc",), ())


def test_layers_of_which_nothing_is_found_are_refused() -> None:
    with pytest.raises(InputError, match="'minimax' cannot be fitted again: in layer 0 no projection was found"):
        kinds_of_halves(tiny_decoder("minimax"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "post_attention_layernorm"}, "norm='post_attention_layernorm', and the layer shows 'input_l"),
        ({"gates": ("mlp.up_proj",)}, r"reads=\('mlp.up_proj',\), and the layer shows \('mlp.gate_proj', 'mlp.up_p"),
        ({"attention_output": "mlp.down_proj"}, "of the attention of layer 0 it says writes="),
    ],
)
def test_a_wrong_record_is_refused(monkeypatch: pytest.MonkeyPatch, changes: Any, words: str) -> None:
    wrong = dataclasses.replace(STOCK_FAMILIES["llama"], modules=LayerModules(**changes))
    monkeypatch.setattr("linearpatch_kernels.modeling.families.STOCK_FAMILIES", {"llama": wrong})
    with pytest.raises(InputError, match=words):
        kinds_of_halves(tiny_model("llama"))
