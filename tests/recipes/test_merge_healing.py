"""`merge` with the ways to heal: what is written, going on after a kill, and what is refused before any work."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.healing import merges
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import Patch
from linearpatch_kernels.pruning.fits import UnusableFit
from linearpatch_kernels.recipes import healing
from tests.support.field import linearpatch

SMALL: dict[str, Any] = {"samples": 12, "length": 16, "rank": 4, "device": "cpu", "layers": 4, "variant": "come-block"}


def merge(place: Path, output: Path, **settings: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return lp.merge(place / "dense", output=output, text=place / "numbers.txt", **{**SMALL, **settings})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output).state_dict()


def test_the_layers_behind_are_refitted_where_that_is_asked(place: Path, tmp_path: Path) -> None:
    results = {behind: merge(place, tmp_path / str(behind), heal="refit", behind=behind) for behind in (None, 0, 2)}
    index = next(index for index, node in enumerate(results[2].plan.tree) if isinstance(node, list))
    reach = [layer for layer in (index + 1, index + 2) if layer < SMALL["layers"]]
    for behind, result in results.items():
        rows = result.summary["refit"]
        assert [row["layer"] for row in rows] == [index, *(layer for layer in reach for _ in range(4) if behind)]
        assert result.summary["heal"] == "refit"
    # None behind is what was so far.
    states = {behind: weights(tmp_path / str(behind)) for behind in results}
    assert all(torch.equal(value, states[0][name]) for name, value in states[None].items())
    assert any(not torch.equal(value, states[0][name]) for name, value in states[2].items())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "2")) is LlamaForCausalLM
    report = (tmp_path / "2" / "linearpatch" / "report" / "report.md").read_text()
    assert "(refit, 2 behind)" in report
    assert "projections of the layers" in report
    assert sorted(tmp_path.iterdir()) == [tmp_path / name for name in ("0", "2", "None")]


def test_three_names_of_the_same_patch(place: Path, tmp_path: Path) -> None:
    given: dict[str, dict[str, Any]] = {
        "heal": {"heal": "low-rank"},
        "fit": {"fit": "low-rank"},
        "both": {"heal": "patch", "fit": "low-rank"},
    }
    states = {}
    for name, settings in given.items():
        result = merge(place, tmp_path / name, **settings)
        assert (result.summary["heal"], result.summary["fit"]) == ("patch", "low-rank")
        assert "merged, low-rank patches" in result.quality
        states[name] = weights(tmp_path / name)
    assert all(torch.equal(value, states["heal"][name]) for other in given for name, value in states[other].items())
    assert "fit" not in merge(place, tmp_path / "none", fit="none").summary


def test_a_patch_and_new_weights_behind_it(place: Path, tmp_path: Path) -> None:
    result = merge(place, tmp_path / "out", heal="patch+refit", fit="low-rank")
    assert "merged, low-rank patches, refitted" in result.quality
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    index = next(index for index, node in enumerate(result.plan.tree) if isinstance(node, list))
    assert [*patches(model)] == [index + 1]
    assert {row["layer"] for row in result.summary["refit"]} == set(range(index + 1, SMALL["layers"]))


def test_auto_says_what_it_compared(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [part for name, value in SMALL.items() for part in (f"--{name}", value)]
    arguments = ["--text", place / "numbers.txt", "--heal", "auto", "-o", tmp_path / "out"]
    assert linearpatch("merge", place / "dense", *arguments, *small) is None
    assert "Ways to heal on held-out calibration windows" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "out" / "linearpatch" / "summary.json").read_text())
    assert summary["heal_candidates"].keys() == {"dense", *HEALS}
    losses = {name: one["loss"] for name, one in summary["heal_candidates"].items()}
    taken = summary.get("heal", "none")
    assert losses[taken] <= losses["none"]
    assert bool(patches(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == HEALS[taken].patched


def test_auto_leaves_out_a_patch_that_cannot_be_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(*_: Any, **__: Any) -> Patch:
        raise UnusableFit("no solution")

    monkeypatch.setattr(merges, "fit_patch", unusable)
    result = merge(place, tmp_path / "out", heal="auto")
    assert result.summary["heal_candidates"].keys() == {"dense", "none", "refit"}
    assert "not a candidate: no solution" in result.summary["notes"]


class Killed(BaseException):
    """Like a signal: nothing that handles errors handles it."""


@pytest.mark.parametrize("heal", ["refit", "patch+refit", "auto"])
def test_a_killed_refit_goes_on_to_the_same_bits(
    heal: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"heal": heal, "behind": 2}
    merge(place, tmp_path / "whole", **settings)
    real, steps = healing.RefitWork.keep, []

    def keep(self: Any, way: str, step: Any, weights: Mapping[str, Any], rows: Sequence[Any]) -> None:
        real(self, way, step, weights, rows)
        steps.append(step)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(healing.RefitWork, "keep", keep)
        with pytest.raises(Killed):
            merge(place, tmp_path / "killed", **settings)
    assert len(steps) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"whole", ".killed.merges", ".killed.refit"}
    small = [part for name, value in {**SMALL, **settings}.items() for part in (f"--{name}", value)]
    arguments = ["--text", place / "numbers.txt", "-o", tmp_path / "killed"]
    assert linearpatch("merge", place / "dense", *arguments, *small) is None
    told = capsys.readouterr().err
    assert "going on from 1 merges" in told
    assert "going on from a refit that did not finish" in told
    for name in ("model.safetensors", "config.json", "linearpatch/merge.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    summaries = [json.loads((tmp_path / name / "linearpatch/summary.json").read_text()) for name in ("killed", "whole")]
    assert summaries[0]["refit"] == summaries[1]["refit"]
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "killed"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"heal": "refti"},
            "`heal` refti is no way to heal: choose one of none, patch, refit, patch.refit, auto, ",
        ),
        ({"fit": "best"}, "no fit is called 'best'"),
        ({"heal": "low-rank", "fit": "scalar"}, "`heal` low-rank is a fit and `fit` scalar another one"),
        ({"heal": "patch+refit", "fit": "none"}, "`fit` none is none: name another fit"),
        ({"heal": "low-rank", "behind": 2}, "`behind` is of a refit, and this way to heal has none"),
        ({"heal": "patch+refit", "samples": 3}, "`samples` 3 is too few for a refit"),
        ({"behind": -1}, "`behind` must be at least 0"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        merge(place, tmp_path / "out", **settings)
    assert not [*tmp_path.iterdir()]
