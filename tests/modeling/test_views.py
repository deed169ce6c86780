from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder, decoder_layers
from linearpatch_kernels.modeling.views import partial_decoder, suffix_model
from tests.support.tiny import LAYERS, WINDOW, tiny_model


def stream_entering(model: PreTrainedModel, layer: int, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    hook = decoder_layers(model)[layer].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    decoder(model)(ids, use_cache=False, **inputs)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_two_parts_equal_the_whole_bit_for_bit(model: PreTrainedModel, ids: torch.Tensor, padded: bool) -> None:
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, : WINDOW + 1] = 0
    whole = model.model(ids, use_cache=False, **inputs).last_hidden_state
    for split in range(LAYERS + 1):
        head = partial_decoder(model, 0, split, embed=True)
        tail = partial_decoder(model, split, LAYERS, norm=True)
        stream = head(ids, use_cache=False, **inputs).last_hidden_state
        if split < LAYERS:
            assert torch.equal(stream, stream_entering(model, split, ids, **inputs))
        assert torch.equal(tail(inputs_embeds=stream, use_cache=False, **inputs).last_hidden_state, whole)
        logits = suffix_model(model, split)(inputs_embeds=stream, use_cache=False, **inputs).logits
        assert torch.equal(logits, model(ids, use_cache=False, **inputs).logits)


@torch.no_grad()
def test_the_middle_of_a_patched_model_is_exact(patched: PreTrainedModel, ids: torch.Tensor) -> None:
    stream = partial_decoder(patched, 0, 2, embed=True)(ids).last_hidden_state
    assert torch.equal(stream, stream_entering(patched, 2, ids))
    stream = partial_decoder(patched, 2, 3)(inputs_embeds=stream).last_hidden_state
    assert torch.equal(stream, stream_entering(patched, 3, ids))
    assert torch.equal(suffix_model(patched, 3)(inputs_embeds=stream).logits, patched(ids).logits)


def test_a_view_shares_parameters_and_changes_nothing(model: PreTrainedModel, ids: torch.Tensor) -> None:
    config = copy.deepcopy(model.config)
    before = model(ids).logits
    view = partial_decoder(model, 2, 4)
    # The final norm is there and does not run: which modules stand behind the layers is not known by name.
    own = (*model.model.layers[2:4].parameters(), *model.model.norm.parameters())
    assert {id(p) for p in view.parameters()} == {id(p) for p in own}
    view.register_forward_hook(lambda *_: pytest.fail("a hook of the view ran in the model"))
    view.requires_extra = True
    assert model.config == config
    assert len(model.model.layers) == LAYERS
    assert not hasattr(model.model, "requires_extra")
    assert torch.equal(model(ids).logits, before)


def test_a_view_without_embedding_takes_no_ids(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with pytest.raises(TypeError):
        partial_decoder(model, 0, 2)(ids)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, LAYERS + 1)])
def test_a_span_outside_the_model_is_refused(start: int, end: int) -> None:
    with pytest.raises(InputError, match=f"layers {start}:{end} are not in this model: it has layers 0:{LAYERS}"):
        partial_decoder(tiny_model("llama"), start, end)
