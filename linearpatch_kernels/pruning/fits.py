"""The fits: ways to find the map that heals a joint, in closed form from the statistics of one calibration pass.

All look for a map of x_before that is about x_after, most of them for a matrix P. They differ in the form of the map
(what it costs to run) and in what "about" means;
:mod:`~linearpatch_kernels.pruning.closed_forms` has the formulas. A new fit is one record: ``FITS.add(Fit(...))``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.records import Registry, deferred

if TYPE_CHECKING:
    from torch import Tensor

    from linearpatch_kernels.calibration import JointStatistics
    from linearpatch_kernels.nn import Patch

AUTO = "auto"
"""The name that stands for the best of all candidates (:func:`~linearpatch_kernels.pruning.selection.choose_fit`)."""

DEFAULT_RANK = 64
# A least-squares map has d unknowns for every channel that leaves it, whatever the rank it is then cut down to. On
# SmolLM2-135M (d = 576, 6 of 30 layers dropped, rank 64) the low-rank map wins back 38 % of the loss on d / 4 tokens,
# 27 % on d (the plain least squares 7 %), 55 % on 2 d, 62 % on 4 d and 65 % on 8 d.
_TOKENS_PER_UNKNOWN = 4


@dataclasses.dataclass(frozen=True)
class Fit:
    """One way to find the map at a joint.

    Attributes:
        name: what ``--fit`` takes; about: one line of help.
        source: paper and equation, or whose it is.
        form: the map that it gives, as a formula; s [d] is a scale, down [d, r] and up [r, d] a low-rank term.
        function: of a joint's statistics and the rank, the patch in float32, or None for plain removal.
        needs_moments: whether it asks for the joint's second moments, which take a pass of their own.
        needs_normed_moments: whether it asks for those of the normed stream, which come with them.
        takes_rank: whether the rank means anything to it.
        structured: not a dense d x d map; ``--structured`` leaves the others out.
        automatic: whether ``auto`` tries it.
    """

    name: str
    about: str
    source: str
    form: str
    function: Callable[[JointStatistics, int], Patch | None]
    needs_moments: bool = False
    needs_normed_moments: bool = False
    takes_rank: bool = False
    structured: bool = True
    automatic: bool = True


def _closed_form(name: str) -> Callable[[JointStatistics, int], Patch | None]:
    return deferred(f"linearpatch_kernels.pruning.closed_forms:{name}")


FITS: Registry[Fit] = Registry(
    "fit",
    (
        Fit("none", "plain removal", "ShortGPT, arXiv 2403.03853", "none", lambda _joint, _rank: None),
        Fit("scalar", "one ratio of mean magnitudes", "ours", "s I", _closed_form("scalar")),
        Fit(
            "diagonal",
            "a ratio per channel",
            "LinearPatch, arXiv 2505.24680, the ablation without H",
            "diag(s)",
            _closed_form("diagonal"),
        ),
        Fit(
            "linearpatch",
            "the paper's: a ratio per channel of the Hadamard domain",
            "LinearPatch, arXiv 2505.24680, section 3.2 and eq. 5, as in its code",
            "H diag(s) Hᵀ",
            _closed_form("linearpatch"),
        ),
        Fit(
            "low-rank",
            "reduced-rank regression",
            "Izenman 1975, every token normalised",
            "I + down up",
            _closed_form("low_rank"),
            needs_moments=True,
            takes_rank=True,
        ),
        Fit(
            "hadamard-low-rank",
            "reduced-rank regression beside a fitted diagonal of the Hadamard domain",
            "ours",
            "H diag(s) Hᵀ + down up",
            _closed_form("hadamard_low_rank"),
            needs_moments=True,
            takes_rank=True,
        ),
        Fit(
            "shrunk-low-rank",
            "three quarters of the way to low-rank",
            "ours, `python -m benchmarks.studies.shrinkage`",
            "I + ¾ down up",
            _closed_form("shrunk_low_rank"),
            needs_moments=True,
            takes_rank=True,
        ),
        Fit(
            "least-squares",
            "a dense d x d map",
            "least squares, every token normalised",
            "P",
            _closed_form("least_squares"),
            needs_moments=True,
            structured=False,
        ),
        Fit(
            "shrunk-least-squares",
            "three quarters of the way to least-squares",
            "ours, `python -m benchmarks.studies.shrinkage`",
            "I + ¾ (P - I)",
            _closed_form("shrunk_least_squares"),
            needs_moments=True,
            structured=False,
        ),
        # `auto` leaves these out: what it chose before they were there, it chooses now.
        Fit(
            "norm-least-squares",
            "a dense d x d map of the normed stream, three quarters of the way; not in auto",
            "least squares, every token normalised; as a layer Puzzle, arXiv 2411.19146",
            "x + ¾ RMSNorm(x) M",
            _closed_form("norm_least_squares"),
            needs_moments=True,
            needs_normed_moments=True,
            structured=False,
            automatic=False,
        ),
        Fit(
            "norm-low-rank",
            "reduced-rank regression on the normed stream, three quarters of the way; not in auto",
            "Izenman 1975, every token normalised",
            "x + ¾ RMSNorm(x) down up",
            _closed_form("norm_low_rank"),
            needs_moments=True,
            needs_normed_moments=True,
            takes_rank=True,
            automatic=False,
        ),
        Fit(
            "norm-hadamard",
            "norm-low-rank beside a diagonal of the Hadamard domain; not in auto",
            "ours",
            "x + ¾ RMSNorm(x) (H diag(s) Hᵀ + down up)",
            _closed_form("norm_hadamard"),
            needs_moments=True,
            needs_normed_moments=True,
            takes_rank=True,
            automatic=False,
        ),
    ),
)


class UnusableFit(InputError):
    """A fit that the calibration text does not allow, where another one may be fine."""


def fits_of(name: str, *, structured: bool = False) -> list[Fit]:
    """What a name asks for: the fit itself; of ``auto``, the candidates, without dense maps where ``structured``.

    Raises:
        InputError: an unknown name, or a dense map where ``structured``.
    """
    if name == AUTO:
        return [fit for fit in FITS.values() if fit.automatic and (fit.structured or not structured)]
    fit = FITS.named(name, also=(AUTO,))
    if structured and not fit.structured:
        raise InputError(f"`structured` leaves dense maps out and `fit` {name} is one: give one of the two")
    return [fit]


def needs_moments(name: str) -> bool:
    """Whether a fit, or what ``auto`` tries, needs a pass for second moments. InputError for an unknown name."""
    return any(fit.needs_moments for fit in fits_of(name))


def needs_normed_moments(name: str) -> bool:
    """Whether one of these needs the moments of the normed stream, too. InputError for an unknown name."""
    return any(fit.needs_normed_moments for fit in fits_of(name))


def takes_rank(name: str) -> bool:
    """Whether a rank means anything to a fit, or to what ``auto`` tries. InputError for an unknown name."""
    return any(fit.takes_rank for fit in fits_of(name))


def too_little_text(fits: Sequence[str], width: int, windows: Tensor, *, instead: str = "") -> str | None:
    """A sentence about those of ``fits`` that have too many unknowns for the tokens of ``windows`` [W, T], or None.

    Such a fit can be made, since it is held to the identity, but may do worse than plain removal on any other text.
    ``auto`` is none of them: it chooses on other text.

    Args:
        instead: what else would do, for the sentence.
    """
    count, length = windows.shape
    hungry = [fit for fit in fits if fit != AUTO and needs_moments(fit)]
    if not hungry or count * length >= _TOKENS_PER_UNKNOWN * width:
        return None
    return (
        f"{count} windows of {length} tokens are little text for {', '.join(hungry)} and {width} unknowns per channel: "
        f"on other text that may do worse than plain removal; {math.ceil(_TOKENS_PER_UNKNOWN * width / length)} "
        f"windows would do (`samples`){f', or {instead}' if instead else ''}"
    )


def checked_rank(rank: int, width: int) -> int:
    """The rank, or an InputError if no d x d matrix has it."""
    if not 1 <= rank <= width:
        raise InputError(f"a patch of rank {rank} does not fit a width of {width}: give `rank` 1 to {width}")
    return rank


def fit_patch(joint: JointStatistics, name: str, *, rank: int = DEFAULT_RANK) -> Patch | None:
    """The patch of one joint (None for ``none``), its parameters float32.

    Raises:
        InputError: an unknown fit, a rank that does not fit the width, moments that were not collected.
        UnusableFit: values that are not finite, or equations without a solution.
    """
    # Here, so that help texts are made of the records without torch.
    import torch

    from linearpatch_kernels.torch_state import own_state

    fit = FITS.named(name, also=(AUTO,))
    if fit.takes_rank:
        checked_rank(rank, joint.width)
    try:
        with own_state():
            patch = fit.function(joint, rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # documented, but not in its __all__
        raise UnusableFit(
            f"the fit {name} of {joint.name} has no solution: the stream there is zero or too large on the calibration "
            "text, so give other text or another fit"
        ) from error
    for parameter, value in patch.named_parameters() if patch is not None else ():
        if not bool(torch.isfinite(value).all()):
            raise UnusableFit(
                f"the fit {name} of {joint.name} gave a value that is not finite ({parameter}): "
                "a channel is silent on the calibration text, so give more text or another fit"
            )
    return patch
