"""What tests of several rooms share: the states of a model by plain hooks, and the demo model, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.demo_data import demo_model_path
from linearpatch_kernels.modeling.loading import load_model


def hooked_states(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The input of every layer and the output of the last one, [W, T, L+1, d] in float64, by one plain forward pass."""
    layers = model.get_decoder().layers
    states: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    handles.append(layers[-1].register_forward_hook(lambda _module, _args, output: states.append(output)))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(states, dim=2).double()


@pytest.fixture(scope="session", name="hooked_states")
def _hooked_states() -> Callable[[PreTrainedModel, Tensor], Tensor]:
    return hooked_states


@pytest.fixture
def count_calls() -> Iterator[Callable[..., list[int]]]:
    """``count_calls(modules)[i]`` is how many windows module i has seen since (its input is [windows, tokens, d])."""
    handles: list[Any] = []

    def count(modules: Any) -> list[int]:
        seen = [0] * len(modules)

        def counter(index: int) -> Callable[..., None]:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[index] += len(args[0] if args else kwargs["hidden_states"])

            return hook

        for index, module in enumerate(modules):
            handles.append(module.register_forward_pre_hook(counter(index), with_kwargs=True))
        return seen

    yield count
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def demo() -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer."""
    return load_model(demo_model_path(), device="cpu")
