"""``linearpatch sweep`` from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.report.tables import number
from tests.support.command import CONTEXT, NO_MODEL, SMALL, WIDTH, Run, World, assert_is_picture, prose, refusal


def test_sweep_compares_every_depth_with_every_fit(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--drop", "1-2,4", "--fits", "none,linearpatch", "-o", out, "--text", world.text, *SMALL]
    done = run("sweep", world.model, "--windows", 16, *arguments)
    assert done.status == 0
    assert done.errors == []
    summary = json.loads((out / "sweep.json").read_text())
    assert [(point["drop"], point["fit"]) for point in summary["points"]] == [
        (drop, fit) for drop in (1, 2, 4) for fit in ("none", "linearpatch")
    ]
    assert all(number(point["perplexity"]) in done.stdout for point in summary["points"])
    assert_is_picture(out / "quality-against-depth.png")
    report = (out / "report.md").read_text()
    assert "quality-against-depth.png" in report
    assert os.listdir(tmp_path) == ["out"]
    alone = tmp_path / "alone"
    assert run("prune", world.model, "--drop", 2, "--fit", "none", "-o", alone, *arguments[6:]).status == 0
    dropped = json.loads((alone / RECORDS / "summary.json").read_text())["quality"]["dropped (no patch)"]
    assert dropped["perplexity"] == pytest.approx(summary["points"][2]["perplexity"], rel=1e-5)


def test_a_sweep_into_the_same_directory_replaces_it(world: World, run: Run, tmp_path: Path) -> None:
    arguments = ["--fits", "none", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    assert run("sweep", world.model, "--drop", "1", *arguments).status == 0
    assert run("sweep", world.model, "--drop", "2,3", *arguments).status == 0
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert [point["drop"] for point in points] == [2, 3]


def test_a_killed_sweep_goes_on_and_one_of_another_text_does_not(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearpatch_kernels.pruning import search as pruning

    arguments = ["--drop", "1-2", "--fits", "none,low-rank", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    expected = run("sweep", world.model, *arguments[:5], tmp_path / "expected", *arguments[6:])

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "compare_candidates", killed)
        stopped = run("sweep", world.model, *arguments)
    assert stopped.status == 130
    other = tmp_path / "other.txt"
    other.write_text(prose(3000, seed=9))
    foreign = run("sweep", world.model, *arguments[:7], other, *arguments[8:])
    assert not any("going on" in line for line in foreign.progress)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "compare_candidates", killed)
        run("sweep", world.model, *arguments)
    resumed = run("sweep", world.model, *arguments)
    assert any("going on" in line for line in resumed.progress)
    assert not any("calibrating" in line for line in resumed.progress)
    assert resumed.stdout.split("Time:")[0] == expected.stdout.split("Time:")[0]
    assert sorted(os.listdir(tmp_path)) == ["expected", "other.txt", "out"]


SWEEP_FLAGS = {
    "words": (["--drop", "a"], "1-12"),
    "nothing": (["--drop", ""], "1-12"),
    "open": (["--drop", "1-"], "1-12"),
    "reversed": (["--drop", "3-1"], "smaller number first"),
    "reversed, beside a good one": (["--drop", "2,3-1"], "smaller number first"),
    "superscript": (["--drop", "1-²"], "1-12"),
    "zero": (["--drop", "0-2"], "0"),
    "beyond any model": (["--drop", "1-99999999999"], "99999999999"),
    "fit": (["--drop", "1-2", "--fits", "none,magic"], "magic"),
    "auto": (["--drop", "1-2", "--fits", "auto"], "auto"),
    "no fits": (["--drop", "1-2", "--fits", ","], "fit"),
    "score": (["--drop", "1-2", "--score", "loss"], "cosine"),
    "device": (["--drop", "1-2", "--device", "gpu"], "cpu, cuda"),
    "json": (["--drop", "1-2", "--json", "/nowhere/figures.json"], "/nowhere"),
}


@pytest.mark.parametrize("case", list(SWEEP_FLAGS))
def test_sweep_refuses_flags_before_the_model(world: World, run: Run, empty: Path, case: str) -> None:
    flags, says = SWEEP_FLAGS[case]
    assert says in refusal(run("sweep", NO_MODEL, *flags, "-o", empty / "out", "--text", world.text))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--drop", "1-7"], "1 to 6"),
        (["--drop", "2", "--rank", WIDTH + 1], "1 to 48"),
        (["--drop", "2", "--length", CONTEXT + 1], str(CONTEXT)),
        (["--drop", "2", "--samples", 10**5], "too short"),
        (["--drop", "2", "--text", "short.txt"], "too short"),
        (["--drop", "2", "--text", "exact.txt"], "no windows to evaluate on"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_sweep_refuses_what_does_not_fit_the_model(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], says: str
) -> None:
    (tmp_path / "short.txt").write_text("Much too short.")
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    ids = tokenizer(world.text.read_text(), verbose=False).input_ids
    (tmp_path / "exact.txt").write_text(tokenizer.decode(ids[: 6 * 24 + 3]))
    monkeypatch.chdir(tmp_path)
    text = [] if "--text" in flags else ["--text", world.text]
    done = run("sweep", world.model, "-o", empty / "out", *text, *SMALL, *flags)
    assert says in refusal(done)
    assert done.progress in ([], ["note: the text leaves 0 windows of 8 for the report's figures"])


def test_a_sweep_does_without_what_it_has_no_room_to_keep(world: World, run: Run, small_disk: Path) -> None:
    arguments = ["--drop", "1-2", "--fits", "none", "-o", small_disk / "out", "--text", world.text, *SMALL]
    assert run("sweep", world.model, *arguments, "--samples", 100).status == 0
    assert os.listdir(small_disk) == ["out"]
