"""The losses' CUDA kernels compiled without a GPU: ``python -m tools.gpu_model.losses [ARCH ...]``.

`triton_launches` and `model` have Triton's. Of CUDA's it is said what a kernel needs, how many loads of 16 bytes
are under way before one is waited for, and how many instructions its loop has (the longest one, every branch counted).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_model.build import FLAGS, Cubin, nvcc
from tools.gpu_model.sass import JUMPS, Program, sass_programs

CUDA_SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "topk_kl" / "cuda" / "losses.cu"


@dataclass(frozen=True)
class Counted:
    """Of one kernel: registers a thread, bytes of stack and spills, static instructions."""

    name: str
    registers: int
    spills: int
    loads_together: int
    loop: int
    opcodes: tuple[str, ...]


def _registers(operands: str) -> Iterator[int]:
    for number, wide in re.findall(r"\bR(\d+)\b(\.64)?", operands):
        yield from range(int(number), int(number) + (2 if wide else 1))


def loads_together(program: Program) -> int:
    """The most loads of 16 bytes on their way at a time: until the numbers are asked for, or a branch comes."""
    most, on_their_way = 0, set[int]()
    for instruction in program.instructions:
        if instruction.kind in JUMPS:
            on_their_way.clear()
        loads = instruction.kind == "LDG" and ".128" in instruction.opcode
        asked = {*_registers(", ".join(instruction.parts[1:] if loads else instruction.parts))}
        on_their_way -= {first for first in on_their_way if asked & {*range(first, first + 4)}}
        if loads:
            on_their_way.add(next(_registers(instruction.parts[0])))
            most = max(most, len(on_their_way))
    return most


def longest_loop(program: Program) -> int:
    """Instructions from a label to the last jump back to it; the end of a program is an empty loop."""
    lengths = [0]
    for at, instruction in enumerate(program.instructions):
        if instruction.kind == "BRA" and (target := re.search(r"`\((\.L\w+)\)", instruction.operands)):
            lengths.append(at + 1 - program.labels[target[1]])
    return max(lengths)


def count_cuda(arch: str, folder: Path) -> list[Counted]:
    """Every kernel of the losses for an architecture such as ``90a``.

    Raises:
        FileNotFoundError: there is no nvcc, or no nvdisasm.
        RuntimeError: it does not compile, or only with warnings; what was said.
    """
    compiler, target = nvcc(), folder / f"losses.{arch}.cubin"
    if compiler is None:
        raise FileNotFoundError("no nvcc and C++ compiler")
    command = [compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", str(CUDA_SOURCE), "-o", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or "warning" in ran.stderr:
        raise RuntimeError(ran.stderr)
    cubin = Cubin(target, ran.stderr)
    return [
        Counted(
            _plain(name),
            cubin.registers[name],
            cubin.spills[name],
            loads_together(program),
            longest_loop(program),
            tuple(instruction.opcode for instruction in program.instructions),
        )
        for name, program in sass_programs(cubin.code()).items()
    ]


def _plain(mangled: str) -> str:
    """The kernel's name, with what it is a template of."""
    found = re.match(r"_ZN11linearpatch4cuda(\d+)", mangled)
    if found is None:
        return mangled
    name, rest = mangled[found.end() :][: int(found[1])], mangled[found.end() + int(found[1]) :]
    kind = re.search(r"5KnownI(?:NS0_\d+(\w+?)E|(f))E", rest)
    numbers = re.findall(r"Li(\d+)E", rest)
    return name + (f"<{', '.join([kind[1] or 'float', *numbers])}>" if kind else "")


def main(architectures: Sequence[str]) -> int:
    print(f"{'kernel':>28} {'arch':>6} registers spills loads together  loop instructions")
    with tempfile.TemporaryDirectory() as folder:
        for arch in architectures or ["90a"]:
            for kernel in sorted(count_cuda(arch, Path(folder)), key=lambda one: one.name):
                print(
                    f"{kernel.name:>28} {'sm_' + arch:>6} {kernel.registers:9} {kernel.spills:6}"
                    f" {kernel.loads_together:14} {kernel.loop:5} {len(kernel.opcodes):12}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
