"""A layer of vLLM's with patches in front of it and behind it, and how layers pass the residual stream on.

Most layers of vLLM pass two tensors on: what their last half wrote, and the sum of all before it. The next fused norm
adds the two. Some layers pass the whole sum alone, and some beside a second tensor that the next layer ignores. A patch
acts on the whole sum, and only the layer's code says how it comes. So that is measured (`form_of`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError

# What vLLM calls the stream, or the first of its two parts, in a layer's forward; and the second.
_STREAM = ("hidden_states", "hidden_state", "x")
_RESIDUAL = "residual"
_TOKENS = 4


@dataclass(frozen=True)
class StreamForm:
    """How a class of layers passes the residual stream on.

    Attributes:
        names: the parameters of ``forward``, in order.
        stream: the one that has the stream, or its first part.
        is_sum: whether the stream is the sum of that and ``residual``, as it is of the two tensors that the layer
            returns. Else it is the one tensor that the layer returns, or the first of several.
    """

    names: tuple[str, ...]
    stream: str
    is_sum: bool


def patched_layer(layer: nn.Module, width: int) -> type[nn.Module]:
    """The class of a layer with patches, of a stock layer that vLLM built.

    Raises:
        InputError: how the layer passes the stream on is not known.
    """
    if "forward" in vars(layer):
        raise InputError(
            "vLLM put another forward in the place of the layer's, which would leave out its patches: run without "
            "weight offloading (--cpu-offload-gb, --offload-backend)"
        )
    stock: Any = type(layer)
    return _patched_class(stock, form_of(layer, width))


@functools.cache
def _patched_class(stock: Any, form: StreamForm) -> type[nn.Module]:
    names, stream, is_sum = form.names, form.stream, form.is_sum

    class Layer(stock):
        stock_class = stock

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.patch is not None:
                whole = given[stream]
                if is_sum:
                    if given.get(_RESIDUAL) is not None:
                        whole = whole + given[_RESIDUAL]
                    # As in front of the first layer of all, where there is no sum yet.
                    given[_RESIDUAL] = None
                given[stream] = self.patch(whole)
            output = super().forward(**given)
            if self.output_patch is None:
                return output
            if is_sum:
                whole = self.output_patch(output[0] + output[1])
                return whole, torch.zeros_like(whole)
            return (self.output_patch(output[0]), *output[1:]) if type(output) is tuple else self.output_patch(output)

    Layer.__name__ = Layer.__qualname__ = f"LinearPatch{stock.__name__}"
    return Layer


class _Zeros(Tensor):
    """What a half of a layer that writes nothing returns: zeros, or a pair of zeros and None where a pair is wanted."""

    def __iter__(self) -> Any:
        return iter((self.as_subclass(Tensor), None))


class _WritesNothing(nn.Module):
    """In the place of a half of a layer: whatever it is called with, it adds zero to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        rows = (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.shape[-1:] == (self.width,))
        return torch.zeros_like(next(rows)).as_subclass(_Zeros)


def form_of(layer: nn.Module, width: int) -> StreamForm:
    """How a layer passes the residual stream on: measured on a copy whose halves write nothing.

    Such a layer must return the stream that entered it. On random rows, with a second part and without, only one form
    of the stream does.

    Raises:
        InputError: none of those that are known does.
    """
    names = tuple(inspect.signature(type(layer).forward).parameters)[1:]
    stream = next((name for name in _STREAM if name in names), None)
    if stream is None:
        raise _unknown(layer, f"its forward takes {', '.join(names)}")
    try:
        is_sum = _is_sum(layer, width, names, stream)
    except Exception as error:  # whatever a layer does with inputs that it does not expect
        raise _unknown(layer, f"{type(error).__name__}: {error}") from error
    if is_sum is None:
        raise _unknown(layer, "without its halves it does not return the stream that entered it")
    return StreamForm(names, stream, is_sum)


@torch.no_grad()
def _is_sum(layer: nn.Module, width: int, names: tuple[str, ...], stream: str) -> bool | None:
    """Whether the stream is the sum of two parts; None where it is neither that nor one tensor."""
    empty = copy.copy(layer)
    empty._modules = {
        name: child if child is None or _is_norm(child) else _WritesNothing(width)
        for name, child in layer._modules.items()
    }
    device, dtype = next(layer.parameters()).device, torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, _TOKENS, width, generator=generator, device="cpu", dtype=dtype)
    first, second = drawn.to(device)
    others = _other_inputs(type(layer), (stream, _RESIDUAL), device)
    found = []
    for residual in (second, None) if _RESIDUAL in names else (None,):
        # Clones, because fused norms write into what they are given.
        own = {stream: first.clone()}
        if _RESIDUAL in names:
            own[_RESIDUAL] = residual if residual is None else residual.clone()
        output = type(layer).forward(empty, **others, **own)
        head, *rest = output if type(output) is tuple else (output,)
        is_pair = _RESIDUAL in names and len(rest) == 1 and isinstance(rest[0], Tensor)
        entered = first if residual is None else first + second
        found.append((_same(head, first), is_pair and _same(head + rest[0], entered)))
    is_first, is_sum = (all(column) for column in zip(*found, strict=True))
    return is_sum if is_first != is_sum else None


def _same(one: Any, other: Tensor) -> bool:
    # Of the rounding of a 16-bit model, and far from that of another form.
    return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=0.02, atol=0.02)


def _is_norm(module: nn.Module) -> bool:
    """Whether it may stay: it holds gains and no matrix, and makes zeros of zeros."""
    return not [*module.children()] and all(parameter.dim() <= 1 for parameter in module.parameters())


def _other_inputs(layer: Any, own: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """What a layer's forward must be given besides the stream: positions, and None for all else without a default."""
    inputs: dict[str, Any] = {}
    for parameter in [*inspect.signature(layer.forward).parameters.values()][1:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.name not in own and parameter.default is parameter.empty:
            inputs[parameter.name] = torch.arange(_TOKENS, device=device) if "position" in parameter.name else None
    return inputs


def _unknown(layer: nn.Module, why: str) -> InputError:
    return InputError(
        f"how vLLM's {type(layer).__name__} passes the residual stream on is not known ({why}): serve the checkpoint "
        "with --model-impl transformers --trust-remote-code"
    )
