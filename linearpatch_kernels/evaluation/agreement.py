"""How good a model is, and how close it stays to its teacher, in one pass over the windows."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.notes import Noted
from linearpatch_kernels.evaluation.perplexity import exp_loss, over_predictions, require_finite, token_losses
from linearpatch_kernels.forward import Model, Progress, batches, check_windows, model_logits
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.torch_state import evaluation_mode


@dataclass(frozen=True)
class Quality:
    """What one pass over held-out windows says about a model.

    Attributes:
        perplexity: exp(loss), as :func:`~linearpatch_kernels.evaluation.perplexity.perplexity` defines it.
        loss: mean negative log-likelihood, nats per predicted token.
        loss_standard_error: standard deviation of the windows' mean losses / sqrt(number of windows); None for fewer
            than two windows. It says how far another sample of the same text may be off; two models on the *same*
            windows differ more reliably than this, since most of it is shared.
        top1_agreement: share of the predicted positions (0 to 1) where model and teacher put the same token first;
            None without a teacher.
        kl: mean KL(teacher || model) over the full vocabulary, nats per token; None without a teacher.
        tokens: predicted tokens, windows·(length - 1).
    """

    perplexity: float
    loss: float
    loss_standard_error: float | None
    top1_agreement: float | None
    kl: float | None
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def token_agreement(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Whether both put the same token first, at every predicted position: bool ``[B, T-1]`` of ``[B, T, V]`` logits.

    Equivalent to ``(logits.argmax(-1) == teacher_logits.argmax(-1))[:, :-1]``.
    """
    return over_predictions(lambda rows, teacher, _: rows.argmax(-1) == teacher.argmax(-1), logits, teacher_logits)


def token_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) in nats at every predicted position: ``[B, T-1]`` of ``[B, T, V]`` logits.

    Equivalent to ``F.kl_div(log_softmax(logits), log_softmax(teacher_logits), log_target=True).sum(-1)[:, :-1]``, in
    float32 (float64 for float64 logits).
    """

    def kl(rows: Tensor, teacher: Tensor, _: tuple[int, slice]) -> Tensor:
        log_p = teacher.log_softmax(-1)
        return (log_p.exp() * (log_p - rows.log_softmax(-1))).sum(-1)

    return over_predictions(kl, logits, teacher_logits)


class QualityMeter:
    """Accumulates :class:`Quality` over batches of logits, for whoever runs the model in their own way.

    Memory beyond the logits passed in: at most about 100 MB of float32 chunks, and one float per window.
    """

    def __init__(self, name: str = "the model") -> None:
        self._name = name
        self._window_losses: list[float] = []
        self._tokens = 0
        self._loss = 0.0
        self._agreeing = 0
        self._kl = 0.0
        self._with_teacher: bool | None = None

    def update(self, logits: Tensor, windows: Tensor, teacher_logits: Tensor | None = None) -> None:
        """Add windows ``[B, T]`` with the model's and, in every call or in none, the teacher's logits ``[B, T, V]``.

        Raises:
            InputError: logits that are not finite, or a teacher with another vocabulary.
        """
        if self._with_teacher not in (None, teacher_logits is not None):
            raise InputError("some windows came with the teacher's logits and some without: give them always or never")
        self._with_teacher = teacher_logits is not None
        losses = token_losses(logits, windows)
        require_finite(losses, len(self._window_losses), self._name)
        if teacher_logits is not None:
            self._add_teacher(logits, teacher_logits.to(logits.device))
        self._loss += float(losses.double().sum())
        self._tokens += losses.numel()
        self._window_losses += losses.double().mean(1).tolist()

    def _add_teacher(self, logits: Tensor, teacher_logits: Tensor) -> None:
        if logits.shape != teacher_logits.shape:
            raise InputError(
                f"the teacher's logits are {[*teacher_logits.shape]} and {self._name}'s {[*logits.shape]}: "
                "they need one vocabulary"
            )
        kl = token_kl(logits, teacher_logits)
        # The model's own targets passed already; what is not finite elsewhere may be the teacher's or the model's.
        whose = self._name if bool(teacher_logits.isfinite().all()) else "the teacher"
        require_finite(kl, len(self._window_losses), whose)
        self._kl += float(kl.double().sum())
        self._agreeing += int(token_agreement(logits, teacher_logits).sum())

    def __add__(self, other: QualityMeter) -> QualityMeter:
        """A meter that has seen the windows of both, this one's first."""
        both = QualityMeter(self._name)
        both._window_losses = self._window_losses + other._window_losses
        both._tokens = self._tokens + other._tokens
        both._loss = self._loss + other._loss
        both._agreeing = self._agreeing + other._agreeing
        both._kl = self._kl + other._kl
        both._with_teacher = self._with_teacher if other._with_teacher is None else other._with_teacher
        return both

    def result(self) -> Quality:
        """The quality over all windows so far.

        Raises:
            InputError: no window was added.
        """
        if not self._tokens:
            raise InputError("no window was evaluated: give at least one of at least 2 tokens")
        loss, count = self._loss / self._tokens, len(self._window_losses)
        losses = torch.tensor(self._window_losses, dtype=torch.float64, device="cpu")
        deviation = float(losses.std()) if count > 1 else None
        return Quality(
            perplexity=exp_loss(loss),
            loss=loss,
            loss_standard_error=None if deviation is None else deviation / math.sqrt(count),
            top1_agreement=self._agreeing / self._tokens if self._with_teacher else None,
            kl=self._kl / self._tokens if self._with_teacher else None,
            tokens=self._tokens,
        )


class QualityMeters:
    """A meter for each of several models on the same windows.

    Args:
        names: of the models.
        lenient: whether a model whose figures are not finite is left out from then on, instead of raising.
    """

    def __init__(self, names: Iterable[str], *, lenient: bool = False) -> None:
        self._meters = {name: QualityMeter(name) for name in names}
        self._lenient = lenient
        self._reasons: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The models that are not left out."""
        return [name for name in self._meters if name not in self._reasons]

    def update(self, name: str, logits: Tensor, windows: Tensor, teacher_logits: Tensor | None = None) -> None:
        """As :meth:`QualityMeter.update` of the model ``name``, which must not be left out already."""
        try:
            self._meters[name].update(logits, windows, teacher_logits)
        except InputError as error:
            # Without a teacher there is nothing to compare.
            if not self._lenient or logits is teacher_logits:
                raise
            if teacher_logits is not None:
                require_finite(token_losses(teacher_logits, windows), 0, "the teacher")
            self._reasons[name] = f"left out of the comparison: {error}"

    def __add__(self, other: QualityMeters) -> QualityMeters:
        """Meters that have seen the windows of both; what either left out is left out."""
        both = QualityMeters((), lenient=self._lenient)
        both._meters = {name: meter + other._meters[name] for name, meter in self._meters.items()}
        both._reasons = other._reasons | self._reasons
        return both

    def results(self, noted: Noted | None = None) -> dict[str, Quality]:
        """The quality of every model that is not left out; ``noted`` is told why the others are."""
        if noted is not None:
            for reason in self._reasons.values():
                noted(reason)
        return {name: self._meters[name].result() for name in self.names}


def evaluate_quality(
    model: Model,
    windows: Tensor,
    teacher: Model | None = None,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Quality:
    """Perplexity, and with a teacher top-1 agreement and KL, over windows ``[W, T]`` in one pass.

    Raises:
        InputError: windows that do not fit the model, or logits that are not finite.
    """
    named = {"the model": model}
    return compare_quality(named, windows, teacher, batch_size=batch_size, progress=progress)["the model"]


def compare_quality(
    models: Mapping[str, Model],
    windows: Tensor,
    teacher: Model | None = None,
    *,
    batch_size: int = 1,
    noted: Noted | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> dict[str, Quality]:
    """:func:`evaluate_quality` of several models on the same windows; the teacher runs once per batch for all of them.

    The teacher's logits live as long as their batch: batch_size·T·V numbers, never those of all windows. A model that
    *is* the teacher object is not run twice.

    Args:
        noted: where given, a model with logits that are not finite is left out instead of raising, unless it is the
            teacher, and a note says so.
        processes: every one of them calls this with the same models and windows, runs its own stretch of the windows
            (all of them, where there are fewer windows than processes), and gets the qualities over all.
    """
    processes = processes or Processes()
    for model in (*models.values(), *((teacher,) if teacher is not None else ())):
        check_windows(model, windows)
    shared = 1 < processes.count <= len(windows)
    if shared:
        windows = windows.tensor_split(processes.count)[processes.rank]
    meters = QualityMeters(models, lenient=noted is not None)
    with evaluation_mode(*models.values(), *((teacher,) if teacher is not None else ())):
        for _, batch in batches(windows, batch_size, "evaluating", progress):
            teacher_logits = None if teacher is None else model_logits(teacher, batch)
            for name in meters.names:
                known = teacher_logits if models[name] is teacher else None
                logits = model_logits(models[name], batch) if known is None else known
                meters.update(name, logits, batch, teacher_logits)
    if shared:
        meters = functools.reduce(operator.add, processes.gather(meters))
    return meters.results(noted)


def healed_share(dense: Quality, dropped: Quality, patched: Quality) -> float:
    """How much of the log-perplexity that plain removal cost a patch wins back: 0 none, 1 all, negative if it harms.

    ``(dropped.loss - patched.loss) / (dropped.loss - dense.loss)``; nan where plain removal cost nothing.
    """
    lost = dropped.loss - dense.loss
    return (dropped.loss - patched.loss) / lost if lost > 0 else math.nan


def told_if_worse(
    found: Mapping[str, Quality], result: str, other: str, windows: str, *, than: str = "plain removal"
) -> list[str]:
    """A sentence where a result is worse than another model, nothing where it is not.

    Args:
        found: qualities of ``result`` and ``other``, by default that of plain removal, and of more.
        windows: what they were measured on; than: what the other one is: for the sentence.
    """
    if other not in found or result == other:
        return []
    if result not in found:
        return [f"On {windows} the logits of the result are not finite."]
    ours, its = found[result].loss, found[other].loss
    return [f"On {windows} the result is worse than {than}: a loss of {ours:.4f} nats, not {its:.4f}."] * (ours > its)
