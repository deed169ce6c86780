"""Measuring models: perplexity, closeness to a teacher, accuracy, speed."""

from linearpatch_kernels.evaluation.agreement import (
    Quality,
    QualityMeter,
    compare_quality,
    evaluate_quality,
    healed_share,
)
from linearpatch_kernels.evaluation.latency import ModelSize, Speed, compare_speed, model_size
from linearpatch_kernels.evaluation.multiple_choice import evaluate_tasks
from linearpatch_kernels.evaluation.perplexity import perplexity, token_losses
from linearpatch_kernels.forward import Progress

__all__ = [
    "ModelSize",
    "Progress",
    "Quality",
    "QualityMeter",
    "Speed",
    "compare_quality",
    "compare_speed",
    "evaluate_quality",
    "evaluate_tasks",
    "healed_share",
    "model_size",
    "perplexity",
    "token_losses",
]
