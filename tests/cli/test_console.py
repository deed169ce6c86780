"""What all commands have in common: help, progress, ``--json``, names printed as they are, errors in one line."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from linearpatch_kernels import __version__
from linearpatch_kernels.cli import console
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.recipes.log import Log
from tests.support.command import (
    COMMANDS,
    LAYERS,
    NO_MODEL,
    PACKAGE_ROOT,
    PROGRESS,
    SMALL,
    Outcome,
    Run,
    World,
    refusal,
)


def test_help_answers_without_torch() -> None:
    program = """
import sys
from linearpatch_kernels.cli import main
for command in sys.argv[1:] + [""]:
    sys.argv = ["linearpatch", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
heavy = {"torch", "transformers", "matplotlib", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    # Doctor's names records that only modules with torch in them have (test_doctor.py).
    done = subprocess.run(
        [sys.executable, "-c", program, *(command for command in COMMANDS if command != "doctor")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    flags = ("--drop", "--spans", "--teacher", "--tasks", "--plan-only", "--structured", "--json")
    for word in (*COMMANDS, *flags, "MODEL"):
        assert word in done.stdout


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done == run("--help")
    assert done.status == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_the_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"linearpatch {__version__}\n", "")


def test_unknown_commands(run: Run) -> None:
    assert "prone" in refusal(run("prone"))
    assert "--version-of" in refusal(run("--version-of"))


def test_progress_is_a_few_plain_lines_and_not_on_stdout(world: World, run: Run, tmp_path: Path) -> None:
    done = run("prune", world.model, "--drop", 2, "-o", tmp_path / "out", "--text", world.text, *SMALL)
    assert done.errors == []
    assert 3 <= len(done.progress) <= 8
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout
    assert not any(PROGRESS.fullmatch(line) for line in done.stdout.splitlines())


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(console, "problems", terminal)
    reporter = console.Terminal()
    log = Log(reporter)
    with log.stage("work"):
        for done in range(5):
            log.progress("calibrating", done, 5)
    log.progress("evaluating", 1, 2)
    reporter.finish()
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]  # set by the test
    assert "calibrating" in drawn
    assert "━" in drawn
    assert "4/5" in drawn
    assert "1/2" in drawn
    # Nothing of it stays.
    assert drawn.rstrip().endswith("\x1b[2K")
    assert set(log.seconds) == {"work"}


def test_names_with_brackets_and_colons_are_printed_as_they_are(world: World, run: Run, tmp_path: Path) -> None:
    source = world.copy(tmp_path / "model[bold] :x:")
    out = tmp_path / "out [red] :x:"
    done = run("prune", source, "--drop", 1, "--fit", "scalar", "-o", out, "--text", world.text, *SMALL)
    assert str(out) in done.stdout
    assert "model[bold] :x:" in (out / RECORDS / "report" / "report.md").read_text()
    assert "model[bold] :x:" in run("evaluate", source, "--text", world.text, "--length", 24).stdout
    assert "no [red] :x:" in refusal(run("inspect", tmp_path / "no [red] :x:"))


@pytest.mark.parametrize("command", ["prune", "evaluate", "sweep", "inspect", "doctor"])
def test_json_alone_is_on_stdout(world: World, run: Run, tmp_path: Path, command: str) -> None:
    text = ["--text", world.text, "--length", 24]
    small = ["-o", tmp_path / "out", *text, "--samples", 6, "--rank", 4]
    arguments = {
        "prune": [world.model, "--drop", 2, *small],
        "evaluate": [world.model, *text],
        "sweep": [world.model, "--drop", "1-2", "--fits", "none", *small],
        "inspect": [world.pruned],
        "doctor": [],
    }[command]
    done = run(command, *arguments, "--json", "-")
    assert done.status == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert "━" in done.stderr
    # The next command in the same process writes its tables where they belong.
    assert "━" in run("inspect", world.pruned).stdout


def test_figures_go_where_they_are_sent(world: World, run: Run, tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    real.write_text("a person's own")
    link.symlink_to(real)
    os.mkfifo(pipe)
    assert "no file of linearpatch's" in refusal(run("inspect", world.model, "--json", link))
    assert real.read_text() == "a person's own"
    real.write_text("")
    for _ in range(2):
        assert run("inspect", world.model, "--json", link).status == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["model"]["num_layers"] == LAYERS
    # A pipe, /dev/null or a terminal must not be replaced by a file.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run("inspect", world.model, "--json", pipe).status == 0
    assert json.loads(os.read(reader, 1 << 16)) == json.loads(real.read_text())
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "pipe", "real.json"]


def test_json_has_no_word_for_infinity(tmp_path: Path) -> None:
    console.write_json(tmp_path / "figures.json", {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


@pytest.mark.parametrize("command", ["merge", "sweep", "evaluate"])
def test_several_processes_of_a_command_for_one_are_refused(
    run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = ["-o", empty / "out"]
    flags = {"merge": ["--layers", 2, *output], "sweep": ["--drop", 2, *output], "evaluate": []}[command]
    line = refusal(run(command, NO_MODEL, *flags))
    assert f"{command} runs in one process and WORLD_SIZE=2 says that 2 were started: start it without torchrun" in line


def test_a_traceback_only_where_asked(world: World, run: Run) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        run("inspect", NO_MODEL, "--debug")
    with pytest.raises(ValueError, match="is not a directory"):
        run("--debug", "inspect", NO_MODEL)


def test_an_unexpected_error_is_one_line_too(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(PrunePlan, "load", broken)
    done = run("inspect", world.pruned)
    assert done.status == 2
    assert done.errors == ["error: RuntimeError: first line second line (--debug shows where)"]
