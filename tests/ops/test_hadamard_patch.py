"""The patch operators against the matrices they stand for, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch

OPS = torch.ops.linearpatch
OPTIONAL = ("pre_scale", "post_scale", "down", "up")
# Which optional operands are there. Not all subsets: each alone, all, and none.
OPERANDS = {
    "scale": (),
    "pre": ("pre_scale",),
    "post": ("post_scale",),
    "low-rank": ("down", "up"),
    "all": OPTIONAL,
}
with_operands = pytest.mark.parametrize("names", OPERANDS.values(), ids=OPERANDS)
HALVES = [torch.float16, torch.bfloat16]


def operands(d: int, names: tuple[str, ...], dtype: torch.dtype = torch.float64, rank: int = 3) -> dict[str, Tensor]:
    shapes = {"pre_scale": (d,), "post_scale": (d,), "down": (d, rank), "up": (rank, d)}
    made = {name: torch.randn(shapes[name]) for name in names}
    return {name: tensor.to(dtype) for name, tensor in ({"scale": torch.randn(d)} | made).items()}


def plain(x: Tensor, p: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """The contract's expression by dense matrices, all of it in one dtype."""
    h = hadamard_matrix(x.shape[-1], dtype=dtype)
    x, p = x.to(dtype), {name: tensor.to(dtype) for name, tensor in p.items()}
    y = ((x * p.get("pre_scale", 1)) @ h * p["scale"]) @ h.T * p.get("post_scale", 1)
    return y + (x @ p["down"]) @ p["up"] if "down" in p else y


def positional(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return (x, p["scale"], *(p.get(name) for name in OPTIONAL))


@with_operands
@pytest.mark.parametrize("d", [1, 7, 12, 20, 28, 30, 44, 64, 72])
@pytest.mark.parametrize("op", [OPS.hadamard_patch, OPS.hadamard_patch_reference], ids=["dispatched", "reference"])
def test_float64_is_the_product_by_the_dense_matrix(d: int, names: tuple[str, ...], op: Callable[..., Tensor]) -> None:
    x, p = torch.randn(2, 5, d, dtype=torch.float64), operands(d, names)
    torch.testing.assert_close(op(*positional(x, p)), plain(x, p), rtol=0, atol=1e-12)


@with_operands
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("d", [12, 44, 576])
@pytest.mark.parametrize("op", [OPS.hadamard_patch, OPS.hadamard_patch_reference], ids=["dispatched", "reference"])
def test_error_is_at_most_twice_that_of_the_plain_expression(
    d: int, names: tuple[str, ...], dtype: torch.dtype, op: Callable[..., Tensor]
) -> None:
    x, p = torch.randn(16, d).to(dtype), operands(d, names, dtype)
    exact = plain(x, p)
    y = op(*positional(x, p))
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * (plain(x, p, dtype).double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, p = torch.randn(16, 44).to(dtype), operands(44, OPTIONAL, torch.float32)
    exact = plain(x, p)
    # Half a unit in the last place, and what float32 arithmetic may move the tie by.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + torch.finfo(dtype).smallest_normal + 1e-5
    assert ((hadamard_patch(x, **p).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_any_float_dtype_are_upcast(dtype: torch.dtype, scales: torch.dtype) -> None:
    x, p = torch.randn(4, 20).to(dtype), operands(20, OPTIONAL, scales)
    y = hadamard_patch(x, **p)
    assert y.dtype == dtype
    assert y.equal(hadamard_patch(x, **{name: tensor.float() for name, tensor in p.items()}))


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
        torch.randn(2, 0, 3, 24),
    ],
    ids=["rows", "columns", "every other", "transposed", "expanded", "vector", "empty", "empty inside"],
)
def test_strides_and_leading_dimensions(x: Tensor) -> None:
    p = operands(24, OPTIONAL)
    y = hadamard_patch(x, **p)
    assert y.shape == x.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), plain(x, p), rtol=0, atol=2e-4)
    out = torch.full(x.shape, float("nan")) if x.stride(0) == 0 else torch.empty_like(x)
    assert hadamard_patch(x, **p, out=out) is out
    assert out.equal(y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_stays_in_its_row(bad: float) -> None:
    x, p = torch.randn(3, 24), operands(24, OPTIONAL)
    x[1, 5] = bad
    y = hadamard_patch(x, **p)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]], hadamard_patch(x[[0, 2]], **p))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("d", [6, 7, 12, 64])
@pytest.mark.parametrize("op", [OPS.hadamard_patch, OPS.hadamard_patch_reference], ids=["dispatched", "reference"])
def test_non_finite_spoils_what_is_mixed_with_it(d: int, bad: float, op: Callable[..., Tensor]) -> None:
    x, scale = torch.randn(3, d), torch.rand(d) + 0.5
    x[1, 5] = bad
    y = op(x, scale)
    assert not y[1][hadamard_matrix(d)[5] != 0].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_inputs_are_left_alone() -> None:
    x, p = torch.randn(3, 24), operands(24, OPTIONAL, torch.float32)
    before = [tensor.clone() for tensor in (x, *p.values())]
    y = hadamard_patch(x, **p)
    assert all(a.equal(b) for a, b in zip(before, (x, *p.values()), strict=True))
    assert y.data_ptr() != x.data_ptr()


# --- out= ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_out_may_be_x_itself(dtype: torch.dtype) -> None:
    x, p = torch.randn(6, 44).to(dtype), operands(44, OPTIONAL)
    y = hadamard_patch(x, **p)
    assert hadamard_patch(x, **p, out=x) is x
    assert x.equal(y)


def test_out_may_be_strided() -> None:
    x, p = torch.randn(6, 12), operands(12, ())
    wide = torch.zeros(6, 24)
    hadamard_patch(x, **p, out=wide[:, ::2])
    assert wide[:, ::2].equal(hadamard_patch(x, **p))
    assert wide[:, 1::2].eq(0).all()


def test_out_refuses_to_lose_gradients() -> None:
    x, scale, out = torch.randn(6, 12), torch.randn(12, requires_grad=True), torch.empty(6, 12)
    with pytest.raises(RuntimeError, match="not differentiable"):
        hadamard_patch(x, scale, out=out)
    with torch.no_grad():
        assert hadamard_patch(x, scale, out=out).equal(hadamard_patch(x, scale))


def test_out_tells_autograd_that_a_saved_tensor_changed() -> None:
    x, scale = torch.randn(6, 12, requires_grad=True), torch.randn(12)
    y = x * 2
    z = y.square()
    hadamard_patch(y.detach(), scale, out=y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("out", [torch.empty(5, 12), torch.empty(6, 12, dtype=torch.float16)], ids=["shape", "dtype"])
def test_out_must_fit(out: Tensor) -> None:
    with pytest.raises((InputError, RuntimeError), match="out must be"):
        hadamard_patch(torch.randn(6, 12), torch.randn(12), out=out)


# --- gradients -------------------------------------------------------------------------------------------------------


@with_operands
@pytest.mark.parametrize("d", [12, 20, 28, 44, 6])
def test_gradients_are_those_of_the_plain_expression(d: int, names: tuple[str, ...]) -> None:
    x, p = torch.randn(2, 3, d, dtype=torch.float64, requires_grad=True), operands(d, names)
    wanted = [x, *(tensor.requires_grad_() for tensor in p.values())]
    grad = torch.randn(2, 3, d, dtype=torch.float64)
    ours = torch.autograd.grad(hadamard_patch(x, **p), wanted, grad)
    theirs = torch.autograd.grad(plain(x, p), wanted, grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@with_operands
def test_gradcheck(names: tuple[str, ...]) -> None:
    x, p = torch.randn(2, 12, dtype=torch.float64, requires_grad=True), operands(12, names)
    parameters = [tensor.requires_grad_() for tensor in p.values()]
    assert torch.autograd.gradcheck(lambda x, *q: hadamard_patch(x, **dict(zip(p, q, strict=True))), (x, *parameters))


@pytest.mark.parametrize("wanted", ["x", "scale", *OPTIONAL])
def test_one_gradient_alone_is_the_same(wanted: str) -> None:
    x, p = torch.randn(4, 20, dtype=torch.float64), operands(20, OPTIONAL)
    every = {"x": x, **p}
    every[wanted].requires_grad_()
    hadamard_patch(x, **p).square().sum().backward()
    (exact,) = torch.autograd.grad(plain(x, p).square().sum(), every[wanted])
    torch.testing.assert_close(every[wanted].grad, exact, rtol=0, atol=1e-9)
    assert all(tensor.grad is None for name, tensor in every.items() if name != wanted)


def test_backward_computes_what_is_wanted_and_nothing_else() -> None:
    x, p = torch.randn(4, 20), operands(20, OPTIONAL, torch.float32)
    whole = OPS.hadamard_patch_backward(x, *positional(x, p), 0b111111)
    for bit in range(6):
        alone = OPS.hadamard_patch_backward(x, *positional(x, p), 1 << bit)
        assert [gradient.numel() > 0 for gradient in alone] == [i == bit for i in range(6)]
        torch.testing.assert_close(alone[bit], whole[bit])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_gradients_in_low_precision(dtype: torch.dtype, parameters: torch.dtype) -> None:
    """Held to automatic differentiation of the plain expression in float32, rounded where the contract rounds."""
    x, p = torch.randn(32, 44).to(dtype).requires_grad_(), operands(44, OPTIONAL, parameters)
    wanted = [x, *(tensor.requires_grad_() for tensor in p.values())]
    grad = torch.randn(32, 44).to(dtype)
    ours = torch.autograd.grad(hadamard_patch(x, **p), wanted, grad)
    exact = torch.autograd.grad(plain(x, p), wanted, grad.double())
    single = torch.autograd.grad(plain(x, p, torch.float32), wanted, grad.float())
    for tensor, one, true, other in zip(wanted, ours, exact, single, strict=True):
        assert one.dtype == tensor.dtype
        assert (one.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + 1e-4


@pytest.mark.parametrize("rows", [0, 1])
def test_gradients_of_few_rows(rows: int) -> None:
    x, p = torch.randn(rows, 12, requires_grad=True), operands(12, OPTIONAL, torch.float32)
    wanted = [x, *(tensor.requires_grad_() for tensor in p.values())]
    ours = torch.autograd.grad(hadamard_patch(x, **p).sum(), wanted)
    exact = torch.autograd.grad(plain(x, p).sum(), wanted)
    for one, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-4, atol=1e-4)


# --- what PyTorch does with an operator ------------------------------------------------------------------------------


@with_operands
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(names: tuple[str, ...], dtype: torch.dtype) -> None:
    x, p = torch.randn(3, 12).to(dtype), operands(12, names, torch.float32)
    opcheck(OPS.hadamard_patch.default, positional(x, p))
    opcheck(OPS.hadamard_patch_out.default, (*positional(x, p), torch.empty_like(x)))
    opcheck(OPS.hadamard_patch_backward.default, (torch.randn_like(x), *positional(x, p), 0b101011))
    norm = torch.randn(12)
    opcheck(OPS.add_patch_rms_norm.default, (x, torch.randn_like(x), p["scale"], norm, 1e-5, *positional(x, p)[2:]))
    trained = tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in positional(x, p))
    opcheck(OPS.hadamard_patch.default, trained)


@pytest.mark.parametrize("given", [0, 1, 2, 4])
@pytest.mark.parametrize("variant", ["", "_reference"])
def test_optional_tensors_may_be_left_out(variant: str, given: int) -> None:
    patch, norm = (getattr(OPS, name + variant).default for name in ("hadamard_patch", "add_patch_rms_norm"))
    x, weight, p = torch.randn(3, 12), torch.randn(12), operands(12, OPTIONAL[:given], torch.float32)
    scale, *optional = p.values()
    torch.testing.assert_close(patch(x, scale, *optional).double(), plain(x, p), rtol=0, atol=1e-4)
    opcheck(patch, (x, scale, *optional))
    opcheck(norm, (x, torch.randn_like(x), scale, weight, 1e-5, *optional))
    if variant:
        return
    trained = [tensor.requires_grad_() for tensor in (x, scale, *optional)]
    opcheck(patch, tuple(trained))
    ours = torch.autograd.grad(patch(*trained).square().sum(), trained)
    theirs = torch.autograd.grad(plain(x, dict(zip(p, trained[1:], strict=True))).square().sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    stacked = torch.stack([x, 2 * x]).detach()
    together = torch.func.vmap(patch, in_dims=(0, *[None] * (1 + given)))(stacked, scale, *optional)
    torch.testing.assert_close(together, patch(stacked, scale, *optional))
    each = torch.func.vmap(patch, in_dims=(None, 0, *[None] * given))(x, torch.stack([scale, scale]), *optional)
    torch.testing.assert_close(each[1], patch(x, scale, *optional))


def test_opcheck_of_strides_and_no_rows() -> None:
    p = operands(12, OPTIONAL, torch.float32)
    for x in (torch.randn(12, 3).T, torch.randn(0, 12), torch.randn(2, 3, 12).transpose(0, 1)):
        opcheck(OPS.hadamard_patch.default, positional(x, p))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_any_number_of_rows(backend: str) -> None:
    p = {name: tensor.requires_grad_() for name, tensor in operands(12, OPTIONAL, torch.float32).items()}
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x: hadamard_patch(x, **p) * 2, fullgraph=True, backend=counter)
    for rows in (2, 3, 17, 64):
        x = torch.randn(rows, 12, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        torch.testing.assert_close(y, hadamard_patch(x, **p) * 2)
        (ours,) = torch.autograd.grad(y.sum(), x)
        (theirs,) = torch.autograd.grad(hadamard_patch(x, **p).sum() * 2, x)
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
    for rows in (1, 0):
        assert compiled(torch.randn(rows, 12)).shape == (rows, 12)


def test_out_and_norm_compile() -> None:
    p = operands(12, OPTIONAL, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, residual: Tensor, norm: Tensor) -> Tensor:
        normed, residual = add_patch_rms_norm(x, residual, norm_weight=norm, eps=1e-6, **p)
        hadamard_patch(normed, **p, out=normed)
        return normed + residual

    x, residual, norm = torch.randn(3, 12), torch.randn(3, 12), torch.randn(12)
    normed, new_residual = add_patch_rms_norm(x, residual, norm_weight=norm, eps=1e-6, **p)
    torch.testing.assert_close(step(x, residual, norm), hadamard_patch(normed, **p) + new_residual)


def test_exports_with_any_number_of_rows() -> None:
    class Joint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.randn(12))

        def forward(self, x: Tensor) -> Tensor:
            return hadamard_patch(x, self.scale)

    joint = Joint()
    shapes = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(joint, (torch.randn(4, 12),), dynamic_shapes=shapes)
    assert "linearpatch.hadamard_patch.default" in str(exported.graph)
    x = torch.randn(9, 12)
    assert exported.module()(x).equal(joint(x))


@pytest.mark.parametrize("batched", [("x",), ("scale",), ("x", "scale", *OPTIONAL), ("x", "down")], ids="+".join)
def test_vmap(batched: tuple[str, ...]) -> None:
    every = {"x": torch.randn(5, 12), **operands(12, OPTIONAL, torch.float32)}
    stacked = {n: torch.stack([t, 2 * t, t - 1], dim=-1) if n in batched else t for n, t in every.items()}
    in_dims = ({name: -1 if name in batched else None for name in every},)
    together = torch.func.vmap(lambda p: hadamard_patch(**p), in_dims=in_dims)(stacked)
    for i, y in enumerate(together):
        torch.testing.assert_close(
            y, hadamard_patch(**{n: t[..., i] if n in batched else t for n, t in stacked.items()})
        )


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch calls it
        if func is OPS.hadamard_patch.default:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_vmap_over_rows_is_one_call() -> None:
    x, scale = torch.randn(5, 12, 3), torch.randn(12)
    with Calls() as calls:
        torch.func.vmap(lambda x: hadamard_patch(x, scale), in_dims=2)(x)
    assert calls.shapes == [(3, 5, 12)]


def test_vmap_keeps_gradients() -> None:
    x, scale = torch.randn(3, 5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    y = torch.func.vmap(lambda x: hadamard_patch(x, scale))(x)
    ours = torch.autograd.grad(y.square().sum(), (x, scale))
    theirs = torch.autograd.grad(hadamard_patch(x, scale).square().sum(), (x, scale))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrong", ["x", "scale", "down"])
def test_meta_among_others_is_refused(wrong: str) -> None:
    every = {"x": torch.randn(2, 12), **operands(12, OPTIONAL, torch.float32)}
    with pytest.raises(InputError, match="hadamard_patch needs its tensors on one device, not on cpu and meta"):
        hadamard_patch(**every | {wrong: every[wrong].to("meta")})


def test_meta_tensors_have_shapes_only() -> None:
    y = hadamard_patch(torch.empty(2, 12, device="meta", dtype=torch.bfloat16), torch.empty(12, device="meta"))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 12), torch.bfloat16)


def test_inference_mode() -> None:
    x, scale = torch.randn(3, 12), torch.nn.Parameter(torch.randn(12))
    with torch.inference_mode():
        y = hadamard_patch(x, scale)
    assert y.is_inference()
    assert y.equal(hadamard_patch(x, scale))


def test_autocast_changes_nothing() -> None:
    x, p = torch.randn(3, 12), operands(12, OPTIONAL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard_patch(x, **p)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, hadamard_patch(x, **p))


# --- with the norm ---------------------------------------------------------------------------------------------------


@with_operands
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_add_patch_rms_norm(names: tuple[str, ...], dtype: torch.dtype, rows: int) -> None:
    def expression(dtype: torch.dtype) -> list[Tensor]:
        summed = plain((x.to(dtype) + residual.to(dtype)), p, dtype)
        return [torch.nn.functional.rms_norm(summed, (44,), norm.to(dtype), 1e-3), summed]

    x, residual = torch.randn(rows, 44).to(dtype), torch.randn(rows, 44).to(dtype)
    p, norm = operands(44, names, torch.float32), torch.randn(44)
    results = add_patch_rms_norm(x, residual, norm_weight=norm, eps=1e-3, **p)
    for ours, exact, theirs in zip(results, expression(torch.float64), expression(dtype), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).abs().amax() if rows else torch.tensor(0.0)
        bound = 2 * (theirs.double() - exact).abs().amax() if rows else torch.tensor(0.0)
        assert ours.shape == exact.shape
        assert error <= bound + (1e-12 if dtype == torch.float64 else 1e-6)


def test_add_patch_rms_norm_refuses_a_gradient() -> None:
    x, scale, norm = torch.randn(3, 12, requires_grad=True), torch.randn(12), torch.randn(12)
    normed, _ = add_patch_rms_norm(x, torch.randn(3, 12), scale, norm, 1e-6)
    with pytest.raises(RuntimeError, match="add_patch_rms_norm is not differentiable: use hadamard_patch"):
        normed.sum().backward()


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.randn(11)}, "scale must be"),
        ({"scale": torch.randn(1)}, "scale must be"),
        ({"scale": torch.randn(1, 12)}, "scale must be"),
        ({"scale": torch.ones(12, dtype=torch.int64)}, "scale must be"),
        ({"pre_scale": torch.randn(13)}, "pre_scale must be"),
        ({"post_scale": torch.randn(3, 12)}, "post_scale must be"),
        ({"down": None}, "belong together"),
        ({"up": None}, "belong together"),
        ({"down": torch.randn(11, 3)}, "down and up must be"),
        ({"down": torch.randn(12, 2)}, "down and up must be"),
        ({"up": torch.randn(3, 12, 1)}, "down and up must be"),
        ({"x": torch.ones(2, 12, dtype=torch.int32)}, "floating x"),
        ({"x": torch.tensor(1.0)}, "floating x"),
    ],
)
def test_bad_operands(change: dict[str, Tensor | None], message: str) -> None:
    every = {"x": torch.randn(2, 12), **operands(12, OPTIONAL, torch.float32)} | change
    with pytest.raises((InputError, RuntimeError), match=message):
        hadamard_patch(**every)
    meta = {name: None if tensor is None else tensor.to("meta") for name, tensor in every.items()}
    with pytest.raises((InputError, RuntimeError), match=message):
        hadamard_patch(**meta)


@pytest.mark.parametrize(
    ("residual", "norm", "message"),
    [
        (torch.randn(3, 12), torch.randn(12), "residual must be"),
        (torch.randn(2, 12).half(), torch.randn(12), "residual must be"),
        (torch.randn(2, 12), torch.randn(11), "norm_weight must be"),
        (torch.randn(2, 12), torch.ones(12, dtype=torch.int32), "norm_weight must be"),
    ],
)
def test_bad_operands_of_the_norm(residual: Tensor, norm: Tensor, message: str) -> None:
    with pytest.raises((InputError, RuntimeError), match=message):
        add_patch_rms_norm(torch.randn(2, 12), residual, torch.randn(12), norm, 1e-6)


def test_tensors_are_keyword_only_in_python() -> None:
    with pytest.raises(TypeError):
        hadamard_patch(torch.randn(2, 12), torch.randn(12), torch.randn(12))  # type: ignore[misc]  # the mistake under test


def test_batched_under_no_grad() -> None:
    x, scale = torch.randn(4, 3, 12), torch.rand(12)
    matrix = hadamard_matrix(12, dtype=torch.float32)
    with torch.no_grad():
        y = torch.func.vmap(hadamard_patch, in_dims=(0, None))(x, scale)
    torch.testing.assert_close(y, (x @ matrix * scale) @ matrix.T)
