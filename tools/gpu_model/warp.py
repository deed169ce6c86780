"""A warp that runs a kernel's machine code as far as its addresses and branches go: counts that need no assumption.

The code is that of ``nvdisasm``. Integers, predicates and the parameters are followed for 32 lanes; what floats come to
is not known, nor what is loaded. So every loop turns as often as it would, a switch takes the branch that it would, and
the addresses of every access are seen: which tensor, how many bytes, which banks. Only the exits for rare floats
(divisors and roots that are not normal numbers) depend on data, and are not taken.

A misread instruction would show: an address outside of every tensor, a branch that cannot be decided, and an operation
that is not known are errors.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from tools.gpu_model.sass import Instruction, Program, is_for_rare_floats

Lanes = Any  # an array of 32 numbers, or None where they are not known
LANES = 32
MASK = np.uint64(0xFFFFFFFF)
HIGH = np.uint64(32)
SHARED_WINDOW = 0x7E00  # the upper half of a generic address of shared memory
MOST_INSTRUCTIONS = 1_000_000
FALSE, TRUE, ZERO = np.zeros(LANES, bool), np.ones(LANES, bool), np.zeros(LANES, np.uint64)
BITS = {"U8": 8, "32": 32, "64": 64, "128": 128}
ROWS = ("x", "residual", "y", "normed", "grad", "dx")  # tensors of which every row is reached once
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip


@dataclass(frozen=True)
class Launched:
    """A block of a grid, with one structure as its parameter; ``tensors`` are start and size of what may be reached."""

    parameters: bytes
    grid: tuple[int, int]
    threads: int
    tensors: Mapping[str, tuple[int, int]]
    shared_bytes: int
    block: tuple[int, int] = (0, 0)


@dataclass
class Seen:
    """What one warp did. An instruction whose lanes are all off is issued, and counted under "off"."""

    counts: Counter[str] = field(default_factory=Counter)
    wavefronts: int = 0  # of shared memory, from the addresses
    lines: int = 0  # of 128 bytes, which accesses to global memory from registers, or to them, touch
    moved: Counter[str] = field(default_factory=Counter)  # bytes by tensor

    def __add__(self, other: Seen) -> Seen:
        sums = self.counts + other.counts, self.wavefronts + other.wavefronts, self.lines + other.lines
        return Seen(*sums, self.moved + other.moved)

    def __sub__(self, other: Seen) -> Seen:
        differences = self.counts - other.counts, self.wavefronts - other.wavefronts, self.lines - other.lines
        return Seen(*differences, self.moved - other.moved)


@cache
def _operand(text: str) -> tuple[str, str, int]:
    """What is written: a register's file and number, an immediate number's bits, a place in a constant bank, or a sign
    and what it stands before. RZ is an immediate nought."""
    if register := re.fullmatch(r"(U?R)(\d+)(\.\w+)*", text):
        return "register", register[1], int(register[2])
    if re.fullmatch(r"U?RZ(\.\w+)*", text):
        return "immediate", "", 0
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return "immediate", "", int(text, 0)
    if re.fullmatch(r"[+-]?(\d.*|INF|QNAN)", text):
        return "immediate", "", _float(float(text.replace("QNAN", "nan")))
    if text.startswith("c["):
        return "constant", text, 0
    if text[0] in "-~|":
        return text[0], text[1:].rstrip("|"), 0
    raise ValueError(f"the operand {text} is not known")


@cache
def _constant(value: int) -> Lanes:
    return np.full(LANES, value & 0xFFFFFFFF, np.uint64)


def _float(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def _half(value: float) -> int:
    bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits


def _signed(value: Lanes) -> Lanes:
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


def _of_float(value: Lanes) -> Lanes:
    return value.astype(np.uint32).view(np.float32)


def _as_float(value: Lanes) -> Lanes:
    return value.astype(np.float32).view(np.uint32).astype(np.uint64)


def bank_wavefronts(addresses: Lanes, active: Lanes, size: int) -> int:
    """Passes through the 32 banks of 4 bytes: lanes that want one word share it; 16 bytes go by 8 lanes, 8 by 16."""
    together = {16: 8, 8: 16}.get(size, LANES)
    passes = 0
    for first in range(0, LANES, together):
        lanes = slice(first, first + together)
        words = (addresses[lanes][active[lanes]] // 4)[:, None] + np.arange(max(size // 4, 1), dtype=np.uint64)
        if words.size:
            passes += int(np.bincount((np.unique(words) % 32).astype(int)).max())
    return passes


@dataclass(frozen=True)
class Step:
    """An instruction as it was executed.

    Attributes:
        kind: of the memory that was reached, where the address decided.
        passes: 128 bytes each, through shared memory or the first-level cache.
        rows: whether it moves a part of a row, not what all rows share.
        barrier: which one, and of how many threads.
    """

    instruction: Instruction
    kind: str
    passes: int = 0
    rows: bool = False
    barrier: tuple[int, int] | None = None


class Warp:
    """32 threads of a block; `run` lets them go from the beginning to their end."""

    def __init__(self, program: Program, launched: Launched, warp: int) -> None:
        self.program, self.launched = program, launched
        self.thread = np.arange(LANES, dtype=np.uint64) + np.uint64(LANES * warp)
        self.registers: dict[tuple[str, int], Lanes] = {}
        self.predicates: dict[str, Lanes] = {}
        self.regions: dict[
            str, tuple[Lanes, int]
        ] = {}  # of a BSSY: who comes together, how many had branched off before
        self.waiting: list[tuple[int, Lanes]] = []
        self.active = self.thread < launched.threads
        self.at = 0
        self.seen = Seen()
        self.steps: list[Step] = []
        self.spilled: dict[int, Lanes] = {}  # words of local memory, by their address
        base = len(program.constants[0]) - len(launched.parameters)
        bank = bytearray(program.constants[0][:base] + launched.parameters)
        threads, grid = (0x360, 0x370) if base >= 0x380 else (0x0, 0xC)
        struct.pack_into("<III", bank, threads, launched.threads, 1, 1)
        struct.pack_into("<III", bank, grid, *launched.grid, 1)
        if base < 0x200:
            struct.pack_into("<II", bank, 0x18, 0, SHARED_WINDOW)
        self.banks = {**program.constants, 0: bytes(bank)}

    # --- operands ---

    def value(self, text: str, offset: int = 0) -> Lanes:
        """32 bits of an operand, not reduced where it is negated: x + 1 + ~y has the carry of x - y."""
        kind, what, number = _operand(text)
        if kind == "register":
            return self.registers.get((what, number + offset), ZERO)
        if kind == "immediate":
            return _constant(number >> 32 if offset else number)
        if kind == "constant":
            return self.constant(text, 32, offset)
        of = self.value(what, offset)
        if of is None:
            return None
        return (of ^ MASK) + np.uint64(1) if kind == "-" else of ^ MASK if kind == "~" else of & np.uint64(0x7FFFFFFF)

    def pair(self, text: str) -> Lanes:
        if text[0] == "-" and not text[1].isdigit():
            of = self.pair(text[1:])
            return None if of is None else ~of + np.uint64(1)
        low, high = self.value(text), self.value(text, 1)
        return None if low is None or high is None else (low & MASK) | (high & MASK) << HIGH

    def constant(self, text: str, bits: int, offset: int = 0) -> Lanes:
        found = re.fullmatch(r"c\[(\w+)\]\[(.+)\]", text)
        if found is None:
            raise ValueError(f"{text} is not a place in a constant bank")
        bank, place = found.groups()
        address = ZERO
        for term in place.split("+"):
            part = self.value(term)
            if part is None:
                raise ValueError(f"the address of {text} is not known")
            address = (address + part) & MASK
        data = self.banks[int(bank, 0)]
        return np.array(
            [int.from_bytes(data[int(a) + 4 * offset : int(a) + 4 * offset + bits // 8], "little") for a in address],
            np.uint64,
        )

    def real(self, text: str) -> Lanes:
        """An operand of an operation on floats; an immediate one is written as a number."""
        try:
            return np.full(LANES, float(text), np.float32)
        except ValueError:
            if text[0] == "-":
                of = self.real(text[1:])
                return None if of is None else -of
            value = self.value(text)
            return None if value is None else _of_float(value & MASK)

    def predicate(self, text: str) -> Lanes:
        name = text.lstrip("!")
        value = TRUE if name in ("PT", "UPT") else self.predicates.get(name)
        return None if value is None else ~value if text[0] == "!" else value

    # --- results ---

    def set(self, name: str, value: Lanes, active: Lanes, offset: int = 0) -> None:
        kind, what, number = _operand(name)
        if kind != "register":
            return
        key = (what, number + offset)
        if value is not None:
            value = value & MASK
            if active is not TRUE and not active.all():
                old = self.registers.get(key)
                value = np.where(active, value, ZERO if old is None else old)
        self.registers[key] = value

    def set_pair(self, name: str, value: Lanes, active: Lanes) -> None:
        self.set(name, value, active)
        self.set(name, None if value is None else value >> HIGH, active, 1)

    def set_predicate(self, name: str, value: Lanes, active: Lanes) -> None:
        if name in ("PT", "UPT"):
            return
        if value is not None and not active.all():
            old = self.predicates.get(name)
            value = np.where(active, value, FALSE if old is None else old)
        self.predicates[name] = value

    # --- one after the other ---

    def run(self) -> Seen:
        done = 0
        while self.at is not None:
            instruction = self.program.instructions[self.at]
            done += 1
            if done > MOST_INSTRUCTIONS:
                raise ValueError("this kernel does not come to its end")
            self.at += 1
            try:
                if not self.step(instruction):
                    break
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                where = f"{instruction.guard} {instruction.opcode} {instruction.operands}".strip()
                raise ValueError(f"{where}: {error}") from error
        return self.seen

    def step(self, instruction: Instruction) -> bool:
        """False once all threads have ended."""
        kind, *modifiers = instruction.opcode.split(".")
        self.steps.append(Step(instruction, kind))
        operands = instruction.parts
        guard = self.predicate(instruction.guard[1:]) if instruction.guard else TRUE
        if kind in ("BRA", "BRX", "BRXU", "EXIT", "CALL", "RET"):
            self.seen.counts[instruction.opcode] += 1
            return self.jump(kind, operands, guard, instruction)
        on = None if guard is None else self.active & guard
        name = instruction.opcode
        if kind in ("LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL", "ATOMG", "RED", "LDGSTS"):
            if on is None:
                raise ValueError("whether memory is reached depends on data")
            if on.any():
                name = self.memory(instruction, kind, modifiers, operands, on)
        elif kind == "BAR":
            self.steps[-1] = Step(instruction, kind, barrier=self.barrier(operands))
        else:
            self.compute(kind, modifiers, operands, self.active if on is None else on, instruction)
            if on is None:  # what it may have left is not known
                self.forget(instruction)
        self.seen.counts[name if on is None or on.any() else f"off {name}"] += 1
        return True

    # --- branches ---

    def jump(self, kind: str, operands: Sequence[str], guard: Lanes, instruction: Instruction) -> bool:
        if kind == "EXIT":
            if guard is None:
                raise ValueError("who ends depends on data")
            self.active = self.active & ~guard
            return self.active.any() or self.others()
        if kind in ("BRX", "BRXU", "RET"):
            places = self.value(operands[0].split()[0])
            offset = re.search(r"[-+]0x[0-9a-f]+", instruction.operands)
            if places is None or guard is None or not guard.all() or (offset is None) != (kind == "RET"):
                raise ValueError("where this goes is not known")
            (place,) = {int(p) for p in places[self.active]}
            if offset is not None:  # a return's place is counted from the kernel's beginning
                place += int(offset[0], 16) + self.program.address(self.at)
            self.at = self.program.at(place)
            return True
        target = operands[-1].strip("`()")
        for condition in operands[:-1]:
            # BRA.DIV ~URZ, or a mask: who is missing? Nobody.
            given = self.predicate(condition) if condition[0] != "~" and condition[:2] != "UR" else FALSE
            guard = None if guard is None or given is None else guard & given
        if guard is None:
            guard = FALSE if self.program.is_rare(target) else TRUE if self.program.is_rare_at(self.at) else None
            if guard is None:
                raise ValueError("where this goes depends on data")
        takes = self.active & guard
        if not takes.any():
            return True
        if is_for_rare_floats(target) or target not in self.program.labels:
            raise ValueError("a call for rare floats")
        if (takes != self.active).any():
            self.waiting.append((self.program.labels[target], takes))
            self.active = self.active & ~takes
        else:
            self.at = self.program.labels[target]
        return True

    def others(self) -> bool:
        """Go on with threads that had branched off."""
        if not self.waiting:
            return False
        self.at, self.active = self.waiting.pop()
        return True

    def meet(self, region: str) -> None:
        together, before = self.regions[region]
        if len(self.waiting) > before:
            self.others()
        else:
            self.active = together

    # --- memory ---

    def address(self, text: str, wide: bool) -> Lanes:
        total = ZERO
        for term in re.sub(r"^desc\[\w+\]", "", text).strip("[]").split("+"):
            name, *modifiers = term.split(".")
            if "64" in modifiers or (wide and len(text.split("+")) == 1 and name.startswith("UR") and name != "URZ"):
                part = self.pair(name)
            else:
                part = self.value(name)
                part = None if part is None else part & MASK
                if part is not None and term.startswith("-0x"):
                    part = _signed(part).astype(np.uint64)
            if part is None:
                raise ValueError("an address is not known")
            scale = next((int(m[1:]) for m in modifiers if re.fullmatch(r"X\d+", m)), 1)
            total = total + part * np.uint64(scale)
        return total if wide else total & MASK

    def memory(self, of: Instruction, kind: str, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> str:
        """The access by the memory that it reaches: a generic one may be one of shared memory."""
        bits = of.bits
        load = kind in ("LD", "LDG", "LDS")
        *others, place = (operand for operand in operands if "[" in operand)
        if kind in ("LDL", "STL"):
            return self.spill(of, kind, modifiers, operands, on)
        if kind == "LDGSTS":  # first to shared memory, as a store
            self.memory(of, "STS", [str(bits)], others, on)
        addresses = self.address(place, kind not in ("LDS", "STS"))
        if kind in ("LD", "ST") and (addresses[on] >> HIGH == SHARED_WINDOW).all():
            kind = "LDS" if load else "STS"
            addresses = addresses & MASK
        if kind in ("LDS", "STS"):
            passes = bank_wavefronts(addresses, on, bits // 8)
            self.seen.wavefronts += passes
            self.steps[-1] = Step(of, kind, passes)
            if (addresses[on] % (bits // 8)).any() or addresses[on].max() >= 0x400 + self.launched.shared_bytes:
                raise ValueError("not a place in shared memory")
        else:
            first, last = int(addresses[on].min()), int(addresses[on].max()) + bits // 8
            name = next(
                (n for n, (at, size) in self.launched.tensors.items() if at <= first and last <= at + size), None
            )
            if name is None or (addresses[on] % (bits // 8)).any():
                raise ValueError(f"not a place in a tensor: {first:#x}")
            reads = load or kind == "LDGSTS"
            self.seen.moved[("" if reads else "to ") + name] += int(on.sum()) * bits // 8
            kind = {"LD": "LDG", "ST": "STG"}.get(kind, kind)
            passes = self.steps[-1].passes  # a copy's are those of its store
            if kind != "LDGSTS":
                passes = len(np.unique(addresses[on] // 128))
                self.seen.lines += passes
            self.steps[-1] = Step(of, kind, passes, name in ROWS)
        if load:
            for i in range(bits // 32):
                self.set(operands[0], None, on, i)
        return ".".join([kind, *modifiers])

    def spill(self, of: Instruction, kind: str, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> str:
        """Local memory, where a thread's words lie beside those of its neighbours: a line for each."""
        place = next(operand for operand in operands if "[" in operand)
        (address,) = {int(a) for a in self.address(place, wide=False)[on]}
        words = of.bits // 32
        for i in range(words):
            at = address + 4 * i
            if kind == "LDL":
                self.set(operands[0], self.spilled[at], on, i)
            else:
                value = self.value(operands[1], i)
                self.spilled[at] = (
                    value if value is None or on.all() else np.where(on, value, self.spilled.get(at, ZERO))
                )
        self.seen.lines += words
        self.steps[-1] = Step(of, kind, words)
        return ".".join([kind, *modifiers])

    def barrier(self, operands: Sequence[str]) -> tuple[int, int]:
        """Number and threads. A register that stands for both has the threads in its upper half; one operand, all."""
        values = [self.value(operand) for operand in operands]
        if any(value is None for value in values):
            raise ValueError("which barrier this is depends on data")
        number, *threads = (int(value[0]) for value in values)
        if not threads:
            return number & 15, self.launched.threads
        return number & 15, threads[0] >> 16 if operands[0] == operands[1] else threads[0]

    # --- everything else ---

    def forget(self, instruction: Instruction) -> None:
        """What an instruction writes is not known from here on."""
        for file, number in instruction.written:
            if file.endswith("P"):
                self.predicates[f"{file}{number}"] = None
            else:
                self.registers[file, number] = None

    def compute(self, kind: str, modifiers: Sequence[str], operands: Sequence[str], on: Lanes, of: Instruction) -> None:
        known = kind if kind in OPERATIONS else kind.removeprefix("U")
        if "64" in modifiers and known not in OF_PAIRS:
            raise ValueError("this operation on 64 bits is not known")
        if known in OPERATIONS:
            OPERATIONS[known](self, modifiers, operands, on)
        elif kind in OF_FLOATS:
            self.forget(of)
        elif kind not in WITHOUT_RESULT:
            raise ValueError("this operation is not known")


# Operations on floats, of which only the results' places matter, and those that leave nothing.
OF_FLOATS = {
    *("FADD", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "F2FP", "MUFU", "FCHK", "SHFL", "F2F", "DADD"),
    *("HMUL2", "FMNMX", "HMMA", "UFFMA", "UFADD", "UFMUL"),
}
OF_PAIRS = {"MOV", "LDC", "LDCU", "IADD", "IADD3", "SEL"}
WITHOUT_RESULT = {"NOP", "WARPSYNC", "BREAK", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CCTL"}


# --- operations on integers and predicates ---

Operation = Callable[[Warp, Sequence[str], Sequence[str], Lanes], None]
OPERATIONS: dict[str, Operation] = {}


def _operation(*names: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


def _split(operands: Sequence[str]) -> tuple[str, list[str], list[str], list[str]]:
    """Destination, predicates that are set, sources, predicates that are read."""
    after = next((i for i, operand in enumerate(operands[1:], 1) if not _is_predicate(operand)), len(operands))
    sources = [operand for operand in operands[after:] if not _is_predicate(operand)]
    return operands[0], list(operands[1:after]), sources, [o for o in operands[after:] if _is_predicate(o)]


def _unless_unknown(function: Callable[..., Any], *values: Lanes) -> Lanes:
    return None if any(value is None for value in values) else function(*values)


@_operation("MOV", "R2UR", "S2UR", "S2R", "CS2R")
def _move(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, source = operands[0], operands[1]
    grid = warp.launched.block
    special = {
        "SR_TID.X": warp.thread, "SR_CTAID.X": _constant(grid[0]), "SR_CTAID.Y": _constant(grid[1]), "SRZ": ZERO,
        "SR_CgaCtaId": ZERO, "SR_SWINHI": _constant(SHARED_WINDOW), "SR_LANEID": warp.thread % np.uint64(LANES),
    }  # fmt: skip
    value = special[source] if source.startswith("SR") else warp.value(source)
    warp.set(target, value, on)
    if "64" in modifiers:
        warp.set(target, warp.value(source, 1), on, 1)
    if source == "SRZ" and "32" not in modifiers:
        warp.set(target, ZERO, on, 1)


@_operation("LDC", "LDCU")
def _load_constant(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    bits = next((BITS[m] for m in modifiers if m in BITS), 32)
    if bits == 8:
        warp.set(operands[0], warp.constant(operands[1], 8), on)
    for i in range(bits // 32):
        warp.set(operands[0], warp.constant(operands[1], 32, i), on, i)


@_operation("IADD3", "IADD", "VIADD")
def _add(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, carries, sources, given = _split(operands)
    if "64" in modifiers:
        warp.set_pair(target, _unless_unknown(sum_of_pairs, *(warp.pair(source) for source in sources)), on)
        return
    values = [warp.value(source) for source in sources]
    if "X" in modifiers:
        carried = [warp.predicate(p) for p in given]
        values += [None if c is None else c.astype(np.uint64) for c in carried]
        values = [None if v is None else v & MASK for v in values]
    total = _unless_unknown(lambda *parts: sum(parts, ZERO), *values)
    warp.set(target, total, on)
    for i, carry in enumerate(carries):
        warp.set_predicate(carry, None if total is None else (total >> HIGH) > i, on)


def sum_of_pairs(*values: Lanes) -> Lanes:
    return sum(values, ZERO)


@_operation("IMAD")
def _multiply_add(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, carries, (a, b, c), given = _split(operands)
    left, right = warp.value(a), warp.value(b)
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    more = warp.pair(c) if wide or high else warp.value(c)
    if left is None or right is None or more is None:
        (warp.set_pair if wide else warp.set)(target, None, on)
        return
    if (wide or high) and "U32" not in modifiers:
        product = (_signed(left & MASK) * _signed(right & MASK)).astype(np.uint64)
    else:
        product = (left & MASK) * (right & MASK)
    if high:
        warp.set(target, product + more >> HIGH, on)
        return
    total = product + more
    if "X" in modifiers:
        (carried,) = [warp.predicate(p) for p in given][:1]
        total = total + carried.astype(np.uint64)
    (warp.set_pair if wide else warp.set)(target, total, on)
    for carry in carries:
        warp.set_predicate(carry, total < product if wide else (total >> HIGH) > 0, on)


@_operation("LEA")
def _shift_add(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, carries, sources, given = _split(operands)
    values = [warp.value(source) for source in sources]
    if any(value is None for value in values):
        warp.set(target, None, on)
        return
    shift = values[-1]
    if "HI" in modifiers:
        sign = "SX32" in modifiers
        upper = (_signed(values[0]) >> 31).astype(np.uint64) & MASK if sign else values[2] & MASK
        shifted = ((values[0] & MASK) | upper << HIGH) << shift >> HIGH
    else:
        shifted = (values[0] & MASK) << shift & MASK
    total = shifted + values[1]
    if "X" in modifiers:
        carried = warp.predicate(given[0])
        total = total + carried.astype(np.uint64)
    warp.set(target, total, on)
    for carry in carries:
        warp.set_predicate(carry, (total >> HIGH) > 0, on)


@_operation("SHF")
def _funnel(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, low, by, high = operands
    a, shift, c = warp.value(low), warp.value(by), warp.value(high)
    if a is None or shift is None or c is None:
        warp.set(target, None, on)
        return
    shift = np.minimum(shift & (np.uint64(31) if "W" in modifiers else MASK), 63)
    double = (a & MASK) | (c & MASK) << HIGH
    if "U64" in modifiers or "S64" in modifiers:
        result = double << shift if "L" in modifiers else double >> shift
    elif "L" in modifiers:
        result = (a & MASK) << shift if "HI" not in modifiers else (c & MASK) << shift
    elif "HI" not in modifiers:  # the lower word of both
        result = (double >> shift) & MASK
    elif "S32" in modifiers:
        result = (_signed(c & MASK) >> np.minimum(shift, 31).astype(np.int64)).astype(np.uint64)
        warp.set(target, result, on)
        return
    else:
        result = (c & MASK) >> shift
    warp.set(target, result >> HIGH if "HI" in modifiers and {"U64", "S64"} & {*modifiers} else result, on)


@_operation("LOP3", "LOP")
def _logic(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    out = operands[0] if _is_predicate(operands[0]) else None
    target, a, b, c, table, given = operands[1:] if out else operands
    values = [warp.value(operand) for operand in (a, b, c)]
    result = _unless_unknown(lambda *bits: _by_table(int(table, 0), *bits), *values)
    warp.set(target, result, on)
    if out:
        also = warp.predicate(given)
        warp.set_predicate(out, _unless_unknown(lambda r, p: (r != 0) | p, result, also), on)


def _by_table(table: int, a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    result = ZERO
    for row in range(8):
        if table >> row & 1:
            terms = [of if row >> bit & 1 else of ^ MASK for of, bit in ((a, 2), (b, 1), (c, 0))]
            result = result | (terms[0] & terms[1] & terms[2] & MASK)
    return result


@_operation("PLOP3")
def _predicate_logic(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    first, second, a, b, c, table, other = operands
    values = [warp.predicate(operand) for operand in (a, b, c)]
    for target, rows in ((first, int(table, 0)), (second, int(other, 0))):
        numbers = [None if v is None else np.where(v, MASK, ZERO) for v in values]
        # a table that does not look at an operand gives the same whatever it is
        result = _unless_unknown(lambda *bits, rows=rows: _by_table(rows, *bits) != 0, *numbers)
        warp.set_predicate(target, result, on)


@_operation("ISETP")
def _compare(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    first, second, a, b, given, *lower = operands
    long = "S64" in modifiers or "U64" in modifiers
    left, right = (warp.pair(a), warp.pair(b)) if long else (warp.value(a), warp.value(b))
    also = warp.predicate(given)
    low = warp.predicate(lower[0]) if "EX" in modifiers else TRUE
    if left is None or right is None or also is None or low is None:
        warp.set_predicate(first, None, on)
        warp.set_predicate(second, None, on)
        return
    if long and "S64" in modifiers:
        left, right = left.view(np.int64), right.view(np.int64)
    elif not long and "U32" not in modifiers:
        left, right = _signed(left & MASK), _signed(right & MASK)
    elif not long:
        left, right = left & MASK, right & MASK
    relation = modifiers[0]
    result = COMPARE[relation](left, right)
    if "EX" in modifiers:
        strict = {"GE": np.greater, "GT": np.greater, "LE": np.less, "LT": np.less, "NE": np.not_equal}.get(relation)
        same = left == right
        result = same & low if strict is None else strict(left, right) | (same & low)
    for target, value in ((first, result), (second, ~result)):
        warp.set_predicate(target, value & also if "AND" in modifiers else value | also, on)


@_operation("SEL")
def _select(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, a, b, given = operands
    long = "64" in modifiers
    values = (warp.pair(a), warp.pair(b)) if long else (warp.value(a), warp.value(b))
    chosen = _unless_unknown(np.where, warp.predicate(given), *values)
    (warp.set_pair if long else warp.set)(target, chosen, on)


@_operation("FSEL")
def _select_float(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, a, b, given = operands
    chosen = _unless_unknown(np.where, warp.predicate(given), warp.real(a), warp.real(b))
    warp.set(target, None if chosen is None else _as_float(chosen), on)


@_operation("VIMNMX", "IMNMX", "VIADDMNMX")
def _extreme(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, _, sources, given = _split(operands)
    values = [warp.value(source) for source in sources]
    if any(value is None for value in values):
        warp.set(target, None, on)
        return
    a, b = (values[0] + values[1], values[2]) if len(values) == 3 else values
    a, b = a & MASK, b & MASK
    if "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    least = warp.predicate(given[-1])
    warp.set(target, np.where(least, np.minimum(a, b), np.maximum(a, b)).astype(np.uint64), on)


@_operation("PRMT")
def _permute(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, a, selector, b = operands
    values = [warp.value(operand) for operand in (a, selector, b)]
    if any(value is None for value in values):
        warp.set(target, None, on)
        return
    low, choose, high = (value & MASK for value in values)
    both, result = low | high << HIGH, ZERO
    for byte in range(4):
        nibble = choose >> np.uint64(4 * byte) & np.uint64(15)
        if (nibble & np.uint64(8)).any():
            raise ValueError("a sign is spread")
        result = result | (both >> (nibble * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * byte)
    warp.set(target, result, on)


@_operation("P2R")
def _pack_predicates(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    target, _, kept, wanted = operands
    mask, result = int(wanted, 0), warp.value(kept) & ~np.uint64(int(wanted, 0)) & MASK
    for i in range(7):
        if mask >> i & 1:
            held = warp.predicate(f"P{i}")
            if held is None:
                warp.set(target, None, on)
                return
            result = result | held.astype(np.uint64) << np.uint64(i)
    warp.set(target, result, on)


@_operation("IABS")
def _absolute(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    value = warp.value(operands[1])
    warp.set(operands[0], None if value is None else abs(_signed(value & MASK)).astype(np.uint64), on)


@_operation("HFMA2")
def _halves(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    """How constants are made: -0 * 0 + the two numbers."""
    constant = operands[1:3] == ["-RZ", "RZ"]
    value = _constant(_half(float(operands[3])) << 16 | _half(float(operands[4]))) if constant else None
    warp.set(operands[0], value, on)


# Floats by which integers are divided.
@_operation("I2F", "I2FP")
def _to_float(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    value = warp.value(operands[1])
    if value is None:
        warp.set(operands[0], None, on)
        return
    value = value & (np.uint64(0xFFFF) if "U16" in modifiers else MASK)
    exact = (value if {"U32", "U16"} & {*modifiers} else _signed(value)).astype(np.float64)
    rounded = exact.astype(np.float32)
    if "RP" in modifiers:
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    if "RZ" in modifiers:
        rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)
    warp.set(operands[0], _as_float(rounded), on)


@_operation("F2I")
def _to_integer(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    value = warp.value(operands[1])
    warp.set(operands[0], None if value is None else np.trunc(_of_float(value)).astype(np.int64).astype(np.uint64), on)


@_operation("MUFU")
def _reciprocal(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    value = warp.value(operands[1]) if modifiers == ["RCP"] else None
    if value is not None:
        with np.errstate(divide="ignore"):
            value = _as_float(1 / _of_float(value & MASK))
    warp.set(operands[0], value, on)


@_operation("FMUL")
def _multiply(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    a, b = warp.real(operands[1]), warp.real(operands[2])
    if a is None or b is None:
        warp.set(operands[0], None, on)
        return
    exact = a.astype(np.float64) * b.astype(np.float64)
    rounded = exact.astype(np.float32)
    if "RZ" in modifiers:
        rounded = np.where(abs(rounded) > abs(exact), np.nextafter(rounded, np.float32(0)), rounded)
    warp.set(operands[0], _as_float(rounded), on)


@_operation("FSETP")
def _compare_floats(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    first, second, a, b, given = operands
    values = warp.real(a), warp.real(b), warp.predicate(given)
    relation = COMPARE.get(modifiers[0].removesuffix("U"))
    known = relation is not None and "AND" in modifiers and not any(value is None for value in values)
    result = None
    if relation and known:
        unordered = np.isnan(values[0]) | np.isnan(values[1])
        result = np.where(unordered, modifiers[0].endswith("U"), relation(values[0], values[1]))
    warp.set_predicate(first, result & values[2] if known else None, on)
    warp.set_predicate(second, ~result & values[2] if known else None, on)


@_operation("BSSY")
def _region(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    warp.regions[operands[0]] = (warp.active, len(warp.waiting))


@_operation("BSYNC")
def _meet(warp: Warp, modifiers: Sequence[str], operands: Sequence[str], on: Lanes) -> None:
    warp.meet(operands[0])
