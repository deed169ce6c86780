"""docs/add/score.md: a score that is one file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from linearpatch_kernels.calibration import calibrate
from linearpatch_kernels.pruning.scores import SCORES, choose_spans, score_spans
from linearpatch_kernels.records import Registry
from tests.support.field import save_model, text_file, tiny
from tests.support.pages import ROOT, python_of, run_program


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry with the page's score in it, until the test ends."""
    monkeypatch.setitem(SCORES, "both-cosines", None)
    del SCORES["both-cosines"]
    exec(python_of("add/score.md"), {"__name__": "my_score"})
    return SCORES


def test_it_ranks_the_spans(added: Registry) -> None:
    windows = torch.randint(3, 97, (5, 16), generator=torch.Generator().manual_seed(0))
    statistics = calibrate(tiny(), windows.split(2))
    both = statistics.mean_token_cosine() + statistics.mean_channel_cosine()
    found = score_spans(statistics, 2, "both-cosines")
    assert len(found) == 3
    assert all(value == float(both[span.start, span.end]) for span, value in found.items())
    assert choose_spans(statistics, 2, "both-cosines") == [max(found, key=lambda span: found[span])]


def test_the_pages_name_it(added: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    page = importlib.import_module("choices_reference").page()
    assert "| `both-cosines` | the sum of cosine and channel-cosine | docs/add/score.md |" in page


def test_the_command_takes_it(tmp_path: Path) -> None:
    file = tmp_path / "my_score.py"
    file.write_text(python_of("add/score.md"))
    told = "both-cosines (the sum of cosine and channel-cosine)"
    for command in ("prune", "sweep"):
        assert told in " ".join(run_program(file, command, "--help").replace("│", " ").split())
    assert "both-cosines" in json.loads(run_program(file, "doctor", "--json", "-"))["scores"]
    model = save_model(tiny(), tmp_path / "model")
    arguments = ("--text", text_file(tmp_path), "--samples", 4, "--length", 16, "--device", "cpu", "--fit", "none")
    run_program(file, "prune", model, "--drop", 2, "--score", "both-cosines", "-o", tmp_path / "out", *arguments)
    plan = json.loads((tmp_path / "out" / "linearpatch" / "plan.json").read_text())
    assert plan["score"] == "both-cosines"
