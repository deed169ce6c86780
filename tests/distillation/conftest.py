"""A tiny dense model, windows for it, a plan that removes layers 2 and 3 of six, and the teacher's store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modeling.tiny import VOCABULARY, random_patch, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.nn import Patch
from linearpatch_kernels.surgery.apply import apply_plan
from linearpatch_kernels.surgery.plan import Joint, PrunePlan

JOINT = 2
TRAINING, HELDOUT = range(9), range(9, 12)


def student_of(model: PreTrainedModel, patch: Patch | None = None) -> PreTrainedModel:
    """Layers 2 and 3 removed, with a patch in their place."""
    patch = random_patch("dense") if patch is None else patch
    return apply_plan(model, PrunePlan(6, (Joint(Span(2, 4), patch, "test"),)))


@pytest.fixture(scope="session")
def dense() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def windows() -> Tensor:
    return torch.randint(3, VOCABULARY, (12, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def store(dense: PreTrainedModel, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    """Ten ids a token in shards of five windows."""
    return write_teacher_store(dense, windows, Path(tmp_path_factory.mktemp("store")), top_k=10, shard_windows=5)
