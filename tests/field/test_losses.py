"""The losses where numbers are extreme, and where somebody differentiates in another way than by ``backward()``.

Each was found by calling them with what nobody had tried (random calls against float64, in 44 of 26,000 a NaN): there
are no public reports of them, which is what a silent wrong number leads to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import kl_div

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.fused_loss import fuse_distillation_loss
from tests.support.field import IDS, tiny

with_normalization = pytest.mark.parametrize("normalization", ["topk", "full", "tail"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def expression(logits: Tensor, probs: Tensor, ids: Tensor, normalization: str) -> Tensor:
    """What a person would write, in the logits' dtype; ``"tail"`` where the ids leave nothing is ``"full"``."""
    log_q = logits.gather(1, ids).log_softmax(1) if normalization == "topk" else logits.log_softmax(1).gather(1, ids)
    return kl_div(log_q, probs.to(logits.dtype), reduction="batchmean")


@with_normalization
@pytest.mark.parametrize("about", [-120.0, 300.0, -1e4])
@pytest.mark.parametrize("left", ["every id", "256 bytes", "a bias of -inf", "padded logits"])
def test_nothing_is_left_beside_the_kept_ids(left: str, about: float, normalization: str) -> None:
    """The rest of an empty vocabulary had 0 for its largest logit, and exp(0 - log Z) is infinite: NaN gradients.

    Met where a token keeps every id (tokenizers of bytes, small vocabularies), or what it leaves is masked.
    """
    vocabulary, kept = {"every id": (4, 4), "256 bytes": (256, 256)}.get(left, (9, 3))
    hidden, weight = torch.randint(-8, 9, (5, 16)) / 8, torch.randint(-8, 9, (vocabulary, 16)) / 8
    bias = torch.full((vocabulary,), about)
    if left == "a bias of -inf":
        bias[kept:] = -math.inf
    ids = torch.arange(kept).expand(5, kept).contiguous()
    probs = torch.rand(5, kept).softmax(1)

    def differentiated(of: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h = hidden.to(dtype).requires_grad_()
        logits = h @ weight.to(dtype).T + bias.to(dtype)
        if left == "padded logits":
            logits = logits.masked_fill(torch.arange(vocabulary) >= kept, -math.inf)
        loss = of(h if of is linear else logits)
        return loss.double(), torch.autograd.grad(loss, h)[0].double()

    def linear(h: Tensor) -> Tensor:
        return lp.linear_topk_kl_loss(h, weight, probs, ids, bias=bias, normalization=normalization)

    def given(logits: Tensor) -> Tensor:
        return lp.topk_kl_loss(logits, probs, ids, normalization=normalization)

    exact = differentiated(lambda logits: expression(logits, probs, ids, normalization), torch.float64)
    for loss_of in (given,) if left == "padded logits" else (given, linear):
        for one, other in zip(differentiated(loss_of, torch.float32), exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@with_normalization
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1e2, 1e3, 1e4, 1e5])
def test_large_logits_cost_no_digits(normalization: str, dtype: torch.dtype, shift: float) -> None:
    """One float32 held m + log s: at logits of 10,000 the gradient was off by 2e-3, where log_softmax has 4e-7."""
    logits = (torch.randn(64, 200) * 3 + shift).to(dtype)
    probs, ids = logits.double().softmax(1).topk(20)
    probs /= probs.sum(1, keepdim=True) if normalization == "topk" else 1
    student = (logits.float() + 0.3 * torch.randn(64, 200)).to(dtype)

    def differentiated(of: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
        loss = of(leaf.requires_grad_())
        return loss.double(), torch.autograd.grad(loss, leaf)[0].double()

    def plain(z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return expression(wide, probs, ids, "topk" if normalization == "topk" else "full")

    loss_of = lambda z: lp.topk_kl_loss(z, probs, ids, normalization=normalization)  # noqa: E731
    if normalization == "tail":  # against "full" of a teacher that leaves nothing out
        probs /= probs.sum(1, keepdim=True)
    exact = differentiated(plain, student.double())
    others = differentiated(plain, student.clone())
    for one, other, true in zip(differentiated(loss_of, student.clone()), others, exact, strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm() + 1e-6 * true.norm() + 1e-7


def students() -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses of the last hidden states, [7, 48], of a tiny model."""
    weight = torch.randn(97, 48)
    probs, ids = torch.rand(7, 5).softmax(1), torch.randint(0, 97, (7, 5))
    return {
        "linear": lambda h: lp.linear_topk_kl_loss(h, weight, probs, ids),
        "linear, tail": lambda h: lp.linear_topk_kl_loss(h, weight, probs, ids, normalization="tail"),
        "linear, soft-capped": lambda h: lp.linear_topk_kl_loss(h, weight, probs, ids, softcap=5.0),
        "given": lambda h: lp.topk_kl_loss(h @ weight.T, probs, ids),
        "given, full, in bfloat16": lambda h: lp.topk_kl_loss(
            (h @ weight.T).bfloat16(), probs, ids, normalization="full"
        ),
        "module": lambda h: lp.LinearTopKKLLoss("full", temperature=2.0)(h, weight, probs, ids),
        "mixed with another loss": lambda h: h.square().mean() + lp.linear_topk_kl_loss(h, weight, probs, ids),
    }


with_student = pytest.mark.parametrize("name", students())


@with_student
def test_no_tangent_is_dropped(name: str) -> None:
    """jvp and jacfwd gave zero: torch.library lets a tangent fall without a word."""
    loss_of, hidden = students()[name], torch.randn(7, 48)
    for differentiate in (
        lambda: torch.func.jvp(loss_of, (hidden,), (hidden,)),
        lambda: torch.func.jacfwd(loss_of)(hidden),
        lambda: torch.func.vmap(lambda t: torch.func.jvp(loss_of, (hidden,), (t,)))(hidden[None]),
        lambda: torch.func.linearize(loss_of, hidden),
        lambda: torch.func.hessian(loss_of)(hidden),
        lambda: torch.func.grad(loss_of)(hidden),
        lambda: torch.autograd.functional.jacobian(loss_of, hidden, strategy="forward-mode", vectorize=True),
    ):
        with pytest.raises(
            InputError, match=r"topk_kl_loss.* (has no forward-mode derivative|cannot be differentiated)"
        ):
            differentiate()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(InputError, match="has no forward-mode derivative"):
            loss_of(dual)


@with_student
def test_no_second_derivative_is_made_up(name: str) -> None:
    """A penalty on the gradient was silently wrong: what was computed with the loss counted as a constant."""
    loss_of, hidden = students()[name], torch.randn(7, 48, requires_grad=True)
    for outer in (lambda loss: loss, lambda loss: loss**2, torch.log):
        (gradient,) = torch.autograd.grad(outer(loss_of(hidden)), hidden, create_graph=True)
        with pytest.raises(InputError, match="topk_kl_loss is differentiable once"):
            torch.autograd.grad(gradient.square().sum(), hidden)
    with pytest.raises(InputError, match="topk_kl_loss is differentiable once"):
        torch.autograd.functional.hvp(loss_of, hidden.detach(), hidden.detach())


def test_a_penalty_on_a_models_gradient_is_refused_and_a_step_without_it_is_not() -> None:
    """Through a model whose loss is fused: the weights' own second derivatives exist, the loss's does not."""
    student = tiny(layers=2)
    student.set_attn_implementation("eager")  # torch's fused attention has no second derivative either
    undo = fuse_distillation_loss(student, normalization="tail")
    slots = torch.rand(1, IDS.shape[1], 97).topk(5)
    probs, ids = slots.values.softmax(-1) * 0.9, slots.indices
    embedded = student.get_input_embeddings()(IDS).detach().requires_grad_()

    def loss() -> Tensor:
        return student(inputs_embeds=embedded, teacher_probs=probs, teacher_ids=ids).loss

    (gradient,) = torch.autograd.grad(loss(), embedded, create_graph=True)
    with pytest.raises(InputError, match="linear_topk_kl_loss is differentiable once"):
        (loss() + gradient.norm()).backward()
    student.zero_grad()
    loss().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())
    undo()


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": t} for t in (0, -1.0, math.nan, -math.inf, 1e-45, 1e-60, 1e300, "1", None, 10**400, 1j)),
        *({"softcap": c} for c in (-1.0, math.nan, -math.inf, 1e-45, 1e-60, 1e300, "x", [5.0])),
        *({"normalization": n} for n in ("", "TOPK", None, 5, "nope\n[bold]")),
    ],
    ids=str,
)
def test_an_option_that_is_none_is_refused_in_one_line(options: dict[str, object]) -> None:
    """A temperature of 1e-60 has no reciprocal in float32 and gave NaN; ``"1"`` was a TypeError of somebody's ``>``."""
    hidden, weight, probs, ids = torch.randn(4, 8), torch.randn(20, 8), torch.rand(4, 3), torch.randint(0, 20, (4, 3))
    calls = [
        lambda: lp.linear_topk_kl_loss(hidden, weight, probs, ids, **options),
        lambda: lp.LinearTopKKLLoss(**options),  # before any work is done
        lambda: lp.linear_topk_kl_loss(*(tensor.to("meta") for tensor in (hidden, weight, probs, ids)), **options),
    ]
    if "softcap" not in options:
        calls += [lambda: lp.topk_kl_loss(hidden @ weight.T, probs, ids, **options), lambda: lp.TopKKLLoss(**options)]
    for call in calls:
        with pytest.raises(InputError, match=f"^{next(iter(options))} must be .*$") as refused:
            call()
        assert "\n" not in str(refused.value)
