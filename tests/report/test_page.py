"""What stands on the page of a run."""

from __future__ import annotations

import math
from pathlib import Path

from linearpatch_kernels.evaluation import ModelSize, Quality, Speed
from linearpatch_kernels.report.page import CandidateRow, QualityRow, ReportData, SpanRow, write_report


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
