"""Killed at any moment, and several processes: the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linearpatch_kernels.calibration import CalibrationStatistics, Span, calibrate
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.processes import Processes, launched_processes
from tests.support.tiny import VOCABULARY, tiny_model

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "run_apart.py"


def start(*command: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
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


def by_one_and_by_two(what: str, place: Path) -> Iterator[dict[str, torch.Tensor]]:
    """What the program left, run by one process and by two."""
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"]),
    ):
        (place / name).mkdir()
        start(*launcher, PROGRAM, what, place / name, place / f"{name}.safetensors")
        yield load_file(place / f"{name}.safetensors")


def test_groups_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    one, two = by_one_and_by_two("merged", tmp_path)
    assert sum(name.startswith("group-") for name in one) == 3
    # A group's own training is one process's business: the same bits, in whichever it was.
    for name in one.keys() - {"start", "curve"}:
        assert torch.equal(one[name], two[name]), name
    torch.testing.assert_close(two["start"], one["start"], rtol=1e-6, atol=0)
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)
    assert float(two["curve"].min()) < float(two["curve"][0])


def test_two_processes_are_one_on_the_same_global_batch(tmp_path: Path) -> None:
    one, two = by_one_and_by_two("work", tmp_path)
    error = (two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()
    assert float(error) < 1e-5
    assert not torch.equal(one["gradient"], torch.zeros_like(one["gradient"]))
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)
    assert float(two["curve"][-1]) < float(two["curve"][0])
    stores = [{p.name: p.read_bytes() for p in (tmp_path / name / "store").iterdir()} for name in ("one", "two")]
    assert stores[0] == stores[1]


def test_fewer_heldout_windows_than_processes(tmp_path: Path) -> None:
    one, two = by_one_and_by_two("scarce", tmp_path)
    torch.testing.assert_close(two["curve"], one["curve"], rtol=1e-3, atol=0)


def test_two_processes_calibrate_as_one(tmp_path: Path) -> None:
    start(PROGRAM, "calibrate", tmp_path / "one")
    start("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", PROGRAM, "calibrate", tmp_path / "two")
    whole = CalibrationStatistics.load(tmp_path / "one.0", fingerprint="test")
    for rank in (0, 1):
        shared = CalibrationStatistics.load(tmp_path / f"two.{rank}", fingerprint="test")
        assert shared.samples == whole.samples == 11
        assert shared.tokens == whole.tokens
        assert torch.equal(shared.hadamard_mean_abs, whole.hadamard_mean_abs)
        for name in ("token_cosine", "last_token_angle", "channel_cosine"):
            torch.testing.assert_close(getattr(shared, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
        span = Span(2, 4)
        torch.testing.assert_close(shared.moments[span].xx, whole.moments[span].xx, rtol=1e-12, atol=1e-12)
        assert shared.moments[span].yy == whole.moments[span].yy
        normed, wanted = (one.at(span).collected_normed_moments() for one in (shared, whole))
        torch.testing.assert_close(normed.nr, wanted.nr, rtol=1e-12, atol=1e-12)


def test_too_little_for_so_many() -> None:
    windows = torch.randint(3, VOCABULARY, (1, 20))
    with pytest.raises(InputError, match="2 processes need a sequence of at least as many batches"):
        calibrate(tiny_model("llama"), [windows], ranks=Processes(1, 2))


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("1", "", None):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert (launched_processes().rank, launched_processes().count) == (0, 1)
        assert launched_processes().first
    assert not Processes(1, 2).first
