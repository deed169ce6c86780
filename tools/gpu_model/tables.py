"""The model's rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tools.gpu_model.machines import machine_of
from tools.gpu_model.model import ITEMSIZES, KernelRow, three_pass_cycles

COUNTS = (
    *("registers", "spills", "shared_bytes", "resident_blocks", "warps", "rows"),
    *("ldg", "ldg128", "stg", "stg128", "shfl", "smem_wavefronts", "bar", "mma", "fp", "instructions"),
)
CYCLES = ("dram", "issue", "fp", "lsu", "matrix", "latency")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def count_table(rows: Sequence[KernelRow]) -> str:
    head = ("kernel", "source", "arch", "dtype", "d", *COUNTS)
    return aligned([head, *(tuple("" if (v := getattr(row, c)) is None else str(v) for c in head) for row in rows)])


def cycle_table(rows: Sequence[KernelRow]) -> str:
    """Cycles a row and multiprocessor, ours beside fast-hadamard-transform's three passes."""
    lines: list[tuple[str, ...]] = [
        (
            "kernel",
            "source",
            "arch",
            "dtype",
            "d",
            *CYCLES,
            "bound by",
            "of dram's speed",
            "three passes",
            "of their time",
            "memory",
            "status",
        )
    ]
    for row in rows:
        if row.cycles is None:
            continue
        bound = max(row.cycles, key=row.cycles.__getitem__)
        peer = ("", "")
        if row.three_pass_fraction is not None:
            three_passes = three_pass_cycles(machine_of(row.arch), row.d, ITEMSIZES[row.dtype])
            peer = (f"{three_passes:.0f}", f"{row.three_pass_fraction:.3f}")
        cells = (f"{row.cycles[unit]:.0f}" if unit in row.cycles else "" for unit in CYCLES)
        lines.append(
            (
                row.kernel,
                row.source,
                row.arch,
                row.dtype,
                str(row.d),
                *cells,
                bound,
                f"{row.dram_fraction:.3f}",
                *peer,
                row.memory or "",
                row.status,
            )
        )
    return aligned(lines)
