"""The GPU day without a GPU: every step goes through, what was cut off is read, and the page says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu_day import publish, timing
from tools.gpu_day.table import lines_of, told

ROOT = Path(__file__).parents[2]
FOR_GPUS = {"ncu", "memcheck", "racecheck", "triton-memcheck"}  # need tools that read a GPU


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    steps = "machine hello check headline decode others losses host model triton-check triton-times more"
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "BUDGET": "800", "ONLY": steps}
    environment |= {"OMP_NUM_THREADS": "1", "SLOWER": "4"}
    command = ["bash", str(ROOT / "tools/gpu_day/run.sh"), "--dry"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    phases = {one["phase"]: one for one in lines_of([tmp_path / "phases.jsonl"])}
    assert list(phases) == steps.split()
    assert {name for name, one in phases.items() if one.get("rc") != 0} == set(), done.stdout
    assert len(list(tmp_path.iterdir())) <= 8, "more files do not come back"
    call = publish.collected(tmp_path, "abc")
    assert call["wrong"] == call["failed"] == []
    assert {one["backend"] for one in call["checked"]} == {"cuda", "triton"}
    assert {line.get("op") for line in call["times"]} >= {
        "patch",
        "norm",
        "backward",
        "decode",
        "loss, topk",
        "loss, full",
    }
    assert [line["op"] for line in call["model"]][:3] == ["made", "decode", "prefill"]
    written = tmp_path / "page.md"
    arguments = [str(tmp_path), "--commit", "abc", "--results", str(tmp_path / "results"), "--page", str(written)]
    assert publish.main(arguments) == 0
    text = written.read_text()
    assert "Measured on no GPU: a dry run, whose times mean nothing" in text
    assert "## Beside a copy of the same bytes" in text
    assert "wrong: 0, 0, 0." in text
    assert json.loads((tmp_path / "results" / "gpu-dry.json").read_text())["calls"][0]["commit"] == "abc"


def test_a_run_that_was_cut_off_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    whole = {"step": "time", "op": "patch", "rows": 2, "d": 64}
    (tmp_path / "times.txt").write_text(
        f"=== headline\nWarning: x\n{json.dumps(whole)}\n[1, 2]\n{json.dumps(whole)[:30]}"
    )
    assert list(lines_of([tmp_path / "times.txt", tmp_path / "absent.txt"])) == [whole]
    (tmp_path / "phases.jsonl").write_text('{"phase": "hello", "rc": 0, "s": 1, "at": 1}\n')
    call = publish.collected(tmp_path, "abc")
    assert call["times"] == [whole]
    assert call["device"] is None
    assert publish.page({"note": "Cut off.", "calls": [call | {"times": []}]}).startswith("# On a GPU\n")


def case(us: float, **more: Any) -> dict[str, Any]:
    times = {name: {"us": value, "captured": True} for name, value in {"ours": us, "copy": 50.0}.items()}
    return {
        "step": "time", "backend": "cuda", "op": "patch", "rows": 8, "d": 64, "dtype": "bfloat16", "times": times,
        "bytes": 10**8, "host_us": {"ours": 9.0}, **more,
    }  # fmt: skip


def test_a_case_that_was_measured_again_shows_both(tmp_path: Path) -> None:
    for name, us in (("1", 100.0), ("2", 62.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "phases.jsonl").write_text("")
        (tmp_path / name / "times.txt").write_text(json.dumps(case(us, error="1e-3")) + "\n")
    page = tmp_path / "page.md"
    arguments = [str(tmp_path / "1"), str(tmp_path / "2"), "--results", str(tmp_path), "--page", str(page)]
    assert publish.main([*arguments, "--commit", "old", "--commit", "new", "--note", "A note."]) == 0
    assert "(commit old; commit new). A note." in page.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:8]] for line in page.read_text().splitlines()]
    assert ["cuda", "patch", "8 x 64", "bfloat16", "62.5", "1.60", "0.80 (0.50)"] in rows
    assert publish.main([*arguments[1:], "--commit", "newest", "--add"]) == 0
    assert "(commit old; commit new; commit newest). A note." in page.read_text()
    assert publish.main([*arguments, "--commit", "old"]) == 2
    assert publish.main([str(tmp_path / "absent")]) == 2


def test_counters_of_ncu(tmp_path: Path) -> None:
    file = tmp_path / "ncu.txt"
    file.write_text(
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","ns","register/thread"\n"0","void patch_rows<A, B>(C)","123,712","120"\n==PROF== Disconnected\n'
    )
    assert publish.counters(file) == [{"kernel": "void patch_rows<A, B>(C)", "us": "123.7", "registers": "120"}]
    assert publish.counters(tmp_path / "absent.txt") == []


def test_a_line_to_read() -> None:
    assert "copy/ours 0.500" in (told(case(100.0)) or "")
    assert told({"step": "hello"}) is None


def test_a_rival_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "DRY", True)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "synchronize", lambda: None)
    x = torch.randn(4, 8)
    runs = {"ours": lambda: lambda _: x, "same": lambda: lambda _: x.clone(), "wrong": lambda: lambda _: -x}
    runs["broken"] = lambda: lambda _: 1 / 0
    timing.contest({"op": "x"}, runs, sets=1, same_as_ours=("same", "wrong", "broken"), rounds=2)
    line = json.loads(capsys.readouterr().out)
    assert line["times"].keys() == {"ours", "same"}
    assert "differs from ours" in line["missing"]["wrong"]
    assert line["missing"]["broken"] == "ZeroDivisionError: division by zero"
