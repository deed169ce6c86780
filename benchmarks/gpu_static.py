"""What can be said of the GPU kernels without a GPU: ``python benchmarks/gpu_static.py [--json FILE]``.

The kernels are compiled ahead of time for every architecture; their machine code is read and counted instruction by
instruction as one warp executes it for the rows that it holds at a time, every loop by its trip count; a model of the
multiprocessor turns the counts into cycles per row. All of it is modelled, unvalidated: no kernel was ever timed. The
model knows throughput alone (memory, issue, float32, shared memory with shuffles, matrix units), takes every access to
shared memory as free of bank conflicts, and is blind to latency, barriers and the traffic of the caches.

``dram_fraction`` is the time that reading x and writing y takes at the memory's full speed, over the modelled time.

Needs triton, whose wheel has cuobjdump and nvdisasm; compiling the CUDA C++ kernels is `setup.py`'s business.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

STATUS = "modelled, unvalidated"
DEFAULT_DS = (576, 2048, 3072, 4096, 5120, 8192)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("hadamard_patch_forward", "hadamard_patch_backward", "add_patch_rms_norm")
DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Published figures: bytes/s of the memory, streaming multiprocessors, their clock in Hz."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    matrix_products: int  # bfloat16 products a cycle and multiprocessor by warp-level instructions


MACHINES = {
    "sm_80": Machine("A100 80 GB", 2.039e12, 108, 1.41e9, 1024),
    "sm_90": Machine("H100 SXM", 3.35e12, 132, 1.755e9, 1024),
    "sm_100": Machine("B200", 8.0e12, 148, 1.85e9, 1024),
    "sm_120": Machine("RTX 5090", 1.792e12, 170, 2.41e9, 512),
}


@dataclass(frozen=True)
class WarpCounts:
    """What one warp executes for the rows that its block holds at a time."""

    instructions: int
    fp: int  # float32 additions, multiplications, multiply-adds
    shfl: int = 0
    smem_wavefronts: int = 0
    matrix_products: int = 0


def modelled_cycles(
    machine: Machine, counts: WarpCounts, *, row_bytes: float, warps: int, rows: int = 1
) -> dict[str, float]:
    """Cycles a row and multiprocessor that each unit is busy; the largest is the modelled time.

    Per multiprocessor and cycle: four instructions are issued, 128 lanes add or multiply, one shuffle or one wavefront
    of shared memory (128 bytes) is served.

    Args:
        counts: of one warp for ``rows`` rows.
        row_bytes: read from and written to memory for one row.
        warps: of a block, which holds ``rows`` rows at a time.
    """
    share = warps / rows
    return {
        "dram": row_bytes / machine.bandwidth * machine.multiprocessors * machine.clock,
        "issue": share * counts.instructions / 4,
        "fp": share * counts.fp * 32 / 128,
        "mio": share * (counts.shfl + counts.smem_wavefronts),
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


# --- machine code ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    predicated: bool


@dataclass
class Block:
    label: str
    instructions: list[Instruction]
    successors: list[int]


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<at>@\S+\s+)?(?P<opcode>[A-Z0-9_][\w.]*)\s*(?P<operands>[^;]*);")
_LABEL = re.compile(r"\s*(\.L\w*):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


def sass_functions(text: str) -> dict[str, list[Block]]:
    """Control-flow graph of every function in the output of ``nvdisasm -c``."""
    functions = {}
    for name, body in re.findall(r"^\s*\.section\s+\.text\.([^,\s]+),(.*?)(?=^\s*\.section\s|\Z)", text, re.M | re.S):
        functions[name] = _graph(_sass_lines(body))
    return functions


def _sass_lines(body: str) -> Iterator[str | Instruction]:
    for line in body.splitlines():
        if label := _LABEL.match(line):
            yield label[1]
        elif found := _SASS.match(line):
            yield Instruction(found["opcode"], found["operands"], bool(found["at"]))


def _is_jump(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "CALL")


def _graph(lines: Iterable[str | Instruction]) -> list[Block]:
    blocks = [Block("", [], [])]
    for line in lines:
        if isinstance(line, str):
            blocks.append(Block(line, [], []))
        else:
            blocks[-1].instructions.append(line)
            if _is_jump(line):
                blocks.append(Block("", [], []))
    number = {block.label: i for i, block in enumerate(blocks) if block.label}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        falls_through = True
        if last is not None and _is_jump(last):
            kind = last.opcode.split(".")[0]
            jumps = kind == "BRA" or last.opcode.startswith("CALL.REL.NOINC")  # a call that is never returned from
            if not jumps and kind != "EXIT":
                raise ValueError(f"{last.opcode} {last.operands}: this program cannot be followed")
            falls_through = last.predicated
            if jumps:
                target = _TARGET.search(last.operands)
                if target is None:
                    raise ValueError(f"{last.opcode} {last.operands}: this program cannot be followed")
                block.successors.append(number[target[1]])
                falls_through = falls_through or not last.operands.startswith("`")
        if falls_through and i + 1 < len(blocks):
            block.successors.append(i + 1)
    return blocks


def natural_loops(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """The blocks of every loop by its header."""
    reachable: set[int] = set()
    waiting = [0]
    while waiting:
        if (i := waiting.pop()) not in reachable:
            reachable.add(i)
            waiting += blocks[i].successors
    before: dict[int, list[int]] = {i: [] for i in reachable}
    for i in reachable:
        for successor in blocks[i].successors:
            before[successor].append(i)
    dominators = {i: set(reachable) for i in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in sorted(reachable - {0}):
            new = {i} | set.intersection(*(dominators[j] for j in before[i]))
            changed, dominators[i] = changed or new != dominators[i], new
    loops: dict[int, set[int]] = {}
    for i in reachable:
        for header in set(blocks[i].successors) & dominators[i]:
            body = loops.setdefault(header, {header})
            waiting = [i]
            while waiting:
                if (j := waiting.pop()) not in body:
                    body.add(j)
                    waiting += before[j]
    return loops


def executed(blocks: Sequence[Block], trips: Sequence[int] = ()) -> Counter[str]:
    """How often a warp executes each opcode for one turn of the loop over rows; the longest outermost loop is that one.

    What stands before and after it is executed once for all of a block's rows and is left out.

    Args:
        trips: how often the loops within it turn, in the order of their headers.

    Raises:
        ValueError: the loops are not as many as trips.
    """
    loops = natural_loops(blocks)
    if not loops:
        return Counter(instruction.opcode for block in blocks for instruction in block.instructions)
    size = {header: sum(len(blocks[i].instructions) for i in body) for header, body in loops.items()}
    row_loop = max(loops, key=lambda header: (size[header], -header))
    inner = sorted(header for header in loops if header != row_loop and header in loops[row_loop])
    if len(inner) != len(trips):
        raise ValueError(f"{len(inner)} loops within the loop over rows, and the trip counts of {len(trips)} are known")
    counts: Counter[str] = Counter()
    for i in loops[row_loop]:
        turns = 1
        for header, count in zip(inner, trips, strict=True):
            turns *= count if i in loops[header] else 1
        for instruction in blocks[i].instructions:
            counts[instruction.opcode] += turns
    return counts


# --- what is counted -------------------------------------------------------------------------------------------------


def _total(counts: Counter[str], *prefixes: str) -> int:
    return sum(count for opcode, count in counts.items() if opcode.split(".")[0] in prefixes)


def _wide(counts: Counter[str], prefix: str) -> int:
    return sum(count for opcode, count in counts.items() if opcode.startswith(prefix + ".") and ".128" in opcode)


def _wavefronts(opcode: str) -> int:
    """128-byte passes through shared memory that an access of a whole warp needs where no two lanes collide."""
    kind, *modifiers = opcode.split(".")
    if kind in ("LDS", "STS", "ATOMS"):
        return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if kind in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else int(modifiers[-1][-1])
    return 0


def _products(opcode: str) -> int:
    """Multiply-adds of a warp-level matrix product, from its shape: HMMA.16816 is 16 x 8 x 16."""
    if opcode.split(".")[0] not in ("HMMA", "QMMA"):
        return 0
    shape = re.search(r"\.(16)(8)(\d+)\.", opcode + ".")
    return 16 * 8 * int(shape[3]) if shape else 0


def warp_counts(counts: Counter[str]) -> WarpCounts:
    return WarpCounts(
        instructions=sum(counts.values()),
        fp=_total(counts, "FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
        shfl=_total(counts, "SHFL"),
        smem_wavefronts=sum(count * _wavefronts(opcode) for opcode, count in counts.items()),
        matrix_products=sum(count * _products(opcode) for opcode, count in counts.items()),
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
    status: str = STATUS

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.kernel, self.source, self.arch, self.dtype, self.d


def _row_bytes(kernel: str, d: int, itemsize: int) -> int:
    arrays = {"hadamard_patch_forward": 2, "hadamard_patch_backward": 3, "add_patch_rms_norm": 4}
    return arrays[kernel] * d * itemsize


def nvidia_row(
    kernel: str, source: str, arch: str, dtype: str, d: int, *, counts: Counter[str], registers: int, shared_bytes: int,
    warps: int, rows: int,
) -> KernelRow:  # fmt: skip
    itemsize = DTYPES[dtype][1]
    work, machine = warp_counts(counts), MACHINES[arch]
    cycles = modelled_cycles(machine, work, row_bytes=_row_bytes(kernel, d, itemsize), warps=warps, rows=rows)
    time = max(cycles.values())
    peer = three_pass_cycles(machine, d, itemsize) if kernel == "hadamard_patch_forward" else None
    allocated = -(-registers // 8) * 8 * 32 * warps
    shared_limit = (164 if arch == "sm_80" else 100 if arch == "sm_120" else 228) * 1024
    resident = min(65536 // allocated, shared_limit // (shared_bytes + 1024), 32)
    return KernelRow(
        kernel, source, arch, dtype, d,
        registers=registers,
        spills=_total(counts, "LDL", "STL"),
        shared_bytes=shared_bytes,
        ldg=_total(counts, "LDG", "LDGSTS"),
        ldg128=_wide(counts, "LDG") + _wide(counts, "LDGSTS"),
        stg=_total(counts, "STG"),
        stg128=_wide(counts, "STG"),
        shfl=work.shfl,
        smem_wavefronts=work.smem_wavefronts,
        bar=_total(counts, "BAR"),
        instructions=work.instructions,
        dram_fraction=round(cycles["dram"] / time, 3),
        three_pass_fraction=None if peer is None else round(time / peer, 3),
        fp=work.fp,
        mma=_total(counts, "HMMA"),
        warps=warps,
        rows=rows,
        resident_blocks=resident,
        cycles={unit: round(value, 1) for unit, value in cycles.items()},
    )  # fmt: skip


# --- Triton ----------------------------------------------------------------------------------------------------------


def compile_triton(
    kernel: str, arch: str, dtype: str, d: int, rows: int | None = None, warps: int | None = None
) -> Any:
    """The kernel as a machine with this GPU would compile it, and its layout; no GPU is needed.

    The forward has only ``scale``, the backward wants dx and dscale: what the patch of the paper needs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from linearpatch_kernels.ops.hadamard_patch import triton as kernels

    lanes = 64 if arch.startswith("gfx") else 32
    layout = kernels.layout_of(d, lanes, rows, warps)
    if layout is None:
        raise ValueError(f"Triton leaves d = {d} to PyTorch")
    here = {"x_ptr", "scale_ptr", "rows"} | ({"h_ptr"} if layout.m > 1 else set())
    if kernel == "hadamard_patch_backward":
        function, more = kernels.hadamard_patch_backward_kernel, {"grad_ptr", "dx_ptr", "dscale_ptr", "width"}
    else:
        function, more = kernels.hadamard_patch_kernel, {"y_ptr", "eps"}
        if kernel == "add_patch_rms_norm":
            more |= {"residual_ptr", "weight_ptr", "normed_ptr"}
    here |= more | {name for name in function.arg_names if name.endswith("stride")}
    float32 = {"scale_ptr", "weight_ptr", "dscale_ptr"}

    def kind(name: str) -> str:
        if name not in here:
            return "constexpr"
        if name == "eps":
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        return "*fp32" if name in float32 else "*bf16" if name == "h_ptr" else "*" + DTYPES[dtype][0]

    constants = layout.constants(DTYPES[dtype][1])
    signature = {name: kind(name) for name in function.arg_names}
    values = {name: constants.get(name) for name, of in signature.items() if of == "constexpr"}
    aligned = [
        (i,)
        for i, (name, of) in enumerate(signature.items())
        if of.startswith("*") or (of == "i32" and (name.endswith("stride") or name == "width"))
    ]
    target = GPUTarget("hip", arch, lanes) if lanes == 64 else GPUTarget("cuda", int(arch[3:]), lanes)
    source = ASTSource(function, signature, values, {position: [["tt.divisibility", 16]] for position in aligned})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = triton.compile(source, target=target, options={"num_warps": layout.warps, **kernels.OPTIONS})
    return compiled, layout


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> tuple[dict[str, list[Block]], dict[str, dict[str, int]]]:
    """Control-flow graphs of a cubin's functions, and what ``cuobjdump -res-usage`` says of each."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = _tool("nvdisasm", "-c", file.name), _tool("cuobjdump", "-res-usage", file.name)
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+?):\s*\n\s*(.*)", usage)
    }
    return sass_functions(code), resources


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
        counts=executed(functions[name]),
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
                    yield Instruction("BRA", f"`({operands})", opcode.startswith("s_cbranch"))
                elif opcode == "s_endpgm":
                    yield Instruction("EXIT", "", False)
                else:
                    yield Instruction(opcode, operands, False)

    counts = executed(_graph(lines()))

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


def ranked(kernel: str, arch: str, dtype: str, d: int) -> list[KernelRow]:
    """Ways to hold a power-of-two width, best first: no spills, modelled time, bytes in flight, instructions."""
    candidates = []
    for values in (16, 32, 64):
        for rows in (1, 2, 4, 8, 16, 32):
            warps = rows * d // (32 * values)
            if rows * d % (32 * values) == 0 and warps in (1, 2, 4, 8, 16, 32) and (rows == 1 or warps == 1):
                candidates.append(triton_row(kernel, arch, dtype, d, rows, warps))

    def merit(row: KernelRow) -> tuple[Any, ...]:
        in_flight = (row.resident_blocks or 0) * row.rows * d * DTYPES[dtype][1]
        return (
            row.spills > 0,
            -(row.dram_fraction or 0),
            -min(in_flight, 40_000),
            row.warps * row.instructions / row.rows,
        )

    return sorted(candidates, key=merit)


# --- the command -----------------------------------------------------------------------------------------------------

COLUMNS = (
    *(
        "kernel",
        "source",
        "arch",
        "dtype",
        "d",
        "warps",
        "rows",
        "registers",
        "spills",
        "shared_bytes",
        "resident_blocks",
    ),
    *("ldg", "ldg128", "stg", "stg128", "shfl", "smem_wavefronts", "bar", "mma", "fp", "instructions"),
    *("dram_fraction", "three_pass_fraction"),
)


def table(rows: Sequence[KernelRow]) -> str:
    cells = [COLUMNS, *(tuple("" if (v := getattr(row, c)) is None else str(v) for c in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def read_rows(path: Path) -> list[KernelRow]:
    names = {field.name for field in fields(KernelRow)}
    return [KernelRow(**{k: v for k, v in row.items() if k in names}) for row in json.loads(path.read_text())]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write one object a kernel")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--d", nargs="+", type=int, default=DEFAULT_DS)
    parser.add_argument("--rank", action="store_true", help="rank the ways to hold each width instead (H100)")
    options = parser.parse_args(arguments)
    rows = []
    if options.rank:
        for d in options.d:
            for kernel in KERNELS:
                rows += ranked(kernel, "sm_90", "bfloat16", d)
    else:
        rows = [triton_row(*selected) for selected in triton_selection(options.arch, options.d)]
    print(f"Counts of one warp for `rows` rows; fractions and cycles are {STATUS}.")
    print(table(rows))
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
