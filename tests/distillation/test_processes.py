"""Killed at any moment, and several processes: the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linearpatch_kernels.distillation.processes import Processes, launched_processes

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "run_apart.py"


def start(*command: object) -> str:
    roots = [PROGRAM.parents[2], PROGRAM.parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_kills_at_random_moments_cost_nothing_but_time(tmp_path: Path) -> None:
    """Every process that ends by itself leaves the bytes that one without a kill leaves: store and weights."""
    told = json.loads(start(PROGRAM, "kill", tmp_path, 0, 30).splitlines()[-1])
    assert told["store"] + told["training"] >= 30
    assert min(told["store"], told["training"], told["finished"]) >= 2, told


def test_two_processes_are_one_on_the_same_global_batch(tmp_path: Path) -> None:
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]),
    ):
        (tmp_path / name).mkdir()
        start(*launcher, PROGRAM, "work", tmp_path / name, tmp_path / f"{name}.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    error = (two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()
    assert float(error) < 1e-5
    assert not torch.equal(one["gradient"], torch.zeros_like(one["gradient"]))
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)
    assert float(two["curve"][-1]) < float(two["curve"][0])
    stores = [{p.name: p.read_bytes() for p in (tmp_path / name / "store").iterdir()} for name in ("one", "two")]
    assert stores[0] == stores[1]


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("1", None):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert (launched_processes().rank, launched_processes().count) == (0, 1)
        assert launched_processes().first
    assert not Processes(1, 2).first
