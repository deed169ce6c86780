"""What the calls of the registered cases allocate: ``python -m benchmarks.speed.memory -k TEXT``.

Each implementation runs in a process of its own: once, so that code, caches and compiled graphs are there, then once
more, while the system keeps the largest resident size. What it returns is taken off that; what it reads was there
before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.dlpack import from_dlpack

from benchmarks.record import add_option, record
from benchmarks.speed.registry import CASE_MODULES, Case, load_cases
from benchmarks.speed.table import markdown

OURS = "ours"


def peak_memory(run: Callable[[], object]) -> float:
    """Bytes by which the process grows at most while ``run`` runs, the memory it has freed before given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def beyond_results(case: Case, name: str) -> float:
    """Bytes, at the peak of a call, that are not its results."""
    build = case.ours if name == OURS else next(peer.build for peer in case.peers if peer.name == name)
    with case.context():
        run = build(case.operands())
        results = run()
        returned = sum(from_dlpack(one).nbytes for one in (results if isinstance(results, tuple) else (results,)))
        del results
        return peak_memory(run) - returned


def in_a_process(case: Case, name: str) -> float | str:
    """`beyond_results` there, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", "--one", case.name, name]
    ran = subprocess.run(command, capture_output=True, text=True)
    lines = (ran.stderr if ran.returncode else ran.stdout).strip().splitlines()
    return f"failed: {lines[-1][:160]}" if ran.returncode else float(lines[-1])


def rows(case: Case) -> list[tuple[str, ...]]:
    """Ours first, then every peer that is no bound; how many times as much a peer takes."""
    table: list[tuple[str, ...]] = []
    ours = in_a_process(case, OURS)
    for name in [OURS, *(peer.name for peer in case.peers if not peer.floor)]:
        missing = next((peer.missing() for peer in case.peers if peer.name == name), None)
        found = ours if name == OURS else missing or in_a_process(case, name)
        if isinstance(found, str):
            table.append((case.name, name, found, ""))
            continue
        ratio = f"{found / ours:.3g}x" if isinstance(ours, float) and name != OURS else ""
        table.append((case.name, name, f"{found / 1e6:.1f} MB", ratio))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="TEXT", default="", help="only the cases whose group and name contain it")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "NAME"), help="print the bytes of one implementation")
    add_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = load_cases(CASE_MODULES)
    if options.one:
        case, name = options.one
        print(beyond_results(cases[case], name))
        return
    wanted = [case for case in cases.values() if options.k in f"{case.group}: {case.name}"]
    header = ("case", "implementation", "at the peak, beyond the results", "over ours")
    found = [row for case in wanted for row in rows(case)]
    print(markdown(header, found))
    if options.json:
        record(options.json, {"memory": (header, found)})


if __name__ == "__main__":
    main()
