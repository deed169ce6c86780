"""``linearpatch inspect`` from outside, and the directories that it does not know."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.report.tables import number
from tests.support.command import LAYERS, SMALL, Run, World, call, changed_plan, refusal


def test_inspect_shows_what_was_decided(world: World, run: Run) -> None:
    done = run("inspect", world.pruned)
    plan = PrunePlan.load(world.pruned)
    assert done.status == 0
    assert done.stderr == ""
    assert "linearpatch_llama" in done.stdout
    assert str(plan.spans[0]) in done.stdout
    assert plan.joints[0].fit in done.stdout
    assert "LinearPatch (the paper's)" in done.stdout
    summary = json.loads(run("inspect", world.pruned, "--json", "-").stdout)
    assert summary["model"]["num_layers"] == LAYERS - 2
    assert summary["plan"]["joints"][0]["span"] == str(plan.spans[0])


def test_inspect_of_a_model_a_plan_and_a_sweep(world: World, run: Run, tmp_path: Path) -> None:
    assert "llama" in run("inspect", world.model).stdout
    arguments = ["-o", tmp_path / "plan", "--text", world.text, *SMALL]
    run("prune", world.model, "--spans", "2:4", "--fit", "scalar", "--plan-only", *arguments)
    assert "2:4" in run("inspect", tmp_path / "plan").stdout
    arguments[1] = tmp_path / "sweep"
    run("sweep", world.model, "--drop", "1,3", "--fits", "none,scalar", *arguments)
    done = run("inspect", tmp_path / "sweep")
    assert done.status == 0
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    for point in points:
        assert point["spans"][0] in done.stdout
        assert number(point["perplexity"]) in done.stdout


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ("ssfssf", "2 x s, f, repeated"),
        (
            "ssfsf",
            "2 x s, f, s, f (irregular: engines that compute the kinds of layers from a period will run it wrongly",
        ),
        ("ffff", None),
    ],
)
def test_inspect_says_how_kinds_of_layers_repeat(run: Run, tmp_path: Path, kinds: str, words: str | None) -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": len(kinds), "layer_types": list(kinds)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = json.loads(run("inspect", tmp_path, "--json", "-").stdout)["model"].get("layer_pattern")
    assert told is None if words is None else told.startswith(words)


def test_a_terminal_that_lacks_a_letter(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_plan(lambda plan: plan | {"calibration": {"source": "süß.txt"}})(world, tmp_path / "given")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call("inspect", tmp_path / "given") == 0
    terminal.flush()
    assert "source s??.txt" in terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]  # set by the test


def only(name: str, content: str) -> Callable[[World, Path], None]:
    def build(_: World, place: Path) -> None:
        place.mkdir()
        (place / name).write_text(content)

    return build


def replaced(name: str, content: str | None) -> Callable[[World, Path], None]:
    def build(world: World, place: Path) -> None:
        shutil.copytree(world.pruned, place)
        (place / RECORDS / name).unlink()
        if content is not None:
            (place / RECORDS / name).write_text(content)

    return build


FOREIGN = {
    "nowhere": lambda _, __: None,
    "a file": lambda _, place: place.touch(),
    "empty": lambda _, place: place.mkdir(),
    "somebody's plan": only("plan.json", '{"terraform_version": "1.5"}'),
    "a plan that is a list": only("plan.json", "[]"),
    "a config that is a list": only("config.json", "[]"),
    "a config that is no JSON": only("config.json", "{"),
    "a binary config": lambda _, place: (place.mkdir(), (place / "config.json").write_bytes(b"\xff\xfe")),
    "somebody's config": only("config.json", '{"port": 80}'),
    "patches as a list": only("config.json", '{"model_type": "llama", "linearpatch": [1]}'),
    "patches without numbers": only("config.json", '{"model_type": "x", "linearpatch": {"joints": {"a": 1}}}'),
    "somebody's sweep": only("sweep.json", '{"points": 3}'),
    "a sweep of strings": only("sweep.json", '{"dense": {"perplexity": 1}, "points": [{"drop": 1}]}'),
    "plan cut": replaced("plan.json", '{"format": "linearpatch-plan",'),
    "tensors missing": replaced("plan.safetensors", None),
    "tensors broken": replaced("plan.safetensors", "x"),
    "plan of a later version": changed_plan(lambda plan: plan | {"version": 99}),
    "plan without joints": changed_plan(lambda plan: {k: v for k, v in plan.items() if k != "joints"}),
    "joints of another kind": changed_plan(lambda plan: plan | {"joints": "none"}),
    "joint without a patch": changed_plan(lambda plan: plan | {"joints": [{"span": "2:4"}]}),
    "span beyond the model": changed_plan(lambda plan: plan | {"num_layers": 3}),
    "layers in words": changed_plan(lambda plan: plan | {"num_layers": "eight"}),
    "unknown patch": changed_plan(
        lambda plan: plan | {"joints": [plan["joints"][0] | {"patches": [{"kind": "magic", "dim": 48}]}]}
    ),
    "candidates of another kind": changed_plan(lambda plan: plan | {"candidates": [{"fit": "none"}]}),
    "summary broken": replaced("summary.json", "{"),
    "summary of somebody": replaced("summary.json", '{"quality": {"dense": 3}}'),
    "summary is a list": replaced("summary.json", '{"quality": [1]}'),
}


@pytest.mark.parametrize("case", list(FOREIGN))
def test_inspect_refuses_foreign_directories(world: World, run: Run, tmp_path: Path, case: str) -> None:
    FOREIGN[case](world, tmp_path / "given")
    refusal(run("inspect", tmp_path / "given"))
