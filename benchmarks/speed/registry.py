"""What is measured: a case is one call of an operator of ours and the peers that it is held against.

A module registers its cases when it is imported, and is named in `CASE_MODULES`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from linearpatch_kernels.errors import InputError

CASE_MODULES = ("benchmarks.speed.cases.hadamard_patch", "benchmarks.speed.cases.topk_kl")

Run = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    Attributes:
        name: as the table shows it.
        build: a case's operands -> the call that is timed, everything allocated and compiled before; it returns its
            result (anything that torch.from_dlpack reads, or a tuple of such).
        package: the distribution on PyPI that it needs, and
        module: the module that this one brings.
        floor: a bound (a copy, a forward pass) and no rival: the table shows our time over its time.
        same_result: whether its result is held against ours before it is timed.
        slow_to_build: takes seconds to compile, so that ``--quick`` leaves it out.
    """

    name: str
    build: Callable[[Any], Run]
    package: str | None = None
    module: str | None = None
    floor: bool = False
    same_result: bool = True
    slow_to_build: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, if its package is not installed."""
        if self.module is None or importlib.util.find_spec(self.module):
            return None
        return f"not installed: pip install '{self.package}'"


@dataclass(frozen=True)
class Goal:
    """A ratio that was asked for, on one thread: against the fastest of some peers; ``aim`` is what to hope for."""

    against: tuple[str, ...]
    solid: float
    aim: float | None = None


@dataclass(frozen=True)
class Case:
    """One row group of the tables.

    Attributes:
        group: the table it belongs to.
        name: unique; with the group, what ``-k`` selects by.
        operands: makes what ours and the peers share; called once for each number of threads.
        ours: as `Peer.build`.
        peers: in the order they take their turns.
        goals: ratios to be reached.
        context: what the calls run under.
        device: where the operands are; a case for a device that is not there is shown as such.
        tolerance: largest difference of a peer's result from ours, over the largest value in ours.
        seconds: how long to measure, for one number of threads.
        rounds: exactly so many, whatever they take, for peers that take seconds.
        quick: part of ``--quick``.
        threads: numbers of threads to measure on; the headline is the first.
        about: JSON values for the plot: ``width``, ``order`` (its m), ``dtype``.
    """

    group: str
    name: str
    operands: Callable[[], Any]
    ours: Callable[[Any], Run]
    peers: tuple[Peer, ...]
    goals: tuple[Goal, ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
    device: str = "cpu"
    tolerance: float = 1e-4
    seconds: float = 1.5
    rounds: int | None = None
    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    about: Mapping[str, Any] = field(default_factory=dict)


_cases: dict[str, Case] = {}


def register(case: Case) -> None:
    """Add a case.

    Raises:
        InputError: its name is taken, two of its peers have one name, or a goal names a peer that it does not have.
    """
    names = [peer.name for peer in case.peers]
    if case.name in _cases:
        raise InputError(f"there is a case {case.name!r} already: give this one another name")
    if len({*names}) < len(names):
        raise InputError(f"two peers of case {case.name!r} have the same name: give each its own")
    if strangers := {name for goal in case.goals for name in goal.against} - {*names}:
        raise InputError(f"case {case.name!r} has a goal against {', '.join(sorted(strangers))}: add that peer")
    _cases[case.name] = case


def load_cases(modules: Iterable[str]) -> dict[str, Case]:
    """Every case by name, after importing the modules that register them."""
    for module in modules:
        importlib.import_module(module)
    return dict(_cases)
