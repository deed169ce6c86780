"""The runner from the command to the table, and what the registry refuses; how long anything takes is nobody's test."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed import interleaved, registry
from benchmarks.speed.registry import Case, Goal, Peer, register
from benchmarks.speed.table import Measured, tables
from benchmarks.studies import demo_model
from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = str(ROOT)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--cases", "tests.support.few_cases", *arguments]
    # Within a worker of pytest-xdist, pytest-benchmark writes nothing.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a quick run printed and wrote."""
    place = tmp_path_factory.mktemp("results") / "speed.json"
    finished = run("--quick", "--json", str(place), "--plot", str(place.with_name("ratios.png")))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert place.with_name("ratios.png").stat().st_size > 0
    return finished.stdout, json.loads(place.read_text())


def rows(printed: str) -> dict[str, list[str]]:
    """The table's rows by peer."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {row[2]: row for row in cells[2:]}


def test_the_json_holds_the_machine_and_every_round(quick: tuple[str, dict[str, Any]]) -> None:
    report = quick[1]
    machine = report["machine_info"]
    assert machine["torch"] == torch.__version__
    assert machine["cores"] == os.cpu_count()
    assert machine["cpu"]
    assert machine["memory"] > 0
    assert report["commit_info"]["id"]
    (entry,) = report["benchmarks"]
    rounds = len(entry["stats"]["data"])
    assert rounds >= 3
    assert entry["extra_info"]["threads"] == 1
    assert {name: len(seconds) for name, seconds in entry["extra_info"]["peers"].items()} == {
        "sum": rounds,
        "copy": rounds,
    }


def test_the_ratios_in_the_table_are_those_of_the_json(quick: tuple[str, dict[str, Any]]) -> None:
    printed, report = quick
    (entry,) = report["benchmarks"]
    extra = entry["extra_info"]
    ours = [seconds / extra["calls"] for seconds in entry["stats"]["data"]]
    faster = statistics.median(its / mine for its, mine in zip(extra["peers"]["sum"], ours, strict=True))
    dearer = statistics.median(mine / its for its, mine in zip(extra["peers"]["copy"], ours, strict=True))
    table = rows(printed)
    assert table["sum"][:2] == ["three times x", table["sum"][1]]
    assert table["sum"][4] == f"{faster:.3g}x"
    assert table["copy"][4] == f"{dearer:.3g}x its time"
    assert table["copy"][6:] == ["1000000000", "solid"]
    assert table["the faster of sum, not there"][4:] == [f"{faster:.3g}x", "", "1e-06 → 1000000000", "solid"]


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        ("not there", "not installed: pip install 'no-such-package[cpu]'"),
        ("wrong", "not timed: its result differs from ours by 0.3 of the largest value"),
        ("broken", "failed: no such instruction"),
        ("compiled", "left out of --quick"),
    ],
)
def test_a_peer_that_takes_no_part_is_said(quick: tuple[str, dict[str, Any]], peer: str, reason: str) -> None:
    printed, report = quick
    assert rows(printed)[peer][3:5] == [reason, ""]
    assert report["benchmarks"][0]["extra_info"]["skipped"][peer] == reason


def case(name: str, peers: tuple[str, ...] = ("a",), goals: tuple[Goal, ...] = ()) -> Case:
    build: Callable[[Any], registry.Run] = lambda _: lambda: torch.zeros(1)  # noqa: E731 - one for all
    return Case("g", name, dict, build, tuple(Peer(peer, build) for peer in peers), goals)


def test_the_registry_refuses_what_a_table_could_not_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_cases", {})
    register(case("one"))
    with pytest.raises(InputError, match="there is a case 'one' already"):
        register(case("one"))
    with pytest.raises(InputError, match="two peers of case 'two' have the same name"):
        register(case("two", ("a", "a")))
    with pytest.raises(InputError, match="case 'three' has a goal against b"):
        register(case("three", goals=(Goal(("a", "b"), 1.0),)))
    assert list(registry.load_cases(())) == ["one"]


def test_a_goal_is_against_the_fastest_and_two_threads_stand_beside() -> None:
    goal = {"against": ["slow", "fast"], "solid": 2.0, "aim": 4.0}
    one, two = (
        Measured("g", "c", threads, [1.0, 1.0], {"slow": [9.0, 9.0], "fast": [fast, fast]}, frozenset(), {}, [goal], {})
        for threads, fast in ((1, 3.0), (2, 5.0))
    )
    assert rows(tables([two, one]))["the faster of slow, fast"][3:] == ["3000 ms", "3x", "5x", "2 → 4", "solid"]


def test_the_demo_models_table_times_the_patch_inside_a_step() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    models = demo_model.variants(LlamaForCausalLM(config).eval(), Span(1, 3))
    ids = torch.arange(8)[None]
    operator, dense, nothing = (models[name](ids).logits for name in ("hadamard_patch", "dense product", "no patch"))
    torch.testing.assert_close(operator, dense)
    assert not torch.allclose(operator, nothing)
    table = demo_model.rows(models, prompt=8, new=2, repeats=2)
    assert [row[0] for row in table] == list(models)
    assert [bool(row[4]) for row in table] == [True, True, False]
    assert all(row[5].endswith("%") for row in table[:2])


def test_a_turn_waits_for_the_device_before_its_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the call before it only queued was measured with it: on a GPU times were 1.5 to 3 times too long."""
    done: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: done.append("wait"))
    clock = time.perf_counter
    monkeypatch.setattr(interleaved.time, "perf_counter", lambda: done.append("clock") or clock())
    turn = interleaved.Turn(lambda: done.append("call"), "cuda", turn_seconds=0.0)
    turn.estimate = 0.0  # a short call, before which its operands are brought back
    done.clear()
    turn.seconds()
    assert done == ["call", "wait", "clock", "call", "wait", "clock"]


def test_a_function_is_compiled_for_every_case() -> None:
    """Dynamo compiles one for eight shapes; the ninth case's rival ran eager, and looked slow for that."""

    def doubled(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x * 2

    compiling: list[bool] = []

    def compiled(x: Tensor) -> registry.Run:
        call = torch.compile(doubled, backend="eager", dynamic=False)
        return lambda: call(x)

    for rows in range(1, 12):
        compiling.clear()
        case = Case("GPU", "x", lambda n=rows: torch.ones(n, 3), compiled, ())
        with interleaved.contest(case, 1, interleaved.QUICK):
            pass
        assert compiling[0], f"not compiled for {rows} rows"
