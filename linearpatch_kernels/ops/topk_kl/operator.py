"""Contract and registration of the Top-K distillation losses; the maths is in `reference`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels import backend
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.ops.backends import Kernel, check_served
from linearpatch_kernels.ops.registration import (
    DerivativeError,
    Operator,
    define_operator,
    named,
    refuse_second_derivative,
    second_derivative_error,
)
from linearpatch_kernels.ops.topk_kl.embedding_bag import linear_topk_kl_loss_embedding_bag
from linearpatch_kernels.ops.topk_kl.reference import (
    arithmetic_dtype,
    check_ids,
    check_operands,
    check_tensors,
    gradient_dtype,
    leaves_logits,
    linear_topk_kl_loss_reference,
    topk_kl_loss_backward_reference,
    topk_kl_loss_reference,
)


def _fake_loss(
    logits: Tensor, teacher_probs: Tensor, teacher_ids: Tensor, normalization: str, temperature: float
) -> tuple[Tensor, Tensor]:
    check_operands(logits, teacher_probs, teacher_ids, normalization, temperature)
    dtype = arithmetic_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0], 4), dtype=dtype)


def _fake_loss_backward(grad: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_linear(
    hidden: Tensor,
    weight: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    bias: Tensor | None,
    normalization: str,
    temperature: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, weight, bias, softcap)
    dtype = arithmetic_dtype(hidden, weight)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape if hidden_grad else (0,), dtype=gradient_dtype(hidden, weight)),
        hidden.new_empty(weight.shape if weight_grad else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[:1] if bias_grad else (0,), dtype=dtype),
    )


_GPU = f"{__package__}.gpu"


def _kernel(name: str, impl: str, *, any_width: bool = True) -> Kernel:
    """An implementation whose kernels `gpu` makes the operator of; it is imported when it is first run or asked for."""

    def run(*operands: Any) -> Any:
        gpu = import_module(_GPU)
        return getattr(gpu, name)(*operands, kernels=gpu.kernels_of(impl))

    def serves(device: str, width: int) -> bool:
        return any_width or bool(import_module(_GPU).kernels_of(impl).serves(width))

    return Kernel(run, serves)


_loss = define_operator(
    "topk_kl_loss",
    "(Tensor logits, Tensor teacher_probs, Tensor teacher_ids, str normalization, float temperature)"
    " -> (Tensor loss, Tensor normalizers)",
    topk_kl_loss_reference,
    _fake_loss,
    triton=_GPU,
    kernels={"triton": _kernel("topk_kl_loss", "triton")},
)
_loss_backward = define_operator(
    "topk_kl_loss_backward",
    "(Tensor grad, Tensor logits, Tensor teacher_probs, Tensor teacher_ids, Tensor normalizers, str normalization,"
    " float temperature) -> Tensor",
    topk_kl_loss_backward_reference,
    _fake_loss_backward,
    triton=_GPU,
    kernels={"triton": _kernel("topk_kl_loss_backward", "triton")},
)
_linear = define_operator(
    "linear_topk_kl_loss",
    "(Tensor hidden, Tensor weight, Tensor teacher_probs, Tensor teacher_ids, Tensor? bias, str normalization,"
    " float temperature, bool hidden_grad, bool weight_grad, bool bias_grad)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    linear_topk_kl_loss_reference,
    _fake_linear,
    triton=_GPU,
    compiled="topk_kl_slots",
    kernels={impl: _kernel("linear_topk_kl_loss", impl, any_width=False) for impl in ("triton", "cuda")},
)

# An operator of its own, so that a kernel without a soft-cap has a schema without one.
_softcapped = define_operator(
    "linear_topk_kl_loss_softcapped",
    "(Tensor hidden, Tensor weight, Tensor teacher_probs, Tensor teacher_ids, Tensor? bias, str normalization,"
    " float temperature, bool hidden_grad, bool weight_grad, bool bias_grad, float softcap)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    linear_topk_kl_loss_reference,
    _fake_linear,
)

if backend.FORCED is None and not backend.available("cpu").ok:
    _linear.register_kernel("cpu")(linear_topk_kl_loss_embedding_bag)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, teacher_probs, teacher_ids, ctx.normalization, ctx.temperature = inputs
    ctx.save_for_backward(logits, teacher_probs, teacher_ids, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_loss(gradient_of: Operator) -> Callable[..., Any]:
    """The formula, by the operator that computes the gradient."""

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return gradient_of(grad, *ctx.saved_tensors, ctx.normalization, ctx.temperature), None, None, None, None

    return backward


class _DifferentiatedOnce(torch.autograd.Function):
    """A gradient that was computed with the loss, tied to what it is a function of: to differentiate it raises.

    Without the tie it counts as a constant. A derivative by what the loss is multiplied with goes past it.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise second_derivative_error("linear_topk_kl_loss")


def _anchors(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Empty functions of the tensors that require a gradient, which do not keep the memory of those."""
    with torch.enable_grad():
        return [tensor[:0].clone() for tensor in tensors if tensor is not None and tensor.requires_grad]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, bias, _, _, *others = inputs
    ctx.anchors = _anchors((hidden, weight, bias))
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as each gradient
    ctx.computed, ctx.options = others[:3], len(inputs) - 5


def _backward_linear(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:  # nothing is made of the loss
        return (None,) * (5 + ctx.options)
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    if any(need and not computed for need, computed in zip(needed, ctx.computed, strict=True)):
        raise RuntimeError("linear_topk_kl_loss was called without the gradient that is asked for now: set its flag")
    gradients = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph
        gradients = [_DifferentiatedOnce.apply(gradient, *ctx.anchors) for gradient in gradients]
    dhidden, dweight, dbias = (
        (gradient * grad).to(dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)
    )
    return dhidden, dweight, None, None, dbias, *[None] * ctx.options


for _impl in ("auto", *_loss.variants):
    _loss.by(_impl).register_autograd(_backward_loss(_loss_backward.by(_impl)), setup_context=_save_loss)
    refuse_second_derivative(_loss_backward.by(_impl), "topk_kl_loss")
for _operator in (_linear, _softcapped):
    for _one in (_operator, *_operator.variants.values()):
        _one.register_autograd(_backward_linear, setup_context=_save_linear)


def _refuse_learned(name: str, value: Any) -> None:
    """Raise where a number is a tensor that wants a gradient: torch would take the number out of it without a word."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise DerivativeError(f"{name} is a number, by which the loss is not differentiated: give {name}.item()")


def _loss_of(operator: Operator, impl: str, operands: tuple[Any, ...], check: Callable[[], None]) -> Tensor:
    """The first result of an operator; where it raises, what does not fit is told by the checks of the reference."""
    try:
        with nullcontext() if impl == "auto" or torch.compiler.is_compiling() else named(impl):
            loss: Tensor = operator.by(impl).overload(*operands)[0]
            return loss
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError):  # of a kernel, or of torch's conversion to the schema
        with suppress(RuntimeError):  # numbers that cannot be looked at, as those of a batch under vmap
            check()
        raise


def topk_kl_loss(
    logits: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    *,
    normalization: str = "topk",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """KL(teacher || student), the mean over the tokens, in nats (LinearPatch, section 3.3, is ``"topk"``).

    For ids that are all there, ``"topk"`` is equivalent to::

        student = (logits.float() / temperature).gather(1, teacher_ids).log_softmax(1)
        torch.nn.functional.kl_div(student, teacher_probs.float(), reduction="batchmean")

    ``"full"`` takes the ``log_softmax`` before the ``gather``: the student is normalised over the vocabulary.
    ``"tail"`` adds to that one bucket, ``t * (log(t) - log(s))``, with t and s what the teacher's and the student's
    probabilities of these ids leave to the rest of the vocabulary.

    Args:
        logits: [N, V], floating. Divided by the temperature; there is no factor temperature**2.
        teacher_probs: [N, K], floating: for ``"topk"`` they sum to 1 over the K, else they are the true probabilities.
        teacher_ids: [N, K], int32 or int64, in [0, V). -1 is an absent slot (its probability counts as 0); a token
            whose ids are all -1 is ignored. An id that stands twice is two slots.
        normalization: ``"topk"``, ``"full"`` or ``"tail"``.
        temperature: of the student's softmax, > 0 (from 1e-30 to 1e30).
        impl: the implementation: "auto" (``LINEARPATCH_BACKEND``, else the one for the logits' device), "reference"
            (plain PyTorch), "cpu", "triton" or "cuda". The gradient is computed by the same one.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 if all tokens are ignored. Differentiable once in the logits,
        in reverse mode; the teacher's probabilities count as constants. As exact as float32's ``log_softmax``, however
        large the logits are.

    Raises:
        InputError: shapes, dtypes or options that do not fit; an id outside the vocabulary, on the CPU. On a GPU such
            an id makes the loss NaN, unless ``LINEARPATCH_CHECK_IDS=1`` was set at import: it costs a synchronisation.
            The implementation that is named does not serve the logits (`linearpatch_kernels.ops.backends`).
        DerivativeError: it is differentiated twice, in forward mode, or by torch.func.
    """
    operands = logits, teacher_probs, teacher_ids, normalization, temperature
    _refuse_learned("temperature", temperature)

    def check() -> None:
        check_operands(*operands)
        check_ids(teacher_ids, logits.shape[1])

    check_served(impl, "topk_kl_loss", logits)
    return _loss_of(_loss, impl, operands, check)


def linear_topk_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_probs: Tensor,
    teacher_ids: Tensor,
    *,
    bias: Tensor | None = None,
    normalization: str = "topk",
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`topk_kl_loss` of ``hidden @ weight.T + bias`` without those logits [N, V] in memory.

    ``"topk"`` reads no more than the N * K rows of the weight that the ids name; the others make the logits of some
    tokens, or of some ids, at a time. The gradients that will be needed are computed in the same call, and kept in
    float32; that of bfloat16 hidden states in bfloat16, so that a loss multiplied by what is no power of two rounds it
    twice.

    On a CPU with VNNI the products of bfloat16 over the whole vocabulary are made in 16-bit integers, whose rounding is
    less than that of logits in bfloat16.

    Args:
        hidden: [N, d], floating: what enters the head.
        weight: [V, d], floating: the head.
        teacher_probs, teacher_ids, normalization, temperature: as `topk_kl_loss`.
        bias: [V] or None.
        softcap: c > 0 (from 1e-30 to 1e30), for ``logits = c * tanh((hidden @ weight.T + bias) / c)`` (Gemma 2), before
            the temperature; None, 0 and infinity are none. On GPUs this is served by plain PyTorch.
        impl: as of `topk_kl_loss`.

    Returns:
        A scalar, float32 (float64 where hidden or weight is). Differentiable once in hidden, weight and bias, in
        reverse mode; the teacher's probabilities count as constants.

    Raises:
        InputError, DerivativeError: as `topk_kl_loss`.
    """
    recording = torch.is_grad_enabled()
    flags = [recording and isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (hidden, weight, bias)]
    operands = hidden, weight, teacher_probs, teacher_ids, bias, normalization, temperature, *flags
    _refuse_learned("temperature", temperature)
    _refuse_learned("softcap", softcap)
    cap = () if leaves_logits(softcap) else (softcap,)

    def check() -> None:
        check_tensors({"weight": weight})
        check_operands(hidden, teacher_probs, teacher_ids, normalization, temperature, weight, bias, *cap)
        check_ids(teacher_ids, len(weight))

    check_served(impl, "linear_topk_kl_loss_softcapped" if cap else "linear_topk_kl_loss", hidden, weight)
    return _loss_of(_softcapped if cap else _linear, impl, (*operands, *cap), check)
