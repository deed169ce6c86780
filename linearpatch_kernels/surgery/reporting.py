"""The report of a pruning run: plain data and pictures made from plans, statistics and qualities."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Positions, residual_stream
from linearpatch_kernels.evaluation.perplexity import evaluation_mode
from linearpatch_kernels.evaluation.report import (
    CandidateRow,
    ReportData,
    SpanRow,
    plot_depth_cosine,
    plot_joint_magnitudes,
    plot_sweep,
    write_report,
)
from linearpatch_kernels.evaluation.torch_state import own_state
from linearpatch_kernels.surgery.plan import Joint, PrunePlan
from linearpatch_kernels.surgery.pruning import SweepPoint
from linearpatch_kernels.surgery.scoring import PAIR_SCORES

HEATMAP = "depth-cosine.png"
MAGNITUDES = "joint-magnitudes.png"
SWEEP = "quality-against-depth.png"


def span_rows(plan: PrunePlan, statistics: CalibrationStatistics) -> list[SpanRow]:
    """The rows of the report's table of spans."""
    score = PAIR_SCORES.get(plan.score)
    values = None if score is None else score(statistics)
    return [
        SpanRow(
            str(joint.span),
            plan.score,
            None if values is None else float(values[joint.span.start, joint.span.end]),
            describe_patch(joint),
        )
        for joint in plan.joints
    ]


def describe_patch(joint: Joint) -> str:
    """One phrase: the fit and what the patch is made of."""
    if joint.patch is None:
        return f"{joint.fit}: plain removal"
    return f"{joint.fit}: {type(joint.patch).__name__}, {joint.patch.num_parameters:,} parameters"


def candidate_rows(plan: PrunePlan) -> list[CandidateRow]:
    """The rows of the table that ``--fit auto`` decided on."""
    spans = ",".join(map(str, plan.spans))
    return [
        CandidateRow(spans, row["fit"], row["loss"], row["flops_per_token"], row["kept"]) for row in plan.candidates
    ]


@own_state()
@torch.no_grad()
def joint_magnitudes(model: PreTrainedModel, windows: Tensor, joint: Joint) -> tuple[Tensor, Tensor, Tensor]:
    """Mean |x| per channel [d] over ``windows`` [W, T]: before the patch, after it, and what the layer behind expects.

    The first token of each window is left out: where it is an attention sink it would be all one sees.
    """
    patch = copy.deepcopy(joint.patch).cpu() if joint.patch is not None else None
    with evaluation_mode(model):
        sums = [torch.zeros((), dtype=torch.float64)] * 3
        for window in windows.split(1):
            states = residual_stream(model, window, list(joint.span))
            before, target = (states[depth][:, 1:].float().cpu() for depth in joint.span)
            after = before if patch is None else patch(before)
            sums = [
                total + x.abs().double().mean(dim=(0, 1))
                for total, x in zip(sums, (before, after, target), strict=True)
            ]
    return sums[0] / len(windows), sums[1] / len(windows), sums[2] / len(windows)


def prune_report(
    data: ReportData,
    plan: PrunePlan,
    statistics: CalibrationStatistics,
    magnitudes: tuple[Tensor, Tensor, Tensor] | None = None,
    model_name: str = "",
) -> dict[str, bytes]:
    """The files of a report directory: ``report.md``, the depth heatmap and the magnitudes at the first joint."""
    plots = {HEATMAP: "Cosine between the residual stream at every two depths; the removed span is the marked corner."}
    if magnitudes is not None:
        plots[MAGNITUDES] = (
            f"Channel magnitudes at the joint {plan.spans[0]} on held-out windows (first token left out)."
        )
    with tempfile.TemporaryDirectory() as folder:
        cosine = statistics.mean_token_cosine(Positions.ALL)
        plot_depth_cosine(Path(folder, HEATMAP), cosine, [(span.start, span.end) for span in plan.spans], model_name)
        if magnitudes is not None:
            first = plan.joints[0]
            plot_joint_magnitudes(Path(folder, MAGNITUDES), *magnitudes, (first.span.start, first.span.end), first.fit)
        write_report(folder, dataclasses.replace(data, plots=plots))
        return _contents(folder)


def sweep_report(
    data: ReportData, dense: float, points: Sequence[SweepPoint], model_name: str = ""
) -> dict[str, bytes]:
    """The same for a sweep: ``report.md`` with the plot of perplexity against the number of dropped layers."""
    lines: dict[str, dict[int, float]] = {}
    for point in points:
        lines.setdefault(point.fit, {})[point.drop] = point.quality.perplexity
    with tempfile.TemporaryDirectory() as folder:
        plot_sweep(Path(folder, SWEEP), lines, dense, model_name)
        write_report(folder, dataclasses.replace(data, plots={SWEEP: "Perplexity on held-out text against depth."}))
        return _contents(folder)


def _contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
