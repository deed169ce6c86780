"""Make a language model shallower and heal the joint with a map that costs O(d log d).

The public names below are imported when they are first used: importing the package alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearpatch_kernels import recipes
    from linearpatch_kernels.calibration import CalibrationStatistics, calibrate
    from linearpatch_kernels.distillation.settings import TrainingSettings
    from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
    from linearpatch_kernels.distillation.trainer import distill
    from linearpatch_kernels.errors import InputError
    from linearpatch_kernels.forward import Run
    from linearpatch_kernels.hadamard import hadamard_matrix, hadamard_order, hadamard_transform, paley_factor
    from linearpatch_kernels.healing.merge_search import plan_merging
    from linearpatch_kernels.merging.plan import MergePlan, apply_merges
    from linearpatch_kernels.merging.settings import MergeSettings
    from linearpatch_kernels.nn import (
        DensePatch,
        DiagonalPatch,
        HadamardPatch,
        LinearTopKKLLoss,
        LowRankPatch,
        NormLinearPatch,
        Patch,
        PatchChain,
        TopKKLLoss,
        build_patch,
    )
    from linearpatch_kernels.ops.backends import backends
    from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
    from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
    from linearpatch_kernels.pruning.apply import apply_plan
    from linearpatch_kernels.pruning.plan import Joint, PrunePlan
    from linearpatch_kernels.pruning.search import plan_pruning
    from linearpatch_kernels.recipes.evaluate import evaluate
    from linearpatch_kernels.recipes.export import export
    from linearpatch_kernels.recipes.merge import merge
    from linearpatch_kernels.recipes.prune import prune
    from linearpatch_kernels.recipes.sweep import sweep
    from linearpatch_kernels.span import Span

__version__ = "0.1.0"

__all__ = [
    "CalibrationStatistics",
    "DensePatch",
    "DiagonalPatch",
    "HadamardPatch",
    "InputError",
    "Joint",
    "LinearTopKKLLoss",
    "LowRankPatch",
    "MergePlan",
    "MergeSettings",
    "NormLinearPatch",
    "Patch",
    "PatchChain",
    "PrunePlan",
    "Run",
    "Span",
    "TeacherStore",
    "TopKKLLoss",
    "TrainingSettings",
    "add_patch_rms_norm",
    "apply_merges",
    "apply_plan",
    "backends",
    "build_patch",
    "calibrate",
    "distill",
    "evaluate",
    "export",
    "hadamard_matrix",
    "hadamard_order",
    "hadamard_patch",
    "hadamard_transform",
    "linear_topk_kl_loss",
    "merge",
    "paley_factor",
    "plan_merging",
    "plan_pruning",
    "prune",
    "recipes",
    "sweep",
    "topk_kl_loss",
    "write_teacher_store",
]

_HOME = {
    "calibration": ("CalibrationStatistics", "calibrate"),
    "distillation.teacher_store": ("TeacherStore", "write_teacher_store"),
    "distillation.settings": ("TrainingSettings",),
    "distillation.trainer": ("distill",),
    "errors": ("InputError",),
    "forward": ("Run",),
    "hadamard": ("hadamard_matrix", "hadamard_order", "hadamard_transform", "paley_factor"),
    "nn": (
        "DensePatch",
        "DiagonalPatch",
        "HadamardPatch",
        "LinearTopKKLLoss",
        "LowRankPatch",
        "NormLinearPatch",
        "Patch",
        "PatchChain",
        "TopKKLLoss",
        "build_patch",
    ),
    "ops.backends": ("backends",),
    "ops.hadamard_patch": ("add_patch_rms_norm", "hadamard_patch"),
    "ops.topk_kl": ("linear_topk_kl_loss", "topk_kl_loss"),
    "span": ("Span",),
    "pruning.apply": ("apply_plan",),
    "merging.plan": ("MergePlan", "apply_merges"),
    "merging.settings": ("MergeSettings",),
    "healing.merge_search": ("plan_merging",),
    "pruning.plan": ("Joint", "PrunePlan"),
    "pruning.search": ("plan_pruning",),
    "recipes": ("evaluate", "export", "merge", "prune", "sweep"),
}
# The last one is a module itself.
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names} | {"recipes": "recipes"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = module if name == _MODULE_OF[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
