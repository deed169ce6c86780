"""Weighted least squares for a change of a linear map, with a ridge that is chosen on other tokens."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError

# Of the largest second moment: what an input that never fires counts as having, so that its equation has a solution.
_EPSILON = 1e-12
# Tokens whose products are added up before the sums, which are float64, get them. In float32 4096 keep the relative
# error of a sum below 1e-5, which no ridge that is tried can see.
BLOCK_TOKENS = 4096


_SOLVING: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar("_SOLVING", default=None)


def now() -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def solving() -> Iterator[None]:
    """Around what takes as long for few tokens as for many."""
    seconds = _SOLVING.get()
    begin = now() if seconds is not None else 0.0
    yield
    if seconds is not None:
        seconds.append(now() - begin)


@contextlib.contextmanager
def seconds_of_solving() -> Iterator[list[float]]:
    """A list to which what is `solving` inside adds its seconds."""
    seconds: list[float] = []
    token = _SOLVING.set(seconds)
    try:
        yield seconds
    finally:
        _SOLVING.reset(token)


@dataclasses.dataclass(frozen=True)
class NormalEquations:
    """Sums over tokens t of what a change D [d, n] of a linear map is fitted on, with weights w_t; float64.

    With a_t [n] the input of the map and r_t [d] what its output lacks: ``gram = sum w a a^T`` [n, n], ``cross =
    sum w a r^T`` [n, d], ``error = sum w |r|^2``, and ``tokens``, their number. ``a + b`` is that of both texts.
    """

    gram: Tensor
    cross: Tensor
    error: float
    tokens: int

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.error + other.error, self.tokens + other.tokens
        )

    def of(self, inputs: Tensor) -> NormalEquations:
        """Those of some inputs [m], by their numbers."""
        return NormalEquations(self.gram[inputs][:, inputs], self.cross[inputs], self.error, self.tokens)

    def error_with(self, change: Tensor) -> float:
        """``sum w |r - D a|^2``."""
        return float(self.error - 2 * (change.T * self.cross).sum() + (change @ self.gram * change).sum())

    def solution(self, ridge: float) -> Tensor:
        """The D that minimises ``sum w |r - D a|^2 + ridge * sum_c gram_cc |D_c|^2``, D_c its columns."""
        solution: Tensor = torch.cholesky_solve(self.cross, self.factor(ridge))
        return solution.T

    def factor(self, ridge: float) -> Tensor:
        """The lower Cholesky factor of ``gram + ridge * diag(gram)``, [n, n].

        The ridge is relative to each input's own second moment, so that its strength does not depend on units.

        Raises:
            InputError: the sums are not finite, or too large.
        """
        own = self.gram.diagonal().clamp_min(_EPSILON * float(self.gram.diagonal().max()) or _EPSILON)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(self.gram + torch.diag(ridge * own))
        if int(failed) or not bool(torch.isfinite(self.cross).all()):
            raise InputError(
                "the refit has no solution: activations on the calibration text are not finite or too large; give "
                "other text, or load the model in float32"
            )
        return factor


class RunningSums:
    """`NormalEquations` summed up token by token, on the device that the tokens are on.

    Args:
        precision: of the products of a block of tokens.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device, precision: torch.dtype = torch.float32) -> None:
        self._precision = precision
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self._error, self._tokens = 0.0, 0
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, a: Tensor, r: Tensor, weight: Tensor | None = None) -> None:
        """Tokens a [T, n] and r [T, d], any floating dtype; weights [T], 1 where there are none."""
        a, r = a.to(self._precision), r.to(self._precision)
        if weight is not None:
            root = weight.to(self._precision).sqrt().unsqueeze(-1)
            a, r = a * root, r * root
        self._error += float(r.double().square().sum())
        self._tokens += len(a)
        self._pending.append((a, r))
        if sum(len(one) for one, _ in self._pending) >= BLOCK_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            a, r = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            self._gram += a.T @ a
            self._cross += a.T @ r
            self._pending = []

    def total(self) -> NormalEquations:
        self._flush()
        return NormalEquations(self._gram, self._cross, self._error, self._tokens)


@dataclasses.dataclass(frozen=True)
class RidgeChoice:
    """A change D [d, n] of a map, or None where no ridge does better than no change.

    Attributes:
        ridge: the one taken; None with no change.
        before, after: the held-out error per token, ``sum w |r|^2`` over the tokens, without and with the change.
    """

    change: Tensor | None
    ridge: float | None
    before: float
    after: float


@solving()
def choose_ridge(
    fit: NormalEquations, held: NormalEquations, ridges: Sequence[float], kept: float = 1.0, *, on_all: bool = False
) -> RidgeChoice:
    """``kept`` times the solution of ``fit`` whose ridge has the least error on the held-out tokens.

    From the weakest ridge on, until the error rises: it has one minimum. The solution stays that of ``fit``, so that
    what is held out can still judge it; with ``on_all`` it is that of both texts at the ridge chosen. The error told is
    that of the solution of ``fit`` either way.
    """
    best: tuple[float, float, Tensor] | None = None
    for ridge in sorted(ridges):
        change = fit.solution(ridge)
        error = held.error_with(change)
        if best is not None and error > best[0]:
            break
        best = (error, ridge, change)
    before = held.error / max(1, held.tokens)
    if best is None or not best[0] < held.error:
        return RidgeChoice(None, None, before, before)
    _, ridge, change = best
    after = held.error_with(kept * change) / max(1, held.tokens)
    return RidgeChoice(kept * ((fit + held).solution(ridge) if on_all else change), ridge, before, after)
