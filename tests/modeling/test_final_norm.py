"""The norm behind the last layer, with another scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.modeling.families import decoder
from linearpatch_kernels.modeling.final_norm import scaled_final_norm
from tests.support.sink import token_windows
from tests.support.tiny import FAMILY_NAMES, tiny_model

IDS = token_windows(2, 16, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_the_head_reads_is_scaled_and_nothing_else(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    with torch.no_grad():
        before = PartialRun(model, "tokens", "hidden")(IDS)
        scaled = scaled_final_norm(model, 0.75)
        assert scaled is not None
        for name, value in scaled.items():
            parameter = model.get_parameter(name)
            assert value.dtype == dtype
            assert value.shape == parameter.shape
            parameter.copy_(value)
        after = PartialRun(model, "tokens", "hidden")(IDS)
    # In bfloat16 the gain is rounded once more, to 8 bits.
    atol = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype] * float(before.abs().max())
    torch.testing.assert_close(after, 0.75 * before, rtol=0, atol=atol)


def test_a_norm_without_a_gain_and_one_with_more_behind_it_do_not_show() -> None:
    model = tiny_model("llama")
    assert scaled_final_norm(model, 0.75) is not None
    decoder(model).norm = nn.LayerNorm(48, elementwise_affine=False)
    assert scaled_final_norm(model, 0.75) is None


def test_a_bias_is_scaled_too() -> None:
    model = tiny_model("llama")
    norm = decoder(model).norm = nn.LayerNorm(48)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
        norm.bias.normal_(generator=torch.Generator().manual_seed(1))
    scaled = scaled_final_norm(model, 0.5)
    assert scaled is not None
    torch.testing.assert_close(scaled["model.norm.weight"], 0.5 * norm.weight)
    torch.testing.assert_close(scaled["model.norm.bias"], 0.5 * norm.bias)
