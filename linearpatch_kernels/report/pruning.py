"""The report of a pruning run: plain data and pictures made from plans, statistics and qualities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.forward import residual_stream
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.scores import span_score
from linearpatch_kernels.pruning.search import SweepPoint
from linearpatch_kernels.report.page import CandidateRow, Drawing, ReportData, SpanRow, draw_report
from linearpatch_kernels.report.plots import plot_depth_cosine, plot_joint_magnitudes, plot_sweep
from linearpatch_kernels.torch_state import evaluation_mode, own_state

HEATMAP = "depth-cosine.png"
MAGNITUDES = "joint-magnitudes.png"
SWEEP = "quality-against-depth.png"


def span_rows(plan: PrunePlan, statistics: CalibrationStatistics) -> list[SpanRow]:
    """The rows of the report's table of spans."""
    return [
        SpanRow(str(joint.span), plan.score, span_score(statistics, joint.span, plan.score), describe_patch(joint))
        for joint in plan.joints
    ]


def describe_patch(joint: Joint) -> str:
    """One phrase: the fit, and of what kinds the patches are."""
    if joint.patch is None:
        return f"{joint.fit}: plain removal"
    kinds = " + ".join(type(patch).__name__ for patch in joint.patch)
    return f"{joint.fit}: {kinds}, {joint.patch.num_parameters:,} parameters"


def candidate_rows(plan: PrunePlan) -> list[CandidateRow]:
    """The rows of the table that the fit ``auto`` decided on."""
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
    *,
    noted: Noted = warn,
) -> dict[str, bytes]:
    """The files of a report directory: ``report.md``, the depth heatmap and the magnitudes at the first joint.

    What cannot be drawn is left out; the report and ``noted`` say so.
    """
    spans = [(span.start, span.end) for span in plan.spans]

    def heatmap(path: Path) -> None:
        plot_depth_cosine(path, statistics.mean_token_cosine(), spans, model_name)

    drawings: dict[str, Drawing] = {
        HEATMAP: (
            "Cosine between the residual stream at every two depths; the removed span is the marked corner.",
            heatmap,
        )
    }
    if magnitudes is not None:
        before, after, target = magnitudes
        drawings[MAGNITUDES] = (
            f"Channel magnitudes at the joint {plan.spans[0]} on held-out windows (first token left out).",
            lambda path: plot_joint_magnitudes(path, before, after, target, spans[0], plan.joints[0].fit),
        )
    return draw_report(data, drawings, noted)


def sweep_report(
    data: ReportData, dense: float, points: Sequence[SweepPoint], model_name: str = "", *, noted: Noted = warn
) -> dict[str, bytes]:
    """The same for a sweep: ``report.md`` with the plot of perplexity against the number of dropped layers."""
    lines: dict[str, dict[int, float]] = {}
    for point in points:
        lines.setdefault(point.fit, {})[point.drop] = point.quality.perplexity
    drawing: Drawing = (
        "Perplexity on held-out text against depth.",
        lambda path: plot_sweep(path, lines, dense, model_name),
    )
    return draw_report(data, {SWEEP: drawing}, noted)
