"""What the environment says about siblings is checked; nobody waits for them without a word and a limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from linearpatch_kernels import processes
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.processes import MEETING_SECONDS, check_alone, launched_processes

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", MEETING_SECONDS)
OF_OTHERS = ("SLURM_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_")

PROGRAM = """
import os, sys
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.processes import launched_processes
try:
    found = launched_processes()
    print("of", found.count, found.gather(found.rank), flush=True)
    if found.rank == 1 and sys.argv[1:] == ["dies"]:
        os._exit(3)
    found.wait()
except InputError as error:
    print("refused:", error)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in VARIABLES or name.startswith(OF_OTHERS):
            monkeypatch.delenv(name)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def told(**environment: str) -> str:
    """What `launched_processes` refuses with, at once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        begin = time.monotonic()
        with pytest.raises(InputError) as caught:
            launched_processes()
        assert time.monotonic() - begin < 30
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_variables_that_are_missing_are_named() -> None:
    """pytorch #81704, kubeflow/trainer #2176: silence for seven days, or a bare ValueError."""
    said = told(WORLD_SIZE="2")
    assert "RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR are missing" in said
    assert "for one process unset WORLD_SIZE" in said
    said = told(WORLD_SIZE="3", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500")
    assert "WORLD_SIZE=3 says that 3 processes were started, and LOCAL_RANK is missing" in said
    assert "unset WORLD_SIZE, RANK, MASTER_PORT, MASTER_ADDR" in said


@pytest.mark.parametrize("value", ["two", "0", "-1", "2.0", "1e3", "9" * 30, "²", " "])
def test_numbers_that_are_none(value: str) -> None:
    assert f"WORLD_SIZE={value}" in told(WORLD_SIZE=value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", value)
        with pytest.raises(InputError, match="unset WORLD_SIZE"):
            check_alone("evaluate")
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    if value != "0":
        for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            assert f"{name}={value}" in told(**{**whole, name: value})


def test_a_rank_beyond_the_processes() -> None:
    where = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert "RANK=2 is not one of WORLD_SIZE=2 processes" in told(WORLD_SIZE="2", RANK="2", **where)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": ""},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "two"},
        {"RANK": "3", "LOCAL_RANK": "1"},
    ],
    ids=str,
)
def test_one_process_whatever_a_cluster_leaves_in_its_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = launched_processes()
    assert (found.count, found.rank, found.first, found.gather("x")) == (1, 0, True, ["x"])
    check_alone("evaluate")


def test_a_command_for_one_process_says_what_to_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="sweep runs in one process and WORLD_SIZE=2 says that 2 were started"):
        check_alone("sweep")


def test_siblings_that_do_not_come_are_waited_for_with_a_word_and_a_limit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_WORD_ABOUT_MEETING", 0.3)
    port = str(free_port())
    where = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0"}
    said = told(**where, LINEARPATCH_MEETING_SECONDS="1")
    assert f"RANK=0 did not meet the others at MASTER_ADDR:MASTER_PORT=localhost:{port} within 1 s" in said
    assert f"unset WORLD_SIZE, RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR ({MEETING_SECONDS}" in said
    heard = capfd.readouterr().err
    assert f"waiting for 1 more process, since WORLD_SIZE=2: at localhost:{port}, for up to 1 s" in heard
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_none(value: str) -> None:
    where = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    said = told(WORLD_SIZE="2", RANK="0", **where, LINEARPATCH_MEETING_SECONDS=value)
    assert f"{MEETING_SECONDS}={value} is no number of seconds" in said


def test_a_launcher_s_processes_have_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = processes._limit()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert processes._limit() >= 10 * alone
    assert alone <= 60
    monkeypatch.setenv(MEETING_SECONDS, "7.5")
    assert processes._limit() == 7.5


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["lives", "dies"])
def test_two_processes_started_by_hand(ending: str) -> None:
    """They meet; and where one of them dies, the other one says so instead of waiting on."""
    roots = os.pathsep.join([str(Path(processes.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), MEETING_SECONDS: "120"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, ending],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[0] for process in started]
    assert all(out.startswith("of 2 [0, 1]\n") for out in said), said
    assert ("refused: one of the processes has ended or cannot be reached" in said[0]) == (ending == "dies")
    assert started[0].returncode == 0
