"""What flows through the layers around a joint, and sums over it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.forward import PartialRun, Stream, entering
from linearpatch_kernels.healing.least_squares import NormalEquations, RunningSums
from linearpatch_kernels.modeling.families import decoder_layers
from linearpatch_kernels.processes import Processes


@dataclasses.dataclass(frozen=True)
class Sums:
    """What the sums of all processes come to; the first ``fit`` windows of this one are to fit on."""

    fit: int
    processes: Processes

    def of(self, tokens: Iterable[Tokens], precision: torch.dtype) -> tuple[NormalEquations, NormalEquations]:
        """Of the windows to fit on and of those held out, from what is to be fitted on each window."""
        running: list[RunningSums] = []
        for index, (a, r, weight) in enumerate(tokens):
            if index in (0, self.fit):
                running.append(RunningSums(a.shape[-1], r.shape[-1], a.device, precision))
            running[-1].add(a, r, weight)
        gathered: list[list[NormalEquations]] = self.processes.gather([one.total() for one in running])
        fit, held = (functools.reduce(operator.add, parts) for parts in zip(*gathered, strict=True))
        return fit, held

    def total(self, *sums: Tensor) -> list[Tensor]:
        """Sums of this process's windows, of all processes together."""
        gathered: list[tuple[Tensor, ...]] = self.processes.gather(sums)
        return [functools.reduce(operator.add, parts) for parts in zip(*gathered, strict=True)]


# Inputs a [T, n] of a map, what its output lacks r [T, d], and weights [T] (None: 1).
Tokens: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


_EPSILON = 1e-12


def _rows(state: Tensor) -> Tensor:
    """The tokens of one window [T, n]: some layers drop the window's axis."""
    return state.reshape(-1, state.shape[-1])


class _Enough(Exception):
    """Ends a run of a layer once what was wanted of it is there."""


def entering_modules(
    model: PreTrainedModel, index: int, paths: Sequence[str], states: Iterable[Tensor]
) -> Iterator[list[Tensor]]:
    """What enters modules of a layer, in the order in which they run, [T, n] each, per window; no more of it is run."""
    run = PartialRun(model, index, index + 1)
    layer = decoder_layers(model)[index]
    seen: list[Tensor] = []

    def look(entered: Tensor) -> None:
        seen.append(_rows(entered))
        if len(seen) == len(paths):
            raise _Enough

    with entering([(layer.get_submodule(path), look) for path in paths]):
        for state in states:
            seen.clear()
            with contextlib.suppress(_Enough):
                run(state.unsqueeze(0))
            yield list(seen)


def entering_and_leaving(
    model: PreTrainedModel, index: int, path: str, states: Iterable[Tensor]
) -> Iterator[list[Tensor]]:
    """What enters a module of a layer, and what leaves the layer, per window."""
    run = PartialRun(model, index, index + 1)
    seen: list[Tensor] = []
    with entering([(decoder_layers(model)[index].get_submodule(path), lambda entered: seen.append(_rows(entered)))]):
        for state in states:
            leaving = run(state.unsqueeze(0))[0]
            yield [seen.pop(), leaving]


def lacking(pairs: Iterable[Sequence[Tensor]], targets: Sequence[Tensor], precision: torch.dtype) -> Iterator[Tokens]:
    """What a projection back to the stream is fitted on, from what enters it and the stream that it makes, per window:
    what the stream lacks, relative to the target [T, d]."""
    for (a, has), target in zip(pairs, targets, strict=True):
        y = target.to(has.device, precision)
        yield a, y - has.to(precision), 1 / y.square().sum(-1).clamp_min(_EPSILON)


def behind_half(model: PreTrainedModel, index: int, ends: str, stream: Stream) -> list[Tensor]:
    """Run layer ``index`` over a stream that is there, and give the stream that enters a module in it: W tensors
    [T, d]."""
    middle: list[Tensor] = []
    module = decoder_layers(model)[index].get_submodule(ends)
    with entering([(module, lambda state: middle.append(_rows(state)))]):
        stream.advance(model, index + 1)
    return middle
