"""Every fit against an independent few lines of float64 on hooked states."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics, JointStatistics, Span, calibrate
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.modeling.families import norm_eps
from linearpatch_kernels.nn import DensePatch, HadamardPatch, LowRankPatch, NormLinearPatch, Patch
from linearpatch_kernels.pruning import closed_forms
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.closed_forms import shrunk
from linearpatch_kernels.pruning.fits import (
    AUTO,
    FITS,
    fit_patch,
    fits_of,
    needs_moments,
    needs_normed_moments,
    takes_rank,
)
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.tiny import tiny_model

WIDTH = 48
RANKS = [1, 5, 20]
IDENTITY = torch.eye(WIDTH, dtype=torch.float64)
spans = pytest.mark.parametrize("span", [Span(2, 4), Span(1, 2), Span(4, 6)], ids=str)


@pytest.fixture(scope="module")
def states(
    dense: PreTrainedModel, windows: Tensor, hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]
) -> Tensor:
    """[W, T, L+1, d], float64."""
    return torch.cat([hooked_states(dense, batch) for batch in windows.split(3)])


def fitted(joint: JointStatistics, name: str, rank: int = 8) -> Patch:
    patch = fit_patch(joint, name, rank=rank)
    assert patch is not None
    return patch


# --- fits of magnitudes ----------------------------------------------------------------------------------------------


def transcribed_scale(before: Tensor, after: Tensor) -> Tensor:
    """Per sample mean over tokens of |x_end| over mean over tokens of |x_start|, averaged over the samples: [d]."""
    scales = [y.abs().mean(dim=0) / x.abs().mean(dim=0) for x, y in zip(before, after, strict=True)]
    return torch.stack(scales).mean(dim=0)


def transcribed_scalar(before: Tensor, after: Tensor) -> Tensor:
    return torch.stack([y.abs().mean() / x.abs().mean() for x, y in zip(before, after, strict=True)]).mean()


@spans
def test_linearpatch_is_the_papers_formula(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    hadamard = hadamard_matrix(WIDTH)
    before, after = states[:, :, span.start], states[:, :, span.end]
    transcribed = hadamard @ torch.diag(transcribed_scale(before @ hadamard, after @ hadamard)) @ hadamard.T

    patch = fit_patch(statistics.at(span), "linearpatch")
    assert isinstance(patch, HadamardPatch)
    assert patch.scale.dtype == torch.float32
    torch.testing.assert_close(patch.to_dense(), transcribed, rtol=1e-5, atol=1e-5)
    # The authors' way to run it: P materialised in float32, a dense product.
    x = before.float() / before.norm(dim=-1, keepdim=True).float()
    with torch.no_grad():
        torch.testing.assert_close(patch(x), x @ transcribed.float(), rtol=1e-5, atol=1e-5)


def test_the_scale_is_a_mean_of_ratios_and_no_ratio_of_means(states: Tensor) -> None:
    """What the other tests need in order to tell the two apart."""
    before, after = states[:, :, 2], states[:, :, 4]
    ratio_of_means = after.abs().mean(dim=(0, 1)) / before.abs().mean(dim=(0, 1))
    assert (ratio_of_means - transcribed_scale(before, after)).abs().max() > 0.05


@spans
def test_diagonal(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    expected = torch.diag(transcribed_scale(states[:, :, span.start], states[:, :, span.end]))
    patch = fit_patch(statistics.at(span), "diagonal")
    assert patch is not None
    torch.testing.assert_close(patch.to_dense(), expected, rtol=1e-5, atol=1e-5)


@spans
def test_scalar(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    expected = transcribed_scalar(states[:, :, span.start], states[:, :, span.end]) * IDENTITY
    patch = fit_patch(statistics.at(span), "scalar")
    assert patch is not None
    torch.testing.assert_close(patch.to_dense(), expected, rtol=1e-5, atol=1e-5)


# --- fits of moments -------------------------------------------------------------------------------------------------


class WeightedRows:
    """The least-squares problem itself: rows divided by |x_end|, and below them the ridge that holds P to I."""

    def __init__(self, states: Tensor, span: Span) -> None:
        before, after = states[:, :, span.start].flatten(0, 1), states[:, :, span.end].flatten(0, 1)
        norm = after.norm(dim=-1, keepdim=True)
        ridge = 1e-4 * (before / norm).square().sum(dim=0).mean()
        self.left = torch.cat([before / norm, ridge.sqrt() * IDENTITY])
        self.right = torch.cat([after / norm, ridge.sqrt() * IDENTITY])

    def loss(self, patch: Tensor) -> float:
        return float((self.left @ patch - self.right).square().sum())

    def best(self) -> Tensor:
        return torch.linalg.lstsq(self.left, self.right).solution

    def best_of_rank(self, base: Tensor, rank: int) -> tuple[Tensor, float]:
        """The best P = base + (rank r), and its loss: whiten the rows, cut the singular values, un-whiten."""
        orthonormal, whitener = torch.linalg.qr(self.left)
        left, values, right = torch.linalg.svd(orthonormal.T @ (self.right - self.left @ base))
        cut = left[:, :rank] * values[:rank] @ right[:rank]
        best = base + torch.linalg.solve_triangular(whitener, cut, upper=True)
        return best, self.loss(self.best()) + float(values[rank:].square().sum())


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """float32 products in the moments, and the ridge that bounds what the solve makes of their rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@spans
def test_least_squares(statistics: CalibrationStatistics, states: Tensor, span: Span) -> None:
    rows = WeightedRows(states, span)
    patch = fit_patch(statistics.at(span), "least-squares")
    assert isinstance(patch, DensePatch)
    assert_near(patch.to_dense(), rows.best())
    assert rows.loss(patch.to_dense()) == pytest.approx(rows.loss(rows.best()), rel=1e-5)
    assert rows.loss(patch.to_dense()) < 0.9 * rows.loss(IDENTITY)


def test_directions_that_the_text_never_visits_stay_as_they_are(
    dense: PreTrainedModel, windows: Tensor, hooked_states: Callable[[PreTrainedModel, Tensor], Tensor]
) -> None:
    """Fewer tokens than channels."""
    span, few = Span(2, 4), windows[:1, :20]
    statistics, rows = calibrate(dense, [few], moments=[span]), hooked_states(dense, few)[0, :, span.start]
    unvisited = torch.linalg.svd(rows).Vh[20:]
    for patch in (fitted(statistics.at(span), "least-squares"), fitted(statistics.at(span), "low-rank", 20)):
        torch.testing.assert_close(unvisited @ patch.to_dense(), unvisited, rtol=0, atol=1e-2)
        assert (rows @ patch.to_dense() - rows).abs().max() > 0.1


@spans
@pytest.mark.parametrize("rank", RANKS)
def test_low_rank_is_the_optimum_of_its_rank(
    statistics: CalibrationStatistics, states: Tensor, span: Span, rank: int
) -> None:
    rows = WeightedRows(states, span)
    best, least = rows.best_of_rank(IDENTITY, rank)
    assert rows.loss(best) == pytest.approx(least, rel=1e-8)
    patch = fit_patch(statistics.at(span), "low-rank", rank=rank)
    assert isinstance(patch, LowRankPatch)
    assert (patch.rank, patch.down.shape, patch.up.shape) == (rank, (WIDTH, rank), (rank, WIDTH))
    assert rows.loss(patch.to_dense()) == pytest.approx(least, rel=1e-5)
    assert_near(patch.to_dense(), best)
    torch.testing.assert_close(patch.down.norm(dim=0), patch.up.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_more_rank_is_better_up_to_least_squares(statistics: CalibrationStatistics, states: Tensor) -> None:
    span = Span(2, 4)
    rows = WeightedRows(states, span)
    losses = [rows.loss(fitted(statistics.at(span), "low-rank", rank).to_dense()) for rank in range(1, WIDTH + 1)]
    assert all(more < less for less, more in pairwise([rows.loss(IDENTITY), *losses[:20]]))
    assert all(more <= less * (1 + 1e-6) for less, more in pairwise(losses))
    assert losses[-1] == pytest.approx(rows.loss(rows.best()), rel=1e-5)
    assert_near(
        fitted(statistics.at(span), "low-rank", WIDTH).to_dense(),
        fitted(statistics.at(span), "least-squares").to_dense(),
    )


@spans
@pytest.mark.parametrize("rank", RANKS)
def test_hadamard_low_rank_is_one_turn_of_alternating_least_squares(
    statistics: CalibrationStatistics, states: Tensor, span: Span, rank: int
) -> None:
    rows, hadamard = WeightedRows(states, span), hadamard_matrix(WIDTH)
    start = rows.best_of_rank(IDENTITY, rank)[0]
    # The best s for that low-rank term, as a regression with one column per channel of the Hadamard domain.
    columns = torch.einsum("nd,dk,ek->nek", rows.left, hadamard, hadamard)
    rest = rows.right - rows.left @ (start - IDENTITY)
    scale = torch.linalg.lstsq(columns.flatten(0, 1), rest.flatten().unsqueeze(1)).solution.squeeze(1)
    best, least = rows.best_of_rank(hadamard @ torch.diag(scale) @ hadamard.T, rank)

    patch = fit_patch(statistics.at(span), "hadamard-low-rank", rank=rank)
    assert isinstance(patch, HadamardPatch)
    assert patch.rank == rank
    torch.testing.assert_close(patch.scale.detach().double(), scale, rtol=1e-3, atol=1e-3)
    assert_near(patch.to_dense(), best)
    loss = rows.loss(patch.to_dense())
    assert loss == pytest.approx(least, rel=1e-5)
    assert loss <= rows.loss(fitted(statistics.at(span), "low-rank", rank).to_dense())


@pytest.mark.parametrize("name", ["low-rank", "least-squares"])
def test_shrunk_maps_go_three_quarters_of_the_way(statistics: CalibrationStatistics, name: str) -> None:
    span = Span(2, 4)
    full, kept = (fit_patch(statistics.at(span), fit, rank=5) for fit in (name, f"shrunk-{name}"))
    assert full is not None
    assert kept is not None
    assert type(kept) is type(full)
    expected = IDENTITY + 0.75 * (full.to_dense() - IDENTITY)
    torch.testing.assert_close(kept.to_dense(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_shrinking_makes_a_new_patch(statistics: CalibrationStatistics, kept: float) -> None:
    for patch in (fitted(statistics.at(Span(2, 4)), name, 5) for name in ("low-rank", "least-squares")):
        assert isinstance(patch, DensePatch | LowRankPatch)
        before = copy.deepcopy(patch.state_dict())
        expected = IDENTITY + kept * (patch.to_dense() - IDENTITY)
        torch.testing.assert_close(shrunk(patch, kept).to_dense(), expected, rtol=1e-6, atol=1e-6)
        for name, tensor in patch.state_dict().items():
            assert torch.equal(tensor, before[name])


# --- fits of the normed stream ---------------------------------------------------------------------------------------


class NormedRows:
    """The least-squares problem of M: normed rows and what the stream gains, divided by |x_end|; a ridge that holds M
    to zero."""

    def __init__(self, states: Tensor, span: Span, eps: float) -> None:
        before, after = states[:, :, span.start].flatten(0, 1), states[:, :, span.end].flatten(0, 1)
        norm = after.norm(dim=-1, keepdim=True)
        rows = before / (before.square().mean(-1, keepdim=True) + eps).sqrt() / norm
        ridge = 1e-4 * rows.square().sum(dim=0).mean()
        self.left = torch.cat([rows, ridge.sqrt() * IDENTITY])
        self.right = torch.cat([(after - before) / norm, torch.zeros_like(IDENTITY)])

    def loss(self, matrix: Tensor) -> float:
        return float((self.left @ matrix - self.right).square().sum())

    def best(self) -> Tensor:
        return torch.linalg.lstsq(self.left, self.right).solution

    def least_of_rank(self, rank: int) -> float:
        """Whiten the rows, cut the singular values."""
        orthonormal = torch.linalg.qr(self.left)[0]
        return self.loss(self.best()) + float(torch.linalg.svdvals(orthonormal.T @ self.right)[rank:].square().sum())


def normed_fit(joint: JointStatistics, name: str, rank: int = 8, **options: float) -> NormLinearPatch:
    """Of the function itself, so that a test may keep the whole of M."""
    found: NormLinearPatch = getattr(closed_forms, name)(joint, rank, **options)
    return found


@spans
def test_norm_least_squares(
    dense: PreTrainedModel, statistics: CalibrationStatistics, states: Tensor, span: Span
) -> None:
    rows, joint = NormedRows(states, span, norm_eps(dense)), statistics.at(span)
    whole = normed_fit(joint, "norm_least_squares", kept=1.0).normed_matrix()
    assert_near(whole, rows.best())
    assert rows.loss(whole) == pytest.approx(rows.loss(rows.best()), rel=1e-5)
    patch = fit_patch(joint, "norm-least-squares")
    assert isinstance(patch, NormLinearPatch)
    assert patch.eps == norm_eps(dense)
    torch.testing.assert_close(patch.normed_matrix(), 0.75 * whole, rtol=1e-6, atol=1e-6)
    assert rows.loss(patch.normed_matrix()) < 0.95 * rows.loss(torch.zeros_like(whole))


@spans
@pytest.mark.parametrize("rank", RANKS)
def test_norm_low_rank_is_the_optimum_of_its_rank(
    dense: PreTrainedModel, statistics: CalibrationStatistics, states: Tensor, span: Span, rank: int
) -> None:
    rows, joint = NormedRows(states, span, norm_eps(dense)), statistics.at(span)
    whole = normed_fit(joint, "norm_low_rank", rank, kept=1.0)
    assert (whole.rank, whole.hadamard) == (rank, False)
    assert rows.loss(whole.normed_matrix()) == pytest.approx(rows.least_of_rank(rank), rel=1e-5)
    patch = fit_patch(joint, "norm-low-rank", rank=rank)
    assert isinstance(patch, NormLinearPatch)
    torch.testing.assert_close(patch.normed_matrix(), 0.75 * whole.normed_matrix(), rtol=1e-4, atol=1e-5)


@spans
@pytest.mark.parametrize("rank", RANKS)
def test_norm_hadamard_is_stationary_and_better_than_low_rank_alone(
    dense: PreTrainedModel, statistics: CalibrationStatistics, states: Tensor, span: Span, rank: int
) -> None:
    rows, joint = NormedRows(states, span, norm_eps(dense)), statistics.at(span)
    whole = normed_fit(joint, "norm_hadamard", rank, kept=1.0)
    assert (whole.rank, whole.hadamard) == (rank, True)
    least = rows.loss(whole.normed_matrix())
    assert least <= rows.least_of_rank(rank) * (1 + 1e-4)
    # No better s for its low-rank term, which the scale of a regression in the Hadamard domain says.
    hadamard = hadamard_matrix(WIDTH)
    assert whole.down is not None
    assert whole.up is not None
    assert whole.scale is not None
    rest = rows.right - rows.left @ (whole.down.double() @ whole.up.double()).detach()
    columns = torch.einsum("nd,dk,ek->nek", rows.left, hadamard, hadamard).flatten(0, 1)
    scale = torch.linalg.lstsq(columns, rest.flatten().unsqueeze(1)).solution.squeeze(1)
    assert_near(whole.scale.detach().double(), scale)
    patch = fit_patch(joint, "norm-hadamard", rank=rank)
    assert isinstance(patch, NormLinearPatch)
    kept = rows.loss(patch.normed_matrix())
    assert kept == pytest.approx(rows.loss(0.75 * whole.normed_matrix()), rel=1e-3)


@pytest.mark.parametrize(("name", "rank"), [("norm_least_squares", 1), ("norm_low_rank", 24), ("norm_hadamard", 24)])
@torch.no_grad()
def test_layers_that_write_a_linear_function_of_the_normed_stream_are_restored(name: str, rank: int) -> None:
    """A window of one token makes the attention such a function, of rank 24 here; and the feed-forward part is off."""
    model = tiny_model("mistral", sliding_window=1, rms_norm_eps=1e-3)
    for layer in (2, 3):
        model.model.layers[layer].mlp.down_proj.weight.zero_()
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    windows = torch.randint(3, 97, (30, 40), generator=torch.Generator().manual_seed(0))
    span = Span(2, 4)
    joint = calibrate(model, windows.split(10), moments=[span], normed=True).at(span)
    wanted = model(windows[:2]).logits
    removed, healed = (
        apply_plan(model, PrunePlan(6, (Joint(span, patch, name),)))(windows[:2]).logits
        for patch in (None, normed_fit(joint, name, rank, kept=1.0))
    )
    assert (removed - wanted).abs().max() > 0.1 * wanted.abs().max()
    assert (healed - wanted).abs().max() < 1e-3 * wanted.abs().max()


# --- names and bad input ---------------------------------------------------------------------------------------------


def test_every_fit_by_its_name(statistics: CalibrationStatistics) -> None:
    for name in FITS:
        patch = fit_patch(statistics.at(Span(2, 4)), name, rank=4)
        assert (patch is None) == (name == "none")
        # A matrix of d x d numbers, as the parameter of that size tells.
        whole = patch is not None and any(one.shape == (WIDTH, WIDTH) for one in patch.parameters())
        assert whole == (not FITS[name].structured)
        assert isinstance(patch, NormLinearPatch) == needs_normed_moments(name)
        if patch is not None:
            assert all(parameter.dtype == torch.float32 for parameter in patch.parameters())


@pytest.mark.parametrize("name", FITS)
def test_which_fits_need_moments(statistics: CalibrationStatistics, name: str) -> None:
    assert needs_moments(name) == FITS[name].needs_moments
    if not FITS[name].needs_moments:
        fit_patch(statistics.at(Span(1, 5)), name)
        return
    with pytest.raises(InputError, match=r"the second moments of 1:5 were not collected: calibrate with moments="):
        fit_patch(statistics.at(Span(1, 5)), name, rank=4)
    if FITS[name].needs_normed_moments:
        joint = statistics.at(Span(2, 4))
        bare = dataclasses.replace(joint, moments=dataclasses.replace(joint.collected_moments(), normed=None))
        wanted = "the second moments of the normed stream of 2:4 were not collected: calibrate with normed=True"
        with pytest.raises(InputError, match=wanted):
            fit_patch(bare, name, rank=4)


@pytest.mark.parametrize("rank", [-1, 0, WIDTH + 1])
@pytest.mark.parametrize("fit", [name for name in FITS if takes_rank(name)])
def test_ranks_that_do_not_fit(statistics: CalibrationStatistics, fit: str, rank: int) -> None:
    with pytest.raises(InputError, match=f"a patch of rank {rank} does not fit a width of 48: give `rank` 1 to 48"):
        fit_patch(statistics.at(Span(2, 4)), fit, rank=rank)


@pytest.mark.parametrize("name", [name for name in FITS if not takes_rank(name)])
def test_fits_without_a_rank_take_any(statistics: CalibrationStatistics, name: str) -> None:
    fit_patch(statistics.at(Span(2, 4)), name, rank=WIDTH + 1)


def test_what_a_name_asks_for() -> None:
    own = {"norm-least-squares", "norm-low-rank", "norm-hadamard"}
    assert [fit.name for fit in fits_of(AUTO)] == [name for name in FITS if name not in own]
    assert {fit.name for fit in fits_of(AUTO, structured=True)} == FITS.keys() - own - {
        "least-squares",
        "shrunk-least-squares",
    }
    assert fits_of("low-rank", structured=True) == [FITS["low-rank"]]
    assert needs_moments(AUTO)
    assert not needs_normed_moments(AUTO)
    assert takes_rank(AUTO)
    assert not needs_moments("linearpatch")
    assert not takes_rank("linearpatch")
    with pytest.raises(InputError, match="`structured` leaves dense maps out and `fit` least-squares is one"):
        fits_of("least-squares", structured=True)
    for asking in (fits_of, needs_moments, needs_normed_moments, takes_rank):
        with pytest.raises(InputError, match=r"no fit is called 'magic': choose one of none, .*, auto"):
            asking("magic")


def test_an_unknown_fit(statistics: CalibrationStatistics) -> None:
    with pytest.raises(InputError, match=r"no fit is called 'magic': choose one of none, scalar, .*, auto"):
        fit_patch(statistics.at(Span(2, 4)), "magic")


def test_a_silent_channel_is_refused_by_the_fits_that_divide_by_it(windows: Tensor) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 11] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[11] = 0
            layer.mlp.down_proj.weight[11] = 0
    statistics = calibrate(model, [windows], moments=[Span(2, 4)], normed=True)
    assert statistics.mean_abs[..., 11].abs().max() == 0
    with pytest.raises(InputError, match="the fit diagonal of 2:4 gave a value that is not finite") as caught:
        fit_patch(statistics.at(Span(2, 4)), "diagonal")
    assert "\n" not in str(caught.value)
    for name in FITS.keys() - {"diagonal", "none"}:
        patch = fit_patch(statistics.at(Span(2, 4)), name, rank=4)
        assert patch is not None
        assert all(bool(parameter.isfinite().all()) for parameter in patch.parameters())
