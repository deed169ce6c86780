"""docs/add/fit.md: a fit that is one file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.nn import DiagonalPatch
from linearpatch_kernels.pruning.fits import AUTO, FITS, fit_patch, fits_of
from linearpatch_kernels.records import Registry
from tests.support.field import save_model, text_file, tiny
from tests.support.pages import ROOT, python_of, run_program

SPAN = Span(2, 4)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry with the page's fit in it, until the test ends."""
    monkeypatch.setitem(FITS, "median", None)
    del FITS["median"]
    exec(python_of("add/fit.md"), {"__name__": "my_fit"})
    return FITS


def test_the_function_is_called_with_the_joint(added: Registry) -> None:
    windows = torch.randint(3, 97, (5, 16), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(tiny(), windows.split(2))
    patch = fit_patch(statistics.at(SPAN), "median")
    assert isinstance(patch, DiagonalPatch)
    ratios = statistics.mean_abs[:, SPAN.end] / statistics.mean_abs[:, SPAN.start]
    torch.testing.assert_close(patch.scale.detach(), ratios.median(dim=0).values)
    assert added["median"] in fits_of(AUTO, structured=True)


def test_the_pages_name_it(added: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    page = importlib.import_module("choices_reference").page()
    assert "| `median` | a ratio per channel, the median of the windows | diag(s) | docs/add/fit.md |" in page


def test_the_command_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "my_fit.py"
    file.write_text(python_of("add/fit.md"))
    helped = "median (a ratio per channel, the median of the windows)"
    assert helped in " ".join(run_program(file, "prune", "--help").replace("│", " ").split())
    assert "median" in json.loads(run_program(file, "doctor", "--json", "-"))["fits"]
    model = save_model(tiny(), tmp_path / "model")
    arguments = ("--text", text_file(tmp_path), "--samples", 4, "--length", 16, "--device", "cpu")
    run_program(file, "prune", model, "--spans", "2:4", "--fit", "median", "-o", tmp_path / "out", *arguments)
    plan = json.loads((tmp_path / "out" / "linearpatch" / "plan.json").read_text())
    told = [(joint["fit"], [patch["kind"] for patch in joint["patches"]]) for joint in plan["joints"]]
    assert told == [("median", ["diagonal"])]
