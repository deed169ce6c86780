"""What a report shows, against the plan and the states it is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, Span
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.search import plan_pruning, sweep
from linearpatch_kernels.report.page import CandidateRow, ReportData, SpanRow
from linearpatch_kernels.report.pruning import (
    candidate_rows,
    describe_patch,
    joint_magnitudes,
    prune_report,
    span_rows,
    sweep_report,
)
from tests.support.tiny import random_patch

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("kind", ["hadamard", "dense", None], ids=str)
@pytest.mark.parametrize("span", [Span(2, 4), Span(4, 6)], ids=str)
def test_magnitudes_at_the_joint(
    dense: PreTrainedModel,
    heldout: Tensor,
    span: Span,
    kind: str | None,
    hooked_states: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:
    patch = None if kind is None else random_patch(kind)
    states = hooked_states(dense, heldout)[:, 1:].flatten(0, 1)
    before, target = states[:, span.start], states[:, span.end]
    after = before if patch is None else before @ patch.to_dense()
    found = joint_magnitudes(dense.train(), heldout, Joint(span, patch))
    assert dense.training
    dense.eval()
    for actual, expected in zip(found, (before, after, target), strict=True):
        torch.testing.assert_close(actual, expected.abs().mean(dim=0), rtol=1e-4, atol=1e-5)


def test_span_rows(statistics: CalibrationStatistics) -> None:
    patch = random_patch("low-rank")
    joints = (Joint(Span(1, 2), patch, "low-rank"), Joint(Span(3, 5)))
    cosine = statistics.token_cosine / statistics.tokens
    assert span_rows(PrunePlan(6, joints, score="cosine"), statistics) == [
        SpanRow("1:2", "cosine", pytest.approx(float(cosine[1, 2])), "low-rank: LowRankPatch, 384 parameters"),
        SpanRow("3:5", "cosine", pytest.approx(float(cosine[3, 5])), "none: plain removal"),
    ]
    for score in ("bi", "given", "loss"):
        assert [row.score for row in span_rows(PrunePlan(6, joints, score=score), statistics)] == [None, None]
    assert describe_patch(joints[1]) == "none: plain removal"


def test_candidate_rows() -> None:
    table = ({"fit": "least-squares", "loss": 2.5, "flops_per_token": 4608, "kept": True},)
    plan = PrunePlan(6, (Joint(Span(1, 2)), Joint(Span(3, 5))), candidates=table)
    assert candidate_rows(plan) == [CandidateRow("1:2,3:5", "least-squares", 2.5, 4608, True)]


def test_the_report_of_a_pruning(dense: PreTrainedModel, windows: Tensor, heldout: Tensor) -> None:
    made = plan_pruning(dense, windows, heldout, drop=2, rank=5)
    data = ReportData("Title", spans=span_rows(made.plan, made.statistics), candidates=candidate_rows(made.plan))
    magnitudes = joint_magnitudes(dense, heldout, made.plan.joints[0])
    files = prune_report(data, made.plan, made.statistics, magnitudes, "tiny")
    assert sorted(files) == ["depth-cosine.png", "joint-magnitudes.png", "report.md"]
    text = files["report.md"].decode()
    for name in ("depth-cosine.png", "joint-magnitudes.png"):
        assert files[name].startswith(PNG)
        assert f"]({name})" in text
    assert str(made.plan.spans[0]) in text
    assert all(row["fit"] in text for row in made.plan.candidates)
    plain = prune_report(data, made.plan, made.statistics)
    assert sorted(plain) == ["depth-cosine.png", "report.md"]
    assert "joint-magnitudes.png" not in plain["report.md"].decode()
    other = dataclasses.replace(made.plan, joints=(Joint(Span(1, 2)),))
    assert prune_report(data, other, made.statistics)["depth-cosine.png"] != plain["depth-cosine.png"]


def test_the_report_of_a_sweep(dense: PreTrainedModel, windows: Tensor, heldout: Tensor) -> None:
    quality, points, _ = sweep(dense, windows, heldout, [1, 2, 3], ["none", "linearpatch"])
    files = sweep_report(ReportData("Title"), quality.perplexity, points, "tiny")
    assert sorted(files) == ["quality-against-depth.png", "report.md"]
    assert files["quality-against-depth.png"].startswith(PNG)
    assert "](quality-against-depth.png)" in files["report.md"].decode()
    fewer = sweep_report(ReportData("Title"), quality.perplexity, points[:2], "tiny")
    assert fewer["quality-against-depth.png"] != files["quality-against-depth.png"]
