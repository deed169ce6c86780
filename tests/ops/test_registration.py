"""A kernel for a device takes the reference's place there, and can call on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import linearpatch_kernels.ops.topk_kl  # noqa: F401  (defines its operators)
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from linearpatch_kernels.ops.registration import DerivativeError, define_operator, refuse_second_derivative

OPS = torch.ops.linearpatch


def test_a_kernel_takes_the_place_of_the_reference_and_may_fall_back_on_it() -> None:
    calls = []

    def kernel(*arguments: torch.Tensor | None) -> torch.Tensor:
        calls.append(arguments[0].dtype)
        if arguments[0].dtype == torch.float64:
            return OPS.hadamard_patch_reference(*arguments)
        return torch.full_like(arguments[0], 7)

    x, scale = torch.randn(2, 12), torch.randn(12, requires_grad=True)
    before = hadamard_patch(x, scale)
    with torch.library._scoped_library("linearpatch", "IMPL") as library:
        library.impl("hadamard_patch", kernel, "CPU", allow_override=True)
        assert hadamard_patch(x, scale).eq(7).all()
        assert hadamard_patch(x.double(), scale).requires_grad
        torch.testing.assert_close(hadamard_patch(x.double(), scale).float(), before)
        torch.testing.assert_close(OPS.hadamard_patch_reference(x, scale.detach(), *[None] * 4), before.detach())
        assert torch.compile(hadamard_patch, fullgraph=True, backend="aot_eager")(x, scale).eq(7).all()
    assert calls == [torch.float32, torch.float64, torch.float64, torch.float32]
    assert hadamard_patch(x, scale).equal(before)


OPERATORS = [
    *("hadamard_patch", "hadamard_patch_backward", "hadamard_patch_out", "add_patch_rms_norm"),
    *("topk_kl_loss", "topk_kl_loss_backward", "linear_topk_kl_loss"),
]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_its_reference_have_one_schema(name: str) -> None:
    operator, reference = (str(getattr(OPS, n).default._schema) for n in (name, name + "_reference"))
    assert operator.replace(f"::{name}(", "(") == reference.replace(f"::{name}_reference(", "(")


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_are_positional(name: str) -> None:
    assert not any(argument.kwarg_only for argument in getattr(OPS, name).default._schema.arguments)


@pytest.fixture(scope="module")
def sine() -> object:
    """An operator made as ours are, with no compiled kernel."""
    operator = define_operator(
        "test_sine", "(Tensor x, Tensor? other=None) -> Tensor", lambda x, _: x.sin(), lambda x, _: torch.empty_like(x)
    )
    refuse_second_derivative(operator, "sine")
    return OPS.test_sine.default


@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tangent_is_never_dropped(sine: object, recording: bool, requires_grad: bool) -> None:
    """torch.library has no rule for forward mode, and would give a result without a tangent, which counts as 0."""
    x = torch.randn(3, requires_grad=requires_grad)
    for operator in (sine, OPS.test_sine_reference.default):
        with torch.set_grad_enabled(recording), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones(3))
            with pytest.raises(DerivativeError, match="test_sine has no forward-mode derivative"):
                operator(dual)
            with pytest.raises(DerivativeError, match="test_sine has no forward-mode derivative"):
                operator(torch.ones(3), dual)
            assert operator(torch.ones(3)).equal(torch.ones(3).sin())  # beside a tangent, not under it


def test_torch_func_is_refused_in_our_words(sine: object) -> None:
    def of(x: Tensor) -> Tensor:
        return sine(x).sum()

    x = torch.randn(3)
    for transform in (torch.func.jvp, torch.func.vjp):
        with pytest.raises(DerivativeError, match="test_sine"):
            transform(of, *(((x,), (x,)) if transform is torch.func.jvp else (x,)))
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(DerivativeError, match="test_sine"):
            transform(of)(x)
    with pytest.raises(DerivativeError, match="test_sine"):
        torch.func.vmap(torch.func.grad(of))(x[None])
    assert torch.func.vmap(of)(x[None]).equal(x.sin().sum()[None])


def test_what_has_no_second_derivative_says_so_in_the_functions_name(sine: object) -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(DerivativeError, match="sine is differentiable once"):
        sine(x).sum().backward()
