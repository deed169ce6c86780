"""The ways through the package written down once: functions of (model, settings) that check, work, report and write.

The command parses, calls one of these and prints. `Reporter` is told what they do.
"""

from linearpatch_kernels.recipes.demo import DemoResult, demo
from linearpatch_kernels.recipes.distill import DistillResult, distill
from linearpatch_kernels.recipes.evaluate import Evaluation, TasksFailed, evaluate
from linearpatch_kernels.recipes.export import ExportResult, export
from linearpatch_kernels.recipes.log import Quiet, Reporter
from linearpatch_kernels.recipes.merge import MergeResult, merge
from linearpatch_kernels.recipes.outputs import Result
from linearpatch_kernels.recipes.prune import PruneResult, prune
from linearpatch_kernels.recipes.sweep import SweepResult, sweep
from linearpatch_kernels.settings import (
    DemoSettings,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    MergeRunSettings,
    PruneSettings,
    SweepSettings,
)

__all__ = [
    "DemoResult",
    "DemoSettings",
    "DistillResult",
    "DistillSettings",
    "EvaluateSettings",
    "Evaluation",
    "ExportResult",
    "ExportSettings",
    "MergeResult",
    "MergeRunSettings",
    "PruneResult",
    "PruneSettings",
    "Quiet",
    "Reporter",
    "Result",
    "SweepResult",
    "SweepSettings",
    "TasksFailed",
    "demo",
    "distill",
    "evaluate",
    "export",
    "merge",
    "prune",
    "sweep",
]
