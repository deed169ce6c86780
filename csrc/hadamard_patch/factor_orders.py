"""Write ``orders.h``: the Paley matrices of order 12, 20, 28 and 36 as short programs of additions.

    python csrc/hadamard_patch/factor_orders.py > csrc/hadamard_patch/orders.h

A program multiplies a vector by ``H_m`` (the way back) or ``H_m.T`` (the way there) of `linearpatch_kernels.hadamard`.
Two facts shorten it, both exact:

* chi(-1) = +-1 makes Paley's core symmetric or antisymmetric under i -> -i. So sums and differences of the inputs i
  and -i give sums and differences of the outputs i and -i, and each of the two maps has only half of its entries.
* What is left is a small matrix with entries 0 and +-1, whose rows share partial sums. They are shared greedily: the
  pair of terms that most rows have in common becomes a term of its own (C. Paar, ISIT 1997), ties broken at random.

The second construction adds a butterfly on either side of two products with its conference matrix.
"""

from __future__ import annotations

import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from linearpatch_kernels.hadamard import _field, paley_factor

ORDERS = (12, 20, 28, 36)
ATTEMPTS = 300

Signed = tuple[int, int]  # a value's number and its sign
Row = dict[int, int]  # the sum of these values with these signs


class Program:
    """Values 0..m-1 are the inputs; step i makes value m + i = a + factor * b, negated if it is told so."""

    def __init__(self, m: int) -> None:
        self.m = m
        self.steps: list[tuple[int, int, float, bool]] = []
        self.outputs: list[Signed] = []

    def add(self, a: int, b: int, factor: float) -> int:
        self.steps.append((a, b, factor, False))
        return self.m + len(self.steps) - 1

    def sums(self, rows: Iterable[Row], chance: random.Random) -> list[Signed]:
        """One value per row, with partial sums shared."""
        rows = [dict(row) for row in rows]
        while True:
            common = Counter(
                (*sorted((i, j)), row[i] * row[j]) for row in rows for i, j in combinations(sorted(row), 2)
            )
            most = max(common.values(), default=1)
            if most == 1:
                break
            i, j, factor = chance.choice([pair for pair, count in common.items() if count == most])
            new = self.add(i, j, factor)
            for row in rows:
                if i in row and j in row and row[i] * row[j] == factor:
                    row[new] = row.pop(i)
                    del row[j]
        results = []
        for row in rows:
            (total, sign), *rest = sorted(row.items(), key=lambda term: (-term[1], term[0]))
            for value, other in rest:
                total = self.add(total, value, sign * other)
            results.append((total, sign))
        return results

    def matrix(self) -> torch.Tensor:
        values = list(torch.eye(self.m, dtype=torch.float64))
        for a, b, factor, negated in self.steps:
            values.append((values[a] + factor * values[b]) * (-1 if negated else 1))
        return torch.stack([values[value] * sign for value, sign in self.outputs])

    def settle_signs(self) -> None:
        """Negative outputs are made positive in the step that makes them."""
        uses = Counter(value for a, b, *_ in self.steps for value in (a, b))
        for position, (value, sign) in enumerate(self.outputs):
            if sign < 0:
                a, b, factor, negated = self.steps[value - self.m]
                assert not uses[value], "an output that is used again cannot change its sign"
                assert factor in (1, -1)
                assert not negated
                self.steps[value - self.m] = (b, a, -1, False) if factor == -1 else (a, b, 1, True)
                self.outputs[position] = (value, 1)


def negatives(q: int, p: int) -> list[int]:
    """The number of -a for the element a of GF(q), whose number is its digits in base p."""

    def negative(a: int) -> int:
        return a and -a % p + p * negative(a // p)

    return [negative(a) for a in range(q)]


def difference(p: int, a: int, b: int) -> int:
    return (a or b) and (a - b) % p + p * difference(p, a // p, b // p)


def paley_core(program: Program, x: Sequence[int], m: int, transposed: bool, chance: random.Random) -> list[Signed]:
    """``C @ x``, or with a skew C (the first construction) ``(I + C) @ x``; C the conference matrix of order q + 1."""
    p, n, skew, chi = _field(m)
    q = p**n
    minus = negatives(q, p)
    turn = -1 if skew and transposed else 1  # a skew C is the negative of its transpose
    half = [a for a in range(1, q) if a < minus[a]]
    infinity, zero, plus, less = x[0], x[1], [x[1 + a] for a in half], [x[1 + minus[a]] for a in half]
    even = [program.add(i, j, 1) for i, j in zip(plus, less, strict=True)]
    odd = [program.add(i, j, -1) for i, j in zip(plus, less, strict=True)]
    if skew:
        rows = [
            {infinity: 1, zero: turn, **dict.fromkeys(even, turn)},
            {infinity: -turn, zero: 1, **{o: -turn * chi[a] for o, a in zip(odd, half, strict=True)}},
        ]
    else:
        rows = [
            {zero: 1, **dict.fromkeys(even, 1)},
            {infinity: 1, **{e: chi[a] for e, a in zip(even, half, strict=True)}},
        ]
    for i, a in enumerate(half):
        of_even: Row = {}
        of_odd: Row = {}
        for j, b in enumerate(half):
            same, opposite = chi[difference(p, a, b)], chi[difference(p, a, minus[b])]
            if i != j and same == opposite:
                of_even[even[j]] = turn * same
            elif i != j:
                of_odd[odd[j]] = turn * same
        twice = turn * chi[difference(p, a, minus[a])]
        if skew:  # here I + C has (even - twice * odd) / 2 and (odd + twice * even) / 2 on its diagonal: inputs again
            rows.append({**of_odd, (less if twice > 0 else plus)[i]: 1, infinity: -turn})
            rows.append({**of_even, (plus if twice > 0 else less)[i]: twice, zero: turn * chi[a]})
        else:
            rows.append({**of_even, infinity: 1, zero: chi[a]})
            rows.append(of_odd)
    sums = program.sums(rows, chance)
    y: list[Signed] = [(0, 0)] * (q + 1)
    y[0], y[1] = sums[:2]
    for i, a in enumerate(half):
        (e, e_sign), (o, o_sign) = sums[2 + 2 * i : 4 + 2 * i]
        if not skew:
            twice = chi[difference(p, a, minus[a])]
            e = program.add(e, even[i], e_sign * twice / 2)
            o = program.add(o, odd[i], -o_sign * twice / 2)
        y[1 + a] = program.add(e, o, e_sign * o_sign), e_sign
        y[1 + minus[a]] = program.add(e, o, -e_sign * o_sign), e_sign
    return y


def factor(m: int, transposed: bool, seed: int, *, by_structure: bool) -> Program:
    program, chance = Program(m), random.Random(seed)
    if not by_structure:
        h = paley_factor(m)[0]
        rows = (h.T if transposed else h).tolist()
        program.outputs = program.sums([dict(enumerate(row)) for row in rows], chance)
    elif _field(m)[2]:
        program.outputs = paley_core(program, range(m), m, transposed, chance)
    else:
        sums = [program.add(2 * i, 2 * i + 1, 1) for i in range(m // 2)]
        differences = [program.add(2 * i, 2 * i + 1, -1) for i in range(m // 2)]
        upper = paley_core(program, sums, m, transposed, chance)
        lower = paley_core(program, differences, m, transposed, chance)
        for i in range(m // 2):
            program.outputs.append((program.add(upper[i][0], differences[i], upper[i][1]), upper[i][1]))
            program.outputs.append((program.add(lower[i][0], sums[i], -lower[i][1]), lower[i][1]))
    program.settle_signs()
    return program


def in_few_registers(program: Program) -> Program:
    """The same steps in an order that keeps few values alive: next the one that ends most lives, else the latest."""
    m = program.m
    waiting = Counter(value for a, b, *_ in program.steps for value in (a, b))
    waiting.update(value for value, _ in program.outputs)
    done = set(range(m))
    left = dict(enumerate(program.steps, start=m))
    order: list[int] = []
    age = dict.fromkeys(range(m), -1)
    while left:

        def gain(value: int) -> tuple[int, int]:
            a, b, *_ = left[value]
            ends = (waiting[a] == 1) + (waiting[b] == 1) - (age[a] < 0) - (age[b] < 0)
            return ends, max(age[a], age[b])

        value = max((v for v, (a, b, *_) in left.items() if a in done and b in done), key=gain)
        a, b, *_ = left.pop(value)
        waiting[a] -= 1
        waiting[b] -= 1
        age[a] = age[b] = age[value] = len(order)
        done.add(value)
        order.append(value)
    number = {**{i: i for i in range(m)}, **{value: m + i for i, value in enumerate(order)}}
    result = Program(m)
    steps = [program.steps[value - m] for value in order]
    result.steps = [(number[a], number[b], by, negated) for a, b, by, negated in steps]
    result.outputs = [(number[value], sign) for value, sign in program.outputs]
    return result


def shortest(m: int, transposed: bool) -> Program:
    candidates = (
        factor(m, transposed, seed, by_structure=by_structure)
        for by_structure in (True, False)
        for seed in range(ATTEMPTS if by_structure or m < 20 else 0)
    )
    best = in_few_registers(min(candidates, key=lambda program: len(program.steps)))
    h = paley_factor(m)[0].double()
    assert torch.equal(best.matrix(), h.T if transposed else h)
    return best


KINDS = {(1, False): "sum", (-1, False): "difference", (1, True): "negated_sum"}
KINDS |= {(0.5, False): "plus_half", (-0.5, False): "minus_half"}


def filled(items: Iterable[str]) -> str:
    lines = textwrap.fill(", ".join(items).replace("; ", ";"), 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines.replace(";", ", ")


def declaration(m: int, transposed: bool) -> str:
    if transposed and torch.equal(h := paley_factor(m)[0], h.T):
        return f"template <>\nstruct Order<{m}, true> : Order<{m}, false> {{}};\n"
    program = shortest(m, transposed)
    steps = filled(f"{{{a}; {b}; {KINDS[by, negated]}}}" for a, b, by, negated in program.steps)
    outputs = filled(str(value) for value, _ in program.outputs)
    count = len(program.steps)
    return f"""template <>
struct Order<{m}, {str(transposed).lower()}> {{  // {count} additions, {count / m:.2f} an element
  static constexpr Step steps[] = {{
{steps}}};
  static constexpr uint16_t outputs[] = {{
{outputs}}};
}};
"""


HEAD = """// Written by factor_orders.py; tests/ops/test_cpu_kernel.py holds it to linearpatch_kernels.hadamard.
#pragma once

#include <cstdint>

enum StepKind : uint8_t { sum, difference, negated_sum, plus_half, minus_half };

// Values 0..M-1 are the inputs; step i makes value M + i of values a and b: a + b, a - b, -a - b, a + b/2, a - b/2.
struct Step {
  uint16_t a, b;
  StepKind kind;
};

// How to multiply M values by H_M, or by its transpose.
template <int M, bool transposed>
struct Order;
"""

if __name__ == "__main__":
    print("\n".join([HEAD, *(declaration(m, transposed) for m in ORDERS for transposed in (False, True))]), end="")
