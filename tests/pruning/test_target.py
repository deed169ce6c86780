"""What a target asks: how it is written, and how many layers it comes to."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.pruning.target import Target, layers_to_reach
from tests.support.tiny import tiny_model

LAYERS = 8


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model("llama", layers=LAYERS, tie_word_embeddings=request.param)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("1.25x-decode", Target("decode", 1.25)),
        ("90%-size", Target("size", 0.9)),
        ("0.9x-size", Target("size", 0.9)),
        (" 120%-ppl ", Target("ppl", 1.2)),
    ],
)
def test_how_it_is_written(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["", "1.2", "1.2x", "1,2x-ppl", "1.2x-speed", "-1x-ppl", "1.2x-ppl-size", "infx-ppl"])
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(InputError, match=r"`target` .*write it as 1\.25x-decode, 90%-size or 1\.2x-ppl"):
        Target.parse(text)


@pytest.mark.parametrize("text", ["1x-decode", "0.8x-decode", "100%-size", "120%-size", "0%-size", "1x-ppl", "90%-ppl"])
def test_what_asks_for_no_layer_to_go(text: str) -> None:
    with pytest.raises(InputError, match="is what the dense model has"):
        Target.parse(text)


def weights(model: PreTrainedModel, *, read: bool) -> int:
    """Bytes, or those of them that a token reads."""
    table = model.get_input_embeddings().weight
    return sum(
        one.numel() * one.element_size()
        for one in model.parameters()
        if not (read and one is table and not model.config.tie_word_embeddings)
    )


@pytest.mark.parametrize("of", ["size", "decode"])
def test_the_fewest_layers_that_reach_it(of: str, model: PreTrainedModel) -> None:
    read = of == "decode"
    for drop in range(1, LAYERS - 1):
        cut = keep_layers(model, [0, *range(1 + drop, LAYERS)])
        ratio = weights(cut, read=read) / weights(model, read=read)
        ratio = 1 / ratio if read else ratio
        closer = 1e-9 if read else -1e-9
        assert layers_to_reach(Target(of, ratio - closer), model) == drop  # type: ignore[arg-type]  # one of the two
        if drop < LAYERS - 2:
            assert layers_to_reach(Target(of, ratio + closer), model) == drop + 1  # type: ignore[arg-type]  # as above


def test_more_than_all_layers_that_can_go(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"0\.01x-size asks for more than all layers.*of the weights are left"):
        layers_to_reach(Target("size", 0.01), model)
