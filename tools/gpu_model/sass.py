"""Programs for GPUs as ``nvdisasm`` writes them: instructions, labels, constants, and loops of blocks."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

BYTES_AN_INSTRUCTION = 16
JUMPS = ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "JMX", "CALL")
WITHOUT_RESULT = (*JUMPS, "BAR", "WARPSYNC")  # and what begins with an address
ACCESSES = ("LDG", "LDS", "LD", "LDL", "LDC", "LDCU", "ULDC", "STG", "STS", "ST", "STL")
_NAMED = re.compile(r"(U?[RP])(\d+|Z|T)")
_PLACE = re.compile(r"\b(U?[RP])(\d+)\b(\.64)?")


def _places(operand: str, length: int) -> Iterator[tuple[str, int]]:
    """The registers in an operand. In an address they are single ones, or pairs that say so."""
    for file, number, pair in _PLACE.findall(operand):
        registers = 1 if file.endswith("P") else 2 if pair else 1 if "[" in operand else length
        yield from ((file, int(number) + more) for more in range(registers))


@dataclass(frozen=True)
class Instruction:
    """``guard`` is the predicate in front of it with its @, or nothing."""

    opcode: str
    operands: str
    guard: str = ""

    @cached_property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def parts(self) -> list[str]:
        """The operands one by one."""
        return [part.strip().replace(".reuse", "") for part in self.operands.split(",")] if self.operands else []

    @cached_property
    def bits(self) -> int:
        """What an access of memory moves for a thread."""
        return next((int(m) for m in self.opcode.split(".") if m in ("64", "128")), 32)

    @cached_property
    def _results(self) -> int:
        """How many operands are results: a predicate has a second beside it, a register the carries."""
        named = [_NAMED.fullmatch(part) for part in self.parts]
        if self.kind in WITHOUT_RESULT or not named or named[0] is None:
            return 0
        if named[0][1].endswith("P"):
            return 2 if len(named) > 1 and named[1] and self.kind != "FCHK" else 1
        carries = itertools.takewhile(lambda name: name is not None and name[1].endswith("P"), named[1:])
        return 1 + sum(1 for _ in carries)

    def _length(self, i: int) -> int:
        """Registers in a row that operand ``i`` is."""
        result = i < self._results
        if self.kind == "HMMA":  # the sums are float32
            return 2 if i == 2 else 4
        if self.kind in ACCESSES:
            return self.bits // 32
        if "WIDE" in self.opcode.split("."):
            return 2 if result or i == len(self.parts) - 1 else 1
        pairs = self.kind in ("DADD", "FADD2", "FMUL2", "FFMA2") or ".64" in self.opcode
        return 2 if pairs or (result and ".F64" in self.opcode) else 1

    @cached_property
    def written(self) -> tuple[tuple[str, int], ...]:
        """The registers (R, UR) and predicates (P, UP) that its results are left in."""
        return tuple(place for i in range(self._results) for place in _places(self.parts[i], self._length(i)))

    @cached_property
    def read(self) -> tuple[tuple[str, int], ...]:
        """Those that it needs, its guard among them."""
        operands = [(part, self._length(i)) for i, part in enumerate(self.parts) if i >= self._results]
        return tuple(place for part, length in [*operands, (self.guard, 1)] for place in _places(part, length))


def is_for_rare_floats(function: str) -> bool:
    """By the compiler's name for it. Other functions that it calls (a division of integers) are gone through."""
    return function.strip("`()").endswith("_slowpath")


@dataclass
class Program:
    """One function. ``labels`` are places in ``instructions``, ``constants`` the contents of its constant banks."""

    instructions: list[Instruction]
    labels: dict[str, int]
    constants: dict[int, bytes]

    def address(self, i: int) -> int:
        return i * BYTES_AN_INSTRUCTION

    def at(self, address: int) -> int:
        return address // BYTES_AN_INSTRUCTION

    def is_rare_at(self, i: int) -> bool:
        """Whether what follows is a call for rare floats: how divisions and roots leave for them."""
        while i < len(self.instructions) and self.instructions[i].kind not in JUMPS:
            i += 1
        last = self.instructions[i]
        return last.kind == "CALL" and is_for_rare_floats(last.operands)

    def is_rare(self, label: str) -> bool:
        return label in self.labels and self.is_rare_at(self.labels[label])


@dataclass
class Block:
    label: str
    instructions: list[Instruction]
    successors: list[int]


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(?P<at>@\S+)\s+)?(?P<opcode>[A-Z0-9_][\w.]*)\s*(?P<operands>[^;]*);")
_LABEL = re.compile(r"\s*(\.L\w*|\$__internal\S+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_DATA = re.compile(r"\.(byte|short|word|dword|zero)\s+(.*)")
_SIZES = {"byte": 1, "short": 2, "word": 4, "dword": 8}


def sass_programs(text: str) -> dict[str, Program]:
    """Every function in the output of ``nvdisasm``; its constants only if that was not asked for code alone."""
    sections = dict(re.findall(r"^\s*\.section\s+(\.[^,\s]+),(.*?)(?=^\s*\.section\s|\Z)", text, re.M | re.S))
    programs = {}
    for section, body in sections.items():
        if not section.startswith(".text."):
            continue
        name = section.removeprefix(".text.")
        banks = {bank: _data(sections.get(f".nv.constant{bank}.{name}", "")) for bank in range(5)}
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in _sass_lines(body):
            if isinstance(line, str):
                labels[line] = len(instructions)
            else:
                instructions.append(line)
        programs[name] = Program(instructions, labels, banks)
    return programs


def _data(body: str) -> bytes:
    data = bytearray()
    for kind, values in _DATA.findall(body):
        if kind == "zero":
            data += bytes(int(values, 0))
        else:
            for value in values.split(","):
                data += int(value, 0).to_bytes(_SIZES[kind], "little")
    return bytes(data)


def _sass_lines(body: str) -> Iterator[str | Instruction]:
    for line in body.splitlines():
        if label := _LABEL.match(line):
            yield label[1]
        elif found := _SASS.match(line):
            yield Instruction(found["opcode"], found["operands"].strip(), found["at"] or "")


# --- loops, where every branch is a loop's or the end's --------------------------------------------------------------


def graph(lines: Iterable[str | Instruction]) -> list[Block]:
    """Basic blocks of instructions and the labels between them.

    Raises:
        ValueError: a jump whose target is not written down.
    """
    blocks = [Block("", [], [])]
    for line in lines:
        if isinstance(line, str):
            blocks.append(Block(line, [], []))
        else:
            blocks[-1].instructions.append(line)
            if line.kind in JUMPS:
                blocks.append(Block("", [], []))
    number = {block.label: i for i, block in enumerate(blocks) if block.label}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        falls_through = True
        if last is not None and last.kind in JUMPS:
            jumps = last.kind == "BRA" or last.opcode.startswith("CALL.REL.NOINC")  # a call that is never returned from
            if not jumps and last.kind != "EXIT":
                raise ValueError(f"{last.opcode} {last.operands}: this program cannot be followed")
            falls_through = bool(last.guard)
            if jumps:
                target = _TARGET.search(last.operands)
                if target is None:
                    raise ValueError(f"{last.opcode} {last.operands}: this program cannot be followed")
                block.successors.append(number[target[1]])
                falls_through = falls_through or not last.operands.startswith("`")
        if falls_through and i + 1 < len(blocks):
            block.successors.append(i + 1)
    return blocks


def program_graph(program: Program) -> list[Block]:
    lines: list[str | Instruction] = []
    labels: dict[int, list[str]] = {}
    for label, place in program.labels.items():
        labels.setdefault(place, []).append(label)
    for i, instruction in enumerate(program.instructions):
        lines += [*labels.get(i, []), instruction]
    return graph(lines)


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
