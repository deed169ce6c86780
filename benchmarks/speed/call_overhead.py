"""What torch's private names save a call of one narrow row: ``python -m benchmarks.speed.call_overhead``.

Processes with them and without them (``LINEARPATCH_PUBLIC_TORCH=1``) take turns; a figure is the least of all turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable

import torch

from benchmarks.record import add_option, record
from benchmarks.speed.table import markdown
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from linearpatch_kernels.ops.topk_kl import topk_kl_loss

TURNS = 3
SWITCH = "LINEARPATCH_PUBLIC_TORCH"


def unrecorded(call: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(call)


def cases() -> dict[str, Callable[[], object]]:
    x, scale, out = torch.randn(1, 64), torch.randn(64), torch.empty(1, 64)
    learned = torch.randn(64, requires_grad=True)
    probs, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    wide, paley = torch.randn(1, 4096), torch.randn(1, 1776)
    return {
        "hadamard_patch of 64, no_grad": unrecorded(lambda: hadamard_patch(x, scale)),
        "hadamard_patch of 64, recorded": lambda: hadamard_patch(x, learned),
        "hadamard_patch of 64, out=": unrecorded(lambda: hadamard_patch(x, scale, out=out)),
        "topk_kl_loss of 64": lambda: topk_kl_loss(x, probs, ids),
        "hadamard_transform of 4096": lambda: hadamard_transform(wide),
        "hadamard_transform of 1776": lambda: hadamard_transform(paley),
    }


def measure() -> dict[str, float]:
    """Microseconds a call, by case."""
    taken = {}
    for name, call in cases().items():
        calls, seconds = timeit.Timer(call).autorange()
        taken[name] = min([seconds, *timeit.Timer(call).repeat(3, calls)]) / calls * 1e6
    return taken


def turn(alone: bool) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.call_overhead", "--here"]
    done = subprocess.run(command, env={**os.environ, SWITCH: str(int(alone))}, capture_output=True, check=True)
    taken: dict[str, float] = json.loads(done.stdout)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="one turn in this process, as JSON")
    add_option(parser)
    options = parser.parse_args()
    if options.here:
        torch.set_num_threads(1)
        print(json.dumps(measure()))
        return
    turns = [(turn(False), turn(True)) for _ in range(TURNS)]
    print(f"torch {torch.__version__}, microseconds a call, the least of {TURNS} turns")
    least = {name: [min(one[i][name] for one in turns) for i in range(2)] for name in turns[0][0]}
    header = ("call", "with torch's private names, µs", "without them, µs")
    rows = [(name, *(f"{figure:.1f}" for figure in figures)) for name, figures in least.items()]
    print(markdown(header, rows))
    if options.json:
        record(options.json, {"calls": (header, rows)})


if __name__ == "__main__":
    main()
