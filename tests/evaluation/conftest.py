"""A random Llama small enough to check by hand, and token windows for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(
    seed: int, *, layers: int = 2, vocabulary: int = 89, positions: int = 64, tied: bool = False
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        # Far from uniform predictions, so that a mistake shows.
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session", name="tiny_llama")
def _tiny_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture(scope="session")
def student() -> LlamaForCausalLM:
    return tiny_llama(1)


@pytest.fixture(scope="session")
def teacher() -> LlamaForCausalLM:
    return tiny_llama(2, layers=3)


@pytest.fixture(scope="session")
def windows() -> Tensor:
    return torch.randint(89, (7, 19), generator=torch.Generator().manual_seed(3))
