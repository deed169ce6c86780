"""The stream from layer to layer, seen in one run of a model."""

from __future__ import annotations

import inspect
import itertools
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said
from linearpatch_kernels.modeling.families import (
    decoder,
    decoder_layers,
    embedding,
    family_of,
    hidden_size,
    text_config,
)

# In the names of what a decoder is handed of images.
_SEEN = ("visual", "vision", "deepstack")


@dataclass(frozen=True)
class LayerCall:
    """What a layer was given and what it returned.

    Attributes:
        stream: what entered it; output: what it returned, the stream alone or the first of a tuple.
    """

    stream: Tensor
    output: Any

    @property
    def result(self) -> Tensor:
        """The stream behind it."""
        return stream_in(self.output)

    @property
    def form(self) -> tuple[type, tuple[Any, ...]]:
        """The type of what it returned, and what stood behind the stream there."""
        return type(self.output), tuple(self.output[1:]) if isinstance(self.output, tuple | list) else ()


def stream_in(output: Any) -> Any:
    """The stream in what a layer returned."""
    return output[0] if isinstance(output, tuple | list) else output


def some_tokens(model: nn.Module, count: int) -> Tensor:
    """A window [1, count] of token ids, always the same ones, on the model's device; none of the first ones, which
    padding and the like have."""
    weight = embedding(model).weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, len(weight) - 1), len(weight), (1, count), generator=generator, device="cpu")
    # Where a model reads more than text, some tokens stand for what it reads.
    config: Any = getattr(model, "config", None)
    for name, value in vars(config).items() if text_config(config) is not config else ():
        if name.endswith(("_token_id", "_token_index")):
            ids[ids == value] = min(5, len(weight) - 1)
    # accelerate brings what lies elsewhere.
    return ids if weight.is_meta else ids.to(weight.device)


def difference(one: Tensor, other: Tensor) -> float:
    """Relative; infinite where something is not finite."""
    wanted = other.to(one.device).double()
    found = float((one.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return found if math.isfinite(found) else math.inf


def rounding(computed: Tensor) -> float:
    """By how much what is computed the same way twice may differ, relatively: not at all in float32 and float64 on the
    CPU; elsewhere, where a sum may be taken in any order, by 8 units of the dtype's precision."""
    precision = torch.finfo(computed.dtype)
    return 0 if computed.device.type == "cpu" and precision.bits > 16 else 8 * precision.eps


def _refusal(model: nn.Module) -> str:
    return f"models of type {family_of(model).model_type!r} cannot be calibrated or cut"


def _check_sees_in_front(model: nn.Module) -> None:
    """InputError where a decoder adds what is seen between its layers: no run over text tells what a cut does to it."""
    taken = inspect.signature(type(decoder(model)).forward).parameters
    seen = next((name for name in taken if any(word in name for word in _SEEN)), None)
    if seen is not None:
        raise InputError(f"{_refusal(model)}: their decoder adds what they see behind layers of some numbers ({seen})")


@torch.no_grad()
def traced(model: nn.Module, ids: Tensor) -> list[LayerCall]:
    """The call of every layer in a run over token ids [B, T].

    Raises:
        InputError: what a layer is given is not what the one in front of it returned, [B, T, d], or would not be in a
            run over images.
    """
    layers = decoder_layers(model)
    _check_sees_in_front(model)
    calls: list[tuple[int, LayerCall]] = []
    told = _refusal(model)
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, at: int = index) -> None:
                calls.append((at, LayerCall(args[0] if args else kwargs.get("hidden_states"), output)))

            hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        try:
            decoder(model)(ids, use_cache=False)
        except Exception as error:
            # Each decoder that wants more than token ids says so in its own way.
            raise InputError(f"{told}: they do not run on token ids alone ({said(error)})") from error
    shape = (*ids.shape, hidden_size(model))
    if [index for index, _ in calls] != list(range(len(layers))):
        raise InputError(f"{told}: their layers are not called one after the other, each once")
    found = [call for _, call in calls]
    for call in found:
        for stream in (call.stream, call.result):
            if not isinstance(stream, Tensor) or stream.shape != shape:
                what = [*stream.shape] if isinstance(stream, Tensor) else type(stream).__name__
                raise InputError(f"{told}: between their layers there is {what}, not one stream {[*shape]}")
    for index, (before, after) in enumerate(itertools.pairwise(found)):
        if not torch.equal(before.result.to(after.stream.device), after.stream):
            raise InputError(f"{told}: what enters layer {index + 1} is not what leaves layer {index}")
    return found
