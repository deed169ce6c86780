"""The projections around a joint, fitted again in closed form so that the student's stream is the dense model's.

The result is a *stock* model: the dense model's architecture with fewer layers, and no operator of its own. Behind a
joint three layers are fitted again, in each of them what reads the stream and what writes to it, on the stream that the
student itself has there, all earlier changes in place; where no map heals the joint, the layer in front of it writes
what the removed layers would have written (`docs/guide/heal.md` has the formulas in a row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, PartialRun, Run, Start, check_windows, entering
from linearpatch_kernels.healing.least_squares import NormalEquations, RidgeChoice, RunningSums, choose_ridge
from linearpatch_kernels.modeling.families import Sublayer, decoder_layers, keep_layers, num_layers, sublayers
from linearpatch_kernels.torch_state import evaluation_mode, own_state

Part = Literal["attention-in", "attention-out", "feed-forward-in", "feed-forward-out"]
PARTS: tuple[Part, ...] = ("attention-in", "attention-out", "feed-forward-in", "feed-forward-out")
"""What of a layer is fitted, in this order: q, k and v; o; gate and up; down."""

_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class RefitSettings:
    """How much is fitted again, and how far.

    Attributes:
        behind: layers behind a joint. On SmolLM2-135M the fourth one wins back a hundredth of the error or less.
        shrinkage: the part of a change that is kept, as of the maps at a joint (`fits.SHRINKAGE`): the rest is what the
            change would do wrong on other text.
        ridges: those tried, each relative to an input's own second moment.
    """

    behind: int = 3
    shrinkage: float = 0.75
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

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
        layer: of the student; part: one of `PARTS`; projections: what got new weights, empty where nothing did.
        ridge: the one taken, None where no change was better than none.
        before, after: the error per token on the held-out windows, relative to |target|^2 behind an output.
        why: where the part was left alone, the reason.
    """

    layer: int
    part: Part
    projections: tuple[str, ...]
    ridge: float | None
    before: float
    after: float
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Refit:
    """A refitted model and the fits that made it, in their order."""

    model: PreTrainedModel
    rows: list[RefitRow]


def steps_of_cut(kept: Sequence[int], layers: int, behind: int, *, in_front: bool) -> list[Step]:
    """The layers of a cut model to fit again: ``behind`` of them behind each joint, and the one in front of it.

    Args:
        kept: layers of the dense model that the student has, in order; layers: how many the dense model has.
        in_front: whether the layer in front of a joint is to write what the removed layers would have written (where
            no map at the joint does that).
    """
    steps: dict[int, Step] = {}
    ends = [*kept[1:], layers]
    for index, (layer, following) in enumerate(zip(kept, ends, strict=True)):
        if following == layer + 1:
            continue
        if in_front:
            whole = steps[index].stands_for if index in steps else None
            steps[index] = Step(index, whole, following)
        for later in range(index + 1, min(index + 1 + behind, len(kept))):
            steps[later] = Step(later, kept[later], kept[later] + 1)
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
    done: Mapping[str, Tensor] | None = None,
    keep: Callable[[Step, Mapping[str, Tensor], Sequence[RefitRow]], None] | None = None,
    run: Run = PLAIN,
) -> Refit:
    """The student with new weights in the projections of some layers, by least squares; the same architecture.

    With x the student's stream entering a layer and x', m', y' the dense model's entering it, behind its attention and
    leaving it, in this order and each with the changes before it in place:

    1. what reads the stream in front of the attention (q, k, v, fused or not): ``W <- W (I + c M)``, M the least-squares
       map from the student's normed stream n to the dense one, ``argmin sum_t |n'_t - n_t - M n_t|^2``;
    2. what writes to it (o): ``W <- W + c D``, a its input, ``argmin sum_t |m'_t - (x_t + W a_t) - D a_t|^2 / |m'_t|^2``;
    3. gate and up as 1, toward the dense model's norm behind its attention; 4. down as 2, toward y'.

    Each with a ridge (`NormalEquations.solution`) chosen on ``heldout_windows``, c the shrinkage. Biases stay. Where a
    projection's output is normed before it reaches the stream (Gemma), it is left alone and a row says so. Both models
    run their first layers once, the fitted ones three times; memory: three times the stream of all windows, ``W T d``
    values each, and ``24 n^2`` bytes for the widest input n of a projection.

    Equivalent for one output projection, in PyTorch: ``(a, y - x - F.linear(a, W))`` over all tokens, weighted by
    ``1 / y.square().sum(-1)``, through ``torch.linalg.solve(A.T @ A + ridge * diag, A.T @ R)``.

    Args:
        dense: the model before the cut; student: after it, with patches perhaps; neither is changed.
        steps: `steps_of_cut`, or of a merge; in the order of the layers.
        fit_windows [S, T], heldout_windows [H, T]: token ids. Moments of several processes (``run``) add up.
        done: weights of an earlier run by their names in the student, with which its steps are taken as they are.
        keep: called with every step's new weights by name, and its rows, for whoever wants to go on after a kill.

    Raises:
        InputError: windows that are none of the model's, or too few, steps that name no layer, activations that are not
            finite.

    Source: benchmarks/notes/healing.md; a generalisation of the refit of merged layers.
    """
    settings = settings or RefitSettings()
    check_windows(dense, fit_windows)
    check_windows(dense, heldout_windows)
    _check_steps(steps, dense, student)
    refitted = keep_layers(student, range(num_layers(student)))
    if not steps:
        return Refit(refitted, [])
    share = _Share(fit_windows, heldout_windows, run)
    found, wanted = Stream(share.windows), Stream(share.windows)
    rows: list[RefitRow] = []
    with evaluation_mode(dense, refitted):
        for step in steps:
            names = _weights_of(refitted, step)
            found.advance(refitted, step.index)
            if done is not None and names.keys() & done.keys():
                for name in names.keys() & done.keys():
                    _assign(refitted, name, done[name])
                continue
            before = {name: parameter.detach() for name, parameter in names.items()}
            layer = _Layer(dense, refitted, step, found, wanted, share, settings)
            fresh = layer.fit()
            rows += fresh
            after = _weights_of(refitted, step)
            if keep is not None:
                keep(step, {name: one for name, one in after.items() if one is not before.get(name)}, fresh)
            run.report("refitting layers", steps.index(step) + 1, len(steps))
    return Refit(refitted, rows)


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


class Stream:
    """A model's residual stream over windows [W, T], at one depth after the other: ``states``, W tensors [T, d]."""

    def __init__(self, windows: Tensor) -> None:
        self.states: list[Tensor] = list(windows)
        self._depth: Start = "tokens"

    @torch.no_grad()
    def advance(self, model: PreTrainedModel, depth: int) -> None:
        """Run the layers up to ``depth``; ``model`` may differ from that of the last call from the depth reached on."""
        if self._depth == depth:
            return
        run = PartialRun(model, self._depth, depth)
        with evaluation_mode(model):
            # One by one in the same list: the stream is held once.
            for index, state in enumerate(self.states):
                self.states[index] = run(state.unsqueeze(0))[0]
        self._depth = depth

    @torch.no_grad()
    def advance_through(self, model: PreTrainedModel, index: int) -> list[Tensor]:
        """Run layer ``index``, and give the stream behind its attention: W tensors [T, d]."""
        self.advance(model, index)
        middle: list[Tensor] = []
        norm = decoder_layers(model)[index].get_submodule(sublayers(model)[1].norm)
        with entering([(norm, lambda state: middle.append(state[0]))]):
            self.advance(model, index + 1)
        return middle


class _Share:
    """This process's windows, those to fit on first, and what the sums of all processes come to."""

    def __init__(self, fit: Tensor, held: Tensor, run: Run) -> None:
        processes = run.processes
        if min(len(fit), len(held)) < processes.count:
            raise InputError(
                f"{len(fit)} windows to fit on and {len(held)} held out are too few for {processes.count} processes: "
                "give each at least one of both"
            )
        mine = [
            windows[len(windows) * processes.rank // processes.count : len(windows) * (processes.rank + 1) // processes.count]
            for windows in (fit, held)
        ]
        self._processes = processes
        self._fit = len(mine[0])
        self.windows = torch.cat(mine) if mine[0].shape[1] == mine[1].shape[1] else None
        if self.windows is None:
            raise InputError("windows to fit on and windows held out must have the same length")

    def sums(self, tokens: Iterator[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[NormalEquations, NormalEquations]:
        """Of the windows to fit on and of those held out, from (a, r, weight) per window."""
        running: list[RunningSums | None] = [None, None]
        for index, (a, r, weight) in enumerate(tokens):
            kind = int(index >= self._fit)
            if running[kind] is None:
                running[kind] = RunningSums(a.shape[-1], r.shape[-1], a.device)
            running[kind].add(a, r, weight)  # type: ignore[union-attr]  # made above
        mine = [one.total() for one in running if one is not None]
        if self._processes.count == 1:
            return mine[0], mine[1]
        gathered: list[list[NormalEquations]] = self._processes.gather(mine)
        total = gathered[0]
        for other in gathered[1:]:
            total = [one + two for one, two in zip(total, other, strict=True)]
        return total[0], total[1]


class _Enough(Exception):
    """Ends a run of a layer once what was wanted of it is there."""


class _Layer:
    """One step: the four fits of a layer, in their order."""

    def __init__(
        self,
        dense: PreTrainedModel,
        student: PreTrainedModel,
        step: Step,
        found: Stream,
        wanted: Stream,
        share: _Share,
        settings: RefitSettings,
    ) -> None:
        self._dense, self._student, self._step = dense, student, step
        self._found, self._wanted, self._share, self._settings = found, wanted, share, settings
        self._run = PartialRun(student, step.index, step.index + 1)
        self._module = decoder_layers(student)[step.index]

    def fit(self) -> list[RefitRow]:
        attention, feed_forward = sublayers(self._student)
        step, wanted = self._step, self._wanted
        if step.stands_for is None:
            wanted.advance(self._dense, step.leaves_at)
            return [self._output("feed-forward-out", feed_forward, wanted.states)]
        wanted.advance(self._dense, step.stands_for)
        rows = [self._input("attention-in", attention, self._normed(attention, wanted.states))]
        middle = wanted.advance_through(self._dense, step.stands_for)
        rows.append(self._output("attention-out", attention, middle))
        norm = decoder_layers(self._dense)[step.stands_for].get_submodule(feed_forward.norm)
        rows.append(self._input("feed-forward-in", feed_forward, (norm(state) for state in middle)))
        del middle
        wanted.advance(self._dense, step.leaves_at)
        rows.append(self._output("feed-forward-out", feed_forward, wanted.states))
        return rows

    def _normed(self, half: Sublayer, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the dense layer's projections read, for the stream entering it (a patch of its own lies between)."""
        index: int = self._step.stands_for  # type: ignore[assignment]  # asked for only where there is one
        run = PartialRun(self._dense, index, index + 1)
        yield from self._entering(run, decoder_layers(self._dense)[index], [half.inputs[0].projection], states, True)

    def _entering(
        self, run: PartialRun, layer: nn.Module, paths: Sequence[str], states: Sequence[Tensor], alone: bool
    ) -> Iterator[Any]:
        """What enters the named modules of a layer, and what leaves the layer; ``alone``: what enters the first."""
        for state in states:
            seen: dict[str, Tensor] = {}

            def tell(entered: Tensor, path: str, seen: dict[str, Tensor] = seen) -> None:
                seen[path] = entered[0]
                if alone:
                    raise _Enough

            with ExitStack() as hooks:
                hooks.enter_context(
                    entering(
                        (layer.get_submodule(path), lambda entered, path=path: tell(entered, path)) for path in paths
                    )
                )
                try:
                    leaving = run(state.unsqueeze(0))[0]
                except _Enough:
                    yield seen[paths[0]]
                    continue
            yield seen, leaving

    def _input(self, part: Part, half: Sublayer, targets: Iterator[Tensor]) -> RefitRow:
        """What reads the stream: one map of the normed stream, taken into every projection that reads it."""
        projections = tuple(dict.fromkeys(heads.projection for heads in half.inputs))
        normed = self._entering(self._run, self._module, projections[:1], self._found.states, True)

        def tokens() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for n, target in zip(normed, targets, strict=True):
                yield n, target.to(n.device).float() - n.float(), None

        choice = choose_ridge(*self._share.sums(tokens()), self._settings.ridges, self._settings.shrinkage)
        for path in projections if choice.change is not None else ():
            weight = self._module.get_submodule(path).weight
            self._replace(path, weight.detach().double() @ choice.change.to(weight.device), added=True)
        return self._row(part, projections, choice)

    def _output(self, part: Part, half: Sublayer, targets: Sequence[Tensor]) -> RefitRow:
        """What writes to the stream: a change of the projection back."""
        path = half.output.projection
        behind = [name for name in half.shared_norms if not name.startswith(path.partition(".")[0] + ".")]
        if behind:
            return RefitRow(self._step.index, part, (), None, 0.0, 0.0, f"{behind[0]} norms what comes out of {path}")
        middle = part == "attention-out"
        paths = [path, sublayers(self._student)[1].norm] if middle else [path]
        runs = self._entering(self._run, self._module, paths, self._found.states, False)

        def tokens() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
            for (seen, leaving), target in zip(runs, targets, strict=True):
                has = seen[paths[1]] if middle else leaving
                y = target.to(has.device).float()
                yield seen[path], y - has.float(), 1 / y.square().sum(-1).clamp_min(_EPSILON)

        choice = choose_ridge(*self._share.sums(tokens()), self._settings.ridges, self._settings.shrinkage)
        if choice.change is not None:
            self._replace(path, choice.change, added=True)
        return self._row(part, (path,), choice)

    def _replace(self, path: str, change: Tensor, *, added: bool) -> None:
        module: Any = self._module.get_submodule(path)
        weight = module.weight
        new = (weight.detach().double() + change.to(weight.device)).to(weight.dtype)
        module.weight = nn.Parameter(new, requires_grad=weight.requires_grad)

    def _row(self, part: Part, projections: tuple[str, ...], choice: RidgeChoice) -> RefitRow:
        changed = projections if choice.change is not None else ()
        return RefitRow(self._step.index, part, changed, choice.ridge, choice.before, choice.after)


def _weights_of(model: PreTrainedModel, step: Step) -> dict[str, nn.Parameter]:
    """The weights that a step may change, by their names in the model."""
    layer = decoder_layers(model)[step.index]
    paths = {layer.get_submodule(one) for half in sublayers(model) for one in _projections(half)}
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if module in paths}


def _projections(half: Sublayer) -> list[str]:
    return [*(heads.projection for heads in half.inputs), half.output.projection]


def _assign(model: PreTrainedModel, name: str, value: Tensor) -> None:
    module: Any = model.get_submodule(name.removesuffix(".weight"))
    weight = module.weight
    if weight.shape != value.shape:
        raise InputError(f"{name} of an earlier refit has the shape {list(value.shape)}: delete it and refit again")
    module.weight = nn.Parameter(value.to(weight), requires_grad=weight.requires_grad)
