"""What can be said of the GPU kernels without a GPU: ``python benchmarks/gpu_static.py [--json FILE]``.

Triton's rows need triton, CUDA's nvcc; nvdisasm comes with either. What is not there is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tools.gpu_model import against, build
from tools.gpu_model.model import (
    ARCHITECTURES,
    DEFAULT_DS,
    KERNELS,
    KernelRow,
    cuda_row,
    cuda_selection,
    losses_row,
    losses_selection,
    ranked,
    triton_row,
    triton_selection,
)
from tools.gpu_model.tables import count_table, cycle_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_static.py", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write one object a kernel")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--d", nargs="+", type=int, help="default: those of most models")
    parser.add_argument("--source", nargs="+", default=("cuda", "triton"), choices=("cuda", "triton"))
    parser.add_argument("--rank", action="store_true", help="rank Triton's ways to hold each width instead (H100)")
    parser.add_argument(
        "--against", type=Path, help="predict what this file of benchmarks/results measured, and no more"
    )
    options = parser.parse_args(arguments)
    if options.against:
        print(against.report(options.against))
        return 0
    rows: list[KernelRow] = []
    if options.rank:
        for d in options.d or DEFAULT_DS:
            for kernel in KERNELS:
                rows += ranked(kernel, "sm_90", "bfloat16", d)
    else:
        for source, module, row_of, selection in (
            ("cuda", build.nvcc(), cuda_row, cuda_selection),
            ("triton", importlib.util.find_spec("triton"), triton_row, triton_selection),
            ("triton", importlib.util.find_spec("triton"), losses_row, losses_selection),
        ):
            if source in options.source and module is None:
                print(f"No rows of {source}: there is no {'nvcc' if source == 'cuda' else 'triton'} here.")
            elif source in options.source:
                for selected in selection(options.arch, options.d or DEFAULT_DS):
                    try:
                        rows.append(row_of(*selected))
                    except ValueError as error:  # machine code that `warp` cannot follow
                        print(f"No row of {source} for {', '.join(map(str, selected))}: {error}")
    print("Counts of one warp for `rows` rows.")
    print(count_table(rows))
    print("\nCycles a row and multiprocessor.")
    print(cycle_table(rows))
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
