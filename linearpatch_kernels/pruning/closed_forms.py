"""The formulas of the fits (:data:`~linearpatch_kernels.pruning.fits.FITS`): a joint's statistics to a patch.

``scalar``, ``diagonal`` and ``linearpatch`` match mean magnitudes (the paper's way), ``least_squares`` and ``low_rank``
minimise sum_t |x_before P - x_after|^2 / |x_after|^2 over the calibration tokens, and ``shrunk_...`` go part of that
way. ``norm_...`` minimise the same for x_before + RMSNorm(x_before) M, and go part of the way.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor

from linearpatch_kernels.calibration import JointStatistics, Moments
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.nn import (
    DensePatch,
    DiagonalPatch,
    HadamardPatch,
    LowRankPatch,
    NormLinearPatch,
    Patch,
    nearest_low_rank,
)

PatchT = TypeVar("PatchT", bound=Patch)

# Relative to the mean eigenvalue of the second moments: enough for directions that the text never visited, too little
# to be seen in the others.
_RIDGE = 1e-4
# `python -m benchmarks.studies.shrinkage`: on SmolLM2-135M the held-out loss is lowest between 0.75 and 0.85 on text
# that was calibrated on, and around 0.6 on another.
SHRINKAGE = 0.75


def _ratio_of_means(before: Tensor, after: Tensor) -> Tensor:
    """Mean over the windows of (mean over tokens |x_after|) / (mean over tokens |x_before|), per channel, float64 [d].

    Both are [samples, d]. LinearPatch (arXiv 2505.24680), eq. 5, as its public code computes it: the ratio is taken in
    every window and the ratios are averaged.
    """
    return (after.double() / before.double()).mean(dim=0)


def linearpatch(joint: JointStatistics, _rank: int) -> HadamardPatch:
    """The paper's P = H diag(s) H^T, s the ratio of mean magnitudes in the Hadamard domain (arXiv 2505.24680, 3.2)."""
    scale = _ratio_of_means(joint.hadamard_mean_abs_before, joint.hadamard_mean_abs_after)
    return _filled(HadamardPatch(joint.width), scale=scale)


def diagonal(joint: JointStatistics, _rank: int) -> DiagonalPatch:
    """P = diag(s), the paper's ablation without H: the same ratio per channel of the residual stream itself."""
    return _filled(DiagonalPatch(joint.width), scale=_ratio_of_means(joint.mean_abs_before, joint.mean_abs_after))


def scalar(joint: JointStatistics, _rank: int) -> DiagonalPatch:
    """P = s I, s the ratio of the magnitudes averaged over the channels as well."""
    before, after = (one.double().mean(dim=-1, keepdim=True) for one in (joint.mean_abs_before, joint.mean_abs_after))
    return _filled(DiagonalPatch(joint.width), scale=_ratio_of_means(before, after).expand(joint.width))


def least_squares(joint: JointStatistics, _rank: int) -> DensePatch:
    """The dense P [d, d] that minimises the weighted squares, lightly held to the identity."""
    return _filled(DensePatch(joint.width), weight=_regression(joint.collected_moments()))


def low_rank(joint: JointStatistics, rank: int) -> LowRankPatch:
    """P = I + down up of rank r by reduced-rank regression (Izenman 1975) of what the identity leaves unexplained."""
    identity = torch.eye(joint.width, dtype=torch.float64)
    down, up = _reduced_rank(joint.collected_moments(), identity, rank)
    return _filled(LowRankPatch(joint.width, rank), down=down, up=up)


def hadamard_low_rank(joint: JointStatistics, rank: int) -> HadamardPatch:
    """P = H diag(s) H^T + down up: one turn of alternating least squares from :func:`low_rank` (s = 1) on.

    Given a low-rank term, the best s is the ratio of covariance to variance, per channel of the Hadamard domain, of
    what that term leaves; then the low-rank term is fitted again.
    """
    moments = joint.collected_moments()
    ridged, target = _normal_equations(moments)
    down, up = _reduced_rank(moments, torch.eye(joint.width, dtype=torch.float64), rank)
    scale = _rotated(target - ridged @ down @ up).diagonal() / _rotated(ridged).diagonal()
    down, up = _reduced_rank(moments, _from_hadamard(torch.diag(scale)), rank)
    return _filled(HadamardPatch(joint.width, rank=rank), scale=scale, down=down, up=up)


def shrunk_low_rank(joint: JointStatistics, rank: int) -> DensePatch | LowRankPatch:
    return shrunk(low_rank(joint, rank))


def shrunk_least_squares(joint: JointStatistics, rank: int) -> DensePatch | LowRankPatch:
    return shrunk(least_squares(joint, rank))


def shrunk(patch: DensePatch | LowRankPatch, kept: float = SHRINKAGE) -> DensePatch | LowRankPatch:
    """I + kept (P - I): a least-squares map, taken part of the way back to the identity.

    A map fitted on one text leans towards its means; part of what it does is wrong on any other text.
    """
    if isinstance(patch, LowRankPatch):
        return _filled(copy.deepcopy(patch), up=kept * patch.up)
    identity = torch.eye(patch.dim, dtype=patch.weight.dtype, device=patch.weight.device)
    return _filled(copy.deepcopy(patch), weight=torch.lerp(identity, patch.weight, kept))


def norm_least_squares(joint: JointStatistics, _rank: int, kept: float = SHRINKAGE) -> NormLinearPatch:
    """x + kept RMSNorm(x) M, with the dense M that minimises the weighted squares, lightly held to zero.

    With n_t the normed row: ``M = argmin sum_t |x_after - x_before - n_t M|^2 / |x_after|^2``.
    """
    return _nearest_normed(joint, kept)


def norm_low_rank(joint: JointStatistics, rank: int, kept: float = SHRINKAGE) -> NormLinearPatch:
    """The same with an M of rank r, by reduced-rank regression (Izenman 1975)."""
    return _nearest_normed(joint, kept, rank=rank)


def norm_hadamard(joint: JointStatistics, rank: int, kept: float = SHRINKAGE) -> NormLinearPatch:
    """The same with M = H diag(s) H^T + down up, the nearest to the dense M as the n_t see it."""
    return _nearest_normed(joint, kept, rank=rank, hadamard=True)


def _nearest_normed(joint: JointStatistics, kept: float, rank: int = 0, *, hadamard: bool = False) -> NormLinearPatch:
    moments = joint.collected_normed_moments()
    ridged = moments.nn + _ridge(moments.nn) * torch.eye(joint.width, dtype=torch.float64)
    matrix = torch.cholesky_solve(moments.nr, torch.linalg.cholesky(ridged))
    # What is nearest to a part of M is that part of what is nearest to M.
    return NormLinearPatch.from_dense(
        kept * matrix, rank, hadamard=hadamard, eps=moments.eps, second_moments=ridged if rank else None
    )


def _filled(patch: PatchT, **values: Tensor) -> PatchT:
    with torch.no_grad():
        for name, value in values.items():
            patch.get_parameter(name).copy_(value)
    return patch


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
