"""The time that the blocks of a multiprocessor take together, where memory is not the bound.

Warps wait for what they need, for the units that they share, and for each other. Every warp issues in order, an
instruction once what it reads is there. A scheduler (a fourth of a multiprocessor) issues one instruction a cycle, and
its float32 lanes and matrix unit are busy with it as long as they need; the data pipe of the first-level cache serves
all four, 128 bytes a cycle. Memory is never busy: it answers after its latency. A barrier opens when the last of its
warps has come.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.gpu_model.machines import Machine
from tools.gpu_model.warp import Step

SCHEDULERS = 4

# Cycles from an instruction to one that needs its result. Shared memory, the first-level cache and the memory: pointers
# followed on an H100 SXM5 at 1.98 GHz, 28.6, 40.2, 570.5 ("CUDA Performance Study - NVIDIA H100 SXM5"). Arithmetic:
# table 3 of doi.org/10.1016/j.ultsonch.2023.106546. Matrix products: what a configuration of Accel-Sim for the H100
# assumes. For shuffles, special functions, constants and barriers no measurement was found: they are assumed. What all
# rows share is taken to lie in the first-level cache.
SHARED, FIRST_LEVEL, MEMORY = 29, 40, 571
ARITHMETIC, PRODUCT = 4, 32
SHUFFLE, SPECIAL, CONSTANT, BARRIER = 24, 20, 24, 20

FLOATS = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")
DATA_PIPE = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDL", "STL", "LDSM", "STSM", "SHFL", "ATOMG", "RED")


def products(opcode: str) -> int:
    """Multiply-adds of a warp-level matrix product, from its shape: HMMA.16816 is 16 x 8 x 16. Those of TF32 take twice
    the time, and count twice."""
    if opcode.split(".")[0] not in ("HMMA", "QMMA"):
        return 0
    shape = re.search(r"\.(16)(8)(\d+)\.", opcode + ".")
    return 16 * 8 * int(shape[3]) * (2 if opcode.endswith(".TF32") else 1) if shape else 0


def latency(step: Step) -> int:
    kind = step.kind
    if kind == "LDS":
        return SHARED
    if kind in ("LDG", "LDGSTS"):
        return MEMORY if step.rows else FIRST_LEVEL
    if kind == "LDL":
        return FIRST_LEVEL
    if kind == "HMMA":
        return PRODUCT
    if kind == "SHFL":
        return SHUFFLE
    if kind in ("MUFU", "I2F", "F2I", "F2F", "S2R", "S2UR", "DADD"):
        return SPECIAL
    if kind in ("LDC", "LDCU", "ULDC"):
        return CONSTANT
    return ARITHMETIC


def busy(step: Step, machine: Machine) -> tuple[str, float]:
    """The unit that an instruction keeps, and for how many cycles: a scheduler's own, or all four's "lsu"."""
    if step.kind in DATA_PIPE:
        return "lsu", max(step.passes, 1)
    if step.kind in FLOATS:
        return "fp", 32 * SCHEDULERS / machine.lanes
    if count := products(step.instruction.opcode):
        return "matrix", count * SCHEDULERS / machine.matrix_products
    return "", 0


@dataclass
class _Running:
    """A warp on its way. ``groups`` are the times at which its copies to shared memory are complete, oldest first."""

    steps: Sequence[Step]
    at: int = 0
    free: float = 0
    there: dict[tuple[str, int], float] = field(default_factory=dict)
    copied: float = 0
    groups: list[float] = field(default_factory=list)

    def earliest(self) -> float:
        """When its next instruction has what it needs."""
        step = self.steps[self.at]
        instruction = step.instruction
        time = max([self.free, *(self.there.get(place, 0) for place in instruction.read)])
        if step.kind == "DEPBAR" and (newest := int(instruction.parts[1], 0)) < len(self.groups):
            time = max(time, *self.groups[: len(self.groups) - newest])
        return time


def cycles_together(block: Sequence[Sequence[Step]], blocks: int, machine: Machine) -> float:
    """From the first instruction of ``blocks`` such blocks, all there at a time, to their last.

    Args:
        block: what each of its warps executes.
    """
    running = [_Running(steps) for _ in range(blocks) for steps in block]
    taken: dict[tuple[str, int], float] = defaultdict(float)
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    queue = [(0.0, warp) for warp in range(len(running))]
    last = 0.0
    while queue:
        time, number = heapq.heappop(queue)
        warp, scheduler = running[number], number % SCHEDULERS
        step = warp.steps[warp.at]
        unit, cycles = busy(step, machine)
        unit_key = (unit, 0 if unit == "lsu" else scheduler)
        start = max(warp.earliest(), taken["issue", scheduler], taken[unit_key])
        if start > time:  # somebody else may be before it by then
            heapq.heappush(queue, (start, number))
            continue
        taken["issue", scheduler] = start + 1
        if unit:
            taken[unit_key] = start + cycles
        done = start + latency(step) + (cycles - 1 if unit == "lsu" else 0)
        for place in step.instruction.written:
            warp.there[place] = done
        if step.kind == "LDGSTS":
            warp.copied = max(warp.copied, done)
        elif step.kind == "LDGDEPBAR":
            warp.groups.append(warp.copied)
        warp.free = start + 1
        warp.at += 1
        last = max(last, warp.free)
        if step.barrier is None:
            opened = [number]
        else:
            which, threads = step.barrier
            here = waiting[number // len(block), which]
            here.append(number)
            if 32 * len(here) < threads:
                continue
            opened = waiting.pop((number // len(block), which))
            for other in opened:
                running[other].free = start + BARRIER
        for other in opened:
            if running[other].at < len(running[other].steps):
                heapq.heappush(queue, (running[other].free, other))
    if waiting:
        raise ValueError("a barrier does not open")
    return last
