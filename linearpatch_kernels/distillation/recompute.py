"""What a pass through the suffix need not keep until its backward: it is computed again there, exactly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from linearpatch_kernels.modeling.families import decoder_layers, sublayers

RECOMPUTE = ("none", "activation", "layer")
"""Nothing; the output of the feed-forward's activation, so that no matrix product is done twice; all of a layer."""


@contextlib.contextmanager
def recomputing(model: PreTrainedModel, begin: int, what: str) -> Iterator[None]:
    """While it is open, the layers from ``begin`` on keep less for the backward; values and gradients stay the same.

    Args:
        what: of `RECOMPUTE`.
    """
    layers = list(decoder_layers(model)[begin:])
    with contextlib.ExitStack() as stack:
        if what == "activation":
            path = sublayers(model)[1].output.projection.rpartition(".")[0]
            halves = [layer.get_submodule(path) for layer in layers]
            stack.enter_context(_forgetting([child for half in halves for child in _without_parameters(half)]))
        elif what == "layer":
            for layer in layers:
                stack.enter_context(_checkpointed(layer))
        yield


def _without_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is None]


@contextlib.contextmanager
def _checkpointed(module: nn.Module) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = functools.partial(checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def _forgetting(activations: list[nn.Module]) -> Iterator[None]:
    """Autograd keeps the input of these instead of their output, where another operation asks to keep that.

    In ``act(gate) * up`` the activation keeps ``gate`` already, so the third tensor of that shape is one too many.
    """
    latest: list[tuple[StorageWeakRef, torch.Size, Callable[[], Tensor]]] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            # A weak reference, unlike an address, never comes to mean another tensor.
            storage = StorageWeakRef(output.untyped_storage())
            latest[:] = [(storage, output.shape, functools.partial(module.forward, args[0].detach()))]

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        for storage, shape, again in latest:
            if StorageWeakRef(tensor.untyped_storage()) == storage and tensor.shape == shape:
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
