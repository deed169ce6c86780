"""The matrices are Hadamard matrices in exact arithmetic, and the transform is the product by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import (
    _FACTORS,
    hadamard_matrix,
    hadamard_order,
    hadamard_transform,
    paley_factor,
)

# Every width that the design promises an exact matrix for.
WIDTHS = [
    *(512, 576, 640, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 1792, 2048, 2304, 2560, 2688, 2816, 2880, 3072),
    *(3200, 3584, 3840, 4096, 4544, 4608, 5120, 5376, 5632, 6144, 6656, 7168, 8192, 12288, 16384),
]
# H is not symmetric at these, so that an exchange of H and H.T shows.
ASYMMETRIC = [12, 20, 28, 44, 24, 80, 640, 1536]
BLOCK_DIAGONAL = {7: 1, 33: 1, 6: 2, 30: 2, 92: 4, 232: 8, 260: 52}
# The orders up to 1000 that neither Sylvester nor Paley reach (any table of Hadamard matrices lists them).
UNREACHED = [
    *(92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508),
    *(
        520,
        532,
        536,
        584,
        596,
        604,
        612,
        652,
        668,
        712,
        716,
        732,
        756,
        764,
        772,
        808,
        836,
        852,
        856,
        872,
        876,
        892,
        904,
    ),
    *(932, 940, 944, 952, 956, 964, 980, 988, 996),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def butterfly(x: torch.Tensor) -> torch.Tensor:
    """The unnormalised Walsh-Hadamard transform in natural order, stage by stage."""
    width = x.shape[-1]
    stride = 1
    while stride < width:
        pairs = x.reshape(*x.shape[:-1], width // (2 * stride), 2, stride)
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).reshape(x.shape)
        stride *= 2
    return x


@pytest.mark.parametrize("d", WIDTHS)
def test_every_promised_width_is_exact(d: int) -> None:
    signs, k = paley_factor(d)
    m = len(signs)
    assert m << k == d == hadamard_order(d)
    wide = signs.long()
    assert signs.dtype == torch.int8
    assert wide.abs().eq(1).all()
    assert (wide @ wide.T).equal(m * torch.eye(m, dtype=torch.long))

    x = torch.randn(2, d, dtype=torch.float64)
    y = hadamard_transform(x)
    rows = torch.einsum("rns,nj->rjs", x.view(2, m, -1), wide.double())
    torch.testing.assert_close(y, butterfly(rows).reshape(2, d) / math.sqrt(d), rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("d", [*ASYMMETRIC, *BLOCK_DIAGONAL, 1, 2, 4, 36, 52, 128, 576])
def test_transform_is_the_product_by_an_orthonormal_matrix(d: int) -> None:
    h = hadamard_matrix(d)
    torch.testing.assert_close(h @ h.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(3, d, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x), x @ h, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard_transform(x, inverse=True), x @ h.T, rtol=0, atol=1e-13)
    if d in ASYMMETRIC:
        assert (x @ h - x @ h.T).abs().max() > 0.1


@pytest.mark.parametrize("d", WIDTHS[:6] + ASYMMETRIC)
def test_matrix_is_the_kronecker_product_that_kernels_assume(d: int) -> None:
    signs, k = paley_factor(d)
    sylvester = torch.ones(1, 1)
    for _ in range(k):
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    expected = torch.kron(signs.double(), sylvester.double()) / math.sqrt(d)
    torch.testing.assert_close(hadamard_matrix(d), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("d", "order"), BLOCK_DIAGONAL.items())
def test_other_widths_take_the_largest_order_that_divides(d: int, order: int) -> None:
    assert hadamard_order(d) == order
    h = hadamard_matrix(d)
    blocks = torch.block_diag(*[h[:order, :order]] * (d // order))
    assert h.equal(blocks)


def test_reached_orders_are_those_of_sylvester_and_paley() -> None:
    assert [d for d in range(4, 1001, 4) if hadamard_order(d) != d] == UNREACHED


def test_product_of_two_paley_orders_where_one_is_not_enough() -> None:
    signs, k = paley_factor(1904)
    assert (len(signs), k) == (1904, 0)
    assert signs.equal(torch.kron(paley_factor(28)[0], paley_factor(68)[0]))


def test_paley_factor_is_the_smallest_that_leaves_a_power_of_two() -> None:
    assert {d: len(paley_factor(d)[0]) for d in (1, 2, 4, 8, 64, 24, 48, 40, 56, 72, 184 * 2)} == {
        **{1: 1, 2: 1, 4: 1, 8: 1, 64: 1},
        **{24: 12, 48: 12, 40: 20, 56: 28, 72: 36, 368: 368},
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.booleans(), st.integers(0, 2**31))
def test_any_width_goes_there_and_back(d: int, inverse: bool, seed: int) -> None:
    x = torch.randn(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = hadamard_transform(x, inverse=inverse)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(hadamard_transform(y, inverse=not inverse), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [12, 44, 576, 1024, 2816])
@pytest.mark.parametrize("inverse", [False, True])
def test_error_is_at_most_twice_that_of_the_dense_product(dtype: torch.dtype, d: int, inverse: bool) -> None:
    x = torch.randn(32, d).to(dtype)
    h = hadamard_matrix(d)
    h = h.T if inverse else h
    exact = x.double() @ h
    error = (hadamard_transform(x, inverse=inverse).double() - exact).abs().max()
    assert error <= 2 * ((x @ h.to(dtype)).double() - exact).abs().max() + 1e-6
    assert hadamard_transform(x).dtype == dtype


def test_half_precision_is_rounded_once() -> None:
    x = torch.randn(8, 576).to(torch.bfloat16)
    assert hadamard_transform(x).equal(hadamard_transform(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 24)[::2],
        torch.randn(24, 5).T,
        torch.randn(2, 3, 48)[..., ::2],
        torch.randn(3, 2, 24).transpose(0, 1),
        torch.randn(24).expand(4, 24),
        torch.randn(24),
        torch.randn(0, 24),
        torch.randn(2, 0, 24),
    ],
    ids=["rows", "columns", "every other", "transposed", "expanded", "vector", "empty", "empty inside"],
)
def test_strides_and_leading_dimensions(x: torch.Tensor) -> None:
    y = hadamard_transform(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y, x @ hadamard_matrix(24, dtype=torch.float32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_stays_in_its_row(bad: float) -> None:
    x = torch.randn(3, 24)
    x[1, 5] = bad
    y = hadamard_transform(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].equal(hadamard_transform(x[[0, 2]]))


@pytest.mark.parametrize("d", [12, 20, 28, 44, 10])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_is_the_transform_back(d: int, inverse: bool) -> None:
    x = torch.randn(2, d, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, d, dtype=torch.float64)
    (dx,) = torch.autograd.grad(hadamard_transform(x, inverse=inverse), x, grad)
    torch.testing.assert_close(dx, hadamard_transform(grad, inverse=not inverse), rtol=0, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda x: hadamard_transform(x, inverse=inverse), x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: hadamard_transform(x) * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for d in (36, 12):
        x = torch.randn(4, d, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, hadamard_transform(x) * 2)
        y.sum().backward()
        torch.testing.assert_close(x.grad, hadamard_transform(torch.full((4, d), 2.0), inverse=True))


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 640)
    compiled = torch.compile(hadamard_transform, fullgraph=True)
    torch.testing.assert_close(compiled(x), hadamard_transform(x))


def test_exports() -> None:
    class Transform(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return hadamard_transform(x)

    x = torch.randn(4, 28)
    exported = torch.export.export(Transform(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(7, 28)
    torch.testing.assert_close(exported.module()(x), hadamard_transform(x))


def test_autocast_changes_nothing() -> None:
    x = torch.randn(4, 44)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard_transform(x)
    assert y.equal(hadamard_transform(x))


def test_vmap() -> None:
    x = torch.randn(3, 12, 5)
    y = torch.func.vmap(hadamard_transform, in_dims=2, out_dims=2)(x)
    torch.testing.assert_close(y, torch.stack([hadamard_transform(one) for one in x.unbind(2)], 2))


# Widths that no other test of this file uses: what these leave behind for later calls must be ordinary tensors.


def test_first_call_under_fake_tensors_leaves_nothing_behind() -> None:
    with FakeTensorMode():
        assert hadamard_transform(torch.empty(2, 104)).shape == (2, 104)
    x = torch.randn(2, 104)
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard_matrix(104, dtype=torch.float32), rtol=0, atol=1e-5)
    with FakeTensorMode():
        assert hadamard_transform(torch.empty(2, 104)).shape == (2, 104)


def test_first_call_in_inference_mode_leaves_later_ones_trainable() -> None:
    with torch.inference_mode():
        hadamard_transform(torch.randn(2, 76))
    x = torch.randn(2, 76, requires_grad=True)
    hadamard_transform(x).sum().backward()
    torch.testing.assert_close(x.grad, hadamard_transform(torch.ones(2, 76), inverse=True))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.functionalize, torch.func.vmap])
def test_first_call_inside_a_functional_transform_leaves_nothing_behind(transform: Callable[..., Any]) -> None:
    _FACTORS.clear()
    x = torch.randn(2, 148)
    transform(lambda x: hadamard_transform(x).square().sum())(x)
    assert len(_FACTORS) == 1
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(factor) for factor in _FACTORS.values())
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), inverse=True), x)


def test_first_call_under_compile_leaves_eager_alone() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 164)
    y = torch.compile(hadamard_transform, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, hadamard_transform(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matrix_is_rounded_once_to_its_dtype(dtype: torch.dtype) -> None:
    assert hadamard_matrix(44, dtype=dtype).equal(hadamard_matrix(44).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 6, 7, 8])
def test_result_is_never_the_operand(d: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, d).to(dtype)
    before = x.clone()
    hadamard_transform(x).zero_()
    assert x.equal(before)


def test_bad_input_says_what_to_do() -> None:
    for wrong in (0, -4):
        with pytest.raises(InputError, match="width of at least 1"):
            hadamard_order(wrong)
        with pytest.raises(InputError, match="width of at least 1"):
            paley_factor(wrong)
    with pytest.raises(InputError, match="floating dtype"):
        hadamard_matrix(4, dtype=torch.int32)
    with pytest.raises(InputError, match="floating tensor"):
        hadamard_transform(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="floating tensor"):
        hadamard_transform(torch.tensor(1.0))
    with pytest.raises(InputError, match="width of at least 1"):
        hadamard_transform(torch.ones(2, 0))
