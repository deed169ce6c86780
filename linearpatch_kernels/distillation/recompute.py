"""What a pass through the suffix need not keep until its backward: it is computed again there, exactly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearpatch_kernels.modeling.families import decoder_layers, rms_norms
from linearpatch_kernels.modeling.halves import layer_halves
from linearpatch_kernels.torch_internals import StorageMark


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, begin: int, what: str) -> Iterator[None]:
    """While it is open, the layers from ``begin`` on keep less for the backward; values and gradients stay the same.

    Norms whose gains are frozen have a cheaper backward then, whatever is recomputed.

    Args:
        what: of `settings.RECOMPUTE`.
    """
    layers = list(decoder_layers(model)[begin:])
    with contextlib.ExitStack() as stack:
        for norm in rms_norms(model, begin):
            if _is_plain(norm):
                stack.enter_context(_replaced(norm, functools.partial(_normed, norm, norm.forward)))
        if what == "activation":
            forgotten = [child for half in _feed_forwards(model, begin) for child in _without_parameters(half)]
            stack.enter_context(_forgetting(forgotten))
        elif what == "layer":
            for layer in layers:
                stack.enter_context(_replaced(layer, functools.partial(checkpoint, layer.forward, use_reentrant=False)))
        yield


def _feed_forwards(model: PreTrainedModel, begin: int) -> list[nn.Module]:
    """The modules that hold the last projection of each layer from ``begin`` on, where there is one."""
    layers = decoder_layers(model)
    found = []
    for index, halves in layer_halves(model, range(begin, len(layers))).items():
        last = halves[-1]
        paths = [*(write.projection for write in last.writes), *(last.behind or ())[:1]]
        found += [layers[index].get_submodule(path.rpartition(".")[0]) for path in paths[:1]]
    return found


def _without_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is None]


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class _FrozenRMSNorm(torch.autograd.Function):
    """``gain * (x * rsqrt(mean(x**2) + eps))`` with no gradient of the gain: autograd's numbers in fewer passes.

    Operation by operation, autograd has ``g = grad * gain``; ``g * r`` for the one x; ``dr = (g * x).sum()``;
    ``-0.5 * dr * r**3``; that over d, as wide as x; times ``2 * x``, made from a copy of x, for the other.
    Here, what is the same for all channels of a token stays one number, and the doubling, which is exact, goes to it.

    Args (of ``apply``):
        x: float32 [..., d], given twice: what comes back through either is added to what x has from elsewhere one
            after the other, as autograd does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, gain: Tensor, eps: float) -> Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, gain, r)
        return (x * r).mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, r = ctx.saved_tensors
        g = grad * gain
        wide = g * x
        factor = (-0.5 * wide.sum(-1, keepdim=True)) * r.pow(3) / x.shape[-1] * 2
        return g.mul_(r), torch.mul(x, factor, out=wide), None, None


def _normed(norm: nn.Module, stock: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    gain: Any = norm.weight
    if x.dtype != torch.float32 or gain.dtype != torch.float32 or gain.requires_grad or not x.requires_grad:
        return stock(x)
    result: Tensor = _FrozenRMSNorm.apply(x, x, gain, norm.variance_epsilon)
    return result


def _is_plain(norm: nn.Module) -> bool:
    """Whether the module is the formula, to the last bit (Gemma's is another); asked of the module itself."""
    gain, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if gain is None or eps is None or gain.dtype != torch.float32:
        return False
    with torch.no_grad():
        probe = torch.linspace(-3, 3, 2 * gain.numel(), dtype=torch.float32, device=gain.device).view(2, -1)
        return torch.equal(norm(probe), _FrozenRMSNorm.apply(probe, probe, gain, eps))


@contextlib.contextmanager
def _forgetting(activations: list[nn.Module]) -> Iterator[None]:
    """Autograd keeps the input of these instead of their output, where another operation asks to keep that.

    In ``act(gate) * up`` the activation keeps ``gate`` already, so the third tensor of that shape is one too many.
    """
    latest: list[tuple[StorageMark, torch.Size, Callable[[], Tensor]]] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            latest[:] = [(StorageMark(output), output.shape, functools.partial(module.forward, args[0].detach()))]

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        for mark, shape, again in latest:
            if mark.marks(tensor) and tensor.shape == shape:
                latest.clear()
                return again
        return tensor

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    handles = [module.register_forward_hook(remember) for module in activations]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
