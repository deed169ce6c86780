"""x + RMSNorm(x) M: its error against float64, what it does with odd input, and that nobody takes it for a matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.distillation.forms import FORMS, reformed
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.nn import DiagonalPatch, NormLinearPatch, PatchChain

FORM = {
    "dense": lambda d: NormLinearPatch(d, eps=1e-5),
    "low-rank": lambda d: NormLinearPatch(d, min(d, 3), eps=1e-5),
    "hadamard": lambda d: NormLinearPatch(d, hadamard=True, eps=1e-5),
    "hadamard and rank": lambda d: NormLinearPatch(d, min(d, 3), hadamard=True, eps=1e-5),
}
forms = pytest.mark.parametrize("make", FORM.values(), ids=FORM)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Beyond twice the error of the plain expression: that may be zero by chance on a few numbers.
ATOL = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def filled(make: Callable[[int], NormLinearPatch], d: int, dtype: torch.dtype = torch.float32) -> NormLinearPatch:
    """With an M whose products are about as large as the normed rows."""
    patch, generator = make(d), torch.Generator().manual_seed(d)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            size = 1.0 if name == "scale" else d**-0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return patch.to(dtype)


def plain(patch: NormLinearPatch, x: Tensor) -> Tensor:
    """The definition, in x's dtype throughout."""
    own = {name: value.detach().to(x.dtype) for name, value in patch.named_parameters()}
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + patch.eps)
    added = torch.zeros_like(x)
    if "weight" in own:
        added = added + normed @ own["weight"]
    if "scale" in own:
        h = hadamard_matrix(patch.dim, dtype=x.dtype)
        added = added + (normed @ h * own["scale"]) @ h.T
    if "down" in own:
        added = added + normed @ own["down"] @ own["up"]
    return x + added


@forms
@dtypes
@pytest.mark.parametrize("d", [1, 7, 20, 48, 96, 576])
@torch.no_grad()
def test_the_error_is_that_of_the_plain_expression(
    make: Callable[[int], NormLinearPatch], dtype: torch.dtype, d: int
) -> None:
    patch = filled(make, d, dtype)
    # Rows of very different sizes, below the eps and far above.
    sizes = torch.logspace(-4, 2, 33).unsqueeze(-1)
    x = (sizes * torch.randn(33, d, generator=torch.Generator().manual_seed(3))).to(dtype)
    exact = plain(patch, x.double())
    unit = exact.abs().amax(-1, keepdim=True).clamp_min(1)
    ours, theirs = (((y.double() - exact) / unit).abs().max().item() for y in (patch(x), plain(patch, x)))
    assert ours <= 2 * theirs + ATOL[dtype]


@forms
@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (1, 48), (2, 3, 5, 48)], ids=str)
@torch.no_grad()
def test_shapes(make: Callable[[int], NormLinearPatch], shape: tuple[int, ...]) -> None:
    patch = filled(make, 48)
    x = torch.randn(shape)
    y = patch(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(y.double(), plain(patch, x.double()), rtol=1e-5, atol=1e-5)


@forms
@torch.no_grad()
def test_rows_that_are_not_contiguous(make: Callable[[int], NormLinearPatch]) -> None:
    patch = filled(make, 48)
    x = torch.randn(48, 6, 4).permute(2, 1, 0)
    torch.testing.assert_close(patch(x), patch(x.contiguous()))
    strided = torch.randn(5, 96)[:, ::2]
    torch.testing.assert_close(patch(strided), patch(strided.contiguous()))
    repeated = torch.randn(1, 48).expand(4, 48)
    torch.testing.assert_close(patch(repeated), patch(repeated.contiguous()))


@forms
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_what_is_not_finite_stays_so_and_in_its_row(
    make: Callable[[int], NormLinearPatch], dtype: torch.dtype, bad: float
) -> None:
    patch, x = filled(make, 48, dtype), torch.randn(4, 48).to(dtype)
    clean = patch(x)
    x[2, 5] = bad
    y = patch(x)
    assert not y[2, 5].isfinite()
    assert y[[0, 1, 3]].equal(clean[[0, 1, 3]])


@forms
@torch.no_grad()
def test_a_row_of_zeros_stays_zero(make: Callable[[int], NormLinearPatch]) -> None:
    assert filled(make, 48)(torch.zeros(3, 48)).equal(torch.zeros(3, 48))


@forms
@torch.no_grad()
def test_autocast_narrows_what_is_added_and_not_the_stream(make: Callable[[int], NormLinearPatch]) -> None:
    patch, x = make(48), 1000 * torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = patch(x)
    assert y.dtype == torch.float32
    assert y.equal(x), "a new patch is the identity"


def test_it_is_no_matrix() -> None:
    patch = NormLinearPatch(48)
    assert not patch.linear
    assert not PatchChain(DiagonalPatch(48), patch).linear
    assert PatchChain(DiagonalPatch(48)).linear
    for one in (patch, PatchChain(patch), PatchChain(DiagonalPatch(48), patch)):
        with pytest.raises(InputError, match=r"no matrix P is the whole patch: `normed_matrix\(\)` is the M") as caught:
            one.to_dense()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "keep"])
def test_it_is_not_trained_in_the_form_of_a_matrix(form: str) -> None:
    with pytest.raises(InputError, match=f"`patch` {form} is for linear maps, .* give `patch` keep"):
        reformed(PatchChain(NormLinearPatch(48)), form, 4)
