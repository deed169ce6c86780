"""The patches: maps with a description, whatever is done to them as modules."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parametrize, prune

from linearpatch_kernels import nn as patches
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.nn import (
    DensePatch,
    DiagonalPatch,
    HadamardPatch,
    LinearTopKKLLoss,
    LowRankPatch,
    NormLinearPatch,
    Patch,
    TopKKLLoss,
    build_patch,
    nearest_diagonal_plus_low_rank,
    nearest_low_rank,
)
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss

D = 20
ROWS = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MAKERS: dict[str, Callable[[], Patch]] = {
    "hadamard": lambda: HadamardPatch(D),
    "hadamard pre": lambda: HadamardPatch(D, pre_scale=True),
    "hadamard post": lambda: HadamardPatch(D, post_scale=True),
    "hadamard rank": lambda: HadamardPatch(D, 3),
    "hadamard all": lambda: HadamardPatch(D, 3, pre_scale=True, post_scale=True),
    "low-rank": lambda: LowRankPatch(D, 3),
    "diagonal": lambda: DiagonalPatch(D),
    "dense": lambda: DensePatch(D),
    "norm-linear": lambda: NormLinearPatch(D, eps=1e-3),
    "norm-linear rank": lambda: NormLinearPatch(D, 3),
    "norm-linear hadamard": lambda: NormLinearPatch(D, hadamard=True),
    "norm-linear hadamard rank": lambda: NormLinearPatch(D, 3, hadamard=True),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def patch(request: pytest.FixtureRequest) -> Patch:
    made: Patch = request.param()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made


def matrix_of(patch: Patch) -> Tensor:
    """P, or the M of a normed stream, from the parameters, by the formula of each kind."""
    parameters = {name: value.detach().double() for name, value in patch.named_parameters()}
    low_rank = parameters["down"] @ parameters["up"] if "down" in parameters else torch.zeros((), dtype=torch.float64)
    if "weight" in parameters:
        return parameters["weight"]
    if isinstance(patch, DiagonalPatch):
        return torch.diag(parameters["scale"])
    if isinstance(patch, LowRankPatch):
        return torch.eye(patch.dim, dtype=torch.float64) + low_rank
    if "scale" not in parameters:
        return low_rank
    ones, h = torch.ones(patch.dim, dtype=torch.float64), hadamard_matrix(patch.dim)
    middle = h @ torch.diag(parameters["scale"]) @ h.T
    return (
        torch.diag(parameters.get("pre_scale", ones)) @ middle @ torch.diag(parameters.get("post_scale", ones))
        + low_rank
    )


def exact(patch: Patch, x: Tensor) -> Tensor:
    """What the patch is to give, in float64."""
    x = x.double()
    if not isinstance(patch, NormLinearPatch):
        return x @ matrix_of(patch)
    return x + x / (x.square().mean(-1, keepdim=True) + patch.eps).sqrt() @ matrix_of(patch)


def test_forward_is_the_formula(patch: Patch) -> None:
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(patch(x).double(), exact(patch, x), rtol=0, atol=2e-4)
    torch.testing.assert_close(patch(x.double()), exact(patch, x), rtol=0, atol=1e-12)


def test_the_matrix_of_a_patch(patch: Patch) -> None:
    dense = patch.normed_matrix() if isinstance(patch, NormLinearPatch) else patch.to_dense()
    assert dense.dtype == torch.float64
    assert not dense.requires_grad
    torch.testing.assert_close(dense, matrix_of(patch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_new_patch_is_the_identity_and_trainable(make: Callable[[], Patch]) -> None:
    patch = make()
    x = torch.randn(8, D)
    torch.testing.assert_close(patch(x.double()), x.double(), rtol=0, atol=1e-12)
    before = (patch(x) - x.flip(0)).square().sum()
    optimizer = torch.optim.SGD(patch.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (patch(x) - x.flip(0)).square().sum().backward()
        optimizer.step()
    assert (patch(x) - x.flip(0)).square().sum() < before


def test_description_rebuilds_the_empty_patch(patch: Patch) -> None:
    told = json.loads(json.dumps(patch.description()))
    rebuilt = build_patch(told)
    assert type(rebuilt) is type(patch)
    assert rebuilt.description() == patch.description()
    rebuilt.load_state_dict(patch.state_dict())
    assert rebuilt(ROWS).equal(patch(ROWS))


def test_every_kind_is_registered_under_its_name() -> None:
    assert {kind: cls.kind for kind, cls in patches.PATCH_KINDS.items()} == {kind: kind for kind in patches.PATCH_KINDS}
    assert {type(make()) for make in MAKERS.values()} == set(patches.PATCH_KINDS.values())


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "unknown kind of patch None"),
        ({"kind": "fourier", "dim": 4}, "unknown kind of patch 'fourier'"),
        ({"kind": "dense"}, "does not fit a dense patch"),
        ({"kind": "dense", "dim": 4, "rank": 2}, "does not fit a dense patch"),
        ({"kind": "low-rank", "dim": 4, "rank": 0}, "rank of at least 1"),
        ({"kind": "hadamard", "dim": 0}, "width of at least 1"),
        ({"kind": "hadamard", "dim": 4, "rank": -1}, "rank of at least 0"),
        ({"kind": "norm-linear", "dim": 4, "eps": -1e-6}, "eps of a norm is a finite number from 0 on, not -1e-06"),
        ({"kind": "norm-linear", "dim": 4, "eps": float("nan")}, "not nan"),
        ({"kind": "norm-linear", "dim": 4, "eps": float("inf")}, "not inf"),
        ({"kind": "norm-linear", "dim": 4, "eps": 1}, "eps is 1, no float"),
        ({"kind": "norm-linear", "dim": 4, "rank": 5}, "a rank must be in"),
        ({"kind": "norm-linear", "dim": 4, "order": 4}, "of order 4 is another map"),
        ({"kind": "norm-linear", "dim": 4, "hadamard": True, "order": 2}, "of order 2 is another map"),
    ],
)
def test_bad_description(description: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_patch(description)


def test_costs() -> None:
    # d = 20: the only factor is of order 20. d = 96 = 12 * 2^3.
    assert [(make().num_parameters, make().flops_per_token) for make in MAKERS.values()] == [
        (20, 20 * (2 * 19 + 1)),
        (40, 20 * (2 * 19 + 2)),
        (40, 20 * (2 * 19 + 2)),
        (140, 20 * (2 * 19 + 1) + 4 * 20 * 3 + 20),
        (180, 20 * (2 * 19 + 3) + 4 * 20 * 3 + 20),
        (120, 4 * 20 * 3 + 20),
        (20, 20),
        (400, 2 * 20 * 20),
        (400, 2 * 20 * 20 + 4 * 20),
        (120, 4 * 20 * 3 + 4 * 20),
        (20, 20 * (2 * 19 + 1) + 4 * 20),
        (140, 20 * (2 * 19 + 1) + 4 * 20 * 3 + 20 + 4 * 20),
    ]
    assert HadamardPatch(96).flops_per_token == 96 * (2 * (11 + 3) + 1)
    assert HadamardPatch(64).flops_per_token == 64 * (2 * 6 + 1)


# --- as a module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_keeps_the_dtype_of_x(patch: Patch, dtype: torch.dtype) -> None:
    x = torch.randn(4, D).to(dtype)
    assert patch(x).dtype == dtype
    wanted = exact(patch, x)
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert (patch(x).double() - wanted).abs().max() <= 8 * eps * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_cast_module(patch: Patch, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    patch = patch.to(dtype)
    assert {parameter.dtype for parameter in patch.parameters()} == {dtype}
    x = torch.randn(4, D).to(x_dtype)
    y = patch(x)
    assert y.dtype == x_dtype
    wanted = exact(patch, x)
    worst = max(torch.finfo(x_dtype).eps, torch.finfo(dtype).eps)
    assert (y.double() - wanted).abs().max() <= 8 * worst * wanted.abs().max() + 1e-5


def test_deepcopy_is_another_patch(patch: Patch) -> None:
    twin = copy.deepcopy(patch)
    before = patch(ROWS)
    with torch.no_grad():
        next(twin.parameters()).mul_(3)
    assert patch(ROWS).equal(before)
    assert not twin(ROWS).equal(before)


def test_state_dict_through_safetensors(patch: Patch, tmp_path: Path) -> None:
    save_file(patch.state_dict(), tmp_path / "patch.safetensors")
    rebuilt = build_patch(patch.description())
    rebuilt.load_state_dict(load_file(tmp_path / "patch.safetensors"))
    assert rebuilt(ROWS).equal(patch(ROWS))


def test_meta_device(patch: Patch) -> None:
    with torch.device("meta"):
        empty = build_patch(patch.description())
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty(torch.empty(2, D, device="meta")).shape == (2, D)
    empty.to_empty(device="cpu").load_state_dict(patch.state_dict())
    assert empty(ROWS).equal(patch(ROWS))


def test_inference_mode_and_training_after_it(patch: Patch) -> None:
    x = torch.randn(3, D)
    with torch.inference_mode():
        y = patch(x)
    assert y.equal(patch(x))
    patch(x).sum().backward()
    assert all(parameter.grad is not None for parameter in patch.parameters())


def test_gradients_match_the_dense_formula(patch: Patch) -> None:
    patch = patch.double()
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: patch(x), (x, *patch.parameters()))


def test_compiles_whole(patch: Patch) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, D)
    torch.testing.assert_close(torch.compile(patch, fullgraph=True, backend="aot_eager")(x), patch(x))


def test_no_rows(patch: Patch) -> None:
    assert patch(torch.empty(0, 5, D)).shape == (0, 5, D)


# --- the nearest patch -----------------------------------------------------------------------------------------------


def test_nearest_hadamard_patch_is_the_projection() -> None:
    matrix = torch.randn(D, D, dtype=torch.float64)
    h = hadamard_matrix(D)
    patch = HadamardPatch.from_dense(matrix)
    torch.testing.assert_close(patch.scale.detach().double(), (h.T @ matrix @ h).diagonal(), rtol=0, atol=1e-6)
    # The rest is orthogonal to every patch of this kind.
    rest = matrix - patch.to_dense()
    other = h @ torch.diag(torch.randn(D, dtype=torch.float64)) @ h.T
    assert (rest * other).sum().abs() < 1e-4


@pytest.mark.parametrize("d", [12, 20, 44])
def test_hadamard_patch_of_its_own_matrix(d: int) -> None:
    patch = HadamardPatch(d, 2)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    found = HadamardPatch.from_dense(patch.to_dense(), rank=2)
    assert (found.to_dense() - patch.to_dense()).norm() < 1e-4 * patch.to_dense().norm()
    torch.testing.assert_close(found.scale, patch.scale, rtol=0, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 4, 19])
def test_low_rank_term_is_stationary_and_never_worse(rank: int) -> None:
    matrix = torch.randn(D, D, dtype=torch.float64)
    diagonal, down, up = nearest_diagonal_plus_low_rank(matrix, rank)
    rest = matrix - torch.diag(diagonal) - down @ up
    # No better diagonal for this low-rank term, and no better low-rank term for this diagonal (Eckart-Young).
    torch.testing.assert_close(diagonal, (matrix - down @ up).diagonal(), rtol=0, atol=1e-12)
    best = torch.linalg.svdvals(matrix - torch.diag(diagonal))[rank:].square().sum()
    torch.testing.assert_close(rest.square().sum(), best, rtol=1e-4, atol=1e-6)
    smaller = matrix - torch.diag(matrix.diagonal())
    left, values, right = torch.linalg.svd(smaller)
    naive = smaller - (left[:, :rank] * values[:rank]) @ right[:rank]
    assert rest.norm() <= naive.norm() + 1e-9


def test_ranks_are_nested_in_quality() -> None:
    matrix = torch.randn(D, D)
    errors = [(HadamardPatch.from_dense(matrix, rank=r).to_dense() - matrix).norm() for r in range(0, D + 1, 4)]
    assert all(more <= less + 1e-6 for less, more in pairwise(errors))
    assert errors[-1] < 1e-3


def test_nearest_low_rank_patch_is_the_truncated_decomposition() -> None:
    matrix = torch.randn(D, D, dtype=torch.float64)
    patch = LowRankPatch.from_dense(matrix, rank=3)
    best = torch.linalg.svdvals(matrix - torch.eye(D))[3:].square().sum()
    torch.testing.assert_close((patch.to_dense() - matrix).square().sum(), best, rtol=1e-6, atol=0)


def anisotropic(d: int) -> torch.Tensor:
    """X.T @ X of inputs whose channels, mixed, differ a hundredfold."""
    x = torch.randn(4 * d, d, dtype=torch.float64) * torch.logspace(-1, 1, d, dtype=torch.float64)
    mixed = x @ torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return mixed.T @ mixed


def weighted_error(patch: Patch, matrix: torch.Tensor, moments: torch.Tensor) -> float:
    """||X (matrix - P)||^2."""
    rest = matrix - patch.to_dense()
    return float((rest.T @ moments @ rest).trace())


@pytest.mark.parametrize(("cls", "rank"), [(HadamardPatch, 0), (HadamardPatch, 3), (LowRankPatch, 3)])
def test_nearest_for_the_inputs_given_is_nearer_for_them(cls: Any, rank: int) -> None:
    matrix, moments = torch.eye(D) + 0.3 * torch.randn(D, D, dtype=torch.float64), anisotropic(D)
    plain, weighted = cls.from_dense(matrix, rank), cls.from_dense(matrix, rank, second_moments=moments)
    assert weighted_error(weighted, matrix, moments) < 0.95 * weighted_error(plain, matrix, moments)
    assert (plain.to_dense() - matrix).norm() < (weighted.to_dense() - matrix).norm()
    # A minimum: no small step in the parameters leads lower.
    least = weighted_error(weighted, matrix, moments)
    for parameter in weighted.parameters():
        step = 1e-3 * torch.randn(parameter.shape)
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step
                assert weighted_error(weighted, matrix, moments) > least
                parameter -= sign * step


@pytest.mark.parametrize(("cls", "rank"), [(HadamardPatch, 0), (HadamardPatch, 2), (LowRankPatch, 2)])
def test_nearest_for_the_inputs_given_is_exact_where_there_is_one(cls: Any, rank: int) -> None:
    patch = cls(44, rank)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    matrix, moments = patch.to_dense(), anisotropic(44)
    found = cls.from_dense(matrix, rank, second_moments=moments)
    scale = float((matrix.T @ moments @ matrix).trace())
    assert weighted_error(found, matrix, moments) < 1e-8 * scale


@pytest.mark.parametrize("cls", [HadamardPatch, LowRankPatch])
def test_moments_of_the_identity_change_nothing(cls: Any) -> None:
    matrix = torch.randn(D, D)
    plain, weighted = cls.from_dense(matrix, 3), cls.from_dense(matrix, 3, second_moments=7 * torch.eye(D))
    torch.testing.assert_close(weighted.to_dense(), plain.to_dense(), rtol=0, atol=1e-5)


def test_moments_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="do not fit a matrix"):
        HadamardPatch.from_dense(torch.randn(D, D), second_moments=torch.eye(D + 1))
    with pytest.raises(InputError, match="not positive definite"):
        LowRankPatch.from_dense(torch.randn(D, D), 2, second_moments=torch.diag(torch.arange(D) - 1.0))


def test_dense_patch_of_a_matrix() -> None:
    matrix = torch.randn(D, D)
    assert DensePatch.from_dense(matrix).to_dense().equal(matrix.double())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("hadamard", [False, True])
def test_a_norm_linear_patch_is_the_nearest_of_its_form(hadamard: bool, rank: int) -> None:
    matrix, moments = torch.eye(D) + 0.3 * torch.randn(D, D, dtype=torch.float64), anisotropic(D)
    patch = NormLinearPatch.from_dense(matrix, rank, hadamard=hadamard, eps=0.5, second_moments=moments)
    assert (patch.rank, patch.hadamard, patch.eps) == (rank, hadamard, 0.5)
    if hadamard:
        expected = HadamardPatch.from_dense(matrix, rank, second_moments=moments).to_dense()
    else:
        down, up = nearest_low_rank(matrix, rank, moments)
        expected = down @ up if rank else matrix
    torch.testing.assert_close(patch.normed_matrix(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", [HadamardPatch, LowRankPatch, DensePatch, NormLinearPatch])
def test_bad_matrix(cls: type[Patch]) -> None:
    options = {} if cls is DensePatch else {"rank": 2}
    for wrong in (torch.randn(3, 4), torch.randn(4), torch.ones(4, 4, dtype=torch.int64)):
        with pytest.raises(InputError, match="floating matrix"):
            cls.from_dense(wrong, **options)
    if cls is not DensePatch:
        for rank in (-1, 0, 5) if cls is LowRankPatch else (-1, 5):
            with pytest.raises(InputError, match=rf"a rank must be in \[[01], 4\], the width, not {rank}"):
                cls.from_dense(torch.randn(4, 4), rank=rank)


@pytest.mark.parametrize("nearest", [nearest_low_rank, nearest_diagonal_plus_low_rank])
@pytest.mark.parametrize("rank", [-1, 5])
def test_bad_rank(nearest: Callable[..., object], rank: int) -> None:
    with pytest.raises(InputError, match="a rank must be in"):
        nearest(torch.randn(4, 4, dtype=torch.float64), rank)


# --- what travels with a checkpoint ----------------------------------------------------------------------------------


def test_patch_classes_use_few_names() -> None:
    """Their source is copied into the modeling file of a patched checkpoint, beside the reference and the transform."""
    brought = {"torch", "nn", "Tensor", "Any", "Self", "Mapping", "InputError"}
    brought |= {"hadamard_patch", "hadamard_transform", "factor_order", "hadamard_order", "bounded_order"}
    for cls in (Patch, *patches.PATCH_KINDS.values()):
        methods = [m for m in vars(cls).values() if inspect.isfunction(m) or isinstance(m, classmethod | property)]
        for method in methods:
            function = getattr(method, "__func__", getattr(method, "fget", method))
            names = set(inspect.getclosurevars(inspect.unwrap(function)).globals)
            own = {name for name in names if getattr(getattr(patches, name), "__module__", "") == patches.__name__}
            assert names - own <= brought


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["topk", "full", "tail"])
def test_losses_are_the_functions_with_their_options(normalization: str) -> None:
    hidden, weight, bias = torch.randn(6, 4), torch.randn(11, 4), torch.randn(11)
    ids, probs = torch.randint(11, (6, 3)), torch.rand(6, 3).softmax(1)
    options = {"normalization": normalization, "temperature": 2.0}
    logits = hidden @ weight.T
    assert TopKKLLoss(**options)(logits, probs, ids).equal(topk_kl_loss(logits, probs, ids, **options))
    linear = LinearTopKKLLoss(**options)(hidden, weight, probs, ids, bias)
    assert linear.equal(linear_topk_kl_loss(hidden, weight, probs, ids, bias=bias, **options))
    assert not linear.equal(LinearTopKKLLoss(normalization)(hidden, weight, probs, ids, bias))
    assert repr(TopKKLLoss(**options)) == f"TopKKLLoss(normalization={normalization!r}, temperature=2.0)"


class Doubled(torch.nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return 2 * parameter


def full_patch() -> HadamardPatch:
    made = HadamardPatch(12, 2, pre_scale=True, post_scale=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


NAMES = pytest.mark.parametrize("name", ["scale", "pre_scale", "post_scale", "down", "up"])


@NAMES
def test_parametrised_parameter_is_used(name: str) -> None:
    patch, x = full_patch(), torch.randn(3, 12)
    doubled = copy.deepcopy(patch)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    parametrize.register_parametrization(patch, name, Doubled())
    assert patch(x).equal(doubled(x))
    assert torch.compile(patch, fullgraph=True, backend="eager")(x).equal(doubled(x))


@NAMES
def test_pruned_parameter_is_used(name: str) -> None:
    patch, x = full_patch(), torch.randn(3, 12)
    prune.l1_unstructured(patch, name, amount=0.5)
    pruned = full_patch()
    pruned.load_state_dict({one: getattr(patch, one) for one in pruned.state_dict()})
    assert (getattr(patch, name) == 0).any()
    assert patch(x).equal(pruned(x))
