"""The map that heals a joint, in closed form from the statistics of one calibration pass.

All fits look for a P with x_start P ~ x_end. They differ in the form of P (what it costs to run) and in what "~" means:
``scalar``, ``diagonal`` and ``linearpatch`` match mean magnitudes (the paper's way), ``least-squares`` and ``low-rank``
minimise sum_t |x_start P - x_end|^2 / |x_end|^2 over the calibration tokens, and ``shrunk-...`` go part of that way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from linearpatch_kernels.calibration import CalibrationStatistics, Moments, Positions
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.nn import DensePatch, DiagonalPatch, HadamardPatch, LowRankPatch, Patch, nearest_low_rank
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import own_state

PatchT = TypeVar("PatchT", bound=Patch)

DEFAULT_RANK = 64
# A least-squares map has d unknowns for every channel that leaves it, whatever the rank it is then cut down to. On
# SmolLM2-135M (d = 576, 6 of 30 layers dropped, rank 64) the low-rank map wins back 38 % of the loss on d / 4 tokens,
# 27 % on d (the plain least squares 7 %), 55 % on 2 d, 62 % on 4 d and 65 % on 8 d.
_TOKENS_PER_UNKNOWN = 4
# Relative to the mean eigenvalue of the second moments: enough for directions that the text never visited, too little
# to be seen in the others.
_RIDGE = 1e-4
# `python -m benchmarks.shrinkage`: on SmolLM2-135M the held-out loss is lowest between 0.75 and 0.85 on the text that
# was calibrated on, and around 0.6 on another.
SHRINKAGE = 0.75


def _ratio_of_means(mean_abs: Tensor, span: Span) -> Tensor:
    """Mean over the windows of (mean over tokens |x_end|) / (mean over tokens |x_start|), per channel, float64 [d].

    ``mean_abs`` is [samples, L+1, d]. LinearPatch (arXiv 2505.24680), eq. 5, as its public code computes it: the ratio
    is taken in every window and the ratios are averaged.
    """
    after, before = mean_abs[:, span.end].double(), mean_abs[:, span.start].double()
    return (after / before).mean(dim=0)


def fit_linearpatch(
    statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL
) -> HadamardPatch:
    """The paper's P = H diag(s) H^T, s the ratio of mean magnitudes in the Hadamard domain (arXiv 2505.24680, 3.2)."""
    patch = HadamardPatch(statistics.width)
    return _filled(patch, scale=_ratio_of_means(statistics.hadamard_mean_abs[positions], span))


def fit_diagonal(statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL) -> DiagonalPatch:
    """P = diag(s), the paper's ablation without H: the same ratio per channel of the residual stream itself."""
    return _filled(DiagonalPatch(statistics.width), scale=_ratio_of_means(statistics.mean_abs[positions], span))


def fit_scalar(statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL) -> DiagonalPatch:
    """P = s I, s the ratio of the magnitudes averaged over the channels as well."""
    mean = statistics.mean_abs[positions].double().mean(dim=-1, keepdim=True)
    return _filled(DiagonalPatch(statistics.width), scale=_ratio_of_means(mean, span).expand(statistics.width))


def fit_least_squares(statistics: CalibrationStatistics, span: Span) -> DensePatch:
    """The dense P [d, d] that minimises sum_t |x_start P - x_end|^2 / |x_end|^2, lightly held to the identity."""
    return _filled(DensePatch(statistics.width), weight=_regression(_moments(statistics, span)))


def fit_low_rank(statistics: CalibrationStatistics, span: Span, rank: int = DEFAULT_RANK) -> LowRankPatch:
    """P = I + down up of rank r by reduced-rank regression (Izenman 1975) of what the identity leaves unexplained."""
    moments = _moments(statistics, span)
    width = statistics.width
    down, up = _reduced_rank(moments, torch.eye(width, dtype=torch.float64), checked_rank(rank, width))
    return _filled(LowRankPatch(width, rank), down=down, up=up)


def fit_hadamard_low_rank(statistics: CalibrationStatistics, span: Span, rank: int = DEFAULT_RANK) -> HadamardPatch:
    """P = H diag(s) H^T + down up: one turn of alternating least squares from :func:`fit_low_rank` (s = 1) on.

    Given a low-rank term, the best s is the ratio of covariance to variance, per channel of the Hadamard domain, of
    what that term leaves; then the low-rank term is fitted again.
    """
    moments = _moments(statistics, span)
    width = statistics.width
    ridged, target = _normal_equations(moments)
    down, up = _reduced_rank(moments, torch.eye(width, dtype=torch.float64), checked_rank(rank, width))
    scale = _rotated(target - ridged @ down @ up).diagonal() / _rotated(ridged).diagonal()
    down, up = _reduced_rank(moments, _from_hadamard(torch.diag(scale)), rank)
    return _filled(HadamardPatch(width, rank=rank), scale=scale, down=down, up=up)


def shrunk(patch: DensePatch | LowRankPatch, kept: float = SHRINKAGE) -> DensePatch | LowRankPatch:
    """I + kept (P - I): a least-squares map, taken part of the way back to the identity.

    A map fitted on one text leans towards its means; part of what it does is wrong on any other text.
    """
    if isinstance(patch, LowRankPatch):
        return _filled(copy.deepcopy(patch), up=kept * patch.up)
    identity = torch.eye(patch.dim, dtype=patch.weight.dtype, device=patch.weight.device)
    return _filled(copy.deepcopy(patch), weight=torch.lerp(identity, patch.weight, kept))


Fit = Callable[[CalibrationStatistics, Span, int], "Patch | None"]

FITS: Mapping[str, Fit] = {
    "none": lambda _statistics, _span, _rank: None,
    "scalar": lambda statistics, span, _rank: fit_scalar(statistics, span),
    "diagonal": lambda statistics, span, _rank: fit_diagonal(statistics, span),
    "linearpatch": lambda statistics, span, _rank: fit_linearpatch(statistics, span),
    "low-rank": fit_low_rank,
    "hadamard-low-rank": fit_hadamard_low_rank,
    "shrunk-low-rank": lambda statistics, span, rank: shrunk(fit_low_rank(statistics, span, rank)),
    "least-squares": lambda statistics, span, _rank: fit_least_squares(statistics, span),
    "shrunk-least-squares": lambda statistics, span, _rank: shrunk(fit_least_squares(statistics, span)),
}
"""Name -> fit(statistics, span, rank). A new fit is one entry; ``auto`` chooses among all of them."""

DENSE_FITS = frozenset({"least-squares", "shrunk-least-squares"})
"""The fits that give a d x d map: what ``structured`` leaves out."""

RANKED_FITS = frozenset({"low-rank", "hadamard-low-rank", "shrunk-low-rank"})
"""The fits that a rank is given for."""

NEEDS_MOMENTS = DENSE_FITS | RANKED_FITS
"""The fits that need ``statistics.moments[span]``."""


class UnusableFit(InputError):
    """A fit that the calibration text does not allow, where another one may be fine."""


def too_little_text(fits: Sequence[str], width: int, windows: Tensor, *, instead: str = "") -> str | None:
    """A sentence about those of ``fits`` that have too many unknowns for the tokens of ``windows`` [W, T], or None.

    Such a fit can be made, since it is held to the identity, but may do worse than plain removal on any other text.

    Args:
        instead: what else would do, for the sentence.
    """
    count, length = windows.shape
    hungry = [fit for fit in fits if fit in NEEDS_MOMENTS]
    if not hungry or count * length >= _TOKENS_PER_UNKNOWN * width:
        return None
    return (
        f"{count} windows of {length} tokens are little text for {', '.join(hungry)} and {width} unknowns per channel: "
        f"on other text that may do worse than plain removal; {math.ceil(_TOKENS_PER_UNKNOWN * width / length)} "
        f"windows would do (`samples`){f', or {instead}' if instead else ''}"
    )


@own_state()
def fit_patch(statistics: CalibrationStatistics, span: Span, fit: str, *, rank: int = DEFAULT_RANK) -> Patch | None:
    """The patch of one joint (None for ``none``), its parameters float32.

    Raises:
        InputError: an unknown fit, a rank that does not fit the width, moments that were not collected.
        UnusableFit: values that are not finite, or equations without a solution.
    """
    if fit not in FITS:
        raise InputError(f"no fit is called {fit!r}: choose one of {', '.join(FITS)}, auto")
    try:
        patch = FITS[fit](statistics, span, rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # documented, but not in its __all__
        raise UnusableFit(
            f"the fit {fit} of {span} has no solution: the stream there is zero or too large on the calibration text, "
            "so give other text or another fit"
        ) from error
    for name, parameter in patch.named_parameters() if patch is not None else ():
        if not bool(torch.isfinite(parameter).all()):
            raise UnusableFit(
                f"the fit {fit} of {span} gave a value that is not finite ({name}): "
                "a channel is silent on the calibration text, so give more text or another fit"
            )
    return patch


def _filled(patch: PatchT, **values: Tensor) -> PatchT:
    with torch.no_grad():
        for name, value in values.items():
            patch.get_parameter(name).copy_(value)
    return patch


def _moments(statistics: CalibrationStatistics, span: Span) -> Moments:
    if span not in statistics.moments:
        raise InputError(f"the second moments of {span} were not collected: calibrate with moments=[Span{tuple(span)}]")
    return statistics.moments[span]


def checked_rank(rank: int, width: int) -> int:
    """The rank, or an InputError if no d x d matrix has it."""
    if not 1 <= rank <= width:
        raise InputError(f"a patch of rank {rank} does not fit a width of {width}: give `rank` 1 to {width}")
    return rank


def _ridge(xx: Tensor) -> float:
    return _RIDGE * float(xx.diagonal().mean())


def _normal_equations(moments: Moments) -> tuple[Tensor, Tensor]:
    """(A, B) with A P = B for the P that minimises sum_t w_t |x_a P - x_b|^2 + ridge |P - I|^2, float64 [d, d] each.

    The ridge holds directions that the text never visited to the identity.
    """
    ridge = _ridge(moments.xx) * torch.eye(len(moments.xx), dtype=torch.float64)
    return moments.xx + ridge, moments.xy + ridge


def _regression(moments: Moments) -> Tensor:
    ridged, target = _normal_equations(moments)
    return torch.cholesky_solve(target, torch.linalg.cholesky(ridged))


def _reduced_rank(moments: Moments, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [d, r], up [r, d] that minimise the same sum for P = base + down up.

    The low-rank matrix that is nearest to the full regression of the residual x_b - x_a base, as the x_a see it.
    """
    return nearest_low_rank(_regression(moments) - base, rank, _normal_equations(moments)[0])


def _from_hadamard(second: Tensor) -> Tensor:
    """H C H^T for a [d, d] matrix C."""
    return hadamard_transform(hadamard_transform(second, inverse=True).mT, inverse=True).mT


def _rotated(second: Tensor) -> Tensor:
    """H^T C H for a [d, d] matrix C."""
    return hadamard_transform(hadamard_transform(second).mT).mT
