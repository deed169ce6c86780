"""What decides how a student is trained: values alone, so that asking for them costs no import of torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from linearpatch_kernels.errors import InputError

TRAIN = ("patch", "patch+norms", "lora", "suffix", "merged")
"""The patches alone; they and the RMSNorm gains from them on; and LoRA on the projections from them on too; the patches
and all weights of the layers from them on; the patches and all weights of the merged layers (CoMe). Without patches
"them" is the first merged layer."""

LOSSES = ("tail", "topk", "full")
"""The rest of the vocabulary in one bucket; the paper's, over the K alone; over the vocabulary, without a bucket."""

PRECISIONS = ("float32", "bfloat16")
"""Of the matrix products in training."""

RECOMPUTE = ("none", "activation", "layer")
"""Nothing; the output of the feed-forward's activation, so that no matrix product is done twice; all of a layer."""

STREAM_ERRORS = ("relative", "mse")
"""Squared error per token over the squared norm of the teacher's state, so that a token of huge values (an attention
sink) counts as one; the paper's mean squared error."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What decides the result of a run, together with the student and the store.

    Attributes:
        steps: optimizer steps.
        train: of `TRAIN`.
        loss: of `LOSSES`.
        label_weight: of the text's own next tokens in what is learnt, beside the teacher's distribution, which has the
            rest (`TeacherBatch.with_labels`); 0: the teacher's alone. Held-out windows are always measured against it.
        learning_rate: its peak; gains and scales take ten times as much, but beside whole layers (``suffix``) the same.
        final_share: the cosine ends at this share of the peak (the paper's is 1/20).
        warmup_steps: linear, before the cosine.
        weight_decay: AdamW's; it pulls towards zero, which is no place for a patch, so 0 unless told.
        clip: largest norm of the gradient; 0: no limit.
        windows_per_step: over all processes.
        micro_batch: windows per forward and backward pass in one process; more are accumulated.
        evaluate_every: steps between two looks at the held-out windows; 0: ten in all.
        patience: looks without a better one until the run ends early; 0: never.
        lora_rank: of ``train="lora"``.
        precision: of the matrix products (``bfloat16``: autocast; a half-precision student always).
        recompute: of `RECOMPUTE`: what the backward computes again instead of keeping it; same bits.
        seed: of the order of windows and LoRA's start.

    Raises:
        InputError: a value that makes no sense, with its name.
    """

    steps: int = 100
    train: str = "patch"
    loss: str = "tail"
    label_weight: float = 0.0
    learning_rate: float = 3e-4
    final_share: float = 0.05
    warmup_steps: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    windows_per_step: int = 1
    micro_batch: int = 1
    evaluate_every: int = 0
    patience: int = 0
    lora_rank: int = 16
    precision: str = "float32"
    recompute: str = "activation"
    seed: int = 0

    def __post_init__(self) -> None:
        known_names = {"train": TRAIN, "loss": LOSSES, "precision": PRECISIONS, "recompute": RECOMPUTE}
        for name, known in known_names.items():
            if getattr(self, name) not in known:
                raise InputError(f"`{name}` {getattr(self, name)} is not known: choose one of {', '.join(known)}")
        for name in ("steps", "windows_per_step", "micro_batch", "lora_rank"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("warmup_steps", "evaluate_every", "patience"):
            check_whole(name, getattr(self, name))
        # Every epoch has the next seed, and torch takes no larger ones.
        check_whole("seed", self.seed, least=-(1 << 62), most=1 << 62)
        for name in ("weight_decay", "clip"):
            check_real(name, getattr(self, name))
        for name in ("final_share", "label_weight"):
            check_real(name, getattr(self, name), most=1)
        check_real("learning_rate", self.learning_rate)
        if not self.learning_rate > 0:
            raise InputError(f"`learning_rate` must be positive, not {self.learning_rate}")

    def check_processes(self, count: int) -> None:
        """InputError where the windows of a step cannot be shared out evenly."""
        if self.windows_per_step % count:
            raise InputError(
                f"`windows_per_step` {self.windows_per_step} cannot be shared out among {count} processes: "
                "give a multiple"
            )

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: linear warm-up, then a cosine to ``final_share`` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        through = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, through))) / 2
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)

    def looks(self, step: int) -> bool:
        """Whether the held-out windows are looked at after this many steps."""
        return step % (self.evaluate_every or max(1, self.steps // 10)) == 0 or step == self.steps


@dataclasses.dataclass(frozen=True)
class HierarchySettings:
    """What a hierarchical run has beside `TrainingSettings`.

    Attributes:
        weight: of the streams' error beside the Top-K KL in the run of all groups together; 0: the KL alone.
        error: of `STREAM_ERRORS`.
        group_steps: of every group on its own before that; 0: none.

    Raises:
        InputError: a value that makes no sense, with its name among the settings of `recipes.distill`.
    """

    weight: float = 1.0
    error: str = "relative"
    group_steps: int = 0

    def __post_init__(self) -> None:
        if self.error not in STREAM_ERRORS:
            raise InputError(f"`layer_error` {self.error} is not known: choose one of {', '.join(STREAM_ERRORS)}")
        check_real("layer_weight", self.weight)
        check_whole("group_steps", self.group_steps)


def check_whole(name: str, value: Any, *, least: int = 0, most: int = (1 << 31) - 1) -> None:
    """InputError where a setting is no whole number from ``least`` to ``most``; ``name`` as in the settings."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"`{name}` must be a whole number from {least} to {most}, not {value}")


def check_real(name: str, value: Any, *, most: float = math.inf) -> None:
    """InputError where a setting is no finite number from 0 to ``most``."""
    if not isinstance(value, int | float) or not 0 <= value <= most or not math.isfinite(value):
        wanted = "finite and not negative" if most == math.inf else f"between 0 and {most}"
        raise InputError(f"`{name}` must be {wanted}, not {value}")
