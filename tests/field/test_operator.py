"""What the patch operator was given by people who tried to break it: aliases, derivatives, orders, odd tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from linearpatch_kernels import backend
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import (
    LARGEST_FACTOR,
    bounded_order,
    factor_order,
    hadamard_order,
    hadamard_transform,
)
from linearpatch_kernels.nn import HadamardPatch, build_patch
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference
from linearpatch_kernels.ops.registration import DerivativeError

OPS = torch.ops.linearpatch
D = 64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- out= that shares memory -----------------------------------------------------------------------------------------
#
# hadamard_patch(out=) gave wrong numbers where out was one float32 row of scale, or down, or up, because it was
# compared with x alone, and took an out whose rows overlap.

Operands = dict[str, Tensor]


def patch(x: Tensor, scale: Tensor, out: Tensor, **others: Tensor) -> None:
    hadamard_patch(x, scale, out=out, **others)


def directly(name: str) -> Callable[..., None]:
    def call(x: Tensor, scale: Tensor, out: Tensor, **others: Tensor) -> None:
        optional = [others.get(operand) for operand in ("pre_scale", "post_scale", "down", "up")]
        getattr(OPS, name)(x, scale, *optional, out)

    return call


IMPLEMENTATIONS = {
    "function": patch,
    "operator": directly("hadamard_patch_out"),
    "reference": directly("hadamard_patch_out_reference"),
}
every_implementation = pytest.mark.parametrize("call", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def exact(x: Tensor, scale: Tensor, **others: Tensor) -> Tensor:
    return hadamard_patch_reference(
        x.double(), scale.double(), **{name: tensor.double() for name, tensor in others.items()}
    )


def scale_is_out() -> Operands:
    scale = torch.randn(D)
    return {"x": torch.randn(1, D), "scale": scale, "out": scale.view(1, D)}


def scale_is_a_row_of_x_in_place() -> Operands:
    x = torch.randn(5, D)
    return {"x": x, "scale": x[3], "out": x}


def scale_is_every_other_element() -> Operands:
    base = torch.randn(3, 2 * D)
    return {"x": torch.randn(3, D), "scale": base[1, : 2 * D : 2], "out": base[:, ::2]}


def scale_in_half_precision_is_bytes_of_out() -> Operands:
    out = torch.randn(2, D)
    return {"x": torch.randn(2, D), "scale": out.view(torch.float16)[0, :D], "out": out}


def scale_is_one_number_of_out() -> Operands:
    out = torch.randn(2, D)
    return {"x": torch.randn(2, D), "scale": out[1, 5:6].expand(D), "out": out}


def scale_is_in_another_storage() -> Operands:
    array = np.random.default_rng(0).standard_normal((2, D)).astype(np.float32)
    return {"x": torch.randn(2, D), "scale": torch.from_numpy(array[1]), "out": torch.from_numpy(array)}


def matrix_is_out(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], Operands]:
    def make() -> Operands:
        out = torch.randn(D, D).to(dtype)
        others = {"down": torch.randn(D, D), "up": torch.randn(D, D), name: out}
        return {"x": torch.randn(D, D).to(dtype), "scale": torch.randn(D), "out": out, **others}

    return make


def matrix_is_transposed_out() -> Operands:
    out = torch.randn(D, D)
    return {
        **{"x": torch.randn(D, D), "scale": torch.randn(D), "out": out.T},
        **{"down": out[:, :3], "up": torch.randn(3, D)},
    }


def vector_is_a_row_of_out(name: str) -> Callable[[], Operands]:
    def make() -> Operands:
        out = torch.randn(5, D)
        return {"x": torch.randn(5, D), "scale": torch.randn(D), "out": out, name: out[2]}

    return make


SHARED = {
    "scale": [
        scale_is_out,
        scale_is_a_row_of_x_in_place,
        scale_is_every_other_element,
        scale_in_half_precision_is_bytes_of_out,
        scale_is_one_number_of_out,
        scale_is_in_another_storage,
    ],
    "pre_scale": [vector_is_a_row_of_out("pre_scale")],
    "post_scale": [vector_is_a_row_of_out("post_scale")],
    "down": [matrix_is_out("down"), matrix_is_out("down", torch.float64), matrix_is_transposed_out],
    "up": [matrix_is_out("up"), matrix_is_out("up", torch.bfloat16)],
}


@every_implementation
@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makers in SHARED.items() for make in makers])
def test_out_that_is_memory_of_another_operand_is_refused(
    call: Callable[..., None], name: str, make: Callable[[], Operands]
) -> None:
    operands = make()
    before = {key: tensor.clone() for key, tensor in operands.items()}
    with pytest.raises((InputError, RuntimeError), match=rf"out (must share no|shares) memory with {name}\b"):
        call(**operands)
    assert all(tensor.equal(before[key]) for key, tensor in operands.items())


@every_implementation
@pytest.mark.parametrize(
    ("sizes", "strides"),
    [((3, D), (32, 1)), ((3, D), (0, 1)), ((3, D), (1, 1)), ((2, 3, D), (D, D, 1)), ((3, D), (3, 2))],
)
def test_out_that_is_its_own_memory_twice_is_refused(
    call: Callable[..., None], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    twice = r"out (must have a place of its own for every element|has two elements in one place)"
    memory = torch.randn(500)
    before = memory.clone()
    with pytest.raises((InputError, RuntimeError), match=twice):
        call(torch.randn(sizes), torch.randn(D), memory.as_strided(sizes, strides))
    x = memory.as_strided(sizes, strides)
    with pytest.raises((InputError, RuntimeError), match=twice):
        call(x, torch.randn(D), x)
    assert memory.equal(before)


@every_implementation
@pytest.mark.parametrize(
    ("sizes", "strides"),
    [((3, 4), (1, 3)), ((3, 2), (2, 3)), ((2, 3, 4), (4, 8, 1)), ((1, 4), (0, 2)), ((0, 4), (0, 0))],
)
def test_out_of_odd_strides_is_taken_where_every_element_has_a_place(
    call: Callable[..., None], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    x, scale, memory = torch.randn(sizes), torch.randn(sizes[-1]), torch.full((60,), torch.nan)
    out = memory.as_strided(sizes, strides)
    call(x, scale, out)
    torch.testing.assert_close(out.double(), exact(x, scale), rtol=0, atol=1e-5)
    assert memory.isnan().sum() == 60 - x.numel()


@every_implementation
def test_out_may_lie_between_the_elements_of_another_operand(call: Callable[..., None]) -> None:
    base = torch.randn(3, 2 * D)
    x, scale, out = torch.randn(3, D), base[1, 1::2], base[:, ::2]
    true = exact(x, scale)
    call(x, scale, out)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-5)
    call(x, torch.randn(D), base[:, :D], down=base[:, D:].T, up=base[:, D:])


@every_implementation
@pytest.mark.parametrize("shift", [0, 1, D // 2, D, D + 3])
@pytest.mark.parametrize("low_rank", [False, True])
def test_out_may_be_x_or_a_part_of_it(call: Callable[..., None], shift: int, low_rank: bool) -> None:
    for first, second in ((0, shift), (shift, 0)):
        base = torch.randn(5 * D + shift)
        x, out = (base[start : start + 5 * D].view(5, D) for start in (first, second))
        others = {"down": torch.randn(D, 3), "up": torch.randn(3, D)} if low_rank else {}
        scale = torch.randn(D)
        true = exact(x, scale, **others)
        call(x, scale, out, **others)
        torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-4)


@every_implementation
def test_out_may_be_bytes_of_an_x_that_lies_across_them(call: Callable[..., None]) -> None:
    memory = torch.randn(300).view(torch.uint8)
    x, out = (memory[start : start + 4 * 3 * D].view(torch.float32).view(3, D) for start in (0, 4))
    shifted = torch.from_numpy(memory.numpy()[2 : 2 + 4 * 3 * D].view(np.float32)).view(3, D)
    x.copy_(torch.randn(3, D))
    scale, true = torch.randn(D), exact(x, torch.ones(D))
    for target in (shifted, out):
        x.copy_(true.float())
        wanted = exact(x, scale)
        call(x, scale, target)
        torch.testing.assert_close(target.double(), wanted, rtol=0, atol=1e-5)


def test_a_refused_call_writes_nothing_that_autograd_could_miss() -> None:
    x = torch.randn(4, D, requires_grad=True)
    y = x * 2
    z = y.square()  # saves y
    with pytest.raises(InputError, match="out must share no memory with scale: give a tensor"):
        hadamard_patch(torch.randn(4, D), y.detach()[0], out=y.detach())
    z.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make", [scale_is_out, scale_is_a_row_of_x_in_place, vector_is_a_row_of_out("pre_scale")])
def test_a_compiled_call_is_right_or_raises(compiler: str, make: Callable[[], Operands]) -> None:
    torch._dynamo.reset()
    operands = make()
    out = operands["out"]
    true = exact(**{name: tensor.clone() for name, tensor in operands.items() if name != "out"})
    said = ""
    try:
        torch.compile(patch, fullgraph=True, backend=compiler)(**operands)
    except RuntimeError as error:
        said = str(error)
    if said:
        assert "out shares memory with" in said
    else:
        torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-5)


# --- derivatives that were zero ---------------------------------------------------------------------------------------
#
# torch.func.jvp and jacfwd gave zero tangents and torch.func.grad blamed other code: torch.library knows reverse mode
# alone.


def call_patch(x: Tensor, scale: Tensor, pre: Tensor, post: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return hadamard_patch(x, scale, pre_scale=pre, post_scale=post, down=down, up=up)


def call_reference(x: Tensor, scale: Tensor, pre: Tensor, post: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return hadamard_patch_reference(x, scale, pre_scale=pre, post_scale=post, down=down, up=up)


def six_operands(d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = ((2, d), (d,), (d,), (d,), (d, 2), (2, d))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def same_leaves(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert all(leaf.abs().max() > 1e-3 for leaf in torch.utils._pytree.tree_leaves(theirs) if leaf.numel())


@pytest.mark.parametrize("d", [6, 12])
@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_forward_mode_is_the_plain_expressions(d: int, recording: bool) -> None:
    primals, tangents = six_operands(d), six_operands(d)
    with torch.set_grad_enabled(recording):
        same_leaves(jvp(call_patch, primals, tangents), jvp(call_reference, primals, tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
            ours = forward_ad.unpack_dual(call_patch(*duals)).tangent
            direct = forward_ad.unpack_dual(OPS.hadamard_patch(*duals)).tangent
            theirs = forward_ad.unpack_dual(call_reference(*duals)).tangent
    same_leaves(ours, theirs)
    same_leaves(direct, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_in_low_precision(dtype: torch.dtype) -> None:
    primals, tangents = six_operands(12, dtype), six_operands(12, dtype)
    value, tangent = jvp(call_patch, primals, tangents)
    assert value.dtype == tangent.dtype == dtype
    wide = [tuple(operand.double() for operand in operands) for operands in (primals, tangents)]
    _, true = jvp(call_reference, *wide)
    torch.testing.assert_close(tangent.double(), true, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("transform", [jacfwd, jacrev, hessian])
def test_torch_func_is_the_plain_expressions(transform: Callable[..., Any]) -> None:
    operands, which = six_operands(6), tuple(range(6))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inner: function(*inner).sin().sum() if transform is hessian else function(*inner)

    ours = transform(loss(call_patch), which)(*operands)
    torch.testing.assert_close(ours, transform(loss(call_reference), which)(*operands), rtol=1e-9, atol=1e-9)


def test_a_gradient_for_every_row() -> None:
    x, scale, *_ = six_operands(12)

    def loss(function: Callable[..., Tensor]) -> Callable[..., Any]:
        return vmap(grad(lambda scale, x: function(x, scale).square().sum()), (None, 0))

    same_leaves(loss(hadamard_patch)(scale, x), loss(hadamard_patch_reference)(scale, x))
    module = HadamardPatch(12, rank=2, dtype=torch.float64)
    weights = dict(module.named_parameters())
    gradients = grad(lambda weights: functional_call(module, weights, (x,)).square().sum())(weights)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_a_forced_backend_raises_where_plain_pytorch_would_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "cpu")
    x, scale, *_ = six_operands(12)
    with pytest.raises(RuntimeError, match="LINEARPATCH_BACKEND=cpu has no such derivative of hadamard_patch"):
        jvp(hadamard_patch, (x, scale), (x, scale))


def test_second_derivatives() -> None:
    operands = [operand.requires_grad_() for operand in six_operands(6)]
    assert torch.autograd.gradgradcheck(call_patch, operands)
    x, scale = (operand.detach().float().requires_grad_() for operand in operands[:2])
    penalty = []
    for function in (hadamard_patch, hadamard_patch_reference):
        (dx,) = torch.autograd.grad(function(x, scale).square().sum(), x, create_graph=True)
        penalty.append(torch.autograd.grad(dx.square().sum(), (x, scale)))
    same_leaves(*penalty, tolerance=1e-4)


def test_the_transform_has_every_derivative() -> None:
    x, t = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    for inverse in (False, True):
        _, tangent = jvp(lambda x: hadamard_transform(x, inverse=inverse), (x,), (t,))  # noqa: B023
        torch.testing.assert_close(tangent, hadamard_transform(t, inverse=inverse))


def test_what_is_not_differentiable_says_so() -> None:
    x, weight, t = torch.randn(2, 12), torch.randn(12), torch.ones(2, 12)
    norm = "add_patch_rms_norm is not differentiable: use hadamard_patch"
    with pytest.raises(DerivativeError, match=norm):
        jvp(lambda x: add_patch_rms_norm(x, x, weight, weight, 1e-6)[0], (x,), (t,))
    with pytest.raises(DerivativeError, match=norm):
        grad(lambda x: add_patch_rms_norm(x, x, weight, weight, 1e-6)[0].sum())(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        for operands in ((dual, weight, torch.empty(2, 12)), (x, weight, dual)):
            with pytest.raises(DerivativeError, match="no forward-mode derivative"):
                patch(*operands)
            with pytest.raises(DerivativeError, match="no forward-mode derivative"):
                directly("hadamard_patch_out")(*operands)
        with pytest.raises(DerivativeError, match=norm):
            OPS.add_patch_rms_norm(x, dual, weight, weight, 1e-6)


# --- large orders -----------------------------------------------------------------------------------------------------
#
# A width whose order is a large Paley matrix took 25 bytes for each of its entries and minutes at its first call: 2.3
# GB for 9012, 7.4 GB for 17468.

PEAK = """
import resource, sys
import torch
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
hadamard_patch(torch.randn(1, 64), torch.randn(64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hadamard_patch(torch.randn(1, 9012, dtype=getattr(torch, sys.argv[1])), torch.randn(9012))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 9012**2)
"""


@pytest.mark.parametrize(("dtype", "bytes_an_entry"), [("float32", 4), ("float64", 11)])
def test_a_large_order_takes_a_few_bytes_an_entry(dtype: str, bytes_an_entry: int) -> None:
    assert hadamard_order(9012) == 9012
    done = subprocess.run([sys.executable, "-c", PEAK, dtype], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < bytes_an_entry


def test_orders_are_bounded_by_their_matrix() -> None:
    for d in range(LARGEST_FACTOR - 64, LARGEST_FACTOR + 400, 4):
        m, k = factor_order(d)
        assert m <= LARGEST_FACTOR
        assert hadamard_order(d) == m << k
        assert d <= LARGEST_FACTOR or bounded_order(d) in (None, hadamard_order(d))
    assert (hadamard_order(16364), bounded_order(16364)) == (16364, None)  # the largest m that there is
    assert (hadamard_order(2 * 16364), bounded_order(2 * 16364)) == (2 * 16364, None)  # the bound is on m alone
    assert {d: bounded_order(d) for d in (16412, 17468, 40024)} == {16412: 44, 17468: 44, 40024: 8}


def test_an_order_is_found_at_once_whatever_the_width() -> None:
    """A prime of ten digits took as many divisions."""
    assert [hadamard_order(d) for d in (2**31 - 1, 10**18 + 9, 3 * 2**60)] == [1, 1, 3 * 2**60]


def test_a_patch_made_with_an_order_beyond_the_bound_is_not_taken_for_another() -> None:
    assert HadamardPatch(16412).description()["order"] == 44
    assert build_patch(HadamardPatch(16412).description()).dim == 16412
    assert "order" not in HadamardPatch(48).description()
    of_old = {"kind": "hadamard", "dim": 16412, "rank": 0, "pre_scale": False, "post_scale": False}
    for wrong in (of_old, of_old | {"order": 16412}, of_old | {"dim": 48, "order": 12}):
        with pytest.raises(InputError, match=r"is another map with this version's, of order (44|48): make it again"):
            build_patch(wrong)


# --- odd tensors ------------------------------------------------------------------------------------------------------


def negated(*shape: int) -> Tensor:
    view = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert view.is_neg()
    return view


@every_implementation
def test_views_that_torch_negates(call: Callable[..., None]) -> None:
    """An out like that got "Expected Tensor but got None"."""
    for x, scale, out in (
        (torch.randn(3, D), torch.randn(D), negated(3, D)),
        (negated(3, D), negated(D), torch.empty(3, D)),
        (negated(3, D), torch.randn(D), None),
    ):
        target, true = x if out is None else out, exact(x.resolve_neg(), scale.resolve_neg())
        call(x, scale, target)
        torch.testing.assert_close(target.resolve_neg().double(), true, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="out must be"):
        call(torch.randn(3, D), torch.randn(D), torch.randn(3, D, dtype=torch.complex64).conj())
    with pytest.raises(InputError, match="a place of its own"):
        call(torch.randn(3, D), torch.randn(D), negated(1, D).expand(3, D))


def test_an_empty_batch() -> None:
    x, scales = torch.randn(3, 12), torch.randn(0, 12)
    assert vmap(hadamard_patch, (None, 0))(x, scales).shape == (0, 3, 12)
    norm = vmap(lambda scale: add_patch_rms_norm(x, x, scale, torch.ones(12), 1e-6))
    assert [result.shape for result in norm(scales)] == [(0, 3, 12)] * 2


X, SCALE = torch.randn(4, D), torch.randn(D)
ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "no x": (lambda: hadamard_patch(None, SCALE), "x must be a tensor, not NoneType"),
    "a list": (lambda: hadamard_patch(X, [1.0] * D), "scale must be a tensor, not list"),
    "an array": (lambda: hadamard_patch(X, SCALE, pre_scale=np.ones(D)), "pre_scale must be a tensor, not ndarray"),
    "text for out": (lambda: hadamard_patch(X, SCALE, out="a"), "out must be a tensor, not str"),
    "no scale, with out": (lambda: hadamard_patch(X, None, out=X.clone()), "scale must be a tensor, not NoneType"),
    "a list, with out": (lambda: hadamard_patch(X, [1.0] * D, out=X.clone()), "scale must be a tensor, not list"),
    "no norm": (lambda: add_patch_rms_norm(X, X, SCALE, None, 1e-6), "norm_weight must be a tensor, not NoneType"),
    "sparse x": (lambda: hadamard_patch(X.to_sparse(), SCALE), "x must be a dense tensor, not torch.sparse_coo"),
    "sparse down": (
        lambda: hadamard_patch(X, SCALE, down=torch.eye(D)[:, :3].to_sparse(), up=torch.ones(3, D)),
        r"down must be a dense tensor, not torch.sparse_coo: give down.to_dense\(\)",
    ),
    "sparse out": (lambda: hadamard_patch(X, SCALE, out=X.to_sparse()), "out must be a dense tensor"),
    "sparse residual": (lambda: add_patch_rms_norm(X, X.to_sparse(), SCALE, SCALE, 1e-6), "residual must be a dense"),
    "mkldnn": (lambda: hadamard_patch(X.to_mkldnn(), SCALE), "x must be a dense tensor, not torch._mkldnn"),
    "jagged": (
        lambda: hadamard_patch(torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), SCALE),
        "x must be a dense tensor, not a nested one",
    ),
    "no width": (lambda: hadamard_patch(torch.zeros(3, 0), torch.ones(0)), "width of at least 1, not 0"),
    "no width, meta": (
        lambda: hadamard_patch(torch.zeros(3, 0, device="meta"), torch.ones(0, device="meta")),
        "width of at least 1, not 0",
    ),
    "a petabyte": (
        lambda: hadamard_patch(torch.zeros(1, 8).expand(2**45, 8), torch.ones(8)),
        "a result of 1125899906842624 bytes does not fit into memory",
    ),
}


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("call", "message"), ODD.values(), ids=ODD)
def test_what_it_cannot_work_with_is_said_in_a_line(
    call: Callable[[], Any], message: str, recording: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with torch.set_grad_enabled(recording), pytest.raises((InputError, RuntimeError), match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""
