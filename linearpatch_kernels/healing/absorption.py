"""Neurons of removed layers in the place of a layer's own: the choice among both, by least squares.

A feed-forward half is a sum over neurons (`modeling.families.Sublayer`), and any of them can move to another layer. The
layer in front of a joint is to write what the removed layers would have written, and for that some of their neurons,
reading the stream that is there, are worth more than the least of its own. Source: ours; the elimination is that of the
optimal brain surgeon (Hassibi and Stork, 1993), a neuron's outgoing weights at once. It differs from CoMe's choice
(arXiv 2510.15304), which keeps of every merged layer what is most sensitive and asks nothing about the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, Run
from linearpatch_kernels.healing.activations import Sums, Tokens, entering_and_leaving, entering_modules, lacking
from linearpatch_kernels.healing.least_squares import NormalEquations, RidgeChoice, choose_ridge, solving
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.merging.merge import input_parameters, set_parameter
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import Sublayer, decoder_layers, num_layers
from linearpatch_kernels.modeling.halves import Half, Write
from linearpatch_kernels.modeling.units import sublayers

# One window of so many ranks the neurons of the removed layers: of those few that are left, all windows decide.
RANKED_ON_ONE_OF = 4
# Of the inputs that are left, what a round of the elimination keeps; then all are weighed again.
_KEPT_IN_A_ROUND = 0.75
_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """A feed-forward half some of whose neurons are those of removed layers.

    Attributes:
        parameters: path in the layer -> value, float64; projections: those that these are of.
        count: neurons that came from other layers.
        ridge: the one taken; before, after: the held-out error per token, as of `RidgeChoice`.
    """

    parameters: dict[str, Tensor]
    projections: tuple[str, ...]
    count: int
    ridge: float
    before: float
    after: float


def neurons_that_can_move(model: PreTrainedModel, half: Half, settings: RefitSettings) -> Sublayer | None:
    """A half of a layer as a sum over neurons, where those of other layers can take the place of some; else None.

    They bring the gain of their norm along, in rows of their own (so nothing else may read what that norm gives), and
    what they write goes to the stream as it is.
    """
    if min(settings.neurons, settings.shrinkage) <= 0 or half.name != "feed-forward":
        return None
    try:
        attention, units = sublayers(model)
    except InputError:  # no sum over neurons, or it does not show
        return None
    layer = decoder_layers(model)[0]
    norm = () if units.norm is None else layer.get_submodule(units.norm).named_parameters()
    folds = all(name == "weight" for name, _ in norm) or all(
        isinstance(getattr(layer.get_submodule(heads.projection), "bias", None), Tensor) for heads in units.inputs
    )
    alone = attention.norm != units.norm
    return units if alone and folds and half.writes == (Write(units.output.projection),) else None


@torch.no_grad()
def absorb(
    student: PreTrainedModel,
    index: int,
    half: Sublayer,
    givers: Sequence[nn.Module],
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    sums: Sums,
    settings: RefitSettings,
    run: Run = PLAIN,
) -> Absorbed | RidgeChoice:
    """The feed-forward half of layer ``index`` with which the stream that leaves the layer comes nearest to a target.

    Its own neurons are fitted first; of the givers', those that explain most of the rest are weighed beside them
    (`explained`), and as many as the layer has stay (`most_useful`). Where held-out windows do not gain by it, the
    result is the change of its projection back alone.

    Args:
        student: not changed; half: of `neurons_that_can_move`; givers: layers of the same kind.
        states, targets: per window [T, d], what enters the layer, and what should leave it.
        run: told of what takes minutes where a layer has ten thousand neurons.
    """
    path, precision = half.output.projection, settings.precision
    weight = decoder_layers(student)[index].get_submodule(path).get_parameter("weight").double()

    def own(which: Sequence[int]) -> Iterator[Tokens]:
        pairs = entering_and_leaving(student, index, path, [states[one] for one in which])
        return lacking(pairs, [targets[one] for one in which], precision)

    fit, every = range(sums.fit), range(len(states))
    some = fit[::RANKED_ON_ONE_OF]
    reader = _Reader(student, index, half)
    # Of stages inside one no end is told: a line each would be many where all is done in a second.
    run.report("ranking neurons", 0, len(givers))
    some_sums, held = Sums(len(some), sums.processes).of(own([*some, *every[sums.fit :]]), precision)
    rest = list(_left(own(some), choose_ridge(some_sums, held, settings.ridges), precision))
    entering = [states[one] for one in some]
    worth = []
    for count, giver in enumerate(givers):
        run.report("ranking neurons", count, len(givers))
        worth.append(explained(*sums.total(*reader.moments(giver, entering, rest, precision))))
    del some_sums, rest
    most = torch.stack(worth).flatten().topk(min(settings.neurons, half.units, len(givers) * half.units)).indices
    shortlist = [(int(one) // half.units, int(one) % half.units) for one in most.sort().values]
    reader.read_as(_given(givers, shortlist))

    def both() -> Iterator[Tokens]:
        for (a, r, w), b in zip(own(every), reader.neurons(states), strict=True):
            yield torch.cat([a, b], -1), r, w

    all_sums, held = sums.of(both(), precision)
    mine = torch.arange(half.units, dtype=torch.int64, device=weight.device)
    alone = choose_ridge(all_sums.of(mine), held.of(mine), settings.ridges, settings.shrinkage)
    if alone.ridge is None:
        return alone
    wide = torch.cat([weight, weight.new_zeros(len(weight), len(shortlist))], 1)
    inputs = most_useful(all_sums, wide, half.units, alone.ridge, run)
    choice = weights_of_inputs(all_sums, held, wide, inputs, settings.ridges, settings.shrinkage)
    if choice.after >= alone.after or int(choice.inputs[-1]) < half.units:
        return alone
    kept = choice.inputs.tolist()
    absorbed = [shortlist[one - half.units] for one in kept if one >= half.units]
    stay = (decoder_layers(student)[index], [one for one in kept if one < half.units])
    parameters = input_parameters(half, [stay, *_given(givers, absorbed)])
    parameters[f"{path}.weight"] = choice.weight
    projections = tuple(dict.fromkeys([*(heads.projection for heads in half.inputs), path]))
    return Absorbed(parameters, projections, len(absorbed), choice.ridge, alone.before, choice.after)


def _given(givers: Sequence[nn.Module], neurons: Sequence[tuple[int, int]]) -> list[tuple[nn.Module, list[int]]]:
    """Neurons by giver, from (giver, neuron) in increasing order."""
    return [(layer, [unit for one, unit in neurons if one == giver]) for giver, layer in enumerate(givers)]


def _left(tokens: Iterator[Tokens], alone: RidgeChoice, precision: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """What is left per window once the layer's own neurons are fitted, [T, d], times the weights; and these [T, 1]."""
    change = None if alone.change is None else alone.change.T.to(precision)
    for a, r, weight in tokens:
        assert weight is not None
        left = r if change is None else r - a.to(precision) @ change
        yield left * weight.unsqueeze(-1), weight.unsqueeze(-1)


class _Reader:
    """The student's layer with neurons of other layers, on the stream that enters the student's."""

    def __init__(self, student: PreTrainedModel, index: int, half: Sublayer) -> None:
        self._model, self._index, self._half = keep_layers(student, range(num_layers(student))), index, half

    def read_as(self, given: Sequence[tuple[nn.Module, Sequence[int]]]) -> None:
        for path, value in input_parameters(self._half, given).items():
            set_parameter(decoder_layers(self._model)[self._index], path, value)

    def neurons(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the neurons give, per window."""
        return (a for (a,) in entering_modules(self._model, self._index, [self._half.output.projection], states))

    def moments(
        self,
        giver: nn.Module,
        states: Sequence[Tensor],
        rest: Sequence[tuple[Tensor, Tensor]],
        precision: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """``sum w a r^T`` [n, d] and ``sum w a^2`` [n] of all neurons of a layer, float64."""
        self.read_as([(giver, range(self._half.units))])
        cross = power = torch.zeros((), dtype=torch.float64)
        for a, (left, weight) in zip(self.neurons(states), rest, strict=True):
            a = a.to(precision)
            cross = cross.to(a.device) + a.T @ left
            power = power.to(a.device) + (a.square() * weight).sum(0)
        return cross, power


@dataclasses.dataclass(frozen=True)
class InputChoice:
    """Which inputs of a linear map stay, and the weights that those have.

    Attributes:
        inputs [n]: their numbers, increasing; weight [d, n].
        ridge: the one taken; after: the held-out error per token, ``sum w |r|^2`` over the tokens.
    """

    inputs: Tensor
    weight: Tensor
    ridge: float
    after: float


def explained(cross: Tensor, power: Tensor) -> Tensor:
    """How much of a residual each input could explain alone, ``|sum w a r|^2 / sum w a^2``, [n].

    Args:
        cross [n, d]: ``sum w a r^T``; power [n]: ``sum w a^2``.
    """
    return cross.square().sum(-1) / power.clamp_min(_EPSILON * float(power.max()) or _EPSILON)


@solving()
def most_useful(fit: NormalEquations, weight: Tensor, count: int, ridge: float, run: Run = PLAIN) -> Tensor:
    """The numbers of the ``count`` inputs with which a map does best, increasing.

    With W the weights before: inputs are given up in rounds, those first whose loss costs least,
    ``|W_c + D_c|^2 / (gram + ridge)^-1_cc`` with D the solution for those that are left.

    Args:
        fit: of all N inputs; what the output lacks is measured with ``weight``.
        weight [d, N]: before, zero for an input that the map does not have yet; float64.
        ridge: as for `NormalEquations.factor`.
        run: told how many inputs are left to give up.
    """
    inputs = torch.arange(len(fit.gram), dtype=torch.int64, device=fit.gram.device)
    excess = len(inputs) - count
    while len(inputs) > count:
        run.report("choosing neurons", excess - (len(inputs) - count), excess)
        part, written = _without_the_rest(fit, weight, inputs)
        factor = part.factor(ridge)
        whole = torch.cholesky_solve(part.cross + written, factor) + weight[:, inputs].T
        costs = whole.square().sum(-1) / torch.cholesky_inverse(factor).diagonal()
        left = max(count, int(_KEPT_IN_A_ROUND * len(inputs)))
        inputs = inputs[costs.topk(left).indices.sort().values]
    return inputs


@solving()
def weights_of_inputs(
    fit: NormalEquations,
    held: NormalEquations,
    weight: Tensor,
    inputs: Tensor,
    ridges: Sequence[float],
    kept: float = 1.0,
) -> InputChoice:
    """The weights with which some inputs of a map do without the others.

    What stays of the map before (what the inputs given up wrote is fitted on those that stay) is kept whole, and of the
    change the part ``kept``.

    Args:
        fit, held, weight: as for `most_useful`; ridges: as for `choose_ridge`.
    """
    part, written = _without_the_rest(fit, weight, inputs)
    judged, missing = _without_the_rest(held, weight, inputs)
    lost = -weight
    lost[:, inputs] = 0
    judged = dataclasses.replace(judged, cross=judged.cross + missing, error=held.error_with(lost))
    best: tuple[float, float, Tensor, Tensor] | None = None
    for ridge in sorted(ridges):
        factor = part.factor(ridge)
        old, change = (torch.cholesky_solve(cross, factor).T for cross in (written, part.cross))
        error = judged.error_with(old + change)
        if best is not None and error > best[0]:
            break
        best = (error, ridge, old, change)
    assert best is not None
    _, ridge, old, change = best
    partial = old + kept * change
    after = judged.error_with(partial) / max(1, held.tokens)
    return InputChoice(inputs, weight[:, inputs] + partial, ridge, after)


def _without_the_rest(equations: NormalEquations, weight: Tensor, inputs: Tensor) -> tuple[NormalEquations, Tensor]:
    """Those of some inputs, toward what the output lacks with all; and ``sum w a b^T``, b what the others wrote."""
    gone = torch.ones(len(equations.gram), dtype=torch.bool, device=inputs.device)
    gone[inputs] = False
    if not bool(gone.any()):
        return equations, torch.zeros_like(equations.cross)
    return equations.of(inputs), equations.gram[inputs][:, gone] @ weight[:, gone].T
