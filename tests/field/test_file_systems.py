"""What a file system lacks, or what a command line cannot mean, is told before the work or done without.

Reports: huggingface_hub #2399 (no flock on Lustre and some NFS), libuv #2596, copier #2298 and
mountpoint-s3-csi-driver #511 (no chmod on CIFS and S3).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import directories
from linearpatch_kernels.pruning import search as pruning
from tests.support.field import SMALL, failing, linearpatch, save_model, text_file, tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_model(tiny(), home / "dense")
    text_file(home)
    return home


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a calibration: the long work of a command."""
    seen: list[int] = []
    calibrate = pruning.calibrate

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(pruning, "calibrate", counted)
    return seen


def prune(home: Path, out: object, *more: object) -> Exception | None:
    arguments = ["--drop", "2", "--fit", "linearpatch", "--text", home / "numbers.txt", *SMALL]
    return linearpatch("prune", home / "dense", "-o", out, *arguments, *more)


NICETIES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "flock, ENOSYS": (fcntl, "flock", failing(errno.ENOSYS)),
    "flock, ENOLCK": (fcntl, "flock", failing(errno.ENOLCK)),
    "flock, EOPNOTSUPP": (fcntl, "flock", failing(errno.EOPNOTSUPP)),
    "chmod": (Path, "chmod", failing(errno.EPERM)),
    "fsync of directories": (os, "fsync", failing(errno.EINVAL, lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode))),
    "atomic exchange": (directories, "_exchanged", lambda _: lambda *_: False),
}


@pytest.mark.parametrize("nicety", list(NICETIES))
def test_a_nicety_that_is_missing_is_done_without(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nicety: str
) -> None:
    place, name, make = NICETIES[nicety]
    monkeypatch.setattr(place, name, make(getattr(place, name)))
    for _ in range(2):  # the second takes the place of the first
        assert prune(home, tmp_path / "out") is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("need", ["mkdir", "rename"])
def test_what_is_needed_and_missing_is_told_before_the_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrations: list[int], need: str
) -> None:
    monkeypatch.setattr(Path, need, failing(errno.EROFS)(getattr(Path, need)))
    error = prune(home, tmp_path / "out")
    assert isinstance(error, InputError)
    assert "Read-only file system" in str(error)
    assert calibrations == []


IMPOSSIBLE: dict[str, list[object]] = {
    "a long name": ["-o", "x" * 300],
    "a home that is not there": ["-o", "~nobody-of-this-name/x"],
    "a link to itself": ["-o", "loop"],
    "an empty name": ["-o", ""],
    "an empty text": ["--text", ""],
    "a text with a long name": ["--text", "x" * 300],
    "a device that is full": ["--json", "/dev/full"],
    "figures in a loop": ["--json", "loop"],
    "figures behind a dangling link": ["--json", "dangling"],
    "figures below a file": ["--json", "file/x"],
    "figures with a long name": ["--json", "x" * 251],
    "figures with no name": ["--json", ""],
    "a name that is not UTF-8": ["-o", os.fsdecode(b"out\xff")],
    "batches beyond 64 bits": ["--batch-size", "99999999999999999999"],
    "windows beyond 64 bits": ["--samples", "99999999999999999999"],
    "a rank beyond 64 bits": ["--rank", "99999999999999999999"],
}


@pytest.mark.parametrize("what", list(IMPOSSIBLE))
def test_what_cannot_be_is_one_line_before_the_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrations: list[int], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to(tmp_path / "nowhere" / "f.json")
    Path("file").touch()
    error = prune(home, "out", *IMPOSSIBLE[what])
    # An option's own parser speaks through typer, whose error is one line as well.
    assert isinstance(error, InputError) or type(error).__name__ == "BadParameter", repr(error)
    assert calibrations == []
    assert sorted(os.listdir()) == ["dangling", "file", "loop"]


def test_a_save_that_fails_at_the_very_end_keeps_the_finished_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's directory of the same name appeared while the command ran."""
    flush = directories._flush

    def appears(draft: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        flush(draft)

    monkeypatch.setattr(directories, "_flush", appears)
    error = prune(home, tmp_path / "out")
    assert f"what was finished is kept in {tmp_path / 'out.unfinished'}" in str(error)
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out.unfinished").config.num_hidden_layers == 4
    # A second one is kept beside the first.
    monkeypatch.setattr(
        directories, "_flush", lambda draft: (tmp_path / "new").mkdir() or (tmp_path / "new" / "x").touch()
    )
    (tmp_path / "new.unfinished").mkdir()
    assert str(tmp_path / "new.unfinished1") in str(prune(home, tmp_path / "new"))


def test_a_save_that_fails_half_way_keeps_the_plan(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", failing(errno.ENOSPC)(None))
    error = prune(home, tmp_path / "out")
    assert "No space left on device" in str(error)
    kept = tmp_path / "out.unfinished"
    assert str(kept) in str(error)
    assert {"plan.json", "plan.safetensors", "summary.json"} <= {path.name for path in (kept / "linearpatch").iterdir()}
    assert not (kept / "model.safetensors").exists()


def test_a_text_may_have_a_name_that_is_not_utf8(home: Path, tmp_path: Path) -> None:
    """As files unpacked from old archives have."""
    text = tmp_path / os.fsdecode(b"t\xff.txt")
    shutil.copy(home / "numbers.txt", text)
    for flag in ("--text", "--heldout-text"):
        assert prune(home, tmp_path / "out", flag, text) is None
    assert "t?.txt" in (tmp_path / "out" / "linearpatch" / "report" / "report.md").read_text()


MAIN = "from linearpatch_kernels.cli import main; main()"


def apart(home: Path, out: Path, redirection: str, *more: object) -> int:
    """The status of a prune in a process of its own, its output sent somewhere by a shell."""
    arguments = ["prune", home / "dense", "--drop", "2", "--fit", "none", "-o", out, "--text", home / "numbers.txt"]
    command = shlex.join([sys.executable, "-c", MAIN, *map(str, [*arguments, *SMALL, *more])])
    return subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True).returncode


@pytest.mark.slow
def test_what_cannot_be_said_costs_nothing(home: Path, tmp_path: Path) -> None:
    """A log on a full disk, and a reader that has read enough."""
    for number, redirection in enumerate(("2>/dev/full", ">/dev/full", "| head -c 1")):
        out, figures = tmp_path / f"out{number}", tmp_path / f"{number}.json"
        status = apart(home, out, redirection, "--json", figures)
        assert (out / "model.safetensors").exists()
        assert json.loads(figures.read_text())["spans"]
        assert status == 0 or redirection == ">/dev/full"
