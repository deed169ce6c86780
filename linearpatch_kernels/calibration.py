"""One pass over text that serves every span, every score and every fit.

A decoder of L layers has L + 1 *depths*: depth i < L is the input of layer i, depth L the output of the last layer
before the final norm. Removing the span [start, end) replaces the residual stream at depth ``end`` by a map of the one
at depth ``start``, so pairs of depths are all that scores and fits ask about. :func:`calibrate` looks at every depth
of every window once and keeps sums; nothing of the text's size is stored.

The first token of a window is told apart. In many decoders it is an attention sink whose norm is a multiple
of the others', so that a mean with it and a mean without it can disagree; both are kept (:class:`Positions`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import KEY, Entries, read_seal, reading, write_sealed
from linearpatch_kernels.forward import Progress, Run, check_windows, residual_stream
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.span import Span as Span  # also where 0.1.0 had it
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Tokens that are worked on at once: bounds the working memory, whatever the window.
_CHUNK_TOKENS = 256


class Positions(IntEnum):
    """Which tokens of each window a mean is over; the first axis of the statistics that know both."""

    ALL = 0
    WITHOUT_FIRST = 1


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments between two depths a and b, every token weighted by 1 / |x_b|^2 (float64).

    With rows x_a, x_b of the same token t: ``xx = sum_t w_t x_a^T x_a``, ``xy = sum_t w_t x_a^T x_b`` (both [d, d]) and
    ``yy = sum_t w_t |x_b|^2``, which is the number of tokens. The weight makes every token count the same, also
    an attention sink whose norm would drown the others, and is what the next RMSNorm does to an error anyway.
    """

    xx: Tensor
    xy: Tensor
    yy: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)


@dataclasses.dataclass(frozen=True)
class CalibrationStatistics:
    """What :func:`calibrate` keeps: sums and per-sample means, on the CPU. ``a + b`` is the statistics of both texts.

    S windows, L layers, width d. Memory: ``16 S (L+1) d + 56 (L+1)^2`` bytes (the two per-sample means are float32,
    with and without the first token), plus ``16 d^2`` per span of ``moments``.

    Attributes:
        samples: S, the number of windows.
        tokens: int64 [2], tokens per :class:`Positions`.
        token_cosine: float64 [2, L+1, L+1], sum over the tokens of cos(x_i, x_j).
        token_angle: float64 [2, L+1, L+1], sum over the tokens of arccos(cos(x_i, x_j)) / pi.
        last_token_angle: float64 [L+1, L+1], sum over the windows of the same at their last token.
        channel_cosine: float64 [2, L+1, L+1], sum over the windows of the mean over the d channels of the cosine along
            the window's tokens.
        mean_abs: float32 [2, S, L+1, d], per window the mean over its tokens of |x|.
        hadamard_mean_abs: float32 [2, S, L+1, d], the same of |x H|.
        moments: second moments of the spans that were asked for.
    """

    samples: int
    tokens: Tensor
    token_cosine: Tensor
    token_angle: Tensor
    last_token_angle: Tensor
    channel_cosine: Tensor
    mean_abs: Tensor
    hadamard_mean_abs: Tensor
    moments: Mapping[Span, Moments] = dataclasses.field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return self.token_cosine.shape[-1] - 1

    @property
    def width(self) -> int:
        return self.mean_abs.shape[-1]

    def mean_token_cosine(self, positions: Positions = Positions.ALL) -> Tensor:
        """[L+1, L+1], mean over the tokens of the cosine between the depths."""
        return self.token_cosine[positions] / self.tokens[positions]

    def mean_channel_cosine(self, positions: Positions = Positions.ALL) -> Tensor:
        """[L+1, L+1], mean over windows and channels of the cosine along the tokens (the LinearPatch code's score)."""
        return self.channel_cosine[positions] / self.samples

    def mean_angle(self, positions: Positions = Positions.ALL) -> Tensor:
        """[L+1, L+1], mean over the tokens of the angular distance arccos(cos) / pi, in [0, 1]."""
        return self.token_angle[positions] / self.tokens[positions]

    def mean_last_token_angle(self) -> Tensor:
        """[L+1, L+1], mean over the windows of the angular distance at the last token, in [0, 1]."""
        return self.last_token_angle / self.samples

    def block_influence(self, positions: Positions = Positions.ALL) -> Tensor:
        """[L], 1 - mean cosine between a layer's input and its output (ShortGPT, arXiv 2403.03853, eq. 1)."""
        return 1 - self.mean_token_cosine(positions).diagonal(1)

    def with_moments(self, moments: Mapping[Span, Moments]) -> CalibrationStatistics:
        """The same statistics with the second moments of a later pass over the same windows put in."""
        return dataclasses.replace(self, moments={**self.moments, **moments})

    def __add__(self, other: CalibrationStatistics) -> CalibrationStatistics:
        if (self.num_layers, self.width) != (other.num_layers, other.width):
            raise InputError("statistics of different models cannot be added: calibrate both on the same one")
        if set(self.moments) != set(other.moments):
            raise InputError("statistics with moments of different spans cannot be added: ask both for the same spans")
        return CalibrationStatistics(
            samples=self.samples + other.samples,
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            **{name: torch.cat([getattr(self, name), getattr(other, name)], dim=1) for name in _PER_SAMPLE},
            moments={span: self.moments[span] + other.moments[span] for span in self.moments},
        )

    def save(self, path: str | os.PathLike[str], *, fingerprint: str) -> None:
        """Write a sealed file, whole or not at all; ``fingerprint`` says what model and text it belongs to.

        Raises:
            InputError: it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in (*_SUMS, *_PER_SAMPLE)}
        for span, moments in self.moments.items():
            tensors |= {f"moments.{span}.xx": moments.xx, f"moments.{span}.xy": moments.xy}
        about = {
            "format": _FILE_FORMAT,
            "fingerprint": fingerprint,
            "samples": self.samples,
            "moments": {str(span): moments.yy for span, moments in self.moments.items()},
        }
        write_sealed(Path(path), tensors, about)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, fingerprint: str, cure: str = "delete it and calibrate again"
    ) -> CalibrationStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: a foreign or damaged file, or another model or text; with what to do (``cure``).
        """
        file = Path(path)
        with reading(file, cure):
            about = _told_of_statistics(file, cure)
        if about.text("fingerprint") != fingerprint:
            raise InputError(f"{path} belongs to another model or text: {cure}")
        with reading(file, cure):
            tensors = load_file(file)
            sums = about.entries("moments")
            moments = {
                Span.parse(span): Moments(
                    tensors.pop(f"moments.{span}.xx"), tensors.pop(f"moments.{span}.xy"), sums.real(span)
                )
                for span in sums.names
            }
            found = cls(samples=about.whole("samples", 1), moments=moments, **tensors)
            _check_shapes(found)
            return found


_FILE_FORMAT = "linearpatch-statistics-2"
# Without a seal: read, but nothing tells whether a bit of it is another.
_UNSEALED_FORMAT = "linearpatch-statistics-1"


def _told_of_statistics(file: Path, cure: str) -> Entries:
    """What a file of statistics says beside its tensors."""
    with safe_open(file, framework="pt") as opened:
        told: dict[str, Any] = opened.metadata() or {}
    if told.get("format") == _UNSEALED_FORMAT:
        return Entries({**told, "samples": int(told["samples"]), "moments": json.loads(told["moments"])})
    about = read_seal(file, cure)[0] if KEY in told else {}
    if about.get("format") != _FILE_FORMAT:
        raise InputError(f"{file} is not a statistics file of this version: {cure}")
    return Entries(about)


def _check_shapes(found: CalibrationStatistics) -> None:
    """ValueError where the tensors are not those of one calibration."""
    depths, width = found.mean_abs.shape[-2:]
    pairs, means = (2, depths, depths), (2, found.samples, depths, width)
    wanted = {
        "tokens": (2,),
        "token_cosine": pairs,
        "token_angle": pairs,
        "last_token_angle": (depths, depths),
        "channel_cosine": pairs,
        "mean_abs": means,
        "hadamard_mean_abs": means,
    }
    shapes = {name: tuple(getattr(found, name).shape) for name in wanted}
    for span, moments in found.moments.items():
        wanted |= {f"{span}.xx": (width, width), f"{span}.xy": (width, width)}
        shapes |= {f"{span}.xx": tuple(moments.xx.shape), f"{span}.xy": tuple(moments.xy.shape)}
    wrong = [name for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise ValueError(f"{wrong[0]} has the shape {list(shapes[wrong[0]])}")


_SUMS = ("tokens", "token_cosine", "token_angle", "last_token_angle", "channel_cosine")
_PER_SAMPLE = ("mean_abs", "hadamard_mean_abs")


# Not inference_mode: the statistics, and what a module caches on its first call, must stay usable in training.
@own_state()
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    moments: Sequence[Span] = (),
    ranks: Processes | None = None,
    progress: Progress | None = None,
) -> CalibrationStatistics:
    """Collect, in one pass, what every score and every fit of :mod:`linearpatch_kernels.pruning` needs.

    Memory beyond the model, for batches of B windows of T tokens, with D = L + 1 depths and c = min(T, 256): the
    residual stream, ``B T D d`` values of the model's dtype; the larger of what the model's own forward pass takes and
    ``c D (3 d + 4 D) + 4 d D^2 + 16 d D`` float32 values, ``4 T d + 3 d^2`` more with ``moments``; and the statistics
    (see :class:`CalibrationStatistics`), their per-sample means twice at the end. It does not grow with the number of
    batches but for those means. The results do not depend on how windows are batched (up to the rounding of the model's
    own batched matrix products).

    Args:
        model: a causal LM of a supported family, on any device(s); its parameters are not touched.
        batches: LongTensors [B, T] of token ids, or mappings with ``input_ids``; no padding, T at least 2. B and T may
            vary.
        moments: spans whose second moments are kept in the same pass (``16 d^2`` bytes each). Where the spans are only
            known from this pass's scores, use :func:`collect_moments` for a second one.
        ranks: processes; every one of them calls this with the same batches (a sequence), runs its own stretch of
            them, and gets the statistics of all. None: this one alone.
        progress: called after each batch.

    Raises:
        InputError: a NaN or infinity in the activations (the layer is named), no batch, a padded batch, or a window
            too short or too long, token ids that the model does not have.

    Source: LinearPatch (arXiv 2505.24680) sections 3.1 and 3.2 for the cosines and the Hadamard-domain means, ShortGPT
    (arXiv 2403.03853) eq. 1 for block influence, arXiv 2403.17887 section 3.2 for the angular distance.
    """
    run = Run(processes=ranks or Processes(), progress=progress)
    spans = _checked_spans(moments, num_layers(model))
    sums = _Sums(num_layers(model), hidden_size(model), spans)
    windows = 0
    with evaluation_mode(model):
        for ids, total in _batches(model, _stretch(batches, run.processes)):
            sums.add_batch(residual_stream(model, ids, range(num_layers(model) + 1)))
            windows += len(ids)
            run.report("calibrating", windows, total)
    if windows == 0:
        raise InputError("there is no calibration text: give at least one window of tokens")
    mine = sums.statistics()
    return functools.reduce(operator.add, run.processes.gather(mine))


@own_state()
@torch.no_grad()
def collect_moments(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    spans: Sequence[Span],
    *,
    ranks: Processes | None = None,
    progress: Progress | None = None,
) -> dict[Span, Moments]:
    """The second moments of ``spans``, in a pass that runs no layer behind the last of them.

    Memory beyond the forward pass: the residual stream of the batch at the depths the spans name, and ``16 d^2`` bytes
    a span. Arguments and errors as for :func:`calibrate`.
    """
    run = Run(processes=ranks or Processes(), progress=progress)
    wanted = _checked_spans(spans, num_layers(model))
    if not wanted:
        return {}
    sums = {span: _MomentSums(hidden_size(model)) for span in wanted}
    depths = sorted({depth for span in wanted for depth in span})
    windows = 0
    with evaluation_mode(model):
        for ids, total in _batches(model, _stretch(batches, run.processes)):
            _add_moments(sums, residual_stream(model, ids, depths))
            windows += len(ids)
            run.report("second moments", windows, total)
    if windows == 0:
        raise InputError("there is no calibration text: give at least one window of tokens")
    mine = {span: moment.total() for span, moment in sums.items()}
    found: list[dict[Span, Moments]] = run.processes.gather(mine)
    return {span: functools.reduce(operator.add, [one[span] for one in found]) for span in mine}


@own_state()
@torch.no_grad()
def stream_statistics(pairs: Iterable[tuple[Tensor, Tensor]]) -> CalibrationStatistics:
    """The statistics of two streams, of two models perhaps, as if a model of one layer led from one to the other.

    A fit of ``Span(0, 1)`` from them gives a P with before P ~ after. Second moments are kept.

    Args:
        pairs: per window the tokens [T, d] before and after, T at least 2.

    Raises:
        InputError: no window, or a NaN or infinity among the values.
    """
    sums: _Sums | None = None
    for before, after in pairs:
        if sums is None:
            sums = _Sums(1, before.shape[-1], [Span(0, 1)])
        sums.add([before, after])
    if sums is None:
        raise InputError("there is no calibration text: give at least one window of tokens")
    return sums.statistics()


def _stretch(
    batches: Iterable[Tensor | Mapping[str, Tensor]], processes: Processes
) -> Iterable[Tensor | Mapping[str, Tensor]]:
    """This process's share of the batches, in their order: the shares one after the other are the whole."""
    if processes.count == 1:
        return batches
    if not isinstance(batches, Sequence) or len(batches) < processes.count:
        raise InputError(f"{processes.count} processes need a sequence of at least as many batches to calibrate on")
    bounds = [len(batches) * rank // processes.count for rank in (processes.rank, processes.rank + 1)]
    return batches[slice(*bounds)]


def _batches(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> Iterable[tuple[Tensor, int]]:
    """Token ids of each batch, checked, and the number of windows of all (0: not known)."""
    if isinstance(batches, Tensor | Mapping):
        raise InputError("batches is a single one: give an iterable of [B, T] tensors, for example windows.split(4)")
    total = sum(len(_ids(batch)) for batch in batches) if isinstance(batches, Sequence) else 0
    for batch in batches:
        ids = _ids(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not bool(mask.all()):
            raise InputError("calibration windows must not be padded: give windows of equal length")
        if ids.dim() != 2 or ids.shape[1] < 2:
            raise InputError(f"a calibration batch has shape {list(ids.shape)}: give token ids [B, T] with T >= 2")
        if len(ids):
            check_windows(model, ids)
            yield ids, total


def _ids(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    return batch["input_ids"] if isinstance(batch, Mapping) else batch


def _checked_spans(spans: Sequence[Span], layers: int) -> list[Span]:
    for span in spans:
        if not 0 <= span.start < span.end <= layers:
            raise InputError(
                f"the span {span} does not lie in the model's {layers} layers: give 0 <= START < END <= {layers}"
            )
    return list(dict.fromkeys(spans))


def _check_finite(value: Tensor, depth: int) -> None:
    if not bool(torch.isfinite(value)):
        where = f"the output of layer {depth - 1}" if depth else "the token embedding"
        raise InputError(
            f"{where} holds a NaN or an infinity on the calibration text: "
            "load the model in float32 or bfloat16, or check its weights"
        )


class _MomentSums:
    """Running second moments of one span: float32 products per window, float64 sums."""

    def __init__(self, width: int) -> None:
        self.xx = torch.zeros(width, width, dtype=torch.float64)
        self.xy = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.to(before.device).float()
        # Dividing both sides by |x_b| before the products keeps the sink token from drowning the rest in float32.
        scale = after.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        left, right = before * scale, after * scale
        self.xx += (left.mT @ left).to("cpu", torch.float64)
        self.xy += (left.mT @ right).to("cpu", torch.float64)
        self.tokens += len(before)

    def total(self) -> Moments:
        return Moments(self.xx, self.xy, float(self.tokens))


def _add_moments(sums: Mapping[Span, _MomentSums], hidden: Mapping[int, Tensor]) -> None:
    """One batch: the residual stream [B, T, d] at the depths that the spans name."""
    for depth, states in hidden.items():
        _check_finite(states.sum(dtype=torch.float32), depth)
    for span, moment in sums.items():
        moment.add(hidden[span.start].flatten(0, 1), hidden[span.end].flatten(0, 1))


class _Sums:
    """The running sums behind :class:`CalibrationStatistics`, fed window by window."""

    def __init__(self, layers: int, width: int, spans: Sequence[Span]) -> None:
        pairs = (layers + 1, layers + 1)
        self.tokens = torch.zeros(2, dtype=torch.int64)
        self.token_cosine = torch.zeros(2, *pairs, dtype=torch.float64)
        self.token_angle = torch.zeros(2, *pairs, dtype=torch.float64)
        self.last_token_angle = torch.zeros(pairs, dtype=torch.float64)
        self.channel_cosine = torch.zeros(2, *pairs, dtype=torch.float64)
        self.mean_abs: list[Tensor] = []
        self.hadamard_mean_abs: list[Tensor] = []
        self.moments = {span: _MomentSums(width) for span in spans}

    # A frame of its own, as `_add_moments` is: nothing of a batch is alive while the next one runs through the model.
    def add_batch(self, hidden: Mapping[int, Tensor]) -> None:
        """One batch: the residual stream [B, T, d] at every depth."""
        for window in range(len(hidden[0])):
            self.add([hidden[depth][window] for depth in range(len(hidden))])

    def add(self, depths: Sequence[Tensor]) -> None:
        """One window: the residual stream [T, d] at every depth."""
        tokens, width = depths[0].shape
        device = depths[0].device
        absolute = torch.zeros(2, len(depths), width, dtype=torch.float64)
        rotated = torch.zeros_like(absolute)
        gram = torch.zeros(2, width, len(depths), len(depths), dtype=torch.float32, device=device)
        for start in range(0, tokens, _CHUNK_TOKENS):
            chunk = torch.stack([depth[start : start + _CHUNK_TOKENS].to(device) for depth in depths], dim=1).float()
            self._add_token_pairs(chunk, first=start == 0, last=start + _CHUNK_TOKENS >= tokens)
            _add_both(absolute, chunk.abs(), first=start == 0)
            _add_both(rotated, hadamard_transform(chunk).abs_(), first=start == 0)
            _add_channel_gram(gram, chunk, first=start == 0)
        counts = torch.tensor([tokens, tokens - 1], dtype=torch.int64)
        for depth, sums in enumerate(absolute[Positions.ALL].sum(dim=-1)):
            _check_finite(sums, depth)
        self.tokens += counts
        self.mean_abs.append((absolute / counts.view(2, 1, 1)).float())
        self.hadamard_mean_abs.append((rotated / counts.view(2, 1, 1)).float())
        norm = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(_EPSILON)
        cosine = gram.div_(norm.unsqueeze(-1)).div_(norm.unsqueeze(-2))
        self.channel_cosine += cosine.mean(dim=1).to("cpu", torch.float64)
        for span, moment in self.moments.items():
            moment.add(depths[span.start], depths[span.end])

    def _add_token_pairs(self, chunk: Tensor, *, first: bool, last: bool) -> None:
        unit = chunk / chunk.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
        cosine = torch.bmm(unit, unit.mT)
        angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
        _add_both(self.token_cosine, cosine, first=first)
        _add_both(self.token_angle, angle, first=first)
        if last:
            self.last_token_angle += angle[-1].cpu()

    def statistics(self) -> CalibrationStatistics:
        return CalibrationStatistics(
            samples=len(self.mean_abs),
            **{name: getattr(self, name) for name in _SUMS},
            **{name: torch.stack(getattr(self, name), dim=1) for name in _PER_SAMPLE},
            moments={span: moment.total() for span, moment in self.moments.items()},
        )


# torch.nn.functional.cosine_similarity's, so that the two agree on a channel or token of zeros.
_EPSILON = 1e-8


def _add_both(sums: Tensor, values: Tensor, *, first: bool) -> None:
    """Add the sum over the tokens (the first axis) of ``values``, with and without the window's first token."""
    total = values.sum(dim=0).to("cpu", torch.float64)
    sums[Positions.ALL] += total
    sums[Positions.WITHOUT_FIRST] += values[1:].sum(dim=0).to("cpu", torch.float64) if first else total


def _add_channel_gram(gram: Tensor, chunk: Tensor, *, first: bool) -> None:
    """Add, per channel, the products of all pairs of depths along the tokens: [T, L+1, d] -> [d, L+1, L+1]."""
    channels = chunk.permute(2, 1, 0).contiguous()
    total = torch.bmm(channels, channels.mT)
    gram[Positions.ALL] += total
    # Not total minus the first token's share: that one is so large that the difference would have no digits left.
    gram[Positions.WITHOUT_FIRST] += torch.bmm(channels[..., 1:], channels[..., 1:].mT) if first else total
