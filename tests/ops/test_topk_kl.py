"""The Top-K losses against the definition written token by token, in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.nn import LinearTopKKLLoss, TopKKLLoss
from linearpatch_kernels.ops.registration import DerivativeError
from linearpatch_kernels.ops.topk_kl import gpu, linear_topk_kl_loss, operator, reference, topk_kl_loss
from tests.support.topk_kl_cases import definition, wrong_in_extremes

OPS = torch.ops.linearpatch
HALVES = [torch.float16, torch.bfloat16]
with_normalization = pytest.mark.parametrize("normalization", ["topk", "full", "tail"])
with_temperature = pytest.mark.parametrize("temperature", [1.0, 1.7])


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    probs: Tensor
    ids: Tensor


# No temperatures and no soft-caps: what float32 has no reciprocal of, and what are no numbers.
NO_SCALES = (1e-45, 1e-60, 1e-31, 1e31, 1e300, 10**400, -1e-60, "1", 1j, [1.0], torch.ones(2))


def problem(
    n: int = 7, d: int = 5, v: int = 23, k: int = 4, normalization: str = "topk", holes: bool = True
) -> Problem:
    """Distinct random ids; with holes also ignored tokens, absent slots, duplicates and probabilities of zero."""
    ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)]) if n else torch.empty(0, k, dtype=torch.int64)
    probs = torch.rand(n, k, dtype=torch.float64) + 0.05
    if holes and n > 5:
        ids[1] = -1
        ids[2, 0] = -1
        ids[3, 1:] = -1
        ids[4, 2] = ids[4, 0]
        probs[5, 1] = 0
    whole = torch.where(ids >= 0, probs, 0).sum(1, keepdim=True)
    probs = probs / whole.where(whole > 0, 1) * (1 if normalization == "topk" else 0.8)
    random = [torch.randn(shape, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))]
    return Problem(*random, probs, ids)


@with_normalization
@with_temperature
@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
def test_loss_and_gradient_of_logits(normalization: str, temperature: float, holes: bool) -> None:
    p = problem(normalization=normalization, holes=holes)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    ours = topk_kl_loss(logits, p.probs, p.ids, normalization=normalization, temperature=temperature)
    exact = definition(logits, p.probs, p.ids, normalization, temperature)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    (ours_grad,), (exact_grad,) = (torch.autograd.grad(3 * loss, logits) for loss in (ours, exact))
    torch.testing.assert_close(ours_grad, exact_grad, rtol=0, atol=1e-12)


@with_normalization
@with_temperature
def test_a_soft_cap_is_that_of_the_logits(normalization: str, temperature: float) -> None:
    p = problem(normalization=normalization)
    wanted = [tensor.requires_grad_() for tensor in (p.hidden, p.weight, p.bias)]
    options = {"normalization": normalization, "temperature": temperature}
    ours = linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, bias=p.bias, softcap=1.5, **options)
    logits = 1.5 * (torch.nn.functional.linear(p.hidden, p.weight, p.bias) / 1.5).tanh()
    exact = definition(logits, p.probs, p.ids, normalization, temperature)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@with_normalization
@with_temperature
@pytest.mark.parametrize("biased", [False, True], ids=["weight", "weight+bias"])
def test_linear_loss_and_gradients(normalization: str, temperature: float, biased: bool) -> None:
    p = problem(normalization=normalization)
    wanted = [tensor.requires_grad_() for tensor in (p.hidden, p.weight, p.bias)[: 2 + biased]]
    bias = p.bias if biased else None
    options = {"normalization": normalization, "temperature": temperature}
    ours = linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, bias=bias, **options)
    logits = torch.nn.functional.linear(p.hidden, p.weight, bias)
    exact = definition(logits, p.probs, p.ids, normalization, temperature)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * exact, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_topk_is_the_papers_loss() -> None:
    """KL over the K, `batchmean` (LinearPatch, section 3.3), in the words of the public function's documentation."""
    p = problem(holes=False)
    logits = p.hidden @ p.weight.T
    student = logits.gather(1, p.ids).log_softmax(1)
    exact = torch.nn.functional.kl_div(student, p.probs, reduction="batchmean")
    torch.testing.assert_close(topk_kl_loss(logits, p.probs, p.ids), exact)


@with_normalization
def test_student_equal_to_teacher_loses_nothing(normalization: str) -> None:
    p = problem(holes=False)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    true = logits.detach().softmax(1).gather(1, p.ids)
    probs = true / true.sum(1, keepdim=True) if normalization == "topk" else true
    loss = topk_kl_loss(logits, probs, p.ids, normalization=normalization)
    (gradient,) = torch.autograd.grad(loss, logits)
    if normalization == "full":  # what the teacher left out is missing from this sum, so that it has no minimum here
        assert gradient.abs().max() > 1e-3
    else:
        assert loss.abs() < 1e-12
        assert gradient.abs().max() < 1e-12


@with_normalization
def test_gradcheck(normalization: str) -> None:
    p = problem(normalization=normalization)
    wanted = [tensor.requires_grad_() for tensor in (p.hidden, p.weight, p.bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_topk_kl_loss(h, w, p.probs, p.ids, bias=b, normalization=normalization), wanted
    )
    logits = (p.hidden @ p.weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: topk_kl_loss(logits, p.probs, p.ids, normalization=normalization), logits
    )


@with_normalization
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone_is_the_same(normalization: str, wanted: str) -> None:
    p = problem(normalization=normalization)
    tensor = getattr(p, wanted).requires_grad_()
    linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, bias=p.bias, normalization=normalization).backward()
    logits = torch.nn.functional.linear(p.hidden, p.weight, p.bias)
    (exact,) = torch.autograd.grad(definition(logits, p.probs, p.ids, normalization, 1.0), tensor)
    torch.testing.assert_close(tensor.grad, exact, rtol=0, atol=1e-12)


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16])
def test_error_is_at_most_twice_that_of_the_plain_expression(
    normalization: str, dtype: torch.dtype, teacher: torch.dtype
) -> None:
    p = problem(n=16, d=32, v=101, k=9, normalization=normalization)
    hidden, weight, probs = p.hidden.to(dtype), p.weight.to(dtype), p.probs.to(teacher)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        logits = h @ w.T
        wide = logits if dtype == torch.float64 else logits.float()
        loss = definition(wide, probs, p.ids, normalization, 1.0)
        return loss, *torch.autograd.grad(loss, (h, w, logits))

    exact, low = plain(torch.float64), plain(dtype)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_topk_kl_loss(h, w, probs, p.ids, normalization=normalization)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, (h, w))
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    for ours, true, other in zip((loss, *gradients), exact[:3], low[:3], strict=True):
        assert (ours.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + 1e-6

    logits = (hidden @ weight.T).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    true_loss = definition(wide, probs, p.ids, normalization, 1.0)
    loss = topk_kl_loss(logits, probs, p.ids, normalization=normalization)
    (gradient,), (true_gradient,) = torch.autograd.grad(loss, logits), torch.autograd.grad(true_loss, wide)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_hidden_and_weight_may_differ_in_dtype() -> None:
    p = problem()
    hidden, weight = p.hidden.bfloat16().requires_grad_(), p.weight.float().requires_grad_()
    loss = linear_topk_kl_loss(hidden, weight, p.probs, p.ids)
    torch.testing.assert_close(loss, linear_topk_kl_loss(hidden.float(), weight, p.probs, p.ids))
    loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@with_normalization
def test_small_gradients_survive_half_precision_and_a_loss_scale(normalization: str) -> None:
    """A mean over many tokens times GradScaler's 65536: the gradient must not underflow before it is scaled."""
    p = problem(n=4096, d=4, v=11, k=3, normalization=normalization, holes=False)
    hidden, weight = p.hidden.half().requires_grad_(), p.weight.half()
    loss = linear_topk_kl_loss(hidden, weight, p.probs, p.ids, normalization=normalization)
    (loss * 65536).backward()
    wide = hidden.detach().double().requires_grad_()
    (linear_topk_kl_loss(wide, weight.double(), p.probs, p.ids, normalization=normalization) * 65536).backward()
    assert (hidden.grad.double() - wide.grad).norm() < 0.01 * wide.grad.norm()


def test_logits_far_from_zero_and_nothing_beside_the_slots() -> None:
    """With whatever kernels are there; the reference alone in float32 too."""
    assert not wrong_in_extremes()
    assert not wrong_in_extremes(OPS.linear_topk_kl_loss_reference)


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("temperature", [1.0, 1.7, 0.3])
@pytest.mark.parametrize("shift", [0.0, 100.0, -1000.0, 1e4, 1e5])
def test_given_logits_are_as_exact_as_log_softmax_wherever_they_lie(
    normalization: str, dtype: torch.dtype, temperature: float, shift: float
) -> None:
    shift = min(shift, 3e4) if dtype == torch.float16 else shift
    p = problem(n=64, v=200, k=20, normalization=normalization)
    logits = (torch.randn(64, 200) * 3 + shift).to(dtype)

    def differentiated(logits: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        loss = loss_of(logits) * 64  # so that rounding to a half is what it is of one token's gradient
        return loss / 64, torch.autograd.grad(loss, logits)[0].double()

    options = p.ids, normalization, temperature
    exact = differentiated(logits.double(), lambda z: definition(z, p.probs, *options))
    plain = differentiated(logits, lambda z: definition(z.float(), p.probs, *options))
    ours = differentiated(
        logits, lambda z: topk_kl_loss(z, p.probs, p.ids, normalization=normalization, temperature=temperature)
    )
    for one, other, true, stated in zip(ours, plain, exact, (2e-7, 1e-6), strict=True):
        largest = max(1.0, true.abs().max().item())
        assert (one - true).abs().max() <= 2 * (other - true).abs().max() + stated * largest


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@with_normalization
def test_the_default_dtype_changes_nothing(normalization: str, default: torch.dtype) -> None:
    p = Problem(*(tensor.float() for tensor in problem(normalization=normalization)[:4]), problem().ids)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    hidden = p.hidden.requires_grad_()

    def run() -> list[Tensor]:
        given = topk_kl_loss(logits, p.probs, p.ids, normalization=normalization)
        linear = linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, bias=p.bias, normalization=normalization)
        alone = reference.linear_topk_kl_loss_reference(
            *(hidden.detach(), p.weight, p.probs, p.ids, p.bias, normalization, 1.3, True, True, True)
        )
        return [given, linear, *torch.autograd.grad(given + linear, (logits, hidden)), *alone]

    before = torch.get_default_dtype()
    expected = run()
    torch.set_default_dtype(default)
    try:
        found = run()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.equal(other)


# --- tokens, slots and the vocabulary --------------------------------------------------------------------------------


@with_normalization
@pytest.mark.parametrize("n", [0, 1, 3])
def test_all_tokens_ignored_is_zero(normalization: str, n: int) -> None:
    p = problem(n=n)
    ids = torch.full_like(p.ids, -1)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    logits = torch.full((n, 23), float("nan"), requires_grad=True)
    for loss in (
        linear_topk_kl_loss(hidden, weight, p.probs, ids, normalization=normalization),
        topk_kl_loss(logits, p.probs, ids, normalization=normalization),
    ):
        assert loss.item() == 0
        loss.backward()
    assert all(tensor.grad.eq(0).all() for tensor in (hidden, weight, logits))


@with_normalization
def test_ignored_tokens_may_hold_anything(normalization: str) -> None:
    p = problem(normalization=normalization)
    hidden = p.hidden.clone()
    hidden[1] = float("nan")
    wanted = hidden.requires_grad_(), p.weight.requires_grad_()
    loss = linear_topk_kl_loss(*wanted, p.probs, p.ids, normalization=normalization)
    gradients = torch.autograd.grad(loss, wanted)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0][1].eq(0).all()
    clean = linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, normalization=normalization)
    torch.testing.assert_close(loss, clean)


@with_normalization
def test_probability_of_an_absent_slot_is_not_read(normalization: str) -> None:
    p = problem(normalization=normalization)
    spoiled = torch.where(p.ids >= 0, p.probs, float("nan"))
    logits = p.hidden @ p.weight.T
    expected = topk_kl_loss(logits, p.probs, p.ids, normalization=normalization)
    assert topk_kl_loss(logits, spoiled, p.ids, normalization=normalization).equal(expected)
    linear = linear_topk_kl_loss(p.hidden, p.weight, spoiled, p.ids, normalization=normalization)
    torch.testing.assert_close(linear, expected)


@with_normalization
def test_nan_and_infinity_pass(normalization: str) -> None:
    p = problem(normalization=normalization, holes=False)
    hidden = p.hidden.clone()
    hidden[2, 1] = float("nan")
    hidden.requires_grad_()
    loss = linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, normalization=normalization)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isnan()
    assert gradient[2].isnan().all()
    assert gradient[[0, 1, 3]].isfinite().all()
    logits = p.hidden @ p.weight.T
    logits[0, p.ids[0, 0]] = -float("inf")
    assert topk_kl_loss(logits, p.probs, p.ids, normalization=normalization) == float("inf")


@with_normalization
@pytest.mark.parametrize("k", [4, 23], ids=["some left", "none left"])
def test_vocabulary_that_is_masked_counts_nothing(normalization: str, k: int) -> None:
    p = problem(k=k, normalization=normalization, holes=False)
    logits = p.hidden @ p.weight.T
    masked = torch.cat((logits, torch.full((len(logits), 2), -float("inf"), dtype=torch.float64)), dim=1)
    masked.requires_grad_()
    loss = topk_kl_loss(masked, p.probs, p.ids, normalization=normalization)
    torch.testing.assert_close(loss, topk_kl_loss(logits, p.probs, p.ids, normalization=normalization))
    (gradient,) = torch.autograd.grad(loss, masked)
    assert gradient[:, -2:].eq(0).all()
    assert gradient.isfinite().all()


def test_tail_of_a_whole_vocabulary_is_the_full_divergence() -> None:
    p = problem(v=4, k=4, normalization="full", holes=False)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    tail, full = (topk_kl_loss(logits, p.probs, p.ids, normalization=name) for name in ("tail", "full"))
    torch.testing.assert_close(tail, full)
    for one, other in zip(torch.autograd.grad(tail, logits), torch.autograd.grad(full, logits), strict=True):
        torch.testing.assert_close(one, other)


def test_tail_takes_probabilities_that_round_above_one() -> None:
    p = problem(holes=False)
    logits = (p.hidden @ p.weight.T).requires_grad_()
    tail = topk_kl_loss(logits, p.probs * 1.0005, p.ids, normalization="tail")
    full = topk_kl_loss(logits, p.probs * 1.0005, p.ids, normalization="full")
    torch.testing.assert_close(tail, full)
    assert torch.autograd.grad(tail, logits)[0].isfinite().all()


@with_normalization
def test_large_logits_do_not_overflow(normalization: str) -> None:
    p = problem(normalization=normalization, holes=False)
    logits = (p.hidden @ p.weight.T * 200).float().requires_grad_()
    loss = topk_kl_loss(logits, p.probs, p.ids, normalization=normalization)
    exact = definition(logits.double(), p.probs, p.ids, "topk", 1.0) if normalization == "topk" else None
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    if exact is not None:
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_id_types_and_strides() -> None:
    p = problem()
    expected = linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids)
    assert linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids.int()).equal(expected)
    strided = [tensor.T.contiguous().T for tensor in (p.hidden, p.weight, p.probs, p.ids)]
    torch.testing.assert_close(linear_topk_kl_loss(*strided), expected)
    logits = p.hidden @ p.weight.T
    ours = topk_kl_loss(logits.T.contiguous().T, strided[2], strided[3].int())
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("k", [0, 1, 23])
@with_normalization
def test_few_slots_and_all_of_them(k: int, normalization: str) -> None:
    p = problem(k=k, normalization=normalization, holes=False)
    hidden = p.hidden.requires_grad_()
    loss = linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, normalization=normalization)
    logits = hidden @ p.weight.T
    exact = definition(logits, p.probs, p.ids, "full" if k == 23 and normalization == "tail" else normalization, 1.0)
    torch.testing.assert_close(loss, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(topk_kl_loss(logits, p.probs, p.ids, normalization=normalization), loss)
    for one, other in zip(torch.autograd.grad(loss, hidden), torch.autograd.grad(exact, hidden), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch calls it
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@with_normalization
def test_chunks_change_nothing_and_bound_the_memory(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(n=40, d=3, v=50, normalization=normalization)
    wanted = p.hidden.requires_grad_(), p.weight.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        arguments = p.probs, p.ids, None, normalization, 1.0, True, True, False
        return reference.linear_topk_kl_loss_reference(*(tensor.detach() for tensor in wanted), *arguments)

    whole = run()
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", 3 * 50)
    monkeypatch.setattr(reference, "_ROWS_AT_ONCE", 3 * 4 * 3)
    with LargestTensor() as largest:
        parts = run()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
    assert largest.numel <= max(3 * 50, 40 * 4, 50 * 3)
    assert largest.numel < 40 * 50


class BytesMade(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch calls it
        result = func(*args, **(kwargs or {}))
        self.total += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
        return result


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_kept_once_and_multiplied_once(normalization: str, dtype: torch.dtype) -> None:
    p = problem(n=64, d=32, v=23, normalization=normalization)
    hidden, weight = p.hidden.to(dtype).requires_grad_(), p.weight.to(dtype)
    with BytesMade() as made:
        loss = linear_topk_kl_loss(hidden, weight, p.probs, p.ids, normalization=normalization)
        forward = made.total
        (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == dtype
    assert forward <= gradient.nbytes + 64
    assert made.total <= 2 * gradient.nbytes + 128


def test_topk_reads_the_rows_of_its_ids_alone() -> None:
    p = problem()
    weight = torch.full_like(p.weight, float("nan"))
    used = p.ids[p.ids >= 0].unique()
    weight[used] = p.weight[used]
    hidden = p.hidden.requires_grad_()
    loss = linear_topk_kl_loss(hidden, weight, p.probs, p.ids)
    torch.testing.assert_close(loss, linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids))
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


# --- what PyTorch does with an operator ------------------------------------------------------------------------------


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(normalization: str, dtype: torch.dtype) -> None:
    p = problem(normalization=normalization)
    hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (p.hidden, p.weight, p.bias))
    logits = (hidden @ weight.T).detach().requires_grad_()
    options = (normalization, 1.3)
    opcheck(OPS.topk_kl_loss.default, (logits, p.probs, p.ids, *options))
    _, normalizers = OPS.topk_kl_loss(logits.detach(), p.probs, p.ids, *options)
    grad = torch.tensor(2.0)
    opcheck(OPS.topk_kl_loss_backward.default, (grad, logits.detach(), p.probs, p.ids, normalizers, *options))
    linear = OPS.linear_topk_kl_loss.default
    opcheck(linear, (hidden, weight, p.probs, p.ids, bias, *options, True, True, True))
    opcheck(linear, (hidden, weight.detach(), p.probs, p.ids, None, *options, True, False, False))
    opcheck(linear, (hidden.detach(), weight.detach(), p.probs, p.ids, None, *options, False, False, False))
    softcapped = OPS.linear_topk_kl_loss_softcapped.default
    opcheck(softcapped, (hidden, weight, p.probs, p.ids, bias, *options, True, True, True, 2.0))


@with_normalization
def test_one_graph_for_any_number_of_tokens(normalization: str) -> None:
    p = problem(n=20, normalization=normalization)
    weight = p.weight.requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")

    def both(hidden: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        given = topk_kl_loss(hidden @ weight.T, probs, ids, normalization=normalization)
        return given + 2 * linear_topk_kl_loss(hidden, weight, probs, ids, normalization=normalization)

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for n in (2, 3, 9, 20):
        arguments = p.hidden[:n].clone().requires_grad_(), p.probs[:n].clone(), p.ids[:n].clone()
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 0)
        ours, theirs = compiled(*arguments), both(*arguments)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(loss, (arguments[0], weight)) for loss in (ours, theirs)]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@with_normalization
def test_autocast_changes_nothing(normalization: str) -> None:
    p = Problem(*(tensor.float() for tensor in problem(normalization=normalization)[:4]), problem().ids)
    loss = linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, normalization=normalization)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, normalization=normalization).equal(loss)


def losses_of(p: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every way to the losses, as functions of the hidden states."""
    linear = [partial(linear_topk_kl_loss, bias=p.bias, normalization=name) for name in ("topk", "full", "tail")]
    linear += [partial(linear_topk_kl_loss, softcap=3.0), LinearTopKKLLoss(), LinearTopKKLLoss("full", softcap=3.0)]
    functions = {f"linear {i}": lambda h, loss=loss: loss(h, p.weight, p.probs, p.ids) for i, loss in enumerate(linear)}
    for i, loss in enumerate((topk_kl_loss, partial(topk_kl_loss, normalization="tail"), TopKKLLoss("full"))):
        functions[f"given {i}"] = lambda h, loss=loss: loss(h @ p.weight.T, p.probs, p.ids)
    return functions


with_loss = pytest.mark.parametrize("name", losses_of(problem()))


@with_loss
def test_a_second_derivative_is_refused(name: str) -> None:
    """What is computed with the loss would count as a constant: a penalty on it would have no effect, or a wrong one.

    Nor may the path to what is asked for be cut: by ``autograd.grad`` a node of no input of ours is not visited.
    """
    p = problem()
    loss_of = losses_of(p)[name]
    for leaf in (p.hidden.requires_grad_(), p.weight.requires_grad_()):
        for make in (lambda loss: loss, lambda loss: loss**2, lambda loss: 3 * loss):
            loss = make(loss_of(p.hidden * 1))  # not a leaf
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            for penalised in (gradient.square().sum(), loss + gradient.norm()):
                with pytest.raises(DerivativeError, match="topk_kl_loss is differentiable once"):
                    torch.autograd.grad(penalised, leaf, retain_graph=True)
                with pytest.raises(DerivativeError, match="topk_kl_loss is differentiable once"):
                    penalised.backward(retain_graph=True)
    for functional in (torch.autograd.functional.hessian, torch.autograd.functional.hvp):
        with pytest.raises(DerivativeError, match="topk_kl_loss is differentiable once"):
            functional(loss_of, p.hidden.detach(), *([p.hidden.detach()] if "hvp" in functional.__name__ else []))


@pytest.mark.parametrize("normalization", ["topk", "full"])
def test_a_gradient_is_differentiable_by_what_the_loss_is_multiplied_with(normalization: str) -> None:
    p = problem(normalization=normalization)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    hidden = p.hidden.requires_grad_()
    loss = linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, normalization=normalization)
    (gradient,) = torch.autograd.grad(factor * loss, hidden, create_graph=True)
    (by_factor,) = torch.autograd.grad(gradient.norm(), factor)  # as GradNorm balances several losses
    torch.testing.assert_close(by_factor, gradient.norm().detach() / 2)


def test_what_a_second_derivative_would_need_keeps_no_memory() -> None:
    p = problem()
    hidden = p.hidden.requires_grad_() * 1
    alive = weakref.ref(hidden)
    loss = linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids)
    del hidden
    assert alive() is None
    loss.backward()


@with_loss
def test_forward_mode_is_refused(name: str) -> None:
    p = problem()
    loss_of = losses_of(p)[name]
    for transform in (torch.func.jacfwd, torch.func.grad, torch.func.hessian, torch.func.jacrev):
        with pytest.raises(DerivativeError):
            transform(loss_of)(p.hidden)
    for transform in (torch.func.jvp, torch.func.linearize):
        with pytest.raises(DerivativeError):
            transform(loss_of, *(((p.hidden,), (p.hidden,)) if transform is torch.func.jvp else (p.hidden,)))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(DerivativeError):
        loss_of(forward_ad.make_dual(p.hidden, p.hidden))
    number = torch.tensor(1.0, requires_grad=True)
    for learned in ("temperature", "softcap"):
        with pytest.raises(DerivativeError, match=f"{learned} is a number"):
            linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, **{learned: number})


def test_vmap_and_batched_gradients_are_right() -> None:
    p = problem()
    hidden = torch.stack((p.hidden, 2 * p.hidden))
    for loss_of in losses_of(p).values():
        each = torch.stack([loss_of(h) for h in hidden])
        torch.testing.assert_close(torch.func.vmap(loss_of)(hidden), each)
        one, other = (
            torch.autograd.functional.jacobian(loss_of, p.hidden, vectorize=vectorize) for vectorize in (False, True)
        )
        torch.testing.assert_close(one, other)


def test_gradient_that_was_not_computed_is_refused() -> None:
    p = problem()
    arguments = p.hidden.requires_grad_(), p.weight, p.probs, p.ids, None, "topk", 1.0
    loss, *_ = OPS.linear_topk_kl_loss(*arguments, False, False, False)
    with pytest.raises(RuntimeError, match="without the gradient"):
        loss.backward()


class GradientFlags(TorchDispatchMode):
    flags: tuple[bool, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch calls it
        if func is OPS.linear_topk_kl_loss.default:
            self.flags = tuple(args[-3:])
        return func(*args, **(kwargs or {}))


def test_gradients_are_computed_only_where_they_are_recorded() -> None:
    p = problem()
    hidden, bias = p.hidden.requires_grad_(), p.bias.requires_grad_()
    with GradientFlags() as called:
        linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, bias=bias)
        assert called.flags == (True, False, True)
        with torch.no_grad():
            assert not linear_topk_kl_loss(hidden, p.weight, p.probs, p.ids, bias=bias).requires_grad
        assert called.flags == (False, False, False)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [23, 10**6, -2])
def test_id_outside_the_vocabulary(wrong: int) -> None:
    p = problem()
    p.ids[0, 0] = wrong
    with pytest.raises(InputError, match=f"teacher id {wrong} is outside the vocabulary of 23"):
        topk_kl_loss(p.hidden @ p.weight.T, p.probs, p.ids)
    with pytest.raises(InputError, match=f"teacher id {wrong} is outside the vocabulary of 23"):
        linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(7, 6)}, "weight must be"),
        ({"hidden": torch.randn(7)}, "hidden must be"),
        ({"hidden": torch.ones(7, 5, dtype=torch.int64)}, "hidden must be"),
        ({"weight": torch.randn(23, 5, 1)}, "weight must be"),
        ({"bias": torch.randn(22)}, "bias must be"),
        ({"teacher_probs": torch.randn(6, 4)}, "teacher_probs must be"),
        ({"teacher_probs": torch.ones(7, 4, dtype=torch.int64)}, "teacher_probs must be"),
        ({"teacher_ids": torch.zeros(7, 3, dtype=torch.int64)}, "teacher_ids must be"),
        ({"teacher_ids": torch.zeros(7, 4)}, "teacher_ids must be"),
        ({"normalization": "softmax"}, "normalization must be one of topk, full, tail"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"softcap": float("nan")}, "softcap must be positive"),
        *(({name: value}, f"{name} must be positive") for name in ("temperature", "softcap") for value in NO_SCALES),
        ({"temperature": float("inf")}, "temperature must be positive, between 1e-30 and 1e30, not inf"),
        ({"temperature": None}, "temperature must be positive, between 1e-30 and 1e30, not None"),
        ({"normalization": "to\npk"}, r"one of topk, full, tail, not 'to\\npk'"),
        ({"bias": torch.zeros(23, dtype=torch.int64)}, r"bias must be floating \[23\]"),
        ({"bias": torch.zeros(23, dtype=torch.float8_e4m3fn)}, r"bias must be floating \[23\]"),
        ({"hidden": torch.zeros(7, 5, dtype=torch.float8_e5m2)}, "hidden must be floating"),
        ({"weight": torch.zeros(23, 5, dtype=torch.complex64)}, "weight must be floating"),
        ({"teacher_probs": torch.zeros(7, 4, dtype=torch.float8_e4m3fn)}, "teacher_probs must be floating"),
        ({"weight": torch.randn(23, 5).to_sparse()}, "weight must be a dense tensor"),
        ({"teacher_ids": torch.zeros(7, 4, dtype=torch.int64).to_sparse()}, "teacher_ids must be a dense tensor"),
        ({"teacher_ids": [[1] * 4] * 7}, "teacher_ids must be a tensor, not list"),
        ({"hidden": None}, "hidden must be a tensor, not NoneType"),
        ({"weight": None}, "weight must be a tensor, not NoneType"),
        ({"teacher_probs": None}, "teacher_probs must be a tensor, not NoneType"),
        ({"teacher_ids": None}, "teacher_ids must be a tensor, not NoneType"),
    ],
)
def test_bad_operands(change: dict[str, object], message: str) -> None:
    p = problem()
    every = {"hidden": p.hidden, "weight": p.weight, "teacher_probs": p.probs, "teacher_ids": p.ids, "bias": p.bias}
    with pytest.raises(InputError, match=message):
        linear_topk_kl_loss(**(every | change))
    if not change.keys() & {"hidden", "weight", "bias", "softcap"}:
        every = {"logits": p.hidden @ p.weight.T, "teacher_probs": p.probs, "teacher_ids": p.ids}
        with pytest.raises(InputError, match=message):
            topk_kl_loss(**(every | change))


@with_normalization
@pytest.mark.parametrize("softcap", [0, 0.0, float("inf")])
def test_no_soft_cap_and_an_infinite_one(normalization: str, softcap: float) -> None:
    p = problem(normalization=normalization)
    arguments = p.hidden.requires_grad_(), p.weight, p.probs, p.ids
    one, other = (linear_topk_kl_loss(*arguments, normalization=normalization, softcap=cap) for cap in (softcap, None))
    assert one.equal(other)
    assert torch.autograd.grad(one, p.hidden)[0].equal(torch.autograd.grad(other, p.hidden)[0])


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_temperatures_and_soft_caps(normalization: str, dtype: torch.dtype, scale: float) -> None:
    p = problem(normalization=normalization, holes=False)
    hidden, weight = p.hidden.to(dtype).requires_grad_(), p.weight.to(dtype)
    logits = p.hidden.detach() @ p.weight.T
    for options, z in (
        ({"temperature": scale}, logits / scale),
        ({"softcap": scale}, scale * (logits / scale).tanh()),
    ):
        loss = linear_topk_kl_loss(hidden, weight, p.probs, p.ids, normalization=normalization, **options)
        exact = definition(z, p.probs, p.ids, normalization, 1.0)
        torch.testing.assert_close(loss, exact.to(dtype), rtol=1e-4, atol=1e-5)
        assert not torch.autograd.grad(loss, hidden)[0].isnan().any()


@with_normalization
def test_probabilities_that_are_none_are_as_the_definition_has_them(normalization: str) -> None:
    for value in (float("nan"), float("inf"), -0.1):
        p = problem(normalization=normalization, holes=False)
        p.probs[2, 1] = value
        logits = (p.hidden @ p.weight.T).float()
        loss = topk_kl_loss(logits, p.probs.float(), p.ids, normalization=normalization)
        exact = definition(logits.double(), p.probs, p.ids, normalization, 1.0)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
        linear = linear_topk_kl_loss(
            p.hidden.float(), p.weight.float(), p.probs.float(), p.ids, normalization=normalization
        )
        torch.testing.assert_close(linear, loss, rtol=1e-5, atol=1e-6, equal_nan=True)


@with_normalization
def test_more_slots_than_a_kernel_takes(normalization: str) -> None:
    probs, ids = torch.rand(1, 70000) / 40000, torch.randint(0, 23, (1, 70000))
    p = problem(n=1)
    logits = (p.hidden @ p.weight.T).float().requires_grad_()
    loss = topk_kl_loss(logits, probs, ids, normalization=normalization)
    exact = definition(logits.double(), probs.double(), ids, "full" if normalization == "tail" else normalization, 1.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    one, other = (torch.autograd.grad(value, logits)[0] for value in (loss, exact))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logits", [torch.randn(7), torch.randn(2, 7, 23), torch.ones(7, 23, dtype=torch.int64)])
def test_bad_logits(logits: Tensor) -> None:
    p = problem()
    with pytest.raises(InputError, match="logits must be"):
        topk_kl_loss(logits, p.probs, p.ids)


def test_tensors_of_several_devices() -> None:
    """One on meta takes the call away from the kernels that would see the others."""
    p = problem()
    with pytest.raises(InputError, match="linear_topk_kl_loss needs its tensors on one device, not on cpu and meta"):
        linear_topk_kl_loss(p.hidden, p.weight.to("meta"), p.probs, p.ids)
    with pytest.raises(InputError, match="topk_kl_loss needs its tensors on one device, not on cpu and meta"):
        topk_kl_loss(p.hidden @ p.weight.T, p.probs.to("meta"), p.ids)


def test_an_error_that_is_no_misfit_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*operands: object) -> Tensor:
        raise RuntimeError("no memory left")

    p = problem()
    for one in (operator._loss, operator._linear):
        monkeypatch.setattr(one, "overload", broken)
    with pytest.raises(RuntimeError, match="no memory left"):
        topk_kl_loss(p.hidden @ p.weight.T, p.probs, p.ids)
    with pytest.raises(RuntimeError, match="no memory left"):
        linear_topk_kl_loss(p.hidden, p.weight, p.probs, p.ids, bias=p.bias)


def test_gpus_count_an_id_below_minus_one_as_one_past_the_vocabulary() -> None:
    most = 2**31 - 1
    for ids in (
        torch.tensor([[-1, -2, 5, most, -(2**31)]], dtype=torch.int32),
        torch.tensor([[-1, -9, 5, 2**40, -(2**40)]]),
    ):
        teacher = gpu._Teacher.of(None, torch.ones(1, 5), ids, 1.0, 23, None)  # by torch, as for Triton
        assert teacher.ids.dtype == torch.int32
        assert teacher.ids.tolist() == [[-1, most, 5, most, most]]
