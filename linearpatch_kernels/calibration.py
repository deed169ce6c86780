"""One pass over text that serves every span, every score and every fit.

A decoder of L layers has L + 1 *depths*: depth i < L is the input of layer i, depth L the output of the last layer
before the final norm. Removing the span [start, end) replaces the residual stream at depth ``end`` by a map of the one
at depth ``start``, so pairs of depths are all that scores and fits ask about. :func:`calibrate` looks at every depth
of every window once and keeps sums; nothing of the text's size is stored.

A score asks about all pairs (:class:`CalibrationStatistics`), a fit about one joint (:class:`JointStatistics`), which
may also lie between two models (:func:`joint_statistics`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from linearpatch_kernels.modeling.families import hidden_size, norm_eps, num_layers
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.span import Span as Span  # also where 0.1.0 had it
from linearpatch_kernels.torch_state import evaluation_mode, own_state

# Tokens that are worked on at once: bounds the working memory, whatever the window.
_CHUNK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class NormedMoments:
    """Second moments between a normed depth a and what the stream gains up to b, tokens weighted as in `Moments`.

    With rows ``n = x_a / sqrt(mean(x_a^2) + eps)`` and ``r = x_b - x_a`` of the same token t: ``nn = sum_t w_t n^T n``
    and ``nr = sum_t w_t n^T r`` (both [d, d], float64). A token's norm does not factor out of its sums, so those of the
    stream itself do not give these.

    Attributes:
        eps: of the norm.
    """

    nn: Tensor
    nr: Tensor
    eps: float

    def __add__(self, other: NormedMoments) -> NormedMoments:
        if self.eps != other.eps:
            raise InputError(f"moments of norms with an eps of {self.eps} and of {other.eps} cannot be added")
        return NormedMoments(self.nn + other.nn, self.nr + other.nr, self.eps)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments between two depths a and b, every token weighted by 1 / |x_b|^2 (float64).

    With rows x_a, x_b of the same token t: ``xx = sum_t w_t x_a^T x_a``, ``xy = sum_t w_t x_a^T x_b`` (both [d, d]) and
    ``yy = sum_t w_t |x_b|^2``, which is the number of tokens. The weight makes every token count the same, also
    an attention sink whose norm would drown the others, and is what the next RMSNorm does to an error anyway.

    Attributes:
        normed: those of the normed stream, where they were asked for.
    """

    xx: Tensor
    xy: Tensor
    yy: float
    normed: NormedMoments | None = None

    def __add__(self, other: Moments) -> Moments:
        if (self.normed is None) != (other.normed is None):
            raise InputError("only one of the statistics has moments of the normed stream: ask both for the same")
        normed = None if self.normed is None or other.normed is None else self.normed + other.normed
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, normed)


@dataclasses.dataclass(frozen=True)
class JointStatistics:
    """What fits ask about one joint: the stream before it and the one that should come out of it, d wide, on the CPU.

    Attributes:
        name: what errors call it: a span (``13:19``), or where it lies.
        mean_abs_before, mean_abs_after: float32 [S, d], per window the mean over its tokens of |x|.
        hadamard_mean_abs_before, hadamard_mean_abs_after: float32 [S, d], the same of |x H|.
        moments: second moments from before to after; None where they were not collected.
    """

    name: str
    mean_abs_before: Tensor
    mean_abs_after: Tensor
    hadamard_mean_abs_before: Tensor
    hadamard_mean_abs_after: Tensor
    moments: Moments | None = None

    def __add__(self, other: JointStatistics) -> JointStatistics:
        """Those of both texts."""
        if (self.moments is None) != (other.moments is None):
            raise InputError("only one of the statistics has second moments: collect them in both")
        return JointStatistics(
            self.name,
            torch.cat([self.mean_abs_before, other.mean_abs_before]),
            torch.cat([self.mean_abs_after, other.mean_abs_after]),
            torch.cat([self.hadamard_mean_abs_before, other.hadamard_mean_abs_before]),
            torch.cat([self.hadamard_mean_abs_after, other.hadamard_mean_abs_after]),
            None if self.moments is None or other.moments is None else self.moments + other.moments,
        )

    @property
    def width(self) -> int:
        return self.mean_abs_before.shape[-1]

    def collected_moments(self) -> Moments:
        """The second moments; InputError where they were not collected."""
        if self.moments is None:
            raise InputError(
                f"the second moments of {self.name} were not collected: calibrate with moments=, which names its span"
            )
        return self.moments

    def collected_normed_moments(self) -> NormedMoments:
        """Those of the normed stream; InputError where they were not collected."""
        normed = self.collected_moments().normed
        if normed is None:
            raise InputError(
                f"the second moments of the normed stream of {self.name} were not collected: calibrate with normed=True"
            )
        return normed


def block_influence(cosine: Tensor, *, clamped: bool = False) -> Tensor:
    """How much layers change the stream, 1 - cos(input, output), of cosines of any shape.

    ShortGPT (arXiv 2403.03853), eq. 1. ``clamped`` is how the public code of CoMe (arXiv 2510.15304) takes it: a token
    whose direction a layer turns by more than a right angle counts as one turned by a right angle.
    """
    return 1 - (cosine.clamp(0, 1) if clamped else cosine)


@dataclasses.dataclass(frozen=True)
class CalibrationStatistics:
    """What :func:`calibrate` keeps: sums and per-sample means, on the CPU. ``a + b`` is the statistics of both texts.

    S windows, L layers, width d. Memory: ``8 S (L+1) d + 24 (L+1)^2`` bytes (the two per-sample means are float32),
    plus ``16 d^2`` per span of ``moments``, ``32 d^2`` with those of the normed stream.

    Attributes:
        samples: S, the number of windows; tokens: of all windows together.
        token_cosine: float64 [L+1, L+1], sum over the tokens of cos(x_i, x_j).
        last_token_angle: float64 [L+1, L+1], sum over the windows of arccos(cos(x_i, x_j)) / pi at their last token.
        channel_cosine: float64 [L+1, L+1], sum over the windows of the mean over the d channels of the cosine along the
            window's tokens.
        mean_abs: float32 [S, L+1, d], per window the mean over its tokens of |x|.
        hadamard_mean_abs: float32 [S, L+1, d], the same of |x H|.
        moments: second moments of the spans that were asked for.
    """

    samples: int
    tokens: int
    token_cosine: Tensor
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

    def mean_token_cosine(self) -> Tensor:
        """[L+1, L+1], mean over the tokens of the cosine between the depths."""
        return self.token_cosine / self.tokens

    def mean_channel_cosine(self) -> Tensor:
        """[L+1, L+1], mean over windows and channels of the cosine along the tokens (the LinearPatch code's score)."""
        return self.channel_cosine / self.samples

    def mean_last_token_angle(self) -> Tensor:
        """[L+1, L+1], mean over the windows of the angular distance at the last token, in [0, 1]."""
        return self.last_token_angle / self.samples

    def block_influence(self) -> Tensor:
        """[L], 1 - mean cosine between a layer's input and its output (ShortGPT, arXiv 2403.03853, eq. 1)."""
        return block_influence(self.mean_token_cosine().diagonal(1))

    def at(self, span: Span) -> JointStatistics:
        """What fits ask about the joint that takes the place of ``span``.

        Raises:
            InputError: a span that does not lie in the model.
        """
        _checked_spans([span], self.num_layers)
        before, after = span
        return JointStatistics(
            str(span),
            self.mean_abs[:, before],
            self.mean_abs[:, after],
            self.hadamard_mean_abs[:, before],
            self.hadamard_mean_abs[:, after],
            self.moments.get(span),
        )

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
            tokens=self.tokens + other.tokens,
            **{name: getattr(self, name) + getattr(other, name) for name in _SUMS},
            **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in _PER_SAMPLE},
            moments={span: self.moments[span] + other.moments[span] for span in self.moments},
        )

    def save(self, path: str | os.PathLike[str], *, fingerprint: str) -> None:
        """Write a sealed file, whole or not at all; ``fingerprint`` says what model and text it belongs to.

        Raises:
            InputError: it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in (*_SUMS, *_PER_SAMPLE)}
        eps: dict[str, float] = {}
        for span, moments in self.moments.items():
            tensors |= {f"moments.{span}.xx": moments.xx, f"moments.{span}.xy": moments.xy}
            if moments.normed is not None:
                tensors |= {f"moments.{span}.nn": moments.normed.nn, f"moments.{span}.nr": moments.normed.nr}
                eps[str(span)] = moments.normed.eps
        about = {
            "format": _FILE_FORMAT,
            "fingerprint": fingerprint,
            "samples": self.samples,
            "tokens": self.tokens,
            "moments": {str(span): moments.yy for span, moments in self.moments.items()},
            **({"normed": eps} if eps else {}),
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
            about, halved = _told_of_statistics(file, cure)
        if about.text("fingerprint") != fingerprint:
            raise InputError(f"{path} belongs to another model or text: {cure}")
        with reading(file, cure):
            tensors = load_file(file)
            tokens = int(tensors.pop("tokens")[0]) if halved else about.whole("tokens", 1)
            sums = about.entries("moments")
            # Files of earlier versions have none of the normed stream.
            eps = about.entries("normed") if "normed" in about.names else Entries({})
            moments = {Span.parse(span): _moments_of(span, tensors, sums, eps) for span in sums.names}
            if halved:
                tensors = _whole(tensors)
            found = cls(samples=about.whole("samples", 1), tokens=tokens, moments=moments, **tensors)
            _check_shapes(found)
            return found


_FILE_FORMAT = "linearpatch-statistics-3"
# These held most means twice, with the windows' first token and without it, and the angle at every token.
_HALVED_FORMAT = "linearpatch-statistics-2"
# The same without a seal: read, but nothing tells whether a bit of it is another.
_UNSEALED_FORMAT = "linearpatch-statistics-1"

_SUMS = ("token_cosine", "last_token_angle", "channel_cosine")
_PER_SAMPLE = ("mean_abs", "hadamard_mean_abs")


def _told_of_statistics(file: Path, cure: str) -> tuple[Entries, bool]:
    """What a file of statistics says beside its tensors, and whether these are of an earlier format."""
    with safe_open(file, framework="pt") as opened:
        told: dict[str, Any] = opened.metadata() or {}
    if told.get("format") == _UNSEALED_FORMAT:
        return Entries({**told, "samples": int(told["samples"]), "moments": json.loads(told["moments"])}), True
    about = read_seal(file, cure)[0] if KEY in told else {}
    if about.get("format") not in (_FILE_FORMAT, _HALVED_FORMAT):
        raise InputError(f"{file} is not a statistics file of this version: {cure}")
    return Entries(about), about["format"] == _HALVED_FORMAT


def _moments_of(span: str, tensors: dict[str, Tensor], sums: Entries, eps: Entries) -> Moments:
    """What a file holds of a span; its tensors are taken out of ``tensors``."""

    def taken(name: str) -> Tensor:
        return tensors.pop(f"moments.{span}.{name}")

    normed = NormedMoments(taken("nn"), taken("nr"), eps.real(span)) if span in eps.names else None
    return Moments(taken("xx"), taken("xy"), sums.real(span), normed)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors of an earlier format those over all tokens of a window."""
    kept = {name: one[0] for name, one in tensors.items() if name not in ("token_angle", "last_token_angle")}
    return {**kept, "last_token_angle": tensors["last_token_angle"]}


def _check_shapes(found: CalibrationStatistics) -> None:
    """ValueError where the tensors are not those of one calibration."""
    depths, width = found.mean_abs.shape[-2:]
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(_SUMS, (depths, depths))
    wanted |= dict.fromkeys(_PER_SAMPLE, (found.samples, depths, width))
    shapes = {name: tuple(getattr(found, name).shape) for name in wanted}
    for span, moments in found.moments.items():
        wanted |= {f"{span}.xx": (width, width), f"{span}.xy": (width, width)}
        shapes |= {f"{span}.xx": tuple(moments.xx.shape), f"{span}.xy": tuple(moments.xy.shape)}
        if moments.normed is not None:
            wanted |= {f"{span}.nn": (width, width), f"{span}.nr": (width, width)}
            shapes |= {f"{span}.nn": tuple(moments.normed.nn.shape), f"{span}.nr": tuple(moments.normed.nr.shape)}
    wrong = [name for name, shape in wanted.items() if shapes[name] != shape]
    if wrong:
        raise ValueError(f"{wrong[0]} has the shape {list(shapes[wrong[0]])}")


# Not inference_mode: the statistics, and what a module caches on its first call, must stay usable in training.
@own_state()
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    moments: Sequence[Span] = (),
    normed: bool = False,
    ranks: Processes | None = None,
    progress: Progress | None = None,
) -> CalibrationStatistics:
    """Collect, in one pass, what every score and every fit of :mod:`linearpatch_kernels.pruning` needs.

    Memory beyond the model, for batches of B windows of T tokens, with D = L + 1 depths and c = min(T, 256): the
    residual stream, ``B T D d`` values of the model's dtype; the larger of what the model's own forward pass takes and
    ``c D (3 d + 2 D) + 2 d D^2 + 10 d D`` float32 values, ``4 T d + 3 d^2`` more with ``moments``; and the statistics
    (see :class:`CalibrationStatistics`), their per-sample means twice at the end. It does not grow with the number of
    batches but for those means. The results do not depend on how windows are batched (up to the rounding of the model's
    own batched matrix products).

    Args:
        model: a causal LM of a supported family, on any device(s); its parameters are not touched.
        batches: LongTensors [B, T] of token ids, or mappings with ``input_ids``; no padding, T at least 2. B and T may
            vary.
        moments: spans whose second moments are kept in the same pass (``16 d^2`` bytes each). Where the spans are only
            known from this pass's scores, use :func:`collect_moments` for a second one.
        normed: with the moments of the normed stream (`NormedMoments`; ``16 d^2`` bytes more each).
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
    sums = _Sums(num_layers(model), hidden_size(model), spans, norm_eps(model) if normed else None)
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
    normed: bool = False,
    ranks: Processes | None = None,
    progress: Progress | None = None,
) -> dict[Span, Moments]:
    """The second moments of ``spans``, in a pass that runs no layer behind the last of them.

    Memory beyond the forward pass: the residual stream of the batch at the depths the spans name, and ``16 d^2`` bytes
    a span (``32 d^2`` where ``normed``). Arguments and errors as for :func:`calibrate`.
    """
    run = Run(processes=ranks or Processes(), progress=progress)
    wanted = _checked_spans(spans, num_layers(model))
    if not wanted:
        return {}
    eps = norm_eps(model) if normed else None
    sums = {span: _MomentSums(hidden_size(model), eps) for span in wanted}
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
def joint_statistics(pairs: Iterable[tuple[Tensor, Tensor]], name: str, *, eps: float | None = None) -> JointStatistics:
    """The statistics of a joint between two streams, of two models perhaps: a fit gives a P with before P ~ after.

    Second moments are kept.

    Args:
        pairs: per window the tokens [T, d] before and after.
        name: what errors call the joint.
        eps: of the norm (`norm_eps` of the model), where the moments of the normed stream are to be kept, too.

    Raises:
        InputError: no window, or a NaN or infinity among the values.
    """
    sums, moments = _MagnitudeSums(), None
    for before, after in pairs:
        moments = moments or _MomentSums(before.shape[-1], eps)
        sums.add([before, after])
        moments.add(before, after)
    if moments is None:
        raise InputError("there is no calibration text: give at least one window of tokens")
    mean_abs, hadamard_mean_abs = sums.means()
    return JointStatistics(
        name, mean_abs[:, 0], mean_abs[:, 1], hadamard_mean_abs[:, 0], hadamard_mean_abs[:, 1], moments.total()
    )


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
    """Running second moments of one span: float32 products per window, float64 sums. With an eps, of the normed stream,
    too."""

    def __init__(self, width: int, eps: float | None = None) -> None:
        self.xx = torch.zeros(width, width, dtype=torch.float64)
        self.xy = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0
        self.eps = eps
        self.normed = None if eps is None else (torch.zeros_like(self.xx), torch.zeros_like(self.xy))

    def add(self, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.to(before.device).float()
        # Dividing both sides by |x_b| before the products keeps the sink token from drowning the rest in float32.
        scale = after.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
        _add_products((self.xx, self.xy), before * scale, after * scale)
        if self.normed is not None:
            rows = nn.functional.rms_norm(before, before.shape[-1:], eps=self.eps)
            _add_products(self.normed, rows * scale, (after - before) * scale)
        self.tokens += len(before)

    def total(self) -> Moments:
        normed = None if self.normed is None or self.eps is None else NormedMoments(*self.normed, self.eps)
        return Moments(self.xx, self.xy, float(self.tokens), normed)


def _add_products(sums: tuple[Tensor, Tensor], left: Tensor, right: Tensor) -> None:
    """``left.T @ left`` and ``left.T @ right`` to their sums."""
    for total, other in zip(sums, (left, right), strict=True):
        total += (left.mT @ other).to("cpu", torch.float64)


def _add_moments(sums: Mapping[Span, _MomentSums], hidden: Mapping[int, Tensor]) -> None:
    """One batch: the residual stream [B, T, d] at the depths that the spans name."""
    for depth, states in hidden.items():
        _check_finite(states.sum(dtype=torch.float32), depth)
    for span, moment in sums.items():
        moment.add(hidden[span.start].flatten(0, 1), hidden[span.end].flatten(0, 1))


def _chunks(depths: Sequence[Tensor]) -> Iterator[Tensor]:
    """A window's stream [T, d] at some depths, float32 [tokens, depths, d] on the device of the first, in parts."""
    for start in range(0, len(depths[0]), _CHUNK_TOKENS):
        parts = [depth[start : start + _CHUNK_TOKENS].to(depths[0].device) for depth in depths]
        yield torch.stack(parts, dim=1).float()


class _MagnitudeSums:
    """Per window and depth the mean over the tokens of |x| and of |x H|."""

    def __init__(self) -> None:
        self._mean_abs: list[Tensor] = []
        self._hadamard_mean_abs: list[Tensor] = []

    def add(self, depths: Sequence[Tensor], look: Callable[[Tensor], None] = lambda _: None) -> None:
        """One window: the residual stream [T, d] at every depth; ``look`` sees each part of it, too."""
        absolute = torch.zeros(len(depths), depths[0].shape[-1], dtype=torch.float64)
        rotated = torch.zeros_like(absolute)
        for chunk in _chunks(depths):
            look(chunk)
            absolute += chunk.abs().sum(dim=0).to("cpu", torch.float64)
            rotated += hadamard_transform(chunk).abs_().sum(dim=0).to("cpu", torch.float64)
        for depth, total in enumerate(absolute.sum(dim=-1)):
            _check_finite(total, depth)
        self._mean_abs.append((absolute / len(depths[0])).float())
        self._hadamard_mean_abs.append((rotated / len(depths[0])).float())

    def means(self) -> tuple[Tensor, Tensor]:
        """|x| and |x H|, float32 [windows, depths, d] each."""
        return torch.stack(self._mean_abs), torch.stack(self._hadamard_mean_abs)


class _Sums:
    """The running sums behind :class:`CalibrationStatistics`, fed window by window."""

    def __init__(self, layers: int, width: int, spans: Sequence[Span], eps: float | None = None) -> None:
        pairs = (layers + 1, layers + 1)
        self._samples = self._tokens = 0
        self._token_cosine = torch.zeros(pairs, dtype=torch.float64)
        self._last_token_angle = torch.zeros(pairs, dtype=torch.float64)
        self._channel_cosine = torch.zeros(pairs, dtype=torch.float64)
        self._magnitudes = _MagnitudeSums()
        self._moments = {span: _MomentSums(width, eps) for span in spans}

    # A frame of its own, as `_add_moments` is: nothing of a batch is alive while the next one runs through the model.
    def add_batch(self, hidden: Mapping[int, Tensor]) -> None:
        """One batch: the residual stream [B, T, d] at every depth."""
        for window in range(len(hidden[0])):
            self.add([hidden[depth][window] for depth in range(len(hidden))])

    def add(self, depths: Sequence[Tensor]) -> None:
        """One window: the residual stream [T, d] at every depth."""
        tokens, width = depths[0].shape
        gram = torch.zeros(width, len(depths), len(depths), dtype=torch.float32, device=depths[0].device)
        last = torch.zeros((), dtype=torch.float64, device="cpu")

        def look(chunk: Tensor) -> None:
            nonlocal last
            last = self._add_token_cosines(chunk)
            # Per channel, the products of all pairs of depths along the tokens.
            channels = chunk.permute(2, 1, 0).contiguous()
            gram.add_(torch.bmm(channels, channels.mT))

        self._magnitudes.add(depths, look)
        self._samples += 1
        self._tokens += tokens
        self._last_token_angle += (torch.arccos(last.clamp(-1, 1)) / torch.pi).cpu()
        norm = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(_EPSILON)
        cosine = gram.div_(norm.unsqueeze(-1)).div_(norm.unsqueeze(-2))
        self._channel_cosine += cosine.mean(dim=0).to("cpu", torch.float64)
        for span, moment in self._moments.items():
            moment.add(depths[span.start], depths[span.end])

    def _add_token_cosines(self, chunk: Tensor) -> Tensor:
        """Returns those of the last token, [L+1, L+1]."""
        unit = chunk / chunk.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
        cosine = torch.bmm(unit, unit.mT)
        self._token_cosine += cosine.sum(dim=0).to("cpu", torch.float64)
        return cosine[-1].clone()

    def statistics(self) -> CalibrationStatistics:
        mean_abs, hadamard_mean_abs = self._magnitudes.means()
        return CalibrationStatistics(
            samples=self._samples,
            tokens=self._tokens,
            token_cosine=self._token_cosine,
            last_token_angle=self._last_token_angle,
            channel_cosine=self._channel_cosine,
            mean_abs=mean_abs,
            hadamard_mean_abs=hadamard_mean_abs,
            moments={span: moment.total() for span, moment in self._moments.items()},
        )


# torch.nn.functional.cosine_similarity's, so that the two agree on a channel or token of zeros.
_EPSILON = 1e-8
