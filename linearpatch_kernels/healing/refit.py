"""The projections around a joint, fitted again in closed form so that the student's stream is the dense model's.

The result is a *stock* model: the dense model's architecture with fewer layers, and no operator of its own. Behind a
joint three layers are fitted again, in each of them what reads the stream and what writes to it, on the stream that the
student itself has there, all earlier changes in place; where no map heals the joint, the layer in front of it writes
what the removed layers would have written (`docs/guide/heal.md` has the formulas in a row).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, PartialRun, Run, Stream, check_windows, entering
from linearpatch_kernels.healing.least_squares import NormalEquations, RidgeChoice, RunningSums, choose_ridge
from linearpatch_kernels.healing.ways import BEHIND
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.halves import Half, Write, layer_halves
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

PARTS = ("attention-in", "attention-out", "feed-forward-in", "feed-forward-out")
"""What of a layer is fitted, in this order: q, k and v; o; gate and up; down. One that is a single half (Mamba's) has
``layer-in`` and ``layer-out``."""

_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class RefitSettings:
    """How much is fitted again, and how far.

    Attributes:
        behind: layers behind a joint.
        shrinkage: the part of a change that is kept: the rest is what the change would do wrong on other text.
        ridges: those tried, each relative to an input's own second moment.
        precision: of the products that the moments are sums of: float32, or the slower float64.
        on_all: whether a change is fitted on the held-out windows, too, once they have chosen its ridge: more text,
            where nothing else is judged on them.
    """

    behind: int = BEHIND
    # docs/results/healing.md: on text like the calibration's as good as three quarters, on text of another kind better.
    shrinkage: float = 0.6
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    precision: torch.dtype = torch.float32
    on_all: bool = False

    def __post_init__(self) -> None:
        if self.behind < 0 or not 0 <= self.shrinkage <= 1:
            raise InputError(
                f"behind={self.behind}, shrinkage={self.shrinkage}: give a number of layers from 0 on and a part from "
                "0 to 1"
            )
        if not self.ridges or not all(ridge > 0 for ridge in self.ridges):
            raise InputError(f"ridges={self.ridges}: give at least one, each above 0")


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer to fit again: layer ``index`` of the student.

    Attributes:
        stands_for: the layer of the dense model whose input, middle and output the student's are to be; None: only
            what leaves the layer has a target.
        leaves_at: the depth of the dense model whose stream is to leave the layer.
    """

    index: int
    stands_for: int | None
    leaves_at: int


@dataclasses.dataclass(frozen=True)
class RefitRow:
    """What one least-squares fit came to.

    Attributes:
        layer: of the student; part: as in `PARTS`; projections: what got new weights, empty where nothing did.
        ridge: the one taken, None where no change was better than none.
        before, after: the error per token on the held-out windows, of an output relative to |target|^2; None where
            nothing was fitted.
        why: then the reason.
    """

    layer: int
    part: str
    projections: tuple[str, ...]
    ridge: float | None
    before: float | None
    after: float | None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Refit:
    """A refitted model and the fits that made it, in their order."""

    model: PreTrainedModel
    rows: list[RefitRow]


def steps_of_cut(kept: Sequence[int], layers: int, behind: int, *, in_front: bool) -> list[Step]:
    """The layers of a cut model to fit again: `steps_of` where each of its layers stands for itself.

    Args:
        kept: layers of the dense model that the student has, in order; layers: how many the dense model has.
    """
    return steps_of([Span(layer, layer + 1) for layer in kept], layers, behind, in_front=in_front)


def steps_of(stands_for: Sequence[Span], layers: int, behind: int, *, in_front: bool) -> list[Step]:
    """The layers to fit again around joints and merged layers: ``behind`` of them behind each, and the one in front.

    The layer in front of a joint is to write what the removed layers would have written, a merged layer what all that
    it stands for would have: of a merged layer nothing else has a counterpart in the dense model.

    Args:
        stands_for: per layer of the student, in order, the layers of the dense model that it stands for: itself, or
            several; layers: how many the dense model has.
        in_front: whether these layers are fitted (where no map at the joint, or behind the merged layer, does it).
    """
    steps: dict[int, Step] = {}
    neighbours = itertools.pairwise([Span(-1, 0), *stands_for, Span(layers, layers + 1)])
    for index, (own, following) in enumerate(neighbours, -1):
        if own.length == 1 and following.start == own.end:
            continue
        if in_front and index >= 0:
            whole = steps[index].stands_for if index in steps else None
            steps[index] = Step(index, whole, following.start)
        for later in range(index + 1, min(index + 1 + behind, len(stands_for))):
            if stands_for[later].length == 1:
                steps[later] = Step(later, *stands_for[later])
    return [steps[index] for index in sorted(steps)]


@own_state()
@torch.no_grad()
def refit(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    steps: Sequence[Step],
    fit_windows: Tensor,
    heldout_windows: Tensor,
    *,
    settings: RefitSettings | None = None,
    stream: Stream | None = None,
    own: Stream | None = None,
    done: Mapping[str, Tensor] | None = None,
    keep: Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None] | None = None,
    run: Run = PLAIN,
) -> Refit:
    """The student with new weights in the projections of some layers, by least squares; the same architecture.

    With x the student's stream entering a layer and x', m', y' the dense model's entering it, behind its attention and
    leaving it, in this order and each with the changes before it in place:

    1. what reads the stream in front of the attention (q, k, v, fused or not): ``W <- W (I + c M)``, n the normed
       stream, ``M = argmin sum_t |n'_t - n_t - M n_t|^2``;
    2. what writes to it (o): ``W <- W + c D``, a its input,
       ``D = argmin sum_t |m'_t - (x_t + W a_t) - D a_t|^2 / |m'_t|^2``;
    3. gate and up as 1, toward the dense model's norm behind its attention; 4. down as 2, toward y'.

    Each with a ridge (`NormalEquations.solution`) chosen on ``heldout_windows``, c the shrinkage. Biases stay. Which
    projections these are the layer shows (`modeling.halves`). One whose output is normed before it reaches the stream
    (Gemma) is left alone, as are experts and what chooses them, and a row says so. Where both halves read the same
    stream (Cohere), both are read first, and o has the target of down. What both models have in front runs once, the
    fitted layers four times; memory: three times the stream of all windows, ``W T d`` values each, and ``24 n^2`` bytes
    for the widest input n of a projection.

    Equivalent for one output projection, in PyTorch: ``(a, y - x - F.linear(a, W))`` over all tokens, weighted by
    ``1 / y.square().sum(-1)``, through ``torch.linalg.solve(A.T @ A + ridge * diag, A.T @ R)``.

    Args:
        dense: the model before the cut; student: after it, with patches perhaps; neither is changed.
        steps: `steps_of` a cut or a merge; in the order of the layers.
        fit_windows [S, T], heldout_windows [H, T]: token ids. Moments of several processes (``run``) add up.
        stream: `dense_stream` of these windows and processes, where several refits share it; it is not changed.
        own: then also the student's, up to the first step's layer at the most, where the two part before ``stream``.
        done: weights of an earlier run by their names in the student, with which its steps are taken as they are.
        keep: called with every step's new weights by name, and its rows, for whoever wants to go on after a kill.

    Raises:
        InputError: windows that are none of the model's, or too few, steps that name no layer, activations that are not
            finite.

    Source: ours.
    """
    settings = settings or RefitSettings()
    check_windows(dense, fit_windows)
    check_windows(dense, heldout_windows)
    _check_steps(steps, dense, student)
    refitted = keep_layers(student, range(num_layers(student)))
    if not steps:
        return Refit(refitted, [])
    halves = layer_halves(refitted, [step.index for step in steps])
    windows, sums = _share(fit_windows, heldout_windows, run.processes)
    wanted, found = _streams(dense, refitted, steps, Stream(windows) if stream is None else stream, own)
    rows: list[RefitRow] = []
    with evaluation_mode(dense, refitted):
        for count, step in enumerate(steps, 1):
            before = _weights_of(refitted, step, halves[step.index])
            earlier = {name: done[name] for name in before if name in done} if done else {}
            if earlier:
                for name, weight in earlier.items():
                    _assign(refitted, name, weight)
            else:
                found.advance(refitted, step.index)
                layer = _Layer(refitted, step.index, halves[step.index], sums, settings)
                fresh = layer.fit(dense, step, found, wanted)
                rows += fresh
                if keep is not None:
                    after = _weights_of(refitted, step, halves[step.index])
                    keep(step, {name: one for name, one in after.items() if one is not before[name]}, fresh)
            run.report("refitting layers", count, len(steps))
    return Refit(refitted, rows)


def _streams(
    dense: PreTrainedModel, student: PreTrainedModel, steps: Sequence[Step], given: Stream, own: Stream | None
) -> tuple[Stream, Stream]:
    """The dense model's and the student's stream, to start from; what was given stays where it is."""
    wanted = given.copy()
    if own is not None:
        if own.depth > steps[0].index:
            raise InputError(f"the student's stream is at depth {own.depth}, behind the first step's layer: give none")
        return wanted, own.copy()
    # Up to its first change the student is the dense model: the two streams are one.
    shared = shared_depth(dense, student, steps)
    if wanted.depth > shared:
        raise InputError(f"the stream given is at depth {wanted.depth} and the models part at {shared}: give none")
    wanted.advance(dense, shared)
    return wanted, wanted.copy()


def _check_steps(steps: Sequence[Step], dense: nn.Module, student: nn.Module) -> None:
    indices = [step.index for step in steps]
    whole = all(
        0 <= step.index < num_layers(student)
        and 0 < step.leaves_at <= num_layers(dense)
        and (step.stands_for is None or 0 <= step.stands_for < step.leaves_at)
        for step in steps
    )
    if not whole or indices != sorted(set(indices)):
        raise InputError(f"these are no steps through {num_layers(student)} layers, in their order: {steps}")


def shared_depth(dense: nn.Module, student: nn.Module, steps: Sequence[Step]) -> int:
    """The depth up to which no step changes anything and the student shares the dense model's parameters."""
    first = min(step.index for step in steps)
    for index, pair in enumerate(zip(decoder_layers(dense)[:first], decoder_layers(student)[:first], strict=False)):
        ours, theirs = (dict(layer.named_parameters()) for layer in pair)
        # A shared tensor is the same memory, if not the same object.
        if ours.keys() != theirs.keys() or any(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours):
            return index
    return first


@torch.no_grad()
def dense_stream(
    dense: PreTrainedModel, fit_windows: Tensor, heldout_windows: Tensor, depth: int, run: Run = PLAIN
) -> Stream:
    """The dense model's stream at a depth, over this process's share of both kinds of windows, for `refit`."""
    stream = Stream(_share(fit_windows, heldout_windows, run.processes)[0])
    stream.advance(dense, depth)
    return stream


@torch.no_grad()
def refit_output(
    model: PreTrainedModel,
    index: int,
    entering: Sequence[Tensor],
    leaving: Sequence[Tensor],
    held: int,
    settings: RefitSettings,
) -> RefitRow:
    """The last fit of a step alone, for streams that are there: a new down projection in one layer of ``model``.

    Args:
        model: changed in place.
        entering, leaving: per window [T, d] what enters the layer, and what should leave it; the last ``held`` choose
            the ridge.
    """
    halves = layer_halves(model, [index])[index]
    layer = _Layer(model, index, halves, _Sums(len(entering) - held, Processes()), settings)
    with evaluation_mode(model):
        (row,) = layer.outputs(halves[-1], entering, leaving)
    return row


def _share(fit: Tensor, held: Tensor, processes: Processes) -> tuple[Tensor, _Sums]:
    """This process's windows, those to fit on first, and how what is computed of them is added up."""
    if min(len(fit), len(held)) < processes.count:
        raise InputError(
            f"{len(fit)} windows to fit on and {len(held)} held out are too few for {processes.count} processes: "
            "give each at least one of both"
        )
    if fit.shape[1] != held.shape[1]:
        raise InputError("windows to fit on and windows held out must have the same length")
    mine = [
        windows[slice(*(len(windows) * rank // processes.count for rank in (processes.rank, processes.rank + 1)))]
        for windows in (fit, held)
    ]
    return torch.cat(mine), _Sums(len(mine[0]), processes)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What the sums of all processes come to; the first ``fit`` windows of this one are to fit on."""

    fit: int
    processes: Processes

    def of(self, tokens: Iterable[_Tokens], precision: torch.dtype) -> tuple[NormalEquations, NormalEquations]:
        """Of the windows to fit on and of those held out, from what is to be fitted on each window."""
        running: list[RunningSums] = []
        for index, (a, r, weight) in enumerate(tokens):
            if index in (0, self.fit):
                running.append(RunningSums(a.shape[-1], r.shape[-1], a.device, precision))
            running[-1].add(a, r, weight)
        gathered: list[list[NormalEquations]] = self.processes.gather([one.total() for one in running])
        fit, held = (functools.reduce(operator.add, parts) for parts in zip(*gathered, strict=True))
        return fit, held


# Inputs a [T, n] of a map, what its output lacks r [T, d], and weights [T] (None: 1).
_Tokens = tuple[Tensor, Tensor, Tensor | None]


def _rows(state: Tensor) -> Tensor:
    """The tokens of one window [T, n]: some layers drop the window's axis."""
    return state.reshape(-1, state.shape[-1])


class _Enough(Exception):
    """Ends a run of a layer once what was wanted of it is there."""


def _entering(
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


def _entering_and_leaving(
    model: PreTrainedModel, index: int, path: str, states: Iterable[Tensor]
) -> Iterator[list[Tensor]]:
    """What enters a module of a layer, and what leaves the layer, per window."""
    run = PartialRun(model, index, index + 1)
    seen: list[Tensor] = []
    with entering([(decoder_layers(model)[index].get_submodule(path), lambda entered: seen.append(_rows(entered)))]):
        for state in states:
            leaving = run(state.unsqueeze(0))[0]
            yield [seen.pop(), leaving]


def _behind_half(model: PreTrainedModel, index: int, ends: str, stream: Stream) -> list[Tensor]:
    """Run layer ``index`` over a stream that is there, and give the stream that enters a module in it: W tensors
    [T, d]."""
    middle: list[Tensor] = []
    module = decoder_layers(model)[index].get_submodule(ends)
    with entering([(module, lambda state: middle.append(_rows(state)))]):
        stream.advance(model, index + 1)
    return middle


def _normed(
    model: PreTrainedModel, index: int, half: Half, stream: Stream, middle: Sequence[Tensor] | None
) -> Iterable[Tensor]:
    """What enters the projections of a half that read the stream, per window: of the stream in front of the layer, or
    of the one behind the half before it."""
    if not half.reads:
        return ()
    if middle is None:
        # Not the norm applied to the stream: a patch of the layer's own may lie between.
        return (seen for (seen,) in _entering(model, index, half.reads[:1], stream.states))
    return middle if half.norm is None else map(decoder_layers(model)[index].get_submodule(half.norm), middle)


class _Layer:
    """The fits of one layer of the student."""

    def __init__(
        self,
        student: PreTrainedModel,
        index: int,
        halves: Sequence[Half],
        sums: _Sums,
        settings: RefitSettings,
    ) -> None:
        self._student, self._index, self._halves = student, index, halves
        self._sums, self._settings = sums, settings
        self._module = decoder_layers(student)[index]

    def fit(self, dense: PreTrainedModel, step: Step, found: Stream, wanted: Stream) -> list[RefitRow]:
        """All of a step, in their order, from the student's stream entering the layer, and the dense model's at the
        depth it was left at."""
        stands_for, leaves_at = step.stands_for, step.leaves_at
        if stands_for is None:
            wanted.advance(dense, leaves_at)
            return self.outputs(self._halves[-1], found.states, wanted.states)
        wanted.advance(dense, stands_for)
        rows: list[RefitRow] = []
        middle: list[Tensor] | None = None
        for half in self._halves:
            rows.append(self._input(half, found.states, _normed(dense, stands_for, half, wanted, middle)))
            if half.ends is not None:
                middle = _behind_half(dense, stands_for, half.ends, wanted)
                rows += self.outputs(half, found.states, middle)
        del middle
        wanted.advance(dense, leaves_at)
        for half in self._halves:
            if half.ends is None:
                rows += self.outputs(half, found.states, wanted.states)
        return rows

    def _input(self, half: Half, states: Sequence[Tensor], targets: Iterable[Tensor]) -> RefitRow:
        """What reads the stream: one map of the normed stream, taken into every projection that reads it."""
        part = f"{half.name}-in"
        if not half.reads:
            return self._left_alone(part, half.unread)
        normed = _entering(self._student, self._index, half.reads[:1], states)
        choice = self._choice(
            (n, self._precise(target.to(n.device)) - self._precise(n), None)
            for (n,), target in zip(normed, targets, strict=True)
        )
        return self._taken(part, half.reads, choice, lambda weight, change: weight + weight @ change)

    def outputs(self, half: Half, states: Sequence[Tensor], targets: Sequence[Tensor]) -> list[RefitRow]:
        """What writes to the stream: a change of every projection back, toward the stream that is to be behind them."""
        if not half.writes:
            return [self._left_alone(f"{half.name}-out", half.unwritten)]
        return [self._output(half, write, states, targets) for write in half.writes]

    def _output(self, half: Half, write: Write, states: Sequence[Tensor], targets: Sequence[Tensor]) -> RefitRow:
        if half.ends is not None:
            # What enters the module behind is the stream there; the feed-forward need not run.
            pairs = _entering(self._student, self._index, [write.projection, half.ends], states)
        else:
            pairs = _entering_and_leaving(self._student, self._index, write.projection, states)

        def tokens() -> Iterator[_Tokens]:
            for (a, has), target in zip(pairs, targets, strict=True):
                y = self._precise(target.to(has.device))
                yield a, y - self._precise(has), 1 / y.square().sum(-1).clamp_min(_EPSILON)

        choice = self._choice(tokens())
        taken = (write.projection,)
        return self._taken(f"{half.name}-out", taken, choice, lambda weight, change: weight + change / write.factor)

    def _left_alone(self, part: str, why: str) -> RefitRow:
        return RefitRow(self._index, part, (), None, None, None, why)

    def _choice(self, tokens: Iterable[_Tokens]) -> RidgeChoice:
        settings = self._settings
        fit, held = self._sums.of(tokens, settings.precision)
        return choose_ridge(fit, held, settings.ridges, settings.shrinkage, on_all=settings.on_all)

    def _precise(self, states: Tensor) -> Tensor:
        return states.to(self._settings.precision)

    def _taken(
        self,
        part: str,
        projections: tuple[str, ...],
        choice: RidgeChoice,
        changed: Callable[[Tensor, Tensor], Tensor],
    ) -> RefitRow:
        """The change put into the projections; ``changed``: the new weight [outputs, inputs], of the old one and it."""
        taken = projections if choice.change is not None else ()
        if choice.change is not None:
            for path in projections:
                module: Any = self._module.get_submodule(path)
                old = _weight(module, module.weight.detach())
                new = changed(old.double(), choice.change.to(old.device)).to(old.dtype)
                new = _weight(module, new).contiguous()
                module.weight = nn.Parameter(new, requires_grad=module.weight.requires_grad)
        return RefitRow(self._index, part, taken, choice.ridge, choice.before, choice.after)


def _weight(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] of what the module has, or back: GPT-2's have the inputs in front."""
    return weight.T if isinstance(module, Conv1D) else weight


def _weights_of(model: PreTrainedModel, step: Step, halves: Sequence[Half]) -> dict[str, nn.Parameter]:
    """The weights that a step may change, by their names in the model."""
    layer = decoder_layers(model)[step.index]
    paths = {layer.get_submodule(one) for half in halves for one in half.projections}
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if module in paths}


def _assign(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module: Any = model.get_submodule(name.removesuffix(".weight"))
    weight = module.weight
    if weight.shape != value.shape:
        raise InputError(f"{name} of an earlier refit has the shape {list(value.shape)}: delete it and refit again")
    module.weight = nn.Parameter(value.to(weight), requires_grad=weight.requires_grad)
