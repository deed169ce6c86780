"""Least squares for a change of a map, against torch.linalg and against what it must not do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.healing.least_squares import NormalEquations, RunningSums, choose_ridge


def tokens(count: int, inputs: int = 7, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, inputs, generator=generator) * torch.logspace(-2, 1, inputs)
    return a, torch.randn(count, outputs, generator=generator), torch.rand(count, generator=generator) + 0.1


def summed(
    a: Tensor, r: Tensor, weight: Tensor | None, pieces: int = 3, precision: torch.dtype = torch.float32
) -> NormalEquations:
    sums = RunningSums(a.shape[1], r.shape[1], a.device, precision)
    weights = [None] * pieces if weight is None else weight.chunk(pieces)
    for one, other, w in zip(a.chunk(pieces), r.chunk(pieces), weights, strict=True):
        sums.add(one, other, w)
    return sums.total()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_solution_is_that_of_the_ridged_problem(weighted: bool) -> None:
    a, r, weight = tokens(200)
    found = summed(a, r, weight if weighted else None)
    w = (weight if weighted else torch.ones(200)).double().sqrt()[:, None]
    rows, target = a.double() * w, r.double() * w
    ridge = 0.3
    # The ridge as rows of the least-squares problem itself: sqrt(ridge * sum a_c^2) on the diagonal.
    extra = torch.diag((ridge * rows.square().sum(0)).sqrt())
    wanted = torch.linalg.lstsq(torch.cat([rows, extra]), torch.cat([target, torch.zeros(7, 5).double()])).solution.T
    torch.testing.assert_close(found.solution(ridge), wanted, rtol=1e-4, atol=1e-6)
    change = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    error = float((target - rows @ change.T).square().sum())
    assert found.error_with(change) == pytest.approx(error, rel=1e-5)
    assert found.tokens == 200


def test_sums_of_two_texts_are_those_of_both() -> None:
    a, r, weight = tokens(90)
    both, parts = summed(a, r, weight), summed(a[:40], r[:40], weight[:40]) + summed(a[40:], r[40:], weight[40:])
    torch.testing.assert_close(parts.gram, both.gram, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts.cross, both.cross, rtol=1e-5, atol=1e-7)
    assert (parts.tokens, parts.error) == (90, pytest.approx(both.error))


def test_many_tokens_in_blocks_keep_the_precision_of_their_sum() -> None:
    a, r, _ = tokens(20_000)
    found = summed(a, r, None, pieces=40)
    wanted = a.double().T @ a.double()
    assert float((found.gram - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_noise_is_not_fitted() -> None:
    a, r, _ = tokens(12, seed=1)
    b, s, _ = tokens(500, seed=2)
    choice = choose_ridge(summed(a, r, None), summed(b, s, None), (1e-6, 1e-3))
    assert choice.change is None
    assert choice.ridge is None
    assert choice.after == choice.before


def test_the_ridge_is_the_one_that_other_tokens_prefer_and_part_of_the_change_is_kept() -> None:
    a, noise, _ = tokens(30, seed=3)
    b, other, _ = tokens(300, seed=4)
    true = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    fit, held = summed(a, a @ true.T + noise, None), summed(b, b @ true.T + other, None)
    ridges = (1e-6, 1e-2, 0.1, 1.0, 10.0)
    choice = choose_ridge(fit, held, ridges, kept=0.5)
    assert choice.change is not None
    best = min(ridges, key=lambda ridge: held.error_with(fit.solution(ridge)))
    assert choice.ridge == best
    torch.testing.assert_close(choice.change, 0.5 * fit.solution(best))
    assert choice.after == pytest.approx(held.error_with(choice.change) / 300)


def test_silent_inputs_are_left_alone() -> None:
    a, r, _ = tokens(50)
    a[:, 2] = 0
    found = summed(a, r, None).solution(0.1)
    assert bool(torch.isfinite(found).all())
    assert float(found[:, 2].abs().max()) == 0


def test_activations_that_are_not_finite_are_said() -> None:
    a, r, _ = tokens(50)
    a[3, 1] = float("inf")
    with pytest.raises(InputError, match="not finite or too large"):
        summed(a, r, None).solution(0.1)


def test_what_is_fitted_on_all_text_has_the_ridge_that_the_held_out_one_chose() -> None:
    a, noise, _ = tokens(30, seed=3)
    b, other, _ = tokens(300, seed=4)
    true = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    fit, held = summed(a, a @ true.T + noise, None), summed(b, b @ true.T + other, None)
    one, all_ = (choose_ridge(fit, held, (1e-2, 0.1, 1.0), kept=0.75, on_all=on_all) for on_all in (False, True))
    assert all_.ridge == one.ridge
    assert one.ridge is not None
    assert all_.change is not None
    torch.testing.assert_close(all_.change, 0.75 * (fit + held).solution(one.ridge))
    # What was fitted on the held-out tokens says nothing on them.
    assert (all_.before, all_.after) == (one.before, one.after)


def test_products_in_float64_are_exact() -> None:
    a, r, weight = tokens(300)
    wanted = (a.double() * weight.double()[:, None]).T @ a.double()
    found = summed(a, r, weight, precision=torch.float64)
    torch.testing.assert_close(found.gram, wanted, rtol=1e-13, atol=0)
