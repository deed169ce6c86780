"""What healing will take, for whoever wants to know before it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.evaluation.agreement import compare_quality
from linearpatch_kernels.forward import PLAIN, Run
from linearpatch_kernels.healing.absorption import RANKED_ON_ONE_OF
from linearpatch_kernels.healing.choice import Healer
from linearpatch_kernels.healing.least_squares import BLOCK_TOKENS, now, seconds_of_solving
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.healing.ways import Heal
from linearpatch_kernels.modeling.families import decoder_layers, hidden_size
from linearpatch_kernels.modeling.halves import kinds_of_halves
from linearpatch_kernels.pruning.plan import PrunePlan

# Streams of all windows that are held at once: the dense model's, the student's, and what a fit aims at.
_STREAMS = 3
# Matrices [n, n] in float64 that a fit holds: the sums of both kinds of windows, one with its ridge, and its factor.
_SQUARES = 4
# And where neurons of removed layers are weighed: the sums, and of those that are left the sums, factor and inverse.
_SQUARES_OF_BOTH = 5
# Windows to fit on in the two trials that the time is told from; each has one more, held out. The first has one more
# of those that rank neurons, which is what its windows should have.
_TRIALS = (1 + RANKED_ON_ONE_OF, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What healing takes on this machine.

    Attributes:
        bytes: of memory beside the models, at the most.
        seconds: from a few windows; it holds where as much else runs as during them.
    """

    bytes: int
    seconds: float

    def __str__(self) -> str:
        """For a person: ``0.4 GB of memory beside the models, and 2 minutes``."""
        minutes = self.seconds / 60
        told = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{self.seconds:.0f} seconds"
        return f"{self.bytes / 1e9:.1f} GB of memory beside the models, and {told}"


def cost_of_healing(
    dense: PreTrainedModel,
    plan: PrunePlan,
    ways: Sequence[Heal],
    fit_windows: Tensor,
    heldout_windows: Tensor,
    *,
    settings: RefitSettings | None = None,
    run: Run = PLAIN,
) -> Cost:
    """What `heal_cut` will take for these ways.

    It is told from healing with five windows; and with one, too, where most of that is not for solving equations, which
    takes as long for any number of them.

    Args:
        plan, fit_windows [S, T], heldout_windows [H, T], settings, run: as for `heal_cut`; the windows are those of all
            processes together.
    """
    windows = (len(fit_windows) + len(heldout_windows)) / run.processes.count
    few = heldout_windows[:1]
    trials = [fit_windows[:count] for count in _TRIALS]

    def told(what: str, done: int, total: int) -> None:
        if done < total:  # the ends are no news
            run.report(f"on a few windows, {what}", done, total)

    healed: dict[str, PreTrainedModel] = {}

    def trial(some: Tensor) -> tuple[float, float]:
        """Seconds in all, and of them for solving."""
        healer = Healer(dense, plan.spans, some, few, settings=settings, run=Run(progress=told))
        begin = now()
        with seconds_of_solving() as solving:
            healed.update({way.name: healer.by(way, plan).model for way in ways})
        return now() - begin, sum(solving)

    taken, solving = trial(trials[0])
    rest = taken - solving
    # What everything takes for a window more, be it one to fit on or one held out.
    each = rest / (len(trials[0]) + 1)
    if solving < rest and len(trials[0]) > len(trials[1]):
        less, solving_less = trial(trials[1])
        each = max(0.0, rest - (less - solving_less)) / (len(trials[0]) - len(trials[1]))
    seconds = solving + max(0.0, rest - each * (len(trials[0]) + 1)) + each * windows
    if len(ways) > 1:
        begin = now()
        compare_quality({"dense": dense, **healed}, few, noted=lambda _: None)
        seconds += (now() - begin) * len(heldout_windows) / run.processes.count
    if not any(way.refitted for way in ways):
        return Cost(0, seconds)
    neurons = (settings or RefitSettings()).neurons if any(way.refitted and way.stock for way in ways) else 0
    return Cost(memory_of_refit(dense, round(windows), fit_windows.shape[1], neurons), seconds)


def memory_of_refit(dense: PreTrainedModel, windows: int, length: int, neurons: int) -> int:
    """Bytes beside the models that `refit` takes for windows [W, T]: their streams, and the moments of a projection.

    ``3 W T d`` values of the model's dtype; and, for the n inputs of the widest projection back to the stream,
    ``32 n^2 + 24 n d`` bytes of moments and solutions in float64 and ``8 (n + d)`` bytes for every token of a block.
    Where up to ``neurons`` of removed layers are weighed beside a layer's own n: ``40 N^2`` for the N of both, and what
    is left of the stream on the windows on which they are ranked.
    """
    width = hidden_size(dense)
    layers = decoder_layers(dense)
    kinds = kinds_of_halves(dense)
    writes = ((layers[index], one) for index in kinds for half in kinds[index] for one in half.writes)
    inputs = max([width, *(_inputs(layer, one.projection, width) for layer, one in writes)])
    held, squares = _STREAMS * windows, _SQUARES
    if neurons:
        inputs, squares = inputs + min(inputs, neurons), _SQUARES_OF_BOTH
        held += math.ceil(windows / RANKED_ON_ONE_OF)
    streams = held * length * width * dense.dtype.itemsize
    moments = 8 * (squares * inputs**2 + 3 * inputs * width)
    block = 8 * min(windows * length, BLOCK_TOKENS + length) * (inputs + width)
    return streams + moments + block


def _inputs(layer: torch.nn.Module, path: str, outputs: int) -> int:
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight.numel() // outputs
