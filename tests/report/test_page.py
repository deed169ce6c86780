"""The report's tables and the data in the plots."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import ModelSize, Quality, Speed
from linearpatch_kernels.evaluation.report import (
    CandidateRow,
    QualityRow,
    ReportData,
    SpanRow,
    number,
    plot_depth_cosine,
    plot_joint_magnitudes,
    plot_sweep,
    write_report,
)


def quality(loss: float, agreement: float | None = None, kl: float | None = None) -> Quality:
    return Quality(math.exp(loss), loss, 0.0625, agreement, kl, 32704)


def table_after(report: str, heading: str) -> list[list[str]]:
    """The rows of the first Markdown table after a heading, without its rule."""
    section = report.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| ---")]


def test_quality_table(tmp_path: Path) -> None:
    data = ReportData(
        title="A model",
        quality=[
            QualityRow("dense", 30, quality(3.5, 1.0, 0.0), ModelSize(134_515_008, 538_060_032)),
            QualityRow("dropped", 24, quality(4.5, 0.5, 1.25)),
            QualityRow("auto", 24, quality(3.75, 0.75, 0.5), None, Speed(1234.5, 17.25, 256, 32, 1, 5)),
        ],
        quality_text="64 windows of 512 tokens",
        dense="dense",
        dropped="dropped",
    )
    path = write_report(tmp_path, data)
    report = path.read_text()
    assert path == tmp_path / "report.md"
    assert report.startswith("# A model\n\n## Quality\n")
    header, dense, dropped, auto = table_after(report, "Quality")
    assert dict(zip(header, dense, strict=True)) == {
        "model": "dense",
        "layers": "30",
        "perplexity": "33.12",
        "loss ± s.e. (nats)": "3.5000 ± 0.0625",
        "top-1 agreement": "100.0 %",
        "KL (nats)": "0.000",
        "healed": "",
        "parameters": "134.5 M",
        "size": "538 MB",
        "prefill tok/s": "",
        "decode tok/s": "",
    }
    assert dict(zip(header, dropped, strict=True))["healed"] == ""
    row = dict(zip(header, auto, strict=True))
    assert (row["healed"], row["prefill tok/s"], row["decode tok/s"]) == ("75.0 %", "1,234", "17.25")
    assert "64 windows of 512 tokens, 32,704 predicted tokens" in report
    assert "256 prompt tokens, 32 new tokens, batch 1, median of 5" in report


def test_columns_nobody_measured_are_left_out(tmp_path: Path) -> None:
    data = ReportData(title="t", quality=[QualityRow("dense", 2, quality(3.5))])
    header = table_after(write_report(tmp_path, data).read_text(), "Quality")[0]
    assert header == ["model", "layers", "perplexity", "loss ± s.e. (nats)"]


def test_the_other_sections(tmp_path: Path) -> None:
    data = ReportData(
        title="t",
        steps=["Calibrated.", "Fitted."],
        candidates=[
            CandidateRow("13:19", "linearpatch", 4.25, 13824, False),
            CandidateRow("13:19", "low-rank 64 | x", 3.5, 73728, True),
        ],
        spans=[SpanRow("13:19", "cosine", 0.875, "identity + rank 64")],
        sweep={"none": {1: 40.0, 2: 3e8}, "auto": {2: 44.0}},
        tasks={
            "dense": {"piqa": {"acc": 0.5, "acc_norm": 0.75, "n": 1838}},
            "auto": {"piqa": {"acc": 0.25, "acc_norm": 0.5, "n": 1838}, "copa": {"acc": 1.0, "n": 100}},
        },
        plots={"cosine.png": "Depths"},
        timings={"calibration": 40.04, "fits": 2.0},
        files={"plan.json": "the plan"},
        usage="load()\n",
        sample_prompt="Once",
        sample="upon\na time",
    )
    report = write_report(tmp_path, data).read_text()
    assert "1. Calibrated.\n2. Fitted." in report
    assert [row[0:2] for row in table_after(report, "Candidates")[1:]] == [
        ["13:19", "low-rank 64 \\| x"],
        ["13:19", "linearpatch"],
    ]
    assert table_after(report, "Spans")[1] == ["13:19", "cosine", "0.8750", "identity + rank 64"]
    assert table_after(report, "Perplexity against dropped layers") == [
        ["dropped layers", "none", "auto"],
        ["1", "40", ""],
        ["2", "3e+08", "44"],
    ]
    assert table_after(report, "Accuracy, zero-shot")[1:] == [
        ["piqa", "1838", "50.0 % / 75.0 %", "25.0 % / 50.0 %"],
        ["copa", "100", "", "100.0 %"],
    ]
    assert "![Depths](cosine.png)" in report
    assert table_after(report, "Time")[1:] == [["calibration", "40.0"], ["fits", "2.0"], ["**together**", "**42.0**"]]
    assert "| `plan.json` | the plan |" in report
    assert "```python\nload()\n```" in report
    assert "> Once **⟶** upon\n> a time" in report


def test_an_empty_report_has_a_title_only(tmp_path: Path) -> None:
    assert write_report(tmp_path, ReportData(title="nothing")).read_text().strip() == "# nothing"


@pytest.mark.parametrize(
    ("value", "text"),
    [(33.1234, "33.12"), (0.5, "0.5"), (999.96, "1000"), (12345.6, "12,346"), (3.2e8, "3.2e+08"), (math.inf, "inf")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look at what is in them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def labels(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_depth_cosine_shows_the_matrix_and_marks_the_spans(tmp_path: Path, drawn: list[Figure]) -> None:
    cosine = torch.rand(13, 13, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plot_depth_cosine(tmp_path / "c.png", cosine, [(2, 5), (7, 8)], "tiny")
    assert is_png(tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert torch.equal(torch.tensor(axes.images[0].get_array()), cosine.detach().double())
    assert labels(drawn[0]) == [
        f"drop 2:5, cosine {cosine[2, 5].item():.3f}",
        f"drop 7:8, cosine {cosine[7, 8].item():.3f}",
    ]
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert "tiny" in axes.get_title()


@pytest.mark.parametrize("span", [(5, 5), (3, 2), (-1, 2), (2, 13)])
def test_depth_cosine_refuses_spans_outside(tmp_path: Path, span: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="do not lie within 0:12"):
        plot_depth_cosine(tmp_path / "c.png", torch.eye(13), [span])
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize("shape", [(3,), (3, 4), (1, 1)])
def test_depth_cosine_refuses_what_is_no_matrix_of_depths(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="depth x depth matrix"):
        plot_depth_cosine(tmp_path / "c.png", torch.ones(shape))


def test_joint_magnitudes_are_ranked_by_the_target(tmp_path: Path, drawn: list[Figure]) -> None:
    before, after, target = torch.rand(3, 37, generator=torch.Generator().manual_seed(1)) + 0.1
    plot_joint_magnitudes(tmp_path / "j.png", before, after.bfloat16(), target, (13, 19), "low-rank")
    assert is_png(tmp_path / "j.png")
    order = target.argsort(descending=True)
    lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in drawn[0].axes[0].lines}
    assert torch.equal(lines["before the patch"], before[order].double())
    assert torch.equal(lines["after the patch (low-rank)"], after[order].bfloat16().double())
    assert torch.equal(lines["target: what layer 19 expects"], target[order].double())


def test_joint_magnitudes_refuse_different_widths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="three vectors"):
        plot_joint_magnitudes(tmp_path / "j.png", torch.ones(4), torch.ones(4), torch.ones(5), (1, 2))


@pytest.mark.parametrize("top", [44.0, 900.0, 3e8])
def test_sweep_has_a_line_per_fit_and_the_dense_model(tmp_path: Path, drawn: list[Figure], top: float) -> None:
    plot_sweep(tmp_path / "s.png", {"none": {2: top, 1: 41.0}, "auto": {1: 38.0, 2: 39.0, 3: math.inf}}, 37.5, "tiny")
    assert is_png(tmp_path / "s.png")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["none"] == ([1, 2], [41.0, top])
    assert lines["auto"] == ([1, 2], [38.0, 39.0])
    assert lines["dense (37.5)"][1] == [37.5, 37.5]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 14, "ticks enough to read, not too many"
