"""The data in the pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.report.plots import plot_depth_cosine, plot_joint_magnitudes, plot_sweep


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
