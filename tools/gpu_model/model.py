"""The GPU kernels' machine code counted and turned into cycles a row: ``python benchmarks/gpu_static.py --json FILE``.

The kernels are compiled ahead of time for every architecture, and their machine code is counted instruction by
instruction as a warp executes it for the rows that its block holds at a time. For the CUDA kernels the machine code is
run, as far as its addresses and branches go, on the launch that the host would make (`warp`, `plan.cpp`): what
one more turn of the loop over rows adds is counted, with every loop as often as it turns, every switch as it is taken,
and the bank conflicts of the addresses seen. In Triton's the loop over rows is the only one, and shared memory is taken
as free of conflicts.

A model of the multiprocessor turns the counts into cycles a row. What each unit is busy: memory, issue, float32, the
data pipe of the first-level cache ("lsu"), matrix units. And for CUDA "latency": the time that the blocks of a
multiprocessor take together, instruction by instruction, where memory answers after its latency, however much is asked
of it (`block`); barriers, copies that are asked for a row ahead, and units that several warps want are in it.
Memory's speed is that of the measured copy where the machine was measured (``benchmarks/results``), else the published
one; a row's ``memory`` says which.

The model is blind to the instruction cache, to what a branch costs, to the lanes of integers, to the second-level
cache's speed, to a memory that answers later the more it is asked for, and to power. All measured calls took longer
than it says. ``python benchmarks/gpu_static.py --against FILE`` sets it beside them (`against`, the table:
benchmarks/notes/patch-gpu.md).

``dram_fraction`` is the time that the rows take at the memory's speed, read and written, over the largest of the other
terms: above 1, all else leaves memory as the bound. ``three_pass_fraction`` is the modelled time, memory's included,
over that of fast-hadamard-transform in three passes, which has no latency in the model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tools.gpu_model import build
from tools.gpu_model.block import cycles_together, products
from tools.gpu_model.build import disassemble
from tools.gpu_model.machines import Machine, lanes_of, machine_of
from tools.gpu_model.sass import (
    Instruction,
    executed,
    graph,
    program_graph,
)
from tools.gpu_model.warp import Launched, Seen, Warp

STATUS = "modelled, unvalidated"
CHECKED = "modelled: an H100 took 1.07 to 2.02 times as long"  # as `--against` prints it
DEFAULT_DS = (576, 2048, 3072, 4096, 5120, 8192)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("hadamard_patch_forward", "hadamard_patch_backward", "add_patch_rms_norm")
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarpCounts:
    """What one warp executes for the rows that its block holds at a time."""

    instructions: int
    fp: int  # float32 additions, multiplications, multiply-adds
    shfl: int = 0
    smem_wavefronts: int = 0
    global_wavefronts: int = 0  # 128 bytes each, from the first-level cache to registers or back
    matrix_products: int = 0


def modelled_cycles(
    machine: Machine, counts: WarpCounts, *, row_bytes: float, warps: int, rows: int = 1
) -> dict[str, float]:
    """Cycles a row and multiprocessor that each unit is busy.

    Per multiprocessor and cycle: four instructions are issued, the machine's lanes add or multiply, and the data pipe
    of the first-level cache ("lsu") serves one shuffle or 128 bytes, of shared memory or on their way from or to
    memory.

    Args:
        counts: of one warp for ``rows`` rows.
        row_bytes: read from and written to memory for one row.
        warps: of a block, which holds ``rows`` rows at a time.
    """
    share = warps / rows
    return {
        "dram": row_bytes / machine.bandwidth * machine.multiprocessors * machine.clock,
        "issue": share * counts.instructions / 4,
        "fp": share * counts.fp * 32 / machine.lanes,
        "lsu": share * (counts.shfl + counts.smem_wavefronts + counts.global_wavefronts),
        "matrix": share * counts.matrix_products / machine.matrix_products,
    }


def three_pass_cycles(machine: Machine, d: int, itemsize: int) -> float:
    """fast-hadamard-transform for ``H diag H.T``: a transform, a product by the scale, a transform; x and y thrice.

    Its kernel for d = 4096 in bfloat16 on sm_90 was counted: 8 warps, 477 instructions, 128 shuffles and 16 accesses of
    128 bits to shared memory each. At any other width the three passes are taken to run at the memory's full speed.
    """
    row_bytes = 2 * d * itemsize
    one_pass = modelled_cycles(machine, WarpCounts(0, 0), row_bytes=row_bytes, warps=0)["dram"]
    transform = one_pass
    if (d, itemsize) == (4096, 2):
        peer = WarpCounts(instructions=477, fp=0, shfl=128, smem_wavefronts=64)
        transform = max(modelled_cycles(machine, peer, row_bytes=row_bytes, warps=8).values())
    return 2 * transform + one_pass


# --- what is counted -------------------------------------------------------------------------------------------------


def _total(counts: Counter[str], *prefixes: str) -> int:
    return sum(count for opcode, count in counts.items() if opcode.split(".")[0] in prefixes)


def _wide(counts: Counter[str], prefix: str) -> int:
    return sum(count for opcode, count in counts.items() if opcode.startswith(prefix + ".") and ".128" in opcode)


def _wavefronts(opcode: str) -> int:
    """128-byte passes through shared memory that an access of a whole warp needs where no two lanes collide."""
    kind, *modifiers = opcode.split(".")
    if kind in ("LDS", "STS", "ATOMS", "LDGSTS"):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if kind in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else int(modifiers[-1][-1])
    return 0


def _lines(opcode: str) -> int:
    """The same of an access to global memory whose lanes lie side by side. A copy to shared memory is one there."""
    kind, *modifiers = opcode.split(".")
    if kind == "LDGSTS":
        return 0
    return (4 if "128" in modifiers else 2 if "64" in modifiers else 1) if kind in ("LDG", "STG") else 0


def warp_counts(counts: Counter[str]) -> WarpCounts:
    return WarpCounts(
        instructions=sum(counts.values()),
        fp=_total(counts, "FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
        shfl=_total(counts, "SHFL"),
        smem_wavefronts=sum(count * _wavefronts(opcode) for opcode, count in counts.items()),
        global_wavefronts=sum(count * _lines(opcode) for opcode, count in counts.items()),
        matrix_products=sum(count * products(opcode) for opcode, count in counts.items()),
    )


@dataclass(frozen=True)
class KernelRow:
    """One kernel for one width. Counts are those of one warp for the ``rows`` rows that its block holds at a time."""

    kernel: str
    source: str
    arch: str
    dtype: str
    d: int
    registers: int
    spills: int
    shared_bytes: int
    ldg: int
    ldg128: int
    stg: int
    stg128: int
    shfl: int
    smem_wavefronts: int
    bar: int
    instructions: int
    dram_fraction: float | None
    three_pass_fraction: float | None
    fp: int
    mma: int
    warps: int
    rows: int
    resident_blocks: int | None
    cycles: dict[str, float] | None
    memory: str | None
    status: str = STATUS

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.kernel, self.source, self.arch, self.dtype, self.d


LOSSES = ("linear_topk_kl_forward", "linear_topk_kl_forward_backward")  # "topk": a row is one of the vocabulary
ARRAYS = {
    **dict.fromkeys(LOSSES, ("row",)),
    "hadamard_patch_forward": ("x", "to y"),
    "hadamard_patch_backward": ("x", "grad", "to dx"),
    "add_patch_rms_norm": ("x", "residual", "to y", "to normed"),
}


def resident_blocks(machine: Machine, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at a time: by its registers, shared memory, warps."""
    allocated = -(-registers // 8) * 8 * 32 * warps
    return min(65536 // allocated, machine.shared[1] // (shared_bytes + 1024), 64 // warps, 32)


def nvidia_row(
    kernel: str, source: str, arch: str, dtype: str, d: int, *, counts: Counter[str], registers: int, shared_bytes: int,
    warps: int, rows: int, resident: int | None = None, wavefronts: tuple[int, int] | None = None,
    latency: float | None = None, spills: int = 0,
) -> KernelRow:  # fmt: skip
    """A row from the counts of one warp.

    Args:
        resident: blocks of a multiprocessor, where fewer are launched than it holds.
        wavefronts: of shared and of global memory, where they are known from addresses.
        latency: cycles a row of `cycles_together`, where the instructions are known one by one.
    """
    itemsize = ITEMSIZES[dtype]
    work, machine = warp_counts(counts), machine_of(arch)
    if wavefronts is not None:
        work = replace(work, smem_wavefronts=wavefronts[0], global_wavefronts=wavefronts[1])
    cycles = modelled_cycles(machine, work, row_bytes=len(ARRAYS[kernel]) * d * itemsize, warps=warps, rows=rows)
    if latency is not None:
        cycles["latency"] = latency
    besides = max(value for unit, value in cycles.items() if unit != "dram")
    time = max(cycles.values())
    peer = three_pass_cycles(machine, d, itemsize) if kernel == "hadamard_patch_forward" else None
    return KernelRow(
        kernel, source, arch, dtype, d,
        registers=registers,
        spills=spills + _total(counts, "LDL", "STL"),
        shared_bytes=shared_bytes,
        ldg=_total(counts, "LDG", "LDGSTS"),
        ldg128=_wide(counts, "LDG") + _wide(counts, "LDGSTS"),
        stg=_total(counts, "STG"),
        stg128=_wide(counts, "STG"),
        shfl=work.shfl,
        smem_wavefronts=work.smem_wavefronts,
        bar=_total(counts, "BAR"),
        instructions=work.instructions,
        dram_fraction=round(cycles["dram"] / besides, 3),
        three_pass_fraction=None if peer is None else round(time / peer, 3),
        fp=work.fp,
        mma=_total(counts, "HMMA"),
        warps=warps,
        rows=rows,
        resident_blocks=resident or resident_blocks(machine, registers, shared_bytes, warps),
        cycles={unit: round(value, 1) for unit, value in cycles.items()},
        memory=machine.memory,
        status=STATUS if latency is None or machine.memory == "published" else CHECKED,
    )  # fmt: skip


# --- CUDA ------------------------------------------------------------------------------------------------------------


MANY_ROWS = 1 << 24
FEW_TURNS = 3  # a copy that is asked for two rows ahead has come by then


@dataclass(frozen=True)
class Turns:
    """What all warps of a block do for one more turn of their loop over rows.

    Attributes:
        kernel: its name in the source.
        plan: how it is launched.
        resident: blocks that a multiprocessor works on at a time.
        seen: what was counted, of one block.
        cycles: of the resident blocks together (`cycles_together`).
        around: theirs before the first turn and after the last.
    """

    source: str
    kernel: str
    plan: build.Plan
    resident: int
    seen: Seen
    cycles: float
    around: float

    @property
    def warps(self) -> int:
        return self.plan.threads // 32


def cuda_turns(kernel: str, arch: str, dtype: str, d: int, rows: int = MANY_ROWS) -> Turns:
    """By running three turns and four of the launch for a call of ``rows`` rows.

    Raises:
        ValueError: there is no kernel for this, or a row was not read and written once.
    """
    from linearpatch_kernels.hadamard import paley_factor

    signs, log2_inner = paley_factor(d)
    order, number = len(signs), int(arch[3:])
    machine, itemsize = machine_of(arch), ITEMSIZES[dtype]
    seen, cycles, resident = [], [], 0
    for turns in (FEW_TURNS, FEW_TURNS + 1):
        plan = build.launch_plan(
            kernel,
            order=order,
            inner=1 << log2_inner,
            blocks=d // (order << log2_inner),
            has_program=order in build.orders_with_programs(),
            dtype=("float32", "float16", "bfloat16").index(dtype),
            rows=rows,
            turns=turns,
            device=(machine.multiprocessors, *machine.shared),
        )
        source = "gradients" if kernel == "hadamard_patch_backward" else plan.source
        element = {"float32": "KnownIfE", "float16": "4HalfE", "bfloat16": "8BFloat16E"}[dtype]
        wanted: tuple[str, ...]
        if plan.warp_rows:
            fused = "Lb1E" if kernel == "add_patch_rms_norm" else "Lb0E"
            of_a_row = plan.threads // 32 // plan.rows_together
            tiles = (plan.order << plan.log2_inner) // 256 // of_a_row
            wanted = ("patch_warp_rows", f"{element}Li{tiles}ELi{of_a_row}E{fused}")
        elif plan.fixed:
            wanted = (f"FixedILi{plan.order}ELi{plan.log2_inner}E", element, "Lb0E")  # without channel scales
        else:
            wanted = (f"StagedILi{plan.order}E",)
        programs = build.programs(source, number)
        (name,) = (name for name in programs if all(part in name for part in wanted))
        sizes = {
            "scale": 4 * d, "weight": 4 * d, "signs": 1 << 20,
            "scale_sums": 4 * d * plan.blocks * plan.rows_together,
        }  # fmt: skip
        tensors = {t: ((i + 1) << 40, sizes.get(t, plan.rows * d * itemsize)) for i, t in enumerate(build.TENSORS)}
        launched = Launched(
            plan.parameter, (plan.blocks, plan.diagonal_blocks), plan.threads, tensors, plan.shared_bytes
        )
        warps = [Warp(programs[name], launched, warp) for warp in range(plan.threads // 32)]
        seen.append(sum((warp.run() for warp in warps), Seen()))
        cubin = build.compiled(source, number)
        resident = resident_blocks(machine, cubin.registers[name], plan.shared_bytes, len(warps))
        resident = min(resident, -(-plan.blocks * plan.diagonal_blocks // machine.multiprocessors))
        cycles.append(cycles_together([warp.steps for warp in warps], resident, machine))
    turn, time = seen[1] - seen[0], cycles[1] - cycles[0]
    row = plan.rows_together * d // plan.diagonal_blocks * itemsize
    if any(turn.moved[name] != row for name in ARRAYS[kernel]):
        raise ValueError(f"a row is not read or written once: {dict(turn.moved)} bytes")
    return Turns(source, name, plan, resident, turn, time, cycles[0] - FEW_TURNS * time)


def cuda_row(kernel: str, arch: str, dtype: str, d: int) -> KernelRow:
    return row_of_turns(kernel, arch, dtype, d, cuda_turns(kernel, arch, dtype, d))


def row_of_turns(kernel: str, arch: str, dtype: str, d: int, turns: Turns) -> KernelRow:
    cubin = build.compiled(turns.source, int(arch[3:]))
    seen, warps, rows = turns.seen, turns.warps, turns.plan.rows_together
    return nvidia_row(
        kernel, "cuda", arch, dtype, d,
        counts=Counter({opcode: -(-count // warps) for opcode, count in seen.counts.items()}),
        registers=cubin.registers[turns.kernel],
        spills=cubin.spills[turns.kernel],
        shared_bytes=turns.plan.shared_bytes,
        warps=warps,
        rows=rows,
        resident=turns.resident,
        wavefronts=(-(-seen.wavefronts // warps), -(-seen.lines // warps)),
        latency=turns.cycles / (rows * turns.resident),
    )  # fmt: skip


def cuda_selection(archs: Sequence[str], ds: Sequence[int]) -> Iterator[tuple[str, str, str, int]]:
    """(kernel, arch, dtype, d): the forward for every width and all dtypes at one; the others where most models are."""
    for arch in archs:
        if arch.startswith("gfx"):
            continue
        for d in ds:
            yield "hadamard_patch_forward", arch, "bfloat16", d
        for dtype in ("float32", "float16"):
            for d in {4096} & {*ds}:
                yield "hadamard_patch_forward", arch, dtype, d
        for kernel in ("hadamard_patch_backward", "add_patch_rms_norm"):
            for d in sorted({3072, 4096} & {*ds}):
                yield kernel, arch, "bfloat16", d


# --- Triton ----------------------------------------------------------------------------------------------------------


def compile_triton(
    kernel: str, arch: str, dtype: str, d: int, rows: int | None = None, warps: int | None = None
) -> Any:
    """The kernel as a machine with this GPU would compile it, and its layout; no GPU is needed.

    The forward has only ``scale``, the backward wants dx and dscale: what the patch of the paper needs.
    """
    from linearpatch_kernels.ops.hadamard_patch import triton as kernels
    from tools.gpu_model import triton_launches  # needs triton

    with triton_launches.driver_of(arch):
        layout = kernels.layout_of(d, lanes_of(arch), rows, warps)
        if layout is None:
            raise ValueError(f"Triton leaves d = {d} to PyTorch")
        return triton_launches.patch_launch(kernel, layout, dtype).compiled(), layout


def triton_row(
    kernel: str, arch: str, dtype: str, d: int, rows: int | None = None, warps: int | None = None
) -> KernelRow:
    compiled, layout = compile_triton(kernel, arch, dtype, d, rows, warps)
    if arch.startswith("gfx"):
        return _amd_row(kernel, arch, dtype, d, compiled, layout)
    functions, resources = disassemble(compiled.asm["cubin"])
    (name,) = functions
    row = nvidia_row(
        kernel, "triton", arch, dtype, d,
        counts=executed(program_graph(functions[name])),
        registers=resources[name]["REG"],
        shared_bytes=compiled.metadata.shared,
        warps=layout.warps,
        rows=layout.rows,
    )  # fmt: skip
    return row


def _amd_row(kernel: str, arch: str, dtype: str, d: int, compiled: Any, layout: Any) -> KernelRow:
    """The counts that the assembler's text has; there is no model of this machine."""
    text = compiled.asm["amdgcn"]

    def lines() -> Iterator[str | Instruction]:
        for line in text.split(".rodata")[0].splitlines():
            if label := re.match(r"(\.LBB\w+):", line):
                yield label[1]
            elif found := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
                opcode, operands = found[1], found[2].strip()
                if opcode.startswith(("s_branch", "s_cbranch")):
                    yield Instruction("BRA", f"`({operands})", "@" * opcode.startswith("s_cbranch"))
                elif opcode == "s_endpgm":
                    yield Instruction("EXIT", "")
                else:
                    yield Instruction(opcode, operands)

    counts = executed(graph(lines()))

    def total(pattern: str) -> int:
        return sum(count for opcode, count in counts.items() if re.match(pattern, opcode))

    def told(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    wavefronts = {r"ds_(read|write)_b128": 4, r"ds_(read|write)(2|2st64)?_b64": 2, r"ds_(read|write)2(st64)?_b32": 2}
    return KernelRow(
        kernel, "triton", arch, dtype, d,
        registers=told("vgpr_count"),
        spills=told("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        ldg=total(r"(global|buffer)_load"),
        ldg128=total(r"(global|buffer)_load_dwordx4"),
        stg=total(r"(global|buffer)_store"),
        stg128=total(r"(global|buffer)_store_dwordx4"),
        shfl=total(r"ds_b?permute"),
        smem_wavefronts=sum(total(pattern) * passes for pattern, passes in wavefronts.items())
        + total(r"ds_(read|write)_[bu](8|16|32)"),
        bar=total("s_barrier"),
        instructions=sum(counts.values()),
        dram_fraction=None,
        three_pass_fraction=None,
        fp=total(r"v_(pk_)?(add|sub|mul|fma)_f32"),
        mma=total("v_mfma"),
        warps=layout.warps,
        rows=layout.rows,
        resident_blocks=None,
        cycles=None,
        memory=None,
    )  # fmt: skip


def triton_selection(archs: Sequence[str], ds: Sequence[int]) -> Iterator[tuple[str, str, str, int]]:
    """(kernel, arch, dtype, d): the forward for every width and two dtypes, the other kernels where most models are."""
    for arch in archs:
        for d in ds:
            yield "hadamard_patch_forward", arch, "bfloat16", d
        for d in {4096} & set(ds):
            yield "hadamard_patch_forward", arch, "float32", d
            yield "hadamard_patch_forward", arch, "float16", d
            yield "hadamard_patch_backward", arch, "bfloat16", d
            yield "add_patch_rms_norm", arch, "bfloat16", d


def losses_row(kernel: str, arch: str, dtype: str, d: int) -> KernelRow:
    """The losses' row for one slot of a token: its row of the vocabulary is read once, for z and for dhidden."""
    from tools.gpu_model import triton_launches  # needs triton

    with triton_launches.driver_of(arch):
        launch = triton_launches.loss_launch(kernel, d, dtype)
        compiled = launch.compiled()
    functions, resources = disassemble(compiled.asm["cubin"])
    (name,) = functions
    return nvidia_row(
        kernel, "triton", arch, dtype, d,
        counts=executed(program_graph(functions[name])),
        registers=resources[name]["REG"],
        spills=resources[name]["LOCAL"] + resources[name]["STACK"],
        shared_bytes=compiled.metadata.shared,
        warps=launch.options["num_warps"],
        rows=launch.options["SLOTS"],
    )  # fmt: skip


def losses_selection(archs: Sequence[str], ds: Sequence[int]) -> Iterator[tuple[str, str, str, int]]:
    for arch in archs:
        for d in sorted({576, 4096} & {*ds}) if not arch.startswith("gfx") else ():
            for kernel in LOSSES:
                yield kernel, arch, "bfloat16", d


def ranked(kernel: str, arch: str, dtype: str, d: int) -> list[KernelRow]:
    """Ways to hold a power-of-two width, best first: no spills, modelled time, bytes in flight, instructions."""
    candidates = []
    for values in (16, 32, 64):
        for rows in (1, 2, 4, 8, 16, 32):
            warps = rows * d // (32 * values)
            if rows * d % (32 * values) == 0 and warps in (1, 2, 4, 8, 16, 32) and (rows == 1 or warps == 1):
                candidates.append(triton_row(kernel, arch, dtype, d, rows, warps))

    def merit(row: KernelRow) -> tuple[Any, ...]:
        in_flight = (row.resident_blocks or 0) * row.rows * d * ITEMSIZES[dtype]
        return (
            row.spills > 0,
            -min(row.dram_fraction or 0, 1),  # memory's own time is the least
            -min(in_flight, 40_000),
            row.warps * row.instructions / row.rows,
        )

    return sorted(candidates, key=merit)


def read_rows(path: Path) -> list[KernelRow]:
    names = {field.name for field in fields(KernelRow)}
    return [KernelRow(**{k: v for k, v in row.items() if k in names}) for row in json.loads(path.read_text())]
