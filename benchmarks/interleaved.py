"""How a case is measured: in every round each peer once and then ours, so that all meet the same state of the machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Case, Run


@dataclass(frozen=True)
class Effort:
    """How long a case is measured: a share of `Case.seconds`, in rounds; a turn repeats a short call for a while."""

    share: float
    turn_seconds: float
    rounds: tuple[int, int]
    builds_slow_peers: bool


FULL = Effort(1.0, 4e-3, (7, 101), builds_slow_peers=True)
QUICK = Effort(0.2, 1e-3, (3, 21), builds_slow_peers=False)


class Turn:
    """A call, repeated ``calls`` times, as one measurement."""

    def __init__(self, run: Run, device: str, turn_seconds: float) -> None:
        self._run, self._device, self.calls = run, device, 1
        self()  # what only a first call costs: caches, code, pages
        once = min(self.seconds() for _ in range(2))
        if once < turn_seconds:
            self.calls = 10
            self.calls = max(2, round(turn_seconds * 10 / self.seconds()))

    def __call__(self) -> None:
        run = self._run
        for _ in range(self.calls):
            run()
        if self._device != "cpu":
            torch.accelerator.synchronize()

    def warm(self) -> None:
        """Bring its operands back to where its own calls leave them; lost in a long call, so not made before one."""
        if self.calls > 1:
            self._run()

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


def _prepared(case: Case, effort: Effort) -> Contest:
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
                if peer.same_result:
                    reason = _difference(run(), expected, case.tolerance)
                turns |= {} if reason else {peer.name: Turn(run, case.device, effort.turn_seconds)}
            except Exception as error:  # another's code: it may fail in its own way, which is no reason to stop
                reason = f"failed: {' '.join(str(error).split())[:160]}"
        if reason is not None:
            skipped[peer.name] = reason
    once = ours.seconds() + sum(turn.seconds() for turn in turns.values())
    least, most = effort.rounds
    return Contest(ours, turns, skipped, rounds=min(max(round(case.seconds * effort.share / once), least), most))


def _tensors(result: Any) -> list[Tensor]:
    return [torch.from_dlpack(one) for one in (result if isinstance(result, tuple) else (result,))]


def _difference(result: Any, expected: list[Tensor], tolerance: float) -> str | None:
    for one, other in zip(_tensors(result), expected, strict=True):
        largest = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        if not largest <= tolerance:
            return f"not timed: its result differs from ours by {largest:.1g} of the largest value"
    return None
