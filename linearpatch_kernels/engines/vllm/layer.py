"""A layer of vLLM's with patches in front of it and behind it, and how layers pass the residual stream on.

Most layers of vLLM's pass two tensors on, the output of the last half and the sum of all before, which the next fused
norm adds up; some pass the sum alone, and some two tensors of which the second means nothing. The residual stream that a
patch acts on is made of them in another way each time, and only the layer's code knows. So it is measured (`form_of`).
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
        names: the parameters of ``forward``, in order; stream: the one that has the stream, or its first part.
        has_residual: whether there is a second part, and the layer returns two.
        is_sum: whether the stream is the sum of the two; else it is the first.
    """

    names: tuple[str, ...]
    stream: str
    has_residual: bool
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
    return _patched_class(type(layer), form_of(layer, width))


@functools.cache
def _patched_class(stock: Any, form: StreamForm) -> type[nn.Module]:
    names, stream, has_residual, is_sum = form.names, form.stream, form.has_residual, form.is_sum

    class Layer(stock):
        stock_class = stock

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if self.patch is not None:
                whole = given[stream]
                if is_sum and given[_RESIDUAL] is not None:
                    whole = whole + given[_RESIDUAL]
                given[stream] = self.patch(whole)
                if is_sum:
                    # As in front of the first layer of all, where there is no sum yet.
                    given[_RESIDUAL] = None
            output = super().forward(**given)
            if self.output_patch is None:
                return output
            if not has_residual:
                return self.output_patch(output)
            last, residual = output
            if not is_sum:
                return self.output_patch(last), residual
            whole = self.output_patch(last + residual)
            return whole, torch.zeros_like(whole)

    Layer.__name__ = Layer.__qualname__ = f"LinearPatch{stock.__name__}"
    return Layer


class _WritesNothing(nn.Module):
    """In the place of a half of a layer: whatever it is called with, it adds zero to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        return next(torch.zeros_like(one) for one in given if isinstance(one, Tensor) and one.shape[-1:] == (self.width,))


def form_of(layer: nn.Module, width: int) -> StreamForm:
    """How a layer passes the residual stream on: measured on a copy whose halves write nothing.

    Such a layer must return the stream that entered it. Which sum of its outputs equals which sum of its inputs tells
    the forms apart, on random rows.

    Raises:
        InputError: it returns the stream in none of the forms that are known.
    """
    names = tuple(inspect.signature(type(layer).forward).parameters)[1:]
    stream = next((name for name in _STREAM if name in names), None)
    if stream is None:
        raise _unknown(layer, f"its forward takes {', '.join(names)}")
    try:
        return _measured(layer, width, names, stream)
    except InputError:
        raise
    except Exception as error:  # whatever a layer does with inputs that it does not expect
        raise _unknown(layer, f"{type(error).__name__}: {error}") from error


@torch.no_grad()
def _measured(layer: nn.Module, width: int, names: tuple[str, ...], stream: str) -> StreamForm:
    empty = copy.copy(layer)
    empty._modules = {
        name: child if child is None or _is_norm(child) else _WritesNothing(width)
        for name, child in layer._modules.items()
    }
    parameter = next(layer.parameters())
    made = {"device": parameter.device, "dtype": torch.get_default_dtype()}
    # Of one row to the next another ratio of the two, so that no form passes for another.
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, _TOKENS, width, generator=generator, device="cpu")).to(**made)
    others = {name: value for name, value in _other_inputs(type(layer), names, stream, parameter.device).items()}

    def output(hidden: Tensor, residual: Tensor | None) -> Any:
        # Clones, because fused norms write into what they are given.
        own = {stream: hidden.clone()}
        if _RESIDUAL in names:
            own[_RESIDUAL] = None if residual is None else residual.clone()
        return type(layer).forward(empty, **others, **own)

    def same(one: Any, other: Tensor) -> bool:
        return isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other, rtol=0.02, atol=0.02)

    if _RESIDUAL not in names:
        if same(output(first, None), first):
            return StreamForm(names, stream, has_residual=False, is_sum=False)
        raise _unknown(layer, "without its halves it does not return the stream that entered it")
    outputs = [output(first, second), output(first, None)]
    if all(type(one) is tuple and len(one) == 2 for one in outputs):
        (with_sum, sum_behind), (without, behind) = outputs
        summed = [same(with_sum + sum_behind, first + second), same(without + behind, first)] if _tensors(outputs) else [0]
        whole = [same(with_sum, first), same(without, first)]
        if all(summed) != all(whole):
            return StreamForm(names, stream, has_residual=True, is_sum=all(summed))
    raise _unknown(layer, "without its halves it does not return the stream that entered it")


def _tensors(outputs: list[Any]) -> bool:
    return all(isinstance(one, Tensor) for output in outputs for one in output)


def _is_norm(module: nn.Module) -> bool:
    """Whether it may stay: it holds gains and no matrix, and a norm of zeros is zero."""
    return not [*module.children()] and all(parameter.dim() <= 1 for parameter in module.parameters())


def _other_inputs(layer: type[nn.Module], names: tuple[str, ...], stream: str, device: torch.device) -> dict[str, Any]:
    """What a layer's forward is called with besides the stream: positions, and None for what has no default."""
    inputs: dict[str, Any] = {}
    for name in names:
        parameter = inspect.signature(layer.forward).parameters[name]
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or name in (stream, _RESIDUAL) or parameter.default is not parameter.empty:
            continue
        inputs[name] = torch.arange(_TOKENS, device=device) if "position" in name else None
    return inputs


def _unknown(layer: nn.Module, why: str) -> InputError:
    return InputError(
        f"how vLLM's {type(layer).__name__} passes the residual stream on is not known ({why}): serve the checkpoint with "
        "--model-impl transformers --trust-remote-code"
    )
