"""How the GPU day measures.

A contestant is a function of the number of an operand set. Its calls are captured into a CUDA graph that goes round
the sets, so that neither launches nor the cache flatter or burden anyone: for bandwidth the sets together are several
times the L2 cache, for decoding there is one set, warm. Graphs are replayed in turns (A B C A B C ...) between CUDA
events, so that all meet the same clock. What cannot be captured is timed call by call, the cache emptied in between.
The host's time until a call returns is told apart.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.interleaved import forget_compiled
from tools.gpu_day.surroundings import BACKEND, DEVICE, DRY, clocks, failure, relative_error, say, synchronize

Contestant = Callable[[int], Any]

L2_BYTES = 50 << 20  # the H100's; the H200's is 60 MB
FLUSHING = 5 * L2_BYTES
GRAPH_SECONDS = 1.5e-3
ROUNDS, HOST_CALLS = 9, 50


def operand_sets(call_bytes: int, *, most: int = 64) -> int:
    """How many sets of operands no cache holds."""
    return 1 if DRY else max(1, min(most, -(-FLUSHING // max(call_bytes, 1))))


@dataclass
class Entry:
    """A contestant, ready: ``replay`` makes ``calls`` calls."""

    run: Contestant
    replay: Callable[[], Any]
    calls: int
    captured: bool
    microseconds: list[float] = field(default_factory=list)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _elapsed(run: Callable[[], Any]) -> float:
    """Microseconds on the device."""
    if DRY:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    begin, end = _event(), _event()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


_spoil: Tensor | None = None


def _flush() -> None:
    """Read more than L2 holds: what stays there is clean, and the device is busy for longer than a launch takes."""
    global _spoil
    if _spoil is None:
        _spoil = torch.ones(1 << 10 if DRY else FLUSHING // 4, device=DEVICE)
    _spoil.sum()


def prepared(run: Contestant, sets: int) -> Entry:
    """Captured if that can be done. The first calls, which compile and allocate, are made outside of it."""
    for index in range(min(sets, 2)):
        run(index)
    synchronize()
    if DRY:
        return Entry(run, lambda: run(0), 1, False)
    once = statistics.median(_elapsed(lambda: run(0)) for _ in range(3)) * 1e-6
    calls = max(1, min(200, round(GRAPH_SECONDS / once)))
    calls = -(-calls // sets) * sets
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in range(calls):
                run(call % sets)
        graph.replay()
        torch.cuda.synchronize()
        return Entry(run, graph.replay, calls, True)
    except Exception as error:
        say(step="not captured", reason=failure(error))
        synchronize()
        return Entry(run, lambda: run(0), 1, False)


def measure(entries: Mapping[str, Entry], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """All take turns. Microseconds of a call: the median, and the 10th and 90th percentile of the rounds."""
    for _ in range(1 if DRY else rounds):
        for entry in entries.values():
            if not entry.captured:
                _flush()
            entry.microseconds.append(_elapsed(entry.replay) / entry.calls)
    return {name: {**_spread(entry.microseconds), "captured": entry.captured} for name, entry in entries.items()}


def _spread(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return {"us": round(statistics.median(ordered), 3), "spread": [round(low, 3), round(high, 3)], "rounds": len(times)}


def host_microseconds(run: Contestant) -> float:
    """Until a call returns, the median; its work is not waited for."""
    synchronize()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2 if DRY else HOST_CALLS):
            begin = time.perf_counter()
            run(0)
            times.append(time.perf_counter() - begin)
    finally:
        gc.enable()
    synchronize()
    return round(statistics.median(times) * 1e6, 1)


def contest(
    what: Mapping[str, Any],
    contestants: Mapping[str, Callable[[], Contestant]],
    *,
    sets: int,
    moved: int | None = None,
    same_as_ours: tuple[str, ...] = (),
    rounds: int = ROUNDS,
    tolerance: float = 0.05,
) -> dict[str, Any]:
    """Prepare, compare and time; one line of JSON.

    Args:
        what: names the case: operator, rows, d, dtype, error.
        contestants: the first is ours; each makes its call when asked, and may fail in its own way.
        sets: of operands.
        moved: bytes that the operator must read and write in a call.
        same_as_ours: whose results must be ours but for ``tolerance`` (relative, in the norm), or they are not timed.
    """
    forget_compiled()
    entries: dict[str, Entry] = {}
    missing: dict[str, str] = {}
    ours = next(iter(contestants))
    kept: Tensor | None = None
    for name, make in contestants.items():
        try:
            run = make()
            result = run(0)
            synchronize()
            if name == ours and isinstance(result, Tensor):
                kept = result[:64].clone()
            if name in same_as_ours and kept is not None and not (off := relative_error(result[:64], kept)) < tolerance:
                missing[name] = f"its result differs from ours by {off:.1e}"
                continue
            entries[name] = prepared(run, sets)
        except Exception as error:
            missing[name] = failure(error)
    times = measure(entries, rounds)
    host = {name: host_microseconds(entry.run) for name, entry in entries.items() if name in (ours, *same_as_ours)}
    line = {"step": "time", "backend": BACKEND, **what, "sets": sets, "bytes": moved, "times": times, "host_us": host}
    say(**line, missing=missing, clocks=clocks())
    return line
