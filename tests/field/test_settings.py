"""Numbers that make no sense are refused where they are given, not after the work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.hierarchical import HierarchySettings
from linearpatch_kernels.distillation.trainable import check_trainable
from linearpatch_kernels.distillation.trainer import TrainingSettings
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.perplexity import perplexity
from linearpatch_kernels.forward import Run
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.search import plan_pruning, sweep
from tests.support.field import tiny

HUGE = 10**20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1 << 64),
        ("seed", -(1 << 64)),
        ("seed", 0.5),
        ("weight_decay", math.inf),
        ("weight_decay", math.nan),
        ("weight_decay", -0.1),
        ("clip", math.nan),
        ("clip", math.inf),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0.0),
        ("final_share", 1.5),
        ("final_share", math.nan),
        ("label_weight", math.nan),
        ("label_weight", 1.1),
        ("steps", HUGE),
        ("steps", 0),
        ("steps", True),
        ("windows_per_step", HUGE),
        ("micro_batch", HUGE),
        ("micro_batch", "2"),
        ("lora_rank", HUGE),
        ("warmup_steps", -1),
        ("warmup_steps", HUGE),
        ("evaluate_every", HUGE),
        ("patience", HUGE),
    ],
)
def test_a_setting_of_training_that_makes_no_sense(name: str, value: Any) -> None:
    """A seed of 2**64 and a weight decay of infinity were told after the teacher was asked."""
    with pytest.raises(InputError, match=f"`{name}` must be ") as caught:
        TrainingSettings(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [0, -1, (1 << 62), -(1 << 62)])
def test_seeds_that_torch_takes_in_every_epoch(seed: int) -> None:
    torch.Generator().manual_seed(TrainingSettings(seed=seed).seed + (1 << 40))


@pytest.mark.parametrize(
    ("name", "value"), [("weight", math.inf), ("weight", math.nan), ("weight", -1.0), ("group_steps", HUGE)]
)
def test_a_setting_of_merged_layers_that_makes_no_sense(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"`(layer_weight|group_steps)` must be "):
        HierarchySettings(**{name: value})


@pytest.mark.parametrize("batch_size", [0, -3, HUGE])
def test_a_batch_size_that_makes_no_sense(batch_size: int) -> None:
    """Told by an internal error once the model was loaded."""
    model, windows = tiny(), torch.arange(3, 51).view(3, 16)
    for work in (
        lambda: plan_pruning(model, windows, drop=2, fit="none", run=Run(batch_size)),
        lambda: sweep(model, windows, windows, [1], ["none"], run=Run(batch_size)),
        lambda: perplexity(model, windows, batch_size=batch_size),
    ):
        with pytest.raises(InputError, match="the batch size must be a number from 1 to"):
            work()


@pytest.mark.parametrize("rank", [0, -1, 49, HUGE])
def test_a_rank_that_makes_no_sense(rank: int) -> None:
    model, windows = tiny(), torch.arange(3, 51).view(3, 16)
    with pytest.raises(InputError, match=f"rank {rank} does not fit a width of 48"):
        plan_pruning(model, windows, drop=2, fit="low-rank", rank=rank)


def test_a_rank_of_lora_beyond_the_width() -> None:
    pytest.importorskip("peft")
    student = apply_plan(tiny(), PrunePlan(6, (Joint(Span(2, 4)),)))
    with pytest.raises(InputError, match="`lora_rank` 49 is more than the model's width 48"):
        check_trainable(student, 2, "lora", lora_rank=49)
    assert check_trainable(student, 2, "lora", lora_rank=48)
