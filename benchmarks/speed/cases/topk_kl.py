"""Cases and peers of `linear_topk_kl_loss`: the loss and the gradient of the hidden states, from them and the head.

A rival computes the same two. The head's product over the vocabulary is most of what the full-logits rivals do, and a
processor without bf16 instructions takes five times as long for it in bf16 as for "upcast the head, product in
float32": rivals come in both forms, and goals are against the fastest of them. Where the bf16 form would take minutes,
it has a case of its own with fewer tokens, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.speed.hardware import has_bf16_instructions
from benchmarks.speed.registry import Case, Goal, Peer, Run, register
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss
from linearpatch_kernels.ops.topk_kl.embedding_bag import linear_topk_kl_loss_embedding_bag
from linearpatch_kernels.ops.topk_kl.reference import linear_topk_kl_loss_reference

SLOTS = 100
CHUNK = 256  # tokens


@dataclass(frozen=True)
class Operands:
    """hidden [tokens, width] and weight [vocabulary, width] in bf16, and a teacher's slots, their ids distinct.

    ``ids`` are log-uniform over the vocabulary, as frequent words come first in one, or uniform.
    """

    tokens: int
    width: int
    vocabulary: int
    normalization: str
    ids_are: str = "log-uniform"

    @cached_property
    def hidden(self) -> Tensor:
        return torch.randn(self.tokens, self.width).bfloat16().requires_grad_()

    @cached_property
    def weight(self) -> Tensor:
        return torch.randn(self.vocabulary, self.width).mul_(self.width**-0.5).bfloat16()

    @cached_property
    def probs(self) -> Tensor:
        kept = 1.0 if self.normalization == "topk" else 0.8
        return torch.randn(self.tokens, SLOTS).mul_(2).softmax(1) * kept

    @cached_property
    def ids(self) -> Tensor:
        rank = torch.arange(1.0, self.vocabulary + 1)
        weights = (1 / rank if self.ids_are == "log-uniform" else rank.new_ones(self.vocabulary)).expand(64, -1)
        drawn = [torch.multinomial(weights, SLOTS) for _ in range(-(-self.tokens // 64))]
        return torch.cat(drawn)[: self.tokens]

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        return self.probs, self.ids


def ours(o: Operands) -> Run:
    hidden, weight, slots = o.hidden, o.weight, o.slots

    def run() -> tuple[Tensor, ...]:
        loss = linear_topk_kl_loss(hidden, weight, *slots, normalization=o.normalization)
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    return run


# --- rivals that hold logits -----------------------------------------------------------------------------------------


def divergence(logits: Tensor, probs: Tensor, ids: Tensor, normalization: str) -> Tensor:
    """The sum over tokens as it is usually written; for "topk" these are the paper's lines."""
    if normalization == "topk":
        student = logits.gather(1, ids).float().log_softmax(1)
    else:
        student = logits.float().log_softmax(1).gather(1, ids)
    loss = torch.nn.functional.kl_div(student, probs, reduction="sum")
    if normalization == "tail":
        teacher_rest, student_rest = 1 - probs.sum(1), 1 - student.exp().sum(1)
        loss = loss + (teacher_rest * (teacher_rest.log() - student_rest.log())).sum()
    return loss


Form = Callable[[Tensor], Tensor]


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def upcast(weight: Tensor) -> Tensor:
    return weight.float()


def with_logits(form: Form, chunk: int | None, compiled: bool) -> Callable[[Operands], Run]:
    """All tokens at once or some at a time, each chunk's gradient before the next chunk; eager or compiled."""

    def build(o: Operands) -> Run:
        hidden, weight, (probs, ids) = o.hidden, o.weight, o.slots

        def chunk_loss(h: Tensor, w: Tensor, p: Tensor, i: Tensor) -> Tensor:
            return divergence(h.to(w.dtype) @ w.mT, p, i, o.normalization) / o.tokens

        loss_of = torch.compile(chunk_loss, dynamic=False) if compiled else chunk_loss

        def run() -> tuple[Tensor, ...]:
            head = form(weight)
            losses, gradients = [], []
            for h, p, i in zip(*(t.split(chunk or o.tokens) for t in (hidden.detach(), probs, ids)), strict=True):
                part = h.requires_grad_()
                loss = loss_of(part, head, p, i)
                gradients += torch.autograd.grad(loss, part)
                losses.append(loss.detach())
            return torch.stack(losses).sum(), torch.cat(gradients)

        return run

    return build


def logits_peers(forms: dict[str, Form], normalization: str) -> tuple[Peer, ...]:
    title = "the paper's lines" if normalization == "topk" else "full logits"
    peers: list[Peer] = []
    for name, form in forms.items():
        peers += [
            Peer(f"{title}{name}", with_logits(form, None, False)),
            Peer(f"chunked{name}", with_logits(form, CHUNK, False)),
            Peer(f"torch.compile{name}", with_logits(form, None, True), slow_to_build=True),
            Peer(f"chunked torch.compile{name}", with_logits(form, CHUNK, True), slow_to_build=True),
        ]
    return tuple(peers)


BF16: dict[str, Form] = {"": as_it_is}
UPCAST: dict[str, Form] = {", upcast": upcast}


def liger_kl_div(o: Operands) -> Run:
    """Of full logits, and of the teacher's probabilities spread over all ids."""
    function = import_module("liger_kernel.transformers.functional").liger_kl_div
    hidden, weight, (probs, ids) = o.hidden, o.weight, o.slots
    dense = torch.zeros(o.tokens, o.vocabulary).scatter_(1, ids, probs)

    def run() -> tuple[Tensor, ...]:
        student = (hidden @ weight.mT).float().log_softmax(1)
        loss = function(student, dense, "batchmean")
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    return run


LIGER = Peer("Liger KLDiv", liger_kl_div, package="liger-kernel", module="liger_kernel")

# --- rivals that gather rows of the head -----------------------------------------------------------------------------


def gathered_einsum(o: Operands) -> Run:
    hidden, weight, (probs, ids) = o.hidden, o.weight, o.slots

    def run() -> tuple[Tensor, ...]:
        logits = torch.einsum("nd,nkd->nk", hidden, weight[ids])
        loss = torch.nn.functional.kl_div(logits.float().log_softmax(1), probs, reduction="batchmean")
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    return run


def operator(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Operands], Run]:
    """Loss and dhidden of one of the operator's other forms."""

    def build(o: Operands) -> Run:
        call = partial(function, o.hidden.detach(), o.weight, *o.slots, None, o.normalization, 1.0, True, False, False)
        return lambda: call()[:2]

    return build


GATHERED = (
    Peer("gathered einsum", gathered_einsum),
    Peer("gathered, chunked, float32 (our reference)", operator(linear_topk_kl_loss_reference)),
)
EMBEDDING_BAG = Peer("embedding_bag (our fallback)", operator(linear_topk_kl_loss_embedding_bag))


def against(peers: tuple[Peer, ...], solid: float, aim: float) -> Goal:
    return Goal(tuple(peer.name for peer in peers), solid, aim)


# --- the cases -------------------------------------------------------------------------------------------------------

SIZES = {(2048, 576, 49152): (60, 110), (512, 4096, 128256): (100, 200)}


def _register(name: str, o: Operands, peers: tuple[Peer, ...], goals: tuple[Goal, ...], **others: object) -> None:
    register(
        Case(
            group=f"Top-K KL, {o.normalization}",
            name=f"{o.normalization} {o.tokens} x {o.width} of {o.vocabulary} {name}",
            operands=partial(replace, o),  # afresh: a weight of 1 GB must not outlive its case
            ours=ours,
            peers=peers,
            goals=goals,
            context=torch.enable_grad,
            tolerance=5e-2,
            seconds=6.0,
            **others,  # type: ignore[arg-type]  # a case's own fields
        )
    )


def _register_topk() -> None:
    forms = UPCAST | (BF16 if has_bf16_instructions() else {})
    for (tokens, width, vocabulary), asked in SIZES.items():
        for ids_are in ("log-uniform", "uniform"):
            o = Operands(tokens, width, vocabulary, "topk", ids_are)
            _register(
                f"{ids_are} gathered",
                o,
                (*GATHERED, EMBEDDING_BAG),
                (against(GATHERED, 6, 15),),
                quick=width == 576,
            )
        o = Operands(tokens, width, vocabulary, "topk")
        peers = logits_peers(forms, "topk")
        eager = tuple(peer for peer in peers if not peer.slow_to_build)
        _register("eager", o, eager, (against(eager[::2], *asked),), rounds=3)
        if width == 576:
            _register("compiled", o, tuple(peer for peer in peers if peer.slow_to_build), (), rounds=3)


def _register_whole() -> None:
    forms = UPCAST | (BF16 if has_bf16_instructions() else {})
    for tokens, width, vocabulary in SIZES:
        for normalization in ("full", "tail"):
            o = Operands(tokens, width, vocabulary, normalization)
            peers = logits_peers(forms, normalization)
            compiled = tuple(peer for peer in peers if peer.slow_to_build)
            strongest = compiled[1::2]
            if width == 576:
                eager = tuple(peer for peer in peers if not peer.slow_to_build)
                _register("eager", o, eager + (LIGER,) * (normalization == "full"), (), rounds=3)
            else:  # an answer takes seconds
                compiled = strongest
            _register("compiled", o, compiled, (against(strongest, 1.5, 3),), rounds=3)


def _register_bf16_products() -> None:
    """The rivals as they are written, on a processor where their product is slow."""
    if has_bf16_instructions():
        return
    for normalization, kept in (("topk", slice(0, 1)), ("full", slice(3, 4)), ("tail", slice(3, 4))):
        o = Operands(2048, 576, 49152, normalization)
        peers = logits_peers(BF16, normalization)[kept]
        asked = SIZES[2048, 576, 49152] if normalization == "topk" else (1.5, 3)
        _register("bf16 products", o, peers, (against(peers, *asked),), rounds=3)


_register_topk()
_register_whole()
_register_bf16_products()
