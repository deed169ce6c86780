"""Which layers to remove: those without which the refitted model loses least on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import block_influence
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import compare_quality
from linearpatch_kernels.forward import PLAIN, Run, Stream, residual_stream
from linearpatch_kernels.healing.refit import RefitSettings, dense_stream, refit, steps_of_cut
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.pruning.scores import check_drop, spans_of_layers
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Windows that a trial is fitted on at the most: it compares cuts, and the one that is taken is healed on all of them.
TRIAL_WINDOWS = 48
# Layers that are tried in a round of `Search.layers`, those of the least block influence.
_TRIED_LAYERS = 6


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
        count = min(len(fit_windows), max(TRIAL_WINDOWS, run.processes.count))
        self.windows = fit_windows[[len(fit_windows) * i // count for i in range(count)]]
        self._settings, self._run, self._keep = settings or RefitSettings(), run, keep
        self._known = dict(known or {})

    @own_state()
    def spans(self, among: Sequence[Span]) -> list[Span]:
        """The span of ``among`` whose removal heals best.

        Raises:
            InputError: no span, or none without which the logits are finite; or what `refit` raises.
        """
        losses = self._losses(self._dense, range(num_layers(self._dense)), sorted(among), 0, len(among))
        return [_least(losses)]

    @own_state()
    def layers(self, drop: int) -> list[Span]:
        """``drop`` layers, one after the other, each from the model that was refitted without those before it.

        In a round, the layers that change this model's stream least on the held-out windows are tried; the first and
        the last one stay.

        Raises:
            InputError: more layers than can go, or what `spans` raises.
        """
        check_drop(drop, num_layers(self._dense))
        student, kept = self._dense, list(range(num_layers(self._dense)))
        for removed in range(drop):
            influence = self._influence(student)
            inner = sorted(range(1, len(kept) - 1), key=lambda index: influence[index])[:_TRIED_LAYERS]
            tried = [Span(index, index + 1) for index in sorted(inner)]
            losses = self._losses(student, kept, tried, removed * _TRIED_LAYERS, drop * _TRIED_LAYERS)
            best = _least(losses)
            if removed < drop - 1:
                student = self._without(student, kept, best)
            del kept[best.start]
        return spans_of_layers([layer for layer in range(num_layers(self._dense)) if layer not in kept])

    def _losses(
        self, student: PreTrainedModel, kept: Sequence[int], tried: Sequence[Span], done: int, total: int
    ) -> dict[Span, float]:
        """Held-out losses without each of these spans of the student's layers, ``kept`` of the dense model."""
        wanted = own = None
        losses: dict[Span, float] = {}
        for count, span in enumerate(tried, 1):
            name = _name(num_layers(self._dense), kept, span)
            if name not in self._known:
                if wanted is None or own is None:
                    wanted, own = (dense_stream(self._dense, self.windows, self._held, 0, self._run) for _ in range(2))
                depth = max(0, span.start - 1)
                own.advance(student, depth)
                wanted.advance(self._dense, kept[depth])
                healed = self._without(student, kept, span, wanted, own)
                found = compare_quality({name: healed}, self._held, noted=lambda _: None, processes=self._run.processes)
                self._known[name] = found[name].loss if name in found else float("inf")
                if self._keep is not None:
                    self._keep(name, self._known[name])
            losses[span] = self._known[name]
            self._run.report("trying cuts", done + count, total)
        return losses

    def _without(
        self,
        student: PreTrainedModel,
        kept: Sequence[int],
        span: Span,
        wanted: Stream | None = None,
        own: Stream | None = None,
    ) -> PreTrainedModel:
        """The student without a span of its layers, refitted around that joint alone."""
        stay = [index for index in range(len(kept)) if index not in range(*span)]
        steps = steps_of_cut(
            [kept[index] for index in stay], num_layers(self._dense), self._settings.behind, in_front=True
        )
        # Around the other joints the weights are fitted already.
        near = [step for step in steps if -1 <= step.index - span.start < self._settings.behind]
        shallower = keep_layers(student, stay)
        return refit(
            self._dense,
            shallower,
            near,
            self.windows,
            self._held,
            settings=self._settings,
            stream=wanted,
            own=own,
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


def _name(layers: int, kept: Sequence[int], span: Span) -> str:
    """All that a cut removes from the dense model: ``3:4,7:9``."""
    stay = {layer for index, layer in enumerate(kept) if index not in range(*span)}
    return ",".join(map(str, spans_of_layers([layer for layer in range(layers) if layer not in stay])))


def _least(losses: Mapping[Span, float]) -> Span:
    if not losses or min(losses.values()) == float("inf"):
        raise InputError(
            "no cut that was tried leaves a model whose logits are finite on the held-out windows: load the model in "
            "bfloat16 or float32, or give another text"
        )
    return min(losses, key=lambda span: losses[span])
