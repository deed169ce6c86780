"""How a case is measured: in every round each peer and then ours, so that all meet the same state of the machine."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.speed.registry import Case, Run


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: a share of `Case.seconds`, in rounds; a turn repeats a short call for a while."""

    share: float
    turn_seconds: float
    rounds: tuple[int, int]
    builds_slow_peers: bool


FULL = Effort(1.0, 4e-3, (5, 101), builds_slow_peers=True)
QUICK = Effort(0.2, 1e-3, (3, 21), builds_slow_peers=False)


LONG_CALL = 0.1


class Turn:
    """A call, made once already, and repeated ``calls`` times as one measurement."""

    def __init__(self, run: Run, device: str, turn_seconds: float) -> None:
        self._run, self._device, self.calls = run, device, 1
        self.estimate = LONG_CALL
        self.estimate = self.seconds()
        if self.estimate < turn_seconds:
            self.calls = 10
            self.calls = max(2, round(turn_seconds * 10 / self.seconds()))
            self.estimate = turn_seconds

    def __call__(self) -> None:
        run = self._run
        for _ in range(self.calls):
            run()
        self._finish()

    def warm(self) -> None:
        """Bring its operands back to where its own calls leave them; that is lost in a long call, so not before one."""
        if self.estimate < LONG_CALL:
            self._run()
        self._finish()

    def _finish(self) -> None:
        """Wait for the device: what was only queued would be measured with what comes after it."""
        if self._device != "cpu":
            torch.accelerator.synchronize()

    def seconds(self) -> float:
        self.warm()
        begin = time.perf_counter()
        self()
        return time.perf_counter() - begin


@dataclass
class Contest:
    """The turns of one case, and what its peers took.

    Attributes:
        ours: timed by the caller, after `peers_take_turns`.
        seconds: of a call of each peer, one figure a round.
        skipped: why a peer does not take part.
    """

    ours: Turn
    peers: dict[str, Turn]
    skipped: dict[str, str]
    rounds: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def peers_take_turns(self) -> None:
        for name, turn in self.peers.items():
            self.seconds.setdefault(name, []).append(turn.seconds() / turn.calls)
        self.ours.warm()


@contextmanager
def contest(case: Case, threads: int, effort: Effort) -> Iterator[Contest]:
    """Operands, ours and the peers of a case, ready to be timed on so many threads."""
    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        with case.context():
            yield _prepared(case, effort)
    finally:
        gc.enable()
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Results of a few MB that one call frees serve the next: with glibc's defaults their pages come from the system
    time and again, or not, as the history of the process has it, and that costs more than a kernel."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        mmap_threshold, trim_threshold = -3, -1
        set_option(mmap_threshold, 32 << 20)
        set_option(trim_threshold, 1 << 30)


def forget_compiled() -> None:
    """Dynamo compiles a function for eight shapes, and leaves it eager for all later ones without a word: before every
    case it starts anew."""
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and to import it takes seconds
        torch.compiler.reset()


def _prepared(case: Case, effort: Effort) -> Contest:
    forget_compiled()
    operands = case.operands()
    run = case.ours(operands)
    expected = [result.clone() for result in _tensors(run())]
    ours = Turn(run, case.device, effort.turn_seconds)
    turns: dict[str, Turn] = {}
    skipped: dict[str, str] = {}
    for peer in case.peers:
        reason = peer.missing()
        if peer.slow_to_build and not effort.builds_slow_peers:
            reason = "left out of --quick"
        if reason is None:
            try:
                run = peer.build(operands)
                result = run()  # also what only a first call costs: code, caches, pages
                if peer.same_result:
                    reason = _difference(result, expected, case.tolerance)
                turns |= {} if reason else {peer.name: Turn(run, case.device, effort.turn_seconds)}
            except Exception as error:  # another's code: it may fail in its own way, which is no reason to stop
                reason = f"failed: {' '.join(str(error).split())[:160]}"
        if reason is not None:
            skipped[peer.name] = reason
    once = sum(turn.estimate for turn in (ours, *turns.values()))
    least, most = effort.rounds
    rounds = case.rounds or min(max(round(case.seconds * effort.share / once), least), most)
    return Contest(ours, turns, skipped, rounds)


def _tensors(result: Any) -> list[Tensor]:
    return [from_dlpack(one) for one in (result if isinstance(result, tuple) else (result,))]


def _difference(result: Any, expected: list[Tensor], tolerance: float) -> str | None:
    for one, other in zip(_tensors(result), expected, strict=True):
        largest = float((one.float() - other.float()).abs().max() / other.abs().max())
        if not largest <= tolerance:
            return f"not timed: its result differs from ours by {largest:.1g} of the largest value"
    return None
