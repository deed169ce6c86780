"""The map that heals a joint, in closed form from the statistics of one calibration pass.

All fits look for a P with x_start P ~ x_end. They differ in the form of P (what it costs to run) and in what "~" means:
``scalar``, ``diagonal`` and ``linearpatch`` match mean magnitudes (the paper's way), ``least-squares`` and ``low-rank``
minimise sum_t |x_start P - x_end|^2 / |x_end|^2 over the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linearpatch_kernels.calibration import CalibrationStatistics, Moments, Positions, Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.nn import DensePatch, HadamardPatch, LowRankPatch

DEFAULT_RANK = 64
# Relative to the mean eigenvalue of the second moments: enough for directions that the text never visited, too little to
# be seen in the others.
_RIDGE = 1e-4


def _ratio_of_means(mean_abs: Tensor, span: Span) -> Tensor:
    """Mean over the windows of (mean over tokens |x_end|) / (mean over tokens |x_start|), per channel, float64 [d].

    ``mean_abs`` is [samples, L+1, d]. LinearPatch (arXiv 2505.24680), eq. 5, as its public code computes it: the ratio is
    taken in every window and the ratios are averaged.
    """
    after, before = mean_abs[:, span.end].double(), mean_abs[:, span.start].double()
    return (after / before).mean(dim=0)


def fit_linearpatch(statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL) -> HadamardPatch:
    """The paper's P = H diag(s) H^T, s the ratio of mean magnitudes in the Hadamard domain (arXiv 2505.24680, section 3.2)."""
    patch = HadamardPatch(statistics.width)
    return _filled(patch, scale=_ratio_of_means(statistics.hadamard_mean_abs[positions], span))


def fit_diagonal(statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL) -> HadamardPatch:
    """P = diag(s), the paper's ablation without H: the same ratio per channel of the residual stream itself.

    It is a Hadamard patch with the scale 1 and ``post_scale`` s, since H H^T = I.
    """
    patch = HadamardPatch(statistics.width, post_scale=True)
    scale = _ratio_of_means(statistics.mean_abs[positions], span)
    return _filled(patch, scale=torch.ones_like(scale), post_scale=scale)


def fit_scalar(statistics: CalibrationStatistics, span: Span, positions: Positions = Positions.ALL) -> HadamardPatch:
    """P = s I, s the ratio of the magnitudes averaged over the channels as well."""
    mean = statistics.mean_abs[positions].double().mean(dim=-1, keepdim=True)
    patch = HadamardPatch(statistics.width)
    return _filled(patch, scale=_ratio_of_means(mean, span).expand(statistics.width))


def fit_least_squares(statistics: CalibrationStatistics, span: Span) -> DensePatch:
    """The dense P [d, d] that minimises sum_t |x_start P - x_end|^2 / |x_end|^2, lightly held to the identity."""
    return _filled(DensePatch(statistics.width), weight=_regression(_moments(statistics, span)))


def fit_low_rank(statistics: CalibrationStatistics, span: Span, rank: int = DEFAULT_RANK) -> LowRankPatch:
    """P = I + down up of rank r by reduced-rank regression (Izenman 1975) of what the identity leaves unexplained."""
    moments = _moments(statistics, span)
    width = statistics.width
    down, up = _reduced_rank(moments, torch.eye(width, dtype=torch.float64), _checked_rank(rank, width))
    return _filled(LowRankPatch(width, rank), down=down, up=up)


def fit_hadamard_low_rank(statistics: CalibrationStatistics, span: Span, rank: int = DEFAULT_RANK) -> HadamardPatch:
    """P = H diag(s) H^T + down up: s by least squares in the Hadamard domain, then reduced-rank regression of the rest."""
    moments = _moments(statistics, span)
    width = statistics.width
    variance, covariance = (_rotated(second).diagonal() for second in (_ridged(moments.xx), moments.xy))
    ridge = _ridge(moments.xx)
    scale = (covariance + ridge) / variance
    base = hadamard_transform(torch.diag(scale), inverse=True)
    base = hadamard_transform(base.mT, inverse=True).mT
    down, up = _reduced_rank(moments, base, _checked_rank(rank, width))
    return _filled(HadamardPatch(width, rank=rank), scale=scale, down=down, up=up)


Fit = Callable[[CalibrationStatistics, Span, int], "nn.Module | None"]

FITS: Mapping[str, Fit] = {
    "none": lambda _statistics, _span, _rank: None,
    "scalar": lambda statistics, span, _rank: fit_scalar(statistics, span),
    "diagonal": lambda statistics, span, _rank: fit_diagonal(statistics, span),
    "linearpatch": lambda statistics, span, _rank: fit_linearpatch(statistics, span),
    "low-rank": fit_low_rank,
    "hadamard-low-rank": fit_hadamard_low_rank,
    "least-squares": lambda statistics, span, _rank: fit_least_squares(statistics, span),
}
"""Name -> fit(statistics, span, rank). A new fit is one entry; ``auto`` chooses among all of them."""

NEEDS_MOMENTS = frozenset({"low-rank", "hadamard-low-rank", "least-squares"})
"""The fits that need ``statistics.moments[span]``."""


def fit_patch(
    statistics: CalibrationStatistics, span: Span, fit: str, *, rank: int = DEFAULT_RANK
) -> nn.Module | None:
    """The patch of one joint (None for ``none``), its parameters float32.

    Raises:
        InputError: an unknown fit, a rank that does not fit the width, moments that were not collected.
    """
    if fit not in FITS:
        raise InputError(f"no fit is called {fit!r}: choose one of {', '.join(FITS)}, auto")
    patch = FITS[fit](statistics, span, rank)
    for name, parameter in patch.named_parameters() if patch is not None else ():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"the fit {fit} of {span} gave a value that is not finite ({name}): "
                "a channel is silent on the calibration text, so give more text or another fit"
            )
    return patch


def _filled(patch: nn.Module, **values: Tensor) -> nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            patch.get_parameter(name).copy_(value)
    return patch


def _moments(statistics: CalibrationStatistics, span: Span) -> Moments:
    if span not in statistics.moments:
        raise InputError(f"the second moments of {span} were not collected: calibrate with moments=[Span{tuple(span)}]")
    return statistics.moments[span]


def _checked_rank(rank: int, width: int) -> int:
    if not 1 <= rank <= width:
        raise InputError(f"a patch of rank {rank} does not fit a width of {width}: give --rank 1 to {width}")
    return rank


def _ridge(xx: Tensor) -> float:
    return _RIDGE * float(xx.diagonal().mean())


def _ridged(xx: Tensor) -> Tensor:
    return xx + _ridge(xx) * torch.eye(len(xx), dtype=xx.dtype)


def _regression(moments: Moments) -> Tensor:
    """argmin_P sum_t w_t |x_a P - x_b|^2 + ridge |P - I|^2, float64 [d, d]: text the moments never saw keeps its state."""
    ridge = _ridge(moments.xx)
    target = moments.xy + ridge * torch.eye(len(moments.xy), dtype=torch.float64)
    return torch.cholesky_solve(target, torch.linalg.cholesky(_ridged(moments.xx)))


def _reduced_rank(moments: Moments, base: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [d, r], up [r, d] that minimise the same sum for P = base + down up.

    With M the full regression of the residual x_b - x_a base, the best M of rank r is M V V^T, V the r leading right
    singular vectors of C^(1/2) M, C the (ridged) moments of x_a: an eigenproblem of M^T C M.
    """
    full = _regression(moments) - base
    spread = full.mT @ _ridged(moments.xx) @ full
    leading = torch.linalg.eigh((spread + spread.mT) / 2).eigenvectors[:, -rank:].flip(1)
    down, up = full @ leading, leading.mT
    # The same norm on both sides, so that a later training step or a cast to bfloat16 treats them alike.
    balance = (down.norm(dim=0).clamp_min(1e-12)).sqrt()
    return down / balance, up * balance.unsqueeze(1)


def _rotated(second: Tensor) -> Tensor:
    """H^T C H for a [d, d] matrix C."""
    return hadamard_transform(hadamard_transform(second).mT).mT
