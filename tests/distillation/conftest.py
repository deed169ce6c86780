"""A tiny dense model, windows for it, and the teacher's store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from tests.support.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="session")
def dense() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _dense_is_as_it_was(dense: PreTrainedModel) -> Iterator[None]:
    """Every file's tests share it, and students share its parameters."""
    yield
    assert all(parameter.requires_grad and parameter.grad is None for parameter in dense.parameters())


@pytest.fixture(scope="session")
def windows() -> Tensor:
    return torch.randint(3, VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def store(dense: PreTrainedModel, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    """Ten ids a token in shards of five windows."""
    return write_teacher_store(dense, windows, Path(tmp_path_factory.mktemp("store")), top_k=10, shard_windows=5)
