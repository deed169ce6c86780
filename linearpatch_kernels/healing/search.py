"""Which layers to remove: those without which the refitted model loses least on held-out text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import block_influence
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import compare_quality
from linearpatch_kernels.forward import PLAIN, Run, Stream, residual_stream
from linearpatch_kernels.healing.refit import Shared, dense_stream, refit, steps_of_cut
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.pruning.scores import check_drop, spans_of_layers
from linearpatch_kernels.span import Span
from linearpatch_kernels.text import some_windows
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Windows that a trial is fitted on at the most: it compares cuts, and the one that is taken is healed on all of them.
TRIAL_WINDOWS = 48
# Layers that are tried in a round of `Search.layers`, those of the least block influence.
_TRIED_LAYERS = 6
# What the dense model lacks, as `_name` writes it.
_NOTHING = ""
_NOTHING_CAN_GO = "without one layer, healed, the held-out loss is above the limit already: give a larger one"

Cut: TypeAlias = tuple[Span, ...]
"""What is removed at once, in the order of the layers."""


@dataclasses.dataclass(frozen=True)
class _Tried:
    """The best of some cuts: its held-out loss, and its refitted model where it was made just now."""

    best: Cut
    loss: float
    model: PreTrainedModel | None


class Search:
    """Tries cuts of a model: each is refitted to a stock model on a part of the windows, and judged on held-out ones.

    Args:
        dense: the model; not changed.
        fit_windows [S, T], heldout_windows [H, T], settings, run: as for `refit`; of the first, `TRIAL_WINDOWS` spread
            over all of them are used.
        known: losses of an earlier run of this search by cut, which are not measured again.
        keep: called with every cut and its loss, for whoever wants to go on after a kill.

    Attributes:
        windows: those that a trial is fitted on, [<= S, T].
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        fit_windows: Tensor,
        heldout_windows: Tensor,
        *,
        settings: RefitSettings | None = None,
        known: Mapping[str, float] | None = None,
        keep: Callable[[str, float], None] | None = None,
        run: Run = PLAIN,
    ) -> None:
        self._dense, self._held = dense, heldout_windows
        self.windows = some_windows(fit_windows, max(TRIAL_WINDOWS, run.processes.count))
        self._settings, self._run, self._keep = settings or RefitSettings(), run, keep
        self._known = dict(known or {})

    @own_state()
    def spans(self, among: Sequence[Span]) -> list[Span]:
        """The span of ``among`` whose removal heals best.

        Raises:
            InputError: no span, or none without which the logits are finite; or what `refit` raises.
        """
        cuts: list[Cut] = [(span,) for span in sorted(among)]
        return list(self._tried(self._dense, range(num_layers(self._dense)), cuts, 0, len(cuts)).best)

    @own_state()
    def layers(self, drop: int | None = None, *, most: float | None = None) -> list[Span]:
        """Layers to remove, one after the other, each from the model that was refitted without those before it.

        In a round, the layers that change this model's stream least on the held-out windows are tried; the first and
        the last one stay.

        Args:
            drop: how many; or ``most``: as many as keep the held-out loss within this.

        Raises:
            InputError: more layers than can go, none that keeps the loss within ``most``, or what `spans` raises.
        """
        inside = num_layers(self._dense) - 2
        rounds = inside if drop is None else drop
        check_drop(rounds, num_layers(self._dense))
        student, kept = self._dense, list(range(num_layers(self._dense)))
        for removed in range(rounds):
            influence = self._influence(student)
            inner = sorted(range(1, len(kept) - 1), key=lambda index: influence[index])[:_TRIED_LAYERS]
            cuts: list[Cut] = [(Span(index, index + 1),) for index in sorted(inner)]
            found = self._tried(student, kept, cuts, removed * _TRIED_LAYERS, rounds * _TRIED_LAYERS)
            if most is not None and found.loss > most:
                break
            if removed < rounds - 1:
                student = found.model or self._without(student, kept, found.best)
            del kept[found.best[0].start]
        if len(kept) == num_layers(self._dense):
            raise InputError(_NOTHING_CAN_GO)
        return spans_of_layers([layer for layer in range(num_layers(self._dense)) if layer not in kept])

    @own_state()
    def depth(self, most: float, cut: Callable[[int], Sequence[Span]]) -> int:
        """The largest number of layers without which the held-out loss is within ``most``, by bisection.

        Args:
            cut: what is removed where so many layers go; the loss should rise with them.

        Raises:
            InputError: one layer less is too much already; or what `spans` raises.
        """
        layers = num_layers(self._dense)
        within, beyond, rounds = 0, layers - 1, math.ceil(math.log2(layers - 1))
        for count in range(rounds):
            if beyond - within == 1:
                break
            middle = (within + beyond) // 2
            found = self._tried(self._dense, range(layers), [tuple(cut(middle))], count, rounds)
            within, beyond = (middle, beyond) if found.loss <= most else (within, middle)
        if not within:
            raise InputError(_NOTHING_CAN_GO)
        return within

    def dense_loss(self) -> float:
        """The dense model's loss on the held-out windows."""
        return self._known[_NOTHING] if _NOTHING in self._known else self._measured(_NOTHING, self._dense)

    def _tried(
        self, student: PreTrainedModel, kept: Sequence[int], cuts: Sequence[Cut], done: int, total: int
    ) -> _Tried:
        """The best of some cuts of the student's layers, ``kept`` of the dense model."""
        wanted = own = None
        best: _Tried | None = None
        for count, cut in enumerate(cuts, 1):
            name = _name(num_layers(self._dense), kept, cut)
            healed: PreTrainedModel | None = None
            if name not in self._known:
                if wanted is None or own is None:
                    wanted, own = (dense_stream(self._dense, self.windows, self._held, 0, self._run) for _ in range(2))
                depth = max(0, cut[0].start - 1)
                own.advance(student, depth)
                wanted.advance(self._dense, kept[depth])
                healed = self._without(student, kept, cut, wanted, own)
            loss = self._known[name] if healed is None else self._measured(name, healed)
            if best is None or loss < best.loss:
                best = _Tried(cut, loss, healed)
            self._run.report("trying cuts", done + count, total)
        if best is None or best.loss == float("inf"):
            raise InputError(
                "no cut that was tried leaves a model whose logits are finite on the held-out windows: load the model "
                "in bfloat16 or float32, or give another text"
            )
        return best

    def _measured(self, name: str, model: PreTrainedModel) -> float:
        """The held-out loss of a model, from now on known by what it lacks."""
        found = compare_quality({name: model}, self._held, noted=lambda _: None, processes=self._run.processes)
        self._known[name] = found[name].loss if name in found else float("inf")
        if self._keep is not None:
            self._keep(name, self._known[name])
        return self._known[name]

    def _without(
        self,
        student: PreTrainedModel,
        kept: Sequence[int],
        cut: Cut,
        wanted: Stream | None = None,
        own: Stream | None = None,
    ) -> PreTrainedModel:
        """The student without some of its layers, refitted around these joints alone."""
        stay = [index for index in range(len(kept)) if not any(index in range(*span) for span in cut)]
        steps = steps_of_cut(
            [kept[index] for index in stay], num_layers(self._dense), self._settings.behind, in_front=True
        )
        # Around the other joints the weights are fitted already.
        joints = [sum(index < span.start for index in stay) for span in cut]
        near = [step for step in steps if any(-1 <= step.index - joint < self._settings.behind for joint in joints)]
        return refit(
            self._dense,
            keep_layers(student, stay),
            near,
            self.windows,
            self._held,
            settings=self._settings,
            shared=Shared(wanted, own),
            run=self._run,
        ).model

    @torch.no_grad()
    def _influence(self, model: PreTrainedModel) -> list[float]:
        """The block influence of every layer on the held-out windows."""
        layers = num_layers(model)
        total = torch.zeros(layers, dtype=torch.float64)
        with evaluation_mode(model):
            for window in self._held:
                stream = residual_stream(model, window.unsqueeze(0), range(layers + 1))
                pairs = ((stream[depth].double(), stream[depth + 1].double()) for depth in range(layers))
                total += torch.stack([functional.cosine_similarity(a, b, dim=-1).mean().cpu() for a, b in pairs])
        influence: list[float] = block_influence(total / len(self._held)).tolist()
        return influence


def _name(layers: int, kept: Sequence[int], cut: Cut) -> str:
    """All that a cut removes from the dense model: ``3:4,7:9``."""
    stay = {layer for index, layer in enumerate(kept) if not any(index in range(*span) for span in cut)}
    return ",".join(map(str, spans_of_layers([layer for layer in range(layers) if layer not in stay])))
