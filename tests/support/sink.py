"""A tiny dense model whose first token is a sink, windows for it, and its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span, calibrate
from tests.support.tiny import VOCABULARY, tiny_model

SPANS = [Span(2, 4), Span(1, 2), Span(3, 5), Span(4, 6)]


def token_windows(count: int, length: int, seed: int) -> Tensor:
    """Each window from a part of the vocabulary of its own, so that windows differ in more than their noise."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(3, VOCABULARY - 12, (count, 1), generator=generator)
    windows = first + torch.randint(0, 12, (count, length), generator=generator)
    windows[:, 0] = 1
    return windows


@pytest.fixture(scope="session")
def dense() -> PreTrainedModel:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding *= torch.randn(VOCABULARY, 1, generator=generator).exp()
        embedding[1] *= 100
    return model


@pytest.fixture(scope="session")
def windows() -> Tensor:
    return token_windows(9, 40, seed=0)


@pytest.fixture(scope="session")
def heldout() -> Tensor:
    return token_windows(5, 24, seed=1)


@pytest.fixture(scope="session")
def statistics(dense: PreTrainedModel, windows: Tensor) -> CalibrationStatistics:
    """With the moments of `SPANS`, of the stream and of the normed one."""
    return calibrate(dense, windows.split(3), moments=SPANS, normed=True)
