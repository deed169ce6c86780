"""The projections around a joint, fitted again in closed form so that the student's stream is the dense model's.

The result is a *stock* model: the dense model's architecture with fewer layers, and no operator of its own. Behind a
joint three layers are fitted again, in each of them what reads the stream and what writes to it, on the stream that the
student itself has there, all earlier changes in place; the layer in front of the joint writes what the removed layers
would have written, with neurons of theirs where these do better (`absorption`; `docs/guide/heal.md` has the formulas in
a row).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, Run, Stream, check_windows
from linearpatch_kernels.healing.absorption import absorb, neurons_that_can_move
from linearpatch_kernels.healing.activations import (
    Sums,
    Tokens,
    behind_half,
    entering_and_leaving,
    entering_modules,
    lacking,
)
from linearpatch_kernels.healing.least_squares import NormalEquations, RidgeChoice, choose_ridge
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.merging.merge import set_parameter
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder_layers, num_layers
from linearpatch_kernels.modeling.final_norm import scaled_final_norm
from linearpatch_kernels.modeling.halves import Half, Write, layer_halves
from linearpatch_kernels.modeling.patched import patches, replace_patch
from linearpatch_kernels.nn import Patch, PatchChain
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

PARTS = ("attention-in", "attention-out", "feed-forward-in", "feed-forward-out")
"""What of a layer is fitted, in this order: q, k and v; o; gate and up; down. One that is a single half (Mamba's) has
``layer-in`` and ``layer-out``."""

FINAL_NORM = "final-norm"
"""Another scale of the norm behind the last layer."""

# Of the windows, one of so many: a single number is fitted.
_SCALED_ON_ONE_OF = 4

_EPSILON = 1e-12

PatchFor: TypeAlias = Callable[[int, Iterable[tuple[Tensor, Tensor]]], Patch | None]
"""Of a joint of the student, and per window [T, d] the stream there and the dense model's, the patch to put there."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer to fit again: layer ``index`` of the student.

    Attributes:
        stands_for: the layer of the dense model whose input, middle and output the student's are to be; None: only
            what leaves the layer has a target.
        leaves_at: the depth of the dense model whose stream is to leave the layer.
        removed: the layers of the dense model between this one and that depth, whose neurons it may take over.
    """

    index: int
    stands_for: int | None
    leaves_at: int
    removed: Span | None = None


@dataclasses.dataclass(frozen=True)
class RefitRow:
    """What one least-squares fit came to.

    Attributes:
        layer: of the student; part: as in `PARTS`, or `FINAL_NORM` with the number of layers; projections: what got new
            weights, empty where nothing did.
        ridge: the one taken, None where no change was better than none.
        before, after: the error per token on the held-out windows, of an output relative to |target|^2 (of the final
            norm: per number); None where nothing was fitted.
        why: then the reason.
        absorbed: neurons that the removed layers gave; scale: what the final norm was multiplied by.
    """

    layer: int
    part: str
    projections: tuple[str, ...]
    ridge: float | None
    before: float | None
    after: float | None
    why: str = ""
    absorbed: int = 0
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a step came to: its new weights, by their names in the student, and its rows."""

    weights: Mapping[str, Tensor]
    rows: Sequence[RefitRow]

    def onto(self, student: PreTrainedModel) -> list[RefitRow]:
        """Put the weights into a student; the rows."""
        for name, weight in self.weights.items():
            _assign(student, name, weight)
        return list(self.rows)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What several refits have in common, on the same windows, in the same processes and with the same settings.

    Attributes:
        stream: `dense_stream`; it is not changed. None: it is run.
        own: then also the student's, up to the first step's layer at the most, where the two part before ``stream``.
        first: of students of one cut, what the layer in front of the first joint came to, which is the same with any
            patch behind it; it is filled in.
    """

    stream: Stream | None = None
    own: Stream | None = None
    first: dict[Step, Fitted] | None = None


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
        in_front: whether these layers are fitted, too.
    """
    steps: dict[int, Step] = {}
    neighbours = itertools.pairwise([Span(-1, 0), *stands_for, Span(layers, layers + 1)])
    for index, (own, following) in enumerate(neighbours, -1):
        if own.length == 1 and following.start == own.end:
            continue
        if in_front and index >= 0:
            whole = steps[index].stands_for if index in steps else None
            removed = Span(own.end, following.start) if own.length == 1 else None
            steps[index] = Step(index, whole, following.start, removed)
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
    shared: Shared | None = None,
    done: Mapping[str, Tensor] | None = None,
    keep: Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None] | None = None,
    patch_for: PatchFor | None = None,
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
    fitted layers four times; memory: `healing.cost.memory_of_refit`.

    The layer in front of a joint gets 4 alone, toward the dense model's stream behind the removed layers, and neurons
    of theirs where held-out windows gain (`absorption.absorb`).

    At last the final norm gets a factor: ``argmin_f sum_t |z'_t - f z_t|^2``, z what the head reads, with the ridges,
    all of it kept. What least squares cannot tell is missing from the student's stream; the norm makes the rest as long
    as the whole was, and the logits surer than they should be.

    Equivalent for one output projection, in PyTorch: ``(a, y - x - F.linear(a, W))`` over all tokens, weighted by
    ``1 / y.square().sum(-1)``, through ``torch.linalg.solve(A.T @ A + ridge * diag, A.T @ R)``.

    Args:
        dense: the model before the cut; student: after it, with patches perhaps; neither is changed.
        steps: `steps_of` a cut or a merge; in the order of the layers.
        fit_windows [S, T], heldout_windows [H, T]: token ids. Moments of several processes (``run``) add up.
        shared: what it has in common with other refits.
        done: weights of an earlier run by their names in the student, with which its steps are taken as they are.
        keep: called with every step's new weights by name, and its rows, for whoever wants to go on after a kill; once
            more with the last step for the final norm.
        patch_for: fits the patch behind a layer in front of a joint again, once that layer is fitted; None: where the
            student has a patch, steps leave the layer in front as it is.

    Raises:
        InputError: windows that are none of the model's, or too few, steps that name no layer, activations that are not
            finite.

    Source: ours.
    """
    settings, shared = settings or RefitSettings(), shared or Shared()
    check_windows(dense, fit_windows)
    check_windows(dense, heldout_windows)
    _check_steps(steps, dense, student)
    refitted = keep_layers(student, range(num_layers(student)))
    if not steps:
        return Refit(refitted, [])
    halves = layer_halves(refitted, [step.index for step in steps])
    windows, sums = _share(fit_windows, heldout_windows, run.processes)
    wanted, found = _streams(dense, refitted, steps, shared.stream or Stream(windows), shared.own)
    walk = _Walk(dense, refitted, halves, wanted, found, sums, settings, patch_for, run)
    rows: list[RefitRow] = []
    with evaluation_mode(dense, refitted):
        for count, step in enumerate(steps, 1):
            may_change = _weights_of(refitted, step, halves[step.index])
            earlier = {name: done[name] for name in may_change if name in done} if done else {}
            if earlier:
                Fitted(earlier, ()).onto(refitted)
            else:
                fitted = walk.fit(step, shared.first if count == 1 else None)
                rows += fitted.rows
                if keep is not None:
                    keep(step, fitted.weights, fitted.rows)
            run.report("refitting layers", count, len(steps))
        fitted = walk.final_norm(done or {})
        rows += fitted.rows
        if keep is not None and fitted.rows:
            keep(steps[-1], fitted.weights, fitted.rows)
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
    layer = _Layer(model, index, halves, Sums(len(entering) - held, Processes()), settings)
    with evaluation_mode(model):
        (row,) = layer.outputs(halves[-1], entering, leaving)
    return row


def _share(fit: Tensor, held: Tensor, processes: Processes) -> tuple[Tensor, Sums]:
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
    return torch.cat(mine), Sums(len(mine[0]), processes)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Through the layers of a student, whose stream is ``found`` and the dense model's ``wanted``."""

    dense: PreTrainedModel
    student: PreTrainedModel
    halves: Mapping[int, Sequence[Half]]
    wanted: Stream
    found: Stream
    sums: Sums
    settings: RefitSettings
    patch_for: PatchFor | None
    run: Run

    def fit(self, step: Step, shared: dict[Step, Fitted] | None) -> Fitted:
        """What a step comes to, done to the student; ``shared``: of the first step, `Shared.first`."""
        halves = self.halves[step.index]
        before = _weights_of(self.student, step, halves)
        self.found.advance(self.student, step.index)
        joint = _Joint(self.student, step, self.found, self.sums, self.patch_for)
        known = shared if step.removed is not None and step.stands_for is None else None
        if known is not None and step in known:
            self.wanted.advance(self.dense, step.leaves_at)
            rows = known[step].onto(self.student)
        else:
            layer = _Layer(self.student, step.index, halves, self.sums, self.settings, self.run)
            rows = layer.fit(self.dense, step, self.found, self.wanted)
            if known is not None:
                known[step] = Fitted(_changes(before, _weights_of(self.student, step, halves)), rows)
        rows = joint.fit(before, self.wanted, rows)
        return Fitted(_changes(before, _weights_of(self.student, step, halves)), rows)

    def final_norm(self, done: Mapping[str, Tensor]) -> Fitted:
        """Another scale of it, done to the student once its layers are what they will be."""
        settings, number = self.settings, num_layers(self.student)
        if not settings.final_norm or settings.shrinkage <= 0:
            return Fitted({}, [])
        as_it_is = scaled_final_norm(self.student, 1.0)
        if as_it_is is None:
            # The head reads what no gain scales: OLMo's norms have none, GPT-1 has no norm there.
            return Fitted({}, [])
        earlier = {name: done[name] for name in as_it_is if name in done}
        if earlier:
            Fitted(earlier, ()).onto(self.student)
            return Fitted({}, [])
        choice = choose_ridge(*self._scales(), settings.ridges)
        if choice.change is None:
            return Fitted({}, [RefitRow(number, FINAL_NORM, (), None, choice.before, choice.after)])
        scale = 1 + float(choice.change)
        weights = scaled_final_norm(self.student, scale)
        assert weights is not None
        paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        row = RefitRow(number, FINAL_NORM, paths, choice.ridge, choice.before, choice.after, scale=scale)
        fitted = Fitted(weights, [row])
        fitted.onto(self.student)
        return fitted

    def _scales(self) -> tuple[NormalEquations, NormalEquations]:
        """What a factor of all that the head reads is fitted on, and judged on."""
        pairs = []
        for model, stream in ((self.dense, self.wanted), (self.student, self.found)):
            some = stream.copy()
            some.states = (
                some.states[: self.sums.fit : _SCALED_ON_ONE_OF] + some.states[self.sums.fit :: _SCALED_ON_ONE_OF]
            )
            pairs.append(some.hidden(model))
        fit = len(range(0, self.sums.fit, _SCALED_ON_ONE_OF))
        # One factor for all channels: every number is a token of one input and one output.
        tokens = (
            (z.flatten().unsqueeze(-1), (wanted.to(z.device) - z).flatten().unsqueeze(-1), None)
            for wanted, z in zip(*pairs, strict=True)
        )
        return Sums(fit, self.sums.processes).of(tokens, torch.float64)


class _Joint:
    """The patch behind a step's layer, fitted again for what leaves the layer once that is fitted.

    Where held-out windows do not gain by it, both stay what they were: a layer that writes something else may lose
    what the patch reads.
    """

    def __init__(
        self, student: PreTrainedModel, step: Step, found: Stream, sums: Sums, patch_for: PatchFor | None
    ) -> None:
        """Before the layer is fitted; ``found`` is at its depth."""
        self._student, self._step, self._found, self._sums = student, step, found, sums
        self._patch_for = patch_for if self._chain() is not None and step.removed is not None else None
        self._was = [] if self._patch_for is None else self._leaving(slice(sums.fit, None))

    def fit(self, before: Mapping[str, nn.Parameter], wanted: Stream, rows: list[RefitRow]) -> list[RefitRow]:
        """Once the layer is fitted and ``wanted`` is where it leaves: the rows that there are then.

        Args:
            before: the parameters that the layer and its patch had.
        """
        if self._patch_for is None:
            return rows
        held = wanted.states[self._sums.fit :]
        old = self._error(self._was, held)
        leaving = self._leaving(slice(None))
        pairs = zip(leaving[: self._sums.fit], wanted.states[: self._sums.fit], strict=True)
        patch = self._patch_for(self._step.index + 1, pairs)
        chain = self._chain()
        assert chain is not None
        if patch is not None:
            dtype = next(chain.parameters()).dtype
            replace_patch(self._student, self._step.index + 1, patch.to(dtype=dtype))
            if self._error(leaving[self._sums.fit :], held) < old:
                return rows
        replace_patch(self._student, self._step.index + 1, chain)
        for name, parameter in before.items():
            place, _, attribute = name.rpartition(".")
            self._student.get_submodule(place).register_parameter(attribute, parameter)
        why = f"the patch behind layer {self._step.index} does better with the layer as it was"
        last = rows[-1]
        return [
            *rows[:-1],
            dataclasses.replace(last, projections=(), ridge=None, after=last.before, why=why, absorbed=0),
        ]

    def _chain(self) -> PatchChain | None:
        """The patch in front of the next layer; of one behind the last layer nothing is fitted again."""
        return (
            patches(self._student).get(self._step.index + 1)
            if self._step.index + 1 < num_layers(self._student)
            else None
        )

    def _leaving(self, which: slice) -> list[Tensor]:
        """What leaves the layer as it is now, per window."""
        stream = self._found.copy()
        stream.states = stream.states[which]
        stream.advance(self._student, self._step.index + 1)
        return stream.states

    def _error(self, states: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """Of the patch on held-out windows: ``sum_t |y - P x|^2 / |y|^2``."""
        chain = self._chain()
        assert chain is not None
        found = torch.zeros((), dtype=torch.float64)
        for x, y in zip(states, targets, strict=True):
            rest = y.to(x.device).double() - chain(x).double()
            found += (rest.square().sum(-1) / y.double().square().sum(-1).clamp_min(_EPSILON).to(x.device)).sum().cpu()
        return float(self._sums.total(found)[0])


def _normed(
    model: PreTrainedModel, index: int, half: Half, stream: Stream, middle: Sequence[Tensor] | None
) -> Iterable[Tensor]:
    """What enters the projections of a half that read the stream, per window: of the stream in front of the layer, or
    of the one behind the half before it."""
    if not half.reads:
        return ()
    if middle is None:
        # Not the norm applied to the stream: a patch of the layer's own may lie between.
        return (seen for (seen,) in entering_modules(model, index, half.reads[:1], stream.states))
    return middle if half.norm is None else map(decoder_layers(model)[index].get_submodule(half.norm), middle)


class _Layer:
    """The fits of one layer of the student."""

    def __init__(
        self,
        student: PreTrainedModel,
        index: int,
        halves: Sequence[Half],
        sums: Sums,
        settings: RefitSettings,
        run: Run = PLAIN,
    ) -> None:
        self._student, self._index, self._halves = student, index, halves
        self._sums, self._settings, self._run = sums, settings, run
        self._module = decoder_layers(student)[index]

    def fit(self, dense: PreTrainedModel, step: Step, found: Stream, wanted: Stream) -> list[RefitRow]:
        """All of a step, in their order, from the student's stream entering the layer, and the dense model's at the
        depth it was left at."""
        stands_for, leaves_at = step.stands_for, step.leaves_at
        if stands_for is None:
            wanted.advance(dense, leaves_at)
            return self._leaving(dense, step, self._halves[-1], found.states, wanted.states)
        wanted.advance(dense, stands_for)
        rows: list[RefitRow] = []
        middle: list[Tensor] | None = None
        for half in self._halves:
            rows.append(self._input(half, found.states, _normed(dense, stands_for, half, wanted, middle)))
            if half.ends is not None:
                middle = behind_half(dense, stands_for, half.ends, wanted)
                rows += self.outputs(half, found.states, middle)
        del middle
        wanted.advance(dense, leaves_at)
        for half in self._halves:
            if half is self._halves[-1]:
                rows += self._leaving(dense, step, half, found.states, wanted.states)
            elif half.ends is None:
                rows += self.outputs(half, found.states, wanted.states)
        return rows

    def _leaving(
        self,
        dense: PreTrainedModel,
        step: Step,
        half: Half,
        states: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> list[RefitRow]:
        """What the last half writes: a change of the projections back, or other neurons, where that does better."""
        units = None if step.removed is None else neurons_that_can_move(self._student, half, self._settings)
        if step.removed is None or units is None:
            return self.outputs(half, states, targets)
        givers = list(decoder_layers(dense)[slice(*step.removed)])
        found = absorb(
            self._student, self._index, units, givers, states, targets, self._sums, self._settings, self._run
        )
        part = f"{half.name}-out"
        if isinstance(found, RidgeChoice):
            return [self._taken(part, (units.output.projection,), found, lambda weight, change: weight + change)]
        for path, value in found.parameters.items():
            set_parameter(self._module, path, value)
        taken = found.projections
        row = RefitRow(self._index, part, taken, found.ridge, found.before, found.after, absorbed=found.count)
        return [row]

    def _input(self, half: Half, states: Sequence[Tensor], targets: Iterable[Tensor]) -> RefitRow:
        """What reads the stream: one map of the normed stream, taken into every projection that reads it."""
        part = f"{half.name}-in"
        if not half.reads:
            return self._left_alone(part, half.unread)
        normed = entering_modules(self._student, self._index, half.reads[:1], states)
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
            pairs = entering_modules(self._student, self._index, [write.projection, half.ends], states)
        else:
            pairs = entering_and_leaving(self._student, self._index, write.projection, states)

        choice = self._choice(lacking(pairs, targets, self._settings.precision))
        taken = (write.projection,)
        return self._taken(f"{half.name}-out", taken, choice, lambda weight, change: weight + change / write.factor)

    def _left_alone(self, part: str, why: str) -> RefitRow:
        return RefitRow(self._index, part, (), None, None, None, why)

    def _choice(self, tokens: Iterable[Tokens]) -> RidgeChoice:
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


def _changes(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters that are others than before."""
    return {name: one for name, one in after.items() if one is not before.get(name)}


def _weights_of(model: PreTrainedModel, step: Step, halves: Sequence[Half]) -> dict[str, nn.Parameter]:
    """The parameters that a step may change, by their names in the model."""
    layer = decoder_layers(model)[step.index]
    norm = () if halves[-1].norm is None else (halves[-1].norm,)
    modules = {layer.get_submodule(path) for half in halves for path in (*half.projections, *norm)}
    behind = patches(model).get(step.index + 1)
    modules |= set() if behind is None or step.removed is None else set(behind.modules())
    return {
        f"{place}.{name}": parameter
        for place, module in model.named_modules()
        if module in modules
        for name, parameter in module.named_parameters(recurse=False)
    }


def _assign(model: PreTrainedModel, name: str, value: Tensor) -> None:
    shape = model.get_parameter(name).shape
    if shape != value.shape:
        raise InputError(f"{name} of an earlier refit has the shape {list(value.shape)}: delete it and refit again")
    set_parameter(model, name, value)
