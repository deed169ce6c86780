"""Layers 2 and 3 of a tiny six-layer model removed, and which of its windows train and which choose."""

from __future__ import annotations

from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.nn import Patch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.tiny import random_patch

JOINT = 2
TRAINING, HELDOUT = range(9), range(9, 12)


def student_of(model: PreTrainedModel, patch: Patch | None = None) -> PreTrainedModel:
    """Layers 2 and 3 removed, with a patch in their place."""
    patch = random_patch("dense") if patch is None else patch
    return apply_plan(model, PrunePlan(6, (Joint(Span(2, 4), patch, "test"),)))
