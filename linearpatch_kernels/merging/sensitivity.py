"""Which neurons and KV groups a layer needs most, and how much every layer changes the stream: one streaming pass."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.calibration import block_influence
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PLAIN, PartialRun, Run, check_windows, entering
from linearpatch_kernels.modeling.families import Sublayer, decoder_layers, num_layers
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Tokens raised to float32 at once: bounds the working memory, whatever the window.
_CHUNK_TOKENS = 256
_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """What :func:`score_layers` found; float64, on the CPU. CoMe (arXiv 2510.15304), section 3.

    Attributes:
        sensitivity: per half of the layer (``"attention"``, ``"feed-forward"``) a tensor [L, units].
        influence: [L], mean over the tokens of the clamped :func:`~linearpatch_kernels.calibration.block_influence` of
            every layer.
        last_token_angle: span of ``width`` layers -> mean over the windows of arccos(cos(x_start, x_end)) / pi at the
            last token, cos clamped to [0, 1].
        span_influence: span -> what ``influence`` is for a layer, over the whole span.
    """

    sensitivity: dict[str, Tensor]
    influence: Tensor
    last_token_angle: dict[Span, float]
    span_influence: dict[Span, float]


@own_state()
@torch.no_grad()
def score_layers(model: nn.Module, windows: Tensor, *, width: int = 2, run: Run = PLAIN) -> LayerScores:
    """Score every unit, layer and span of ``width`` layers over token ``windows`` [W, T].

    The sensitivity of a unit is, averaged over its channels c, ``mean_t |a_tc| * sum_r |W[r, c]|`` with a [T, channels]
    the input of the half's output projection W: ``(a.abs().mean(0) * W.abs().sum(0)).view(units, -1).mean(1)``. A
    neuron is one channel; a KV group is the channels of its query heads.

    Memory beyond the forward pass: ``width`` states of the stream [B, T, d], 256 rows of float32, and the sums.

    Raises:
        InputError: windows that do not fit the model, a width that does not, activations that are not finite.
    """
    layers = num_layers(model)
    if not 1 <= width <= layers:
        raise InputError(f"there are no spans of {width} layers in a model of {layers}: give 1 to {layers}")
    check_windows(model, windows)
    channels = _ChannelSums(model)
    stream = _StreamSums(layers, width)
    decoder = PartialRun(model, "tokens", layers)
    places = [(layer, functools.partial(stream.add, depth)) for depth, layer in enumerate(decoder_layers(model))]
    with evaluation_mode(model), entering([*channels.places(), *places]):
        for _, batch in run.batches(windows, "scoring the layers"):
            stream.add(layers, decoder(batch))
    count, length = windows.shape
    angles, influences = stream.spans[0] / count, stream.spans[1] / (count * length)
    spans = [Span(start, start + width) for start in range(layers - width + 1)]
    return LayerScores(
        sensitivity=channels.scores(count * length),
        influence=stream.influence / (count * length),
        last_token_angle={span: float(value) for span, value in zip(spans, angles, strict=True)},
        span_influence={span: float(value) for span, value in zip(spans, influences, strict=True)},
    )


class _ChannelSums:
    """Running sums of |a| at the input of every layer's output projections."""

    def __init__(self, model: nn.Module) -> None:
        self._halves = sublayers(model)
        self._layers = decoder_layers(model)
        self._sums: dict[tuple[str, int], Tensor] = {}

    def places(self) -> list[tuple[nn.Module, Callable[[Tensor], None]]]:
        """The projections, each with the function that adds what enters it."""
        return [
            (self._projection(layer, half), functools.partial(self._add, half, index))
            for index, layer in enumerate(self._layers)
            for half in self._halves
        ]

    def scores(self, tokens: int) -> dict[str, Tensor]:
        return {
            half.name: torch.stack([self._score(half, index, tokens) for index in range(len(self._layers))])
            for half in self._halves
        }

    def _score(self, half: Sublayer, index: int, tokens: int) -> Tensor:
        weight = self._projection(self._layers[index], half).weight
        reach = weight.detach().abs().sum(dim=0, dtype=torch.float32).to("cpu", torch.float64)
        score = (self._sums[half.name, index] / tokens * reach).view(half.units, -1).mean(dim=1)
        if not bool(torch.isfinite(score).all()):
            raise InputError(
                f"the {half.name} of layer {index} gives a NaN or an infinity on the calibration text: "
                "load the model in float32 or bfloat16, or check its weights"
            )
        return score

    def _projection(self, layer: nn.Module, half: Sublayer) -> Any:
        return layer.get_submodule(half.output.projection)

    def _add(self, half: Sublayer, index: int, a: Tensor) -> None:
        total = torch.zeros((), dtype=torch.float64)
        for chunk in a.flatten(0, -2).split(_CHUNK_TOKENS):
            total = total + chunk.float().abs().sum(dim=0).to("cpu", torch.float64)
        self._sums[half.name, index] = self._sums.get((half.name, index), 0) + total


class _StreamSums:
    """Running sums over the residual stream, of which only the last ``width`` depths are kept."""

    def __init__(self, layers: int, width: int) -> None:
        self.influence = torch.zeros(layers, dtype=torch.float64)
        # Of every span: the angle at the last tokens, the influence at all.
        self.spans = torch.zeros(2, layers - width + 1, dtype=torch.float64)
        self._width = width
        self._recent: deque[Tensor] = deque(maxlen=width)

    def add(self, depth: int, state: Tensor) -> None:
        """The stream [B, T, d] at ``depth``, in the order of the depths."""
        if depth == 0:
            self._recent.clear()
        else:
            self.influence[depth - 1] += float(block_influence(_cosines(self._recent[-1], state), clamped=True).sum())
        if depth >= self._width:
            cosines = _cosines(self._recent[0], state)
            angles = cosines[:, -1].clamp(0, 1).arccos() / torch.pi
            self.spans[0, depth - self._width] += float(angles.sum())
            self.spans[1, depth - self._width] += float(block_influence(cosines, clamped=True).sum())
        self._recent.append(state)


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """The cosine of every token, [B, T] in float64 of [B, T, d]."""
    chunks = zip(before.split(_CHUNK_TOKENS, dim=1), after.to(before.device).split(_CHUNK_TOKENS, dim=1), strict=True)
    found = [torch.cosine_similarity(a.float(), b.float(), dim=-1, eps=_EPSILON) for a, b in chunks]
    return torch.cat(found, dim=1).to("cpu", torch.float64)
