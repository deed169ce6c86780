"""The GPU day's kit, dry: what it measures and writes, and what it says where there is no GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.slow
def test_dry_run_writes_both_files(tmp_path: Path) -> None:
    command = [sys.executable, gpu.__file__, "--dry", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    (triton,) = report["backends"]
    assert triton["checked"] == {"calls": 6, "wrong": []}
    (row,) = triton["measured"]
    assert {"ours", "mm by the dense matrix", "copy", "add_patch_rms_norm"} <= set(row["seconds"])
    assert triton["losses"]["checked"] == {"calls": 6, "wrong": []}
    assert [row["case"].split()[0] for row in triton["losses"]["measured"]] == ["topk", "full", "tail"]
    for row in triton["losses"]["measured"]:
        assert {"ours", "chunked"} <= set(row["seconds"])
    written = (tmp_path / "gpu.md").read_text()
    assert "a dry run, whose times mean nothing" in written
    assert "6 random calls against float64, 0 wrong." in written


def test_measure_names_who_is_missing_and_keeps_every_round() -> None:
    row = gpu.measure("cpu", 2, 64, torch.float32, dry=True)
    assert row["missing"].keys() | row["seconds"].keys() == {"ours", *(peer.name for peer in gpu.PEERS)}
    assert {"ours", "mm by the dense matrix", "torch.compile of the reference", "copy"} <= row["seconds"].keys()
    (rounds,) = {len(times) for times in row["rounds"].values()}
    assert rounds >= 3
    assert row["bytes_per_second"] == pytest.approx(2 * 2 * 64 * 4 / row["seconds"]["ours"])


def test_markdown_has_a_line_for_every_row_and_for_a_backend_that_failed() -> None:
    row = gpu.measure("cpu", 2, 64, torch.float32, dry=True)
    loss = gpu.measure_losses("cpu", 2, 64, 200, "topk", dry=True)
    losses = {"checked": {"calls": 2, "wrong": ["N 7: off"]}, "measured": [loss]}
    backends = [
        {"backend": "cuda", "failed": "InputError: not built"},
        {
            "backend": "triton",
            "checked": {"calls": 3, "wrong": ["d 64: off"]},
            "measured": [row, row],
            "losses": losses,
        },
    ]
    text = re.sub(" +", " ", gpu.markdown({"machine": gpu.machine(dry=True), "backends": backends}))
    assert text.count("| 2 | 64 | float32 |") == 2
    assert "InputError: not built" in text
    assert "- d 64: off" in text
    assert "- N 7: off" in text
    assert "| topk 2 x 64 of 200 | gathered einsum |" in text
    assert "| topk 2 x 64 of 200 | chunked torch.compile | left out of --quick" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
