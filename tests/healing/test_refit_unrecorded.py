"""The refit of models without a record, whose layers show what reads the stream and what writes to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.forward import model_logits
from linearpatch_kernels.healing.refit import FINAL_NORM, RefitSettings, refit, steps_of_cut
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.halves import layer_halves
from tools.models_reference import tiny_decoder

KEPT = (0, 1, 4, 5, 6, 7)
EXACT = RefitSettings(shrinkage=1.0, ridges=(1e-7,), precision=torch.float64)


def windows(count: int, seed: int) -> Tensor:
    return torch.randint(6, 128, (count, 20), generator=torch.Generator().manual_seed(seed))


FIT, HELD, OTHER = windows(24, 0), windows(6, 1), windows(6, 2)


def of_factor(name: str, factor: float) -> PreTrainedModel:
    model: Any = tiny_decoder(name)
    model.config.residual_multiplier = factor
    for layer in decoder_layers(model):
        layer.residual_multiplier = factor
    return model


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "cohere", "phi", "starcoder2", "opt", "granite", "glm", "mamba2", "deepseek_v3"]
)
def test_removed_layers_that_are_linear_in_what_the_layer_before_wrote_are_restored(name: str) -> None:
    """Weights that lie with their inputs in front (GPT-2), halves side by side (Cohere), outputs that are scaled
    (Granite), layers of one half (Mamba)."""
    dense = of_factor(name, 0.22) if name == "granite" else tiny_decoder(name)
    student = keep_layers(dense, KEPT)
    layers = decoder_layers(dense)
    (write,) = layer_halves(dense, [1])[1][-1].writes
    written: list[Tensor] = []
    layers[1].get_submodule(write.projection).register_forward_hook(lambda _module, _args, out: written.append(out))
    map_ = 0.3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for index, scale in ((2, write.factor), (3, 0.0)):
        # What the layer returns beside the stream stays.
        def passed(_: Any, args: Any, kwargs: Any, output: Any, by: float = scale) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            stream = stream + by * (written[-1].view_as(stream) @ map_)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        layers[index].register_forward_hook(passed, with_kwargs=True)
    wanted = model_logits(dense, OTHER)
    largest = float(wanted.abs().max())
    assert float((model_logits(student, OTHER) - wanted).abs().max()) > 0.02 * largest
    result = refit(dense, student, steps_of_cut(KEPT, num_layers(dense), 0, in_front=True), FIT, HELD, settings=EXACT)
    torch.testing.assert_close(model_logits(result.model, OTHER), wanted, rtol=0, atol=1e-3 * largest)


def test_of_experts_the_attention_is_fitted_and_the_rest_is_said() -> None:
    dense = tiny_decoder("mixtral")
    student = keep_layers(dense, KEPT)
    result = refit(dense, student, steps_of_cut(KEPT, 8, 1, in_front=False), FIT, HELD)
    told = {row.part: (row.projections, row.why) for row in result.rows}
    assert told["attention-in"] == (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "")
    assert told["attention-out"] == (("self_attn.o_proj",), "")
    assert "mlp.gate, mlp.experts read what" in told["feed-forward-in"][1]
    assert told["feed-forward-in"][0] == told["feed-forward-out"][0] == ()
    layer, before = (decoder_layers(one)[2] for one in (result.model, student))
    for name, parameter in layer.named_parameters():
        assert (parameter is before.get_parameter(name)) == ("self_attn" not in name), name


@pytest.mark.parametrize(
    ("name", "norm"), [("gpt2", "transformer.ln_f"), ("bloom", "transformer.ln_f"), ("olmo", None)]
)
def test_the_final_norm_is_found_where_it_has_a_gain(name: str, norm: str | None) -> None:
    dense = tiny_decoder(name)
    result = refit(dense, keep_layers(dense, KEPT), steps_of_cut(KEPT, 8, 1, in_front=True), FIT, HELD)
    scaled = [row.projections for row in result.rows if row.part == FINAL_NORM]
    assert scaled == ([] if norm is None else [(norm,)])
