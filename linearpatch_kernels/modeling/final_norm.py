"""The norm between the last layer and the head: which module it is, and what its gain is, a run shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from linearpatch_kernels.modeling.families import decoder, decoder_layers, embedding, hidden_size, num_layers
from linearpatch_kernels.modeling.halves import near
from linearpatch_kernels.modeling.views import partial_decoder

_TRIED_TOKENS = 8
# By so much that no rounding hides which gain a norm has.
_TRIED_FACTOR = 2.0
# What a norm's weight is added to before it multiplies: nothing, or 1 in Gemma's.
_OFFSETS = (0.0, 1.0)


def scaled_final_norm(model: nn.Module, factor: float) -> dict[str, Tensor] | None:
    """The parameters with which the final norm gives ``factor`` times what it gave, by their names in the model.

    None where the head does not read what a norm with a gain gives. Tried on a few random states of the stream; the
    model is not changed.

    Equivalent for a norm without offset: ``{"norm.weight": factor * norm.weight}``, and its bias likewise.
    """
    layers, table = decoder_layers(model), embedding(model)
    for norm in decoder(model).children():
        weight = getattr(norm, "weight", None)
        if norm in (layers, table) or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        offset = _gain_offset(model, norm)
        if offset is not None:
            path = next(path for path, module in model.named_modules() if module is norm)
            return {f"{path}.{name}": value for name, value in _scaled(norm, factor, offset).items()}
    return None


@torch.no_grad()
def _gain_offset(model: nn.Module, norm: nn.Module) -> float | None:
    """What is added to the norm's weight, where the head reads what this norm gives; else None."""
    called: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        called.append((args[0], output))

    weight = next(decoder_layers(model)[-1].parameters())
    shape = (1, _TRIED_TOKENS, hidden_size(model))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    end = partial_decoder(model, num_layers(model), num_layers(model), embed=False, norm=True)
    hook = norm.register_forward_hook(note)
    try:
        hidden = end(inputs_embeds=drawn.to(weight), use_cache=False).last_hidden_state
    finally:
        hook.remove()
    # The same memory: BLOOM has another norm behind its embedding, which may give the same numbers.
    if len(called) != 1 or called[0][1].data_ptr() != hidden.data_ptr():
        return None
    for offset in _OFFSETS:
        found = functional_call(norm, _scaled(norm, _TRIED_FACTOR, offset), (called[0][0],))
        if near(found, _TRIED_FACTOR * hidden, hidden):
            return offset
    return None


def _scaled(norm: nn.Module, factor: float, offset: float) -> dict[str, Tensor]:
    def scaled(value: Tensor, offset: float) -> Tensor:
        return (factor * (value.detach().double() + offset) - offset).to(value.dtype)

    return {name: scaled(value, offset if name == "weight" else 0.0) for name, value in norm.named_parameters()}
