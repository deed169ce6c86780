"""An implementation that a call names: which one computes, what is refused and why, gradients, compilers, no data."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from linearpatch_kernels import backend, backends
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import hadamard_transform
from linearpatch_kernels.nn import HadamardPatch, LinearTopKKLLoss, TopKKLLoss
from linearpatch_kernels.ops.backends import BACKENDS, Support
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss
from tests.ops.test_hadamard_patch_triton import interpreted, run

CPU = backends()["cpu"] is True
built = pytest.mark.skipif(not CPU, reason=f"no compiled kernels: {backends()['cpu']}")
HERE = ["reference", *(["cpu"] if CPU else [])]


@interpreted
def test_every_implementation_against_float64_in_one_process() -> None:
    done = run("-m", "tests.support.impl_cases", "reference", *(["cpu"] if CPU else []), "triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


class Called(TorchDispatchMode):
    """The operators of ours that a call reaches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "linearpatch":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


X, SCALE = torch.randn(3, 12), torch.randn(12)
PROBS, IDS = torch.rand(3, 4).softmax(1), torch.tensor([[0, 3, 5, 7]]).expand(3, 4)
WEIGHT = torch.randn(9, 12)
CALLS: dict[str, Callable[..., Any]] = {
    "hadamard_patch": lambda impl, x=X: hadamard_patch(x, SCALE.to(x), impl=impl),
    "hadamard_patch with out": lambda impl, x=X: hadamard_patch(x, SCALE.to(x), out=x.clone(), impl=impl),
    "add_patch_rms_norm": lambda impl, x=X: add_patch_rms_norm(x, x, SCALE.to(x), SCALE.to(x), 1e-6, impl=impl)[0],
    "topk_kl_loss": lambda impl, x=X: topk_kl_loss(x, PROBS, IDS, impl=impl),
    "linear_topk_kl_loss": lambda impl, x=X: linear_topk_kl_loss(x, WEIGHT.to(x), PROBS, IDS, impl=impl),
    "linear_topk_kl_loss with softcap": lambda impl, x=X: linear_topk_kl_loss(
        x, WEIGHT.to(x), PROBS, IDS, softcap=2.0, impl=impl
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_the_records_are_the_names() -> None:
    assert list(BACKENDS) == list(backends()) == list(backend.NAMES)
    for one in BACKENDS.values():
        assert one.about
        assert one.available() == Support(True) or one.available().reason == backends()[one.name]


@every_call
def test_an_unknown_name_is_refused(call: Callable[..., Any]) -> None:
    for impl in ("fast", None, ("cpu",)):
        with pytest.raises(InputError, match=r"is none of auto, reference, cpu, triton, cuda$"):
            call(impl)


@every_call
def test_one_that_is_not_here_says_why(call: Callable[..., Any]) -> None:
    for impl, state in backends().items():
        if state is not True:
            with pytest.raises(InputError) as refused:
                call(impl)
            assert str(refused.value).endswith(state)
            assert f"impl={impl!r} does not serve" in str(refused.value)
            assert "\n" not in str(refused.value)


@built
def test_why_a_call_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all are there."""
    cpu, triton, cuda = (BACKENDS[name] for name in ("cpu", "triton", "cuda"))
    assert cpu.serves("hadamard_patch", X) == Support(True)
    assert cpu.serves("hadamard_patch", X.double()) == Support(False, "cpu has no float64 kernels")
    assert cpu.serves("hadamard_transform", X) == Support(False, "cpu has no kernel of hadamard_transform")
    monkeypatch.setattr(backend, "available", lambda name: Support(True))
    elsewhere = Support(False, "triton runs on cuda tensors, and this one is on cpu")
    assert triton.serves("hadamard_patch", X) == elsewhere
    assert triton.serves("linear_topk_kl_loss_softcapped", X).reason.startswith("triton has no kernel of linear")
    assert cuda.serves("topk_kl_loss", X) == Support(False, "cuda has no kernel of topk_kl_loss")
    assert cuda.serves("linear_topk_kl_loss", X).reason == "cuda runs on cuda tensors, and this one is on cpu"
    monkeypatch.setattr(backend, "_TRITON_INTERPRETED", True)
    assert triton.serves("hadamard_patch", torch.randn(2, 64)) == Support(True)
    narrow = Support(False, "triton has no kernel of hadamard_patch for a width of 7")
    assert triton.serves("hadamard_patch", torch.randn(2, 7)) == narrow
    assert "width of 16385" in triton.serves("linear_topk_kl_loss", torch.empty(0, 16385)).reason
    assert BACKENDS["reference"].serves("hadamard_patch", X.double()) == Support(True)


@built
@every_call
def test_float64_is_refused_by_kernels(call: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"cpu has no float64 kernels$"):
        call("cpu", X.double())
    assert call("reference", X.double()).dtype == call("auto", X.double()).dtype == torch.float64


@built
def test_a_float64_head_is_refused_too() -> None:
    with pytest.raises(InputError, match="no float64"):
        linear_topk_kl_loss(X, WEIGHT.double(), PROBS, IDS, impl="cpu")


@every_call
@pytest.mark.parametrize("impl", HERE)
def test_the_named_one_computes(call: Callable[..., Any], impl: str) -> None:
    with Called() as called:
        call(impl)
    assert called.names
    assert all(name.endswith("_reference") == (impl == "reference") for name in called.names)


@pytest.mark.parametrize("name", ["hadamard_patch", "topk_kl_loss", "linear_topk_kl_loss"])
@pytest.mark.parametrize("impl", HERE)
def test_the_gradient_is_computed_by_the_same(name: str, impl: str) -> None:
    grads = []
    for asked in ("auto", impl):
        x = X.clone().requires_grad_()
        y = CALLS[name](asked, x).sum()
        with Called() as called:
            grads += torch.autograd.grad(y, x)
        assert all(name.endswith("_reference") == (asked == "reference") for name in called.names)
    torch.testing.assert_close(grads[0], grads[1])


@built
def test_what_no_kernel_computes_is_refused_and_not_replaced() -> None:
    x = X.clone().requires_grad_()
    first = torch.autograd.grad(hadamard_patch(x, SCALE, impl="cpu").square().sum(), x)
    assert first[0].isfinite().all()
    said = "impl='cpu' has no such derivative of hadamard_patch"
    with pytest.raises(InputError, match=said):
        torch.autograd.grad(hadamard_patch(x, SCALE, impl="cpu").square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match=said):
        torch.func.jvp(lambda x: hadamard_patch(x, SCALE, impl="cpu"), (X,), (X,))
    with pytest.raises(InputError, match=said):
        torch.func.grad(lambda x: hadamard_patch(x, SCALE, impl="cpu").sum())(X)
    for impl in ("auto", "reference"):
        with forward_ad.dual_level():
            dual = hadamard_patch(forward_ad.make_dual(X, X), SCALE, impl=impl)
            torch.testing.assert_close(*forward_ad.unpack_dual(dual))
        (grad,) = torch.autograd.grad(hadamard_patch(x, SCALE, impl=impl).square().sum(), x, create_graph=True)
        torch.testing.assert_close(grad, first[0])
        assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()
    assert hadamard_patch(X, SCALE).isfinite().all()  # nothing is left behind


@every_call
@pytest.mark.parametrize("impl", HERE)
def test_one_graph(call: Callable[..., Any], impl: str) -> None:
    compiled = torch.compile(lambda x: call(impl, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), call(impl))
    if call not in (CALLS["add_patch_rms_norm"], CALLS["hadamard_patch with out"]):
        grads = []
        for function in (compiled, lambda x: call(impl, x)):
            x = X.clone().requires_grad_()
            grads += torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(*grads)


def test_a_compiled_call_of_one_that_is_not_here_says_why() -> None:
    missing = [name for name, state in backends().items() if state is not True]
    for impl in missing:
        with pytest.raises(InputError, match=f"impl='{impl}' does not serve hadamard_patch here"):
            torch.compile(lambda x, impl=impl: hadamard_patch(x, SCALE, impl=impl), backend="eager")(X)


@every_call
def test_shapes_are_worked_out_for_all(call: Callable[..., Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for impl in BACKENDS:
            assert call(impl, mode.from_tensor(X)).shape == call("auto", X).shape


def test_export_keeps_the_name() -> None:
    class Joint(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hadamard_patch(x, SCALE, impl="reference")

    assert "hadamard_patch_reference" in str(torch.export.export(Joint(), (X,), strict=False).graph)


@pytest.mark.parametrize("impl", HERE)
def test_vmap(impl: str) -> None:
    batch = torch.randn(4, 3, 12)
    ours = torch.func.vmap(lambda x: hadamard_patch(x, SCALE, impl=impl))(batch)
    torch.testing.assert_close(ours, hadamard_patch(batch, SCALE))


def test_the_call_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", "cuda")
    with pytest.raises(RuntimeError, match="LINEARPATCH_BACKEND=cuda has no hadamard_patch for cpu tensors"):
        hadamard_patch(X, SCALE)
    for impl in HERE:
        for call in CALLS.values():
            assert call(impl).isfinite().all()


def test_the_transform_is_plain_pytorch() -> None:
    assert hadamard_transform(X, impl="reference").equal(hadamard_transform(X))
    assert hadamard_patch_reference(X, SCALE, impl="reference").equal(hadamard_patch_reference(X, SCALE))
    for impl in ("cpu", "triton", "cuda", "fast"):
        with pytest.raises(InputError, match=f"impl='{impl}' has no kernel of hadamard_transform: it is plain PyTorch"):
            hadamard_transform(X, impl=impl)
        with pytest.raises(InputError, match=f"impl='{impl}' has no kernel of hadamard_patch: it is plain PyTorch"):
            hadamard_patch_reference(X, SCALE, impl=impl)


@pytest.mark.parametrize("impl", HERE)
def test_modules_pass_it_on(impl: str) -> None:
    patch = HadamardPatch(12, rank=2, pre_scale=True, impl=impl)
    losses = TopKKLLoss("full", impl=impl), LinearTopKKLLoss("full", impl=impl)
    with torch.no_grad(), Called() as called:  # else autograd records the reference, operation by operation
        patch(X)
        losses[0](X, PROBS, IDS)
        losses[1](X, WEIGHT, PROBS, IDS)
    assert len(called.names) >= 3
    assert all(name.endswith("_reference") == (impl == "reference") for name in called.names)
    assert json.dumps(patch.description()) == json.dumps(HadamardPatch(12, rank=2, pre_scale=True).description())
    torch.testing.assert_close(patch.to_dense(), torch.eye(12, dtype=torch.float64))
    assert all(f"impl='{impl}'" in repr(loss) for loss in losses)
    assert "impl" not in repr(TopKKLLoss())


def test_modules_that_were_pickled_without_one() -> None:
    for module in (HadamardPatch(12), TopKKLLoss(), LinearTopKKLLoss()):
        del module.__dict__["impl"]
        assert module.impl == "auto"
    with pytest.raises(InputError, match="is none of"):
        HadamardPatch(12, impl="fast")(X)
