"""float32 products on this processor by MKL and by oneDNN: ``python -m benchmarks.studies.float32_products``.

What `torch_state.faster_float32_products` goes by: for the shapes of language models how many times faster
oneDNN is (medians of calls in turns, one thread), and the relative errors of both against float64. Where a processor
has units for bfloat16 that oneDNN prefers, the error says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.record import add_option, record
from benchmarks.speed.table import markdown
from linearpatch_kernels.torch_state import faster_float32_products

# tokens, inner, outer: projections of models 576 and 4096 wide, a head over part of a vocabulary, a Gram matrix
SHAPES = ((256, 576, 1536), (2048, 576, 576), (2048, 1536, 576), (256, 576, 49152), (576, 4096, 576), (256, 4096, 4096))
ROUNDS = 9
MODES = {"MKL": "highest", "oneDNN": "medium"}


def measure(rows: int, inner: int, columns: int) -> dict[str, Any]:
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    exact = a.double() @ b.double().mT
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    errors = {}
    for round_ in range(ROUNDS + 1):
        for name, precision in MODES.items():
            torch.set_float32_matmul_precision(precision)
            begin = time.perf_counter()
            product = torch.nn.functional.linear(a, b)
            spent = time.perf_counter() - begin
            if round_:
                seconds[name].append(spent)
            else:
                errors[name] = float((product - exact).norm() / exact.norm())
    torch.set_float32_matmul_precision("highest")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"shape": [rows, inner, columns], "seconds": medians, "errors": errors}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with faster_float32_products():
        used = torch.get_float32_matmul_precision() == "medium"
    measured = [measure(*shape) for shape in SHAPES]
    rows = [
        (
            " x ".join(map(str, one["shape"])),
            f"{one['seconds']['MKL'] * 1e3:.2f}",
            f"{one['seconds']['MKL'] / one['seconds']['oneDNN']:.2f}",
            *(f"{one['errors'][name]:.1e}" for name in MODES),
        )
        for one in measured
    ]
    header = ("tokens x inner x outer", "MKL, ms", "oneDNN is faster by", "error, MKL", "error, oneDNN")
    print(markdown(header, rows))
    print(f"\nThe package uses {'oneDNN' if used else 'MKL, as torch does,'} here.")
    if options.json:
        record(options.json, {"products": (header, rows)}, note=f"the package uses {'oneDNN' if used else 'MKL'} here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
