"""Every registered case as a benchmark; `python -m benchmarks` runs it and prints the tables.

The JSON is complete: ``stats.data`` of a case holds the seconds of ``extra_info.calls`` calls of ours in each round,
``extra_info.peers`` the seconds of one call of each peer in the same rounds.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch

from benchmarks.speed.interleaved import FULL, QUICK, contest
from benchmarks.speed.registry import CASE_MODULES, load_cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases = load_cases(option("--cases") or CASE_MODULES)
    runs = [
        pytest.param(case.name, threads, id=f"{case.group}: {case.name} [{threads}]")
        for case in cases.values()
        for threads in case.threads
        if threads <= (os.cpu_count() or 1) and (case.quick or not option("--quick"))
    ]
    metafunc.parametrize(("name", "threads"), runs)


def test_speed(name: str, threads: int, benchmark: Any, request: pytest.FixtureRequest) -> None:
    case = load_cases(())[name]
    benchmark.group = case.group
    if case.device != "cpu" and not torch.accelerator.is_available():
        pytest.skip(f"{name}: there is no {case.device} device here")
    effort = QUICK if request.config.getoption("--quick") else FULL
    with contest(case, threads, effort) as match:
        benchmark.pedantic(match.ours, setup=match.peers_take_turns, rounds=match.rounds)
    benchmark.extra_info |= {
        "case": name,
        "about": dict(case.about),
        "threads": threads,
        "calls": match.ours.calls,
        "peers": match.seconds,
        "floors": [peer.name for peer in case.peers if peer.floor],
        "skipped": match.skipped,
        "goals": [dataclasses.asdict(goal) for goal in case.goals],
    }
