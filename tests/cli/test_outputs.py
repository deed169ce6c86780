"""Where the commands write: what they refuse to replace, full disks, kills and interrupts."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from linearpatch_kernels.files import directories
from linearpatch_kernels.pruning.plan import PrunePlan
from tests.support.command import NO_MODEL, SMALL, Run, World, refusal, run_apart, tree


@pytest.mark.parametrize(("command", "flags"), [("prune", ["--plan-only"]), ("sweep", [])])
def test_no_report_replaces_the_model(world: World, run: Run, tmp_path: Path, command: str, flags: list[str]) -> None:
    model = Path(shutil.copytree(world.pruned, tmp_path / "model"))
    before = tree(tmp_path)
    line = refusal(run(command, model, "--drop", 1, "-o", model, "--text", world.text, *flags))
    assert "model, which is still needed: give another directory" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_outputs_are_refused_before_the_model(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    before = tree(tmp_path)
    for place, says in (
        ("file", "is a file"),
        ("file/out", "not a directory"),
        ("thesis", "not an output of linearpatch"),
    ):
        line = refusal(run(command, NO_MODEL, "--drop", 2, "-o", f"{tmp_path}/{place}", "--text", world.text))
        assert says in line
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]
    assert "--output" in refusal(run(command, NO_MODEL, "--drop", 2, "--text", world.text))
    assert "not an output" in refusal(run(command, world.model, "--drop", 2, "--text", world.text, "-o", world.model))
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inside")
    for place in (".", "..", tmp_path / "empty"):
        line = refusal(run(command, NO_MODEL, "--drop", 2, "--text", world.text, "-o", place))
        assert "working directory" in line


def test_a_place_that_cannot_be_written_is_refused_before_the_model(world: World, run: Run, read_only: Path) -> None:
    for place in (read_only / "out", read_only / "deep" / "out"):
        assert "write" in refusal(run("prune", NO_MODEL, "--drop", 2, "-o", place, "--text", world.text))
    line = refusal(run("evaluate", NO_MODEL, "--text", world.text, "--json", read_only / "figures.json"))
    assert "figures.json" in line


def test_too_small_a_disk_is_refused_before_the_long_work(world: World, run: Run, small_disk: Path) -> None:
    done = run("prune", world.model, "--drop", 2, "-o", small_disk / "out", "--text", world.text, *SMALL)
    assert "make room" in refusal(done)
    assert done.progress == []
    assert os.listdir(small_disk) == []


def test_a_disk_that_fills_up_keeps_the_old_output(
    world: World, run: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    prune = ["prune", world.model, "--drop", 2, "--fit", "auto", "-o", out, "--text", world.text, *SMALL]
    assert run(*prune, "--plan-only").status == 0
    before = tree(out)
    # Somebody else fills the disk after it has been looked at.
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    line = refusal(run(*prune))
    assert "No space left" in line
    assert f"what was finished is kept in {small_disk / 'out.unfinished'}" in line
    assert tree(out) == before
    assert sorted(os.listdir(small_disk)) == ["out", "out.unfinished"]
    assert str(PrunePlan.load(small_disk / "out.unfinished").spans[0]) == str(PrunePlan.load(out).spans[0])
    assert not list((small_disk / "out.unfinished").glob("*.safetensors"))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Exception("No space left on device")])
def test_any_writer_may_find_the_disk_full(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Python says OSError, the tokenizers library a bare Exception."""

    def full(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    arguments = ["--drop", 2, "--fit", "scalar", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    line = refusal(run("prune", world.model, *arguments))
    assert "No space left" in line
    assert "out" in line
    assert os.listdir(tmp_path) == ["out.unfinished"]
    assert str(PrunePlan.load(tmp_path / "out.unfinished").joints[0].fit) == "scalar"


KILLED = """
import os, signal
from linearpatch_kernels.files import directories
directories._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_saving_leaves_the_old_output_and_the_next_run_cleans_up(
    world: World, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", world.model, "--spans", "2:4", "--fit", "scalar", "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, "--spans", "5:6", *arguments[4:]).status == 0
    before = tree(out)
    killed = run_apart(*arguments, program=KILLED)
    assert killed.status == -signal.SIGKILL
    assert tree(out) == before
    assert len(os.listdir(tmp_path)) == 2
    assert run(*arguments).status == 0
    assert str(PrunePlan.load(out).spans[0]) == "2:4"
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupt_leaves_nothing(world: World, run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    done = run("prune", world.model, "--drop", 2, "--fit", "none", "-o", empty / "out", "--text", world.text, *SMALL)
    assert done.status == 130
    assert done.errors == ["error: interrupted: nothing is left half-written"]


def test_an_output_on_a_mount_point_is_refused_before_the_long_work(
    world: World, run: Run, tmp_path: Path, small_disk: Path
) -> None:
    done = run("prune", world.model, "--drop", 2, "--plan-only", "-o", small_disk, "--text", world.text, *SMALL)
    assert "mount" in refusal(done)
    assert done.progress == []
