"""Contract and registration of the patch operators; the maths is in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels import backend
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import paley_factor
from linearpatch_kernels.ops.hadamard_patch.reference import (
    _arithmetic_dtype,
    _check_patch_operands,
    add_patch_rms_norm_reference,
    hadamard_patch_backward_reference,
    hadamard_patch_reference,
)
from linearpatch_kernels.ops.registration import batch_by_rows, define_operator

_OPTIONAL = "Tensor? pre_scale, Tensor? post_scale, Tensor? down, Tensor? up"
_OMISSIBLE = _OPTIONAL.replace(",", "=None,") + "=None"  # where nothing that is required follows


def _contiguous_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _forward(x: Tensor, scale: Tensor, *optional: Tensor | None) -> Tensor:
    pre_scale, post_scale, down, up = optional
    y = hadamard_patch_reference(x, scale, pre_scale=pre_scale, post_scale=post_scale, down=down, up=up)
    return y.contiguous()


def _fake_forward(x: Tensor, scale: Tensor, *optional: Tensor | None) -> Tensor:
    _check_patch_operands(x, scale, *optional)
    return _contiguous_like(x)


def _fake_backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *parameters, needs = others
    wanted = [parameter if needs >> i & 1 else None for i, parameter in enumerate((x, *parameters))]
    dx = x.new_empty(0) if wanted[0] is None else _contiguous_like(x)
    dtype = _arithmetic_dtype(x)
    return dx, *(x.new_empty((0,) if p is None else p.shape, dtype=dtype) for p in wanted[1:])


def _check_out(x: Tensor, out: Tensor) -> None:
    if out.shape != x.shape or out.dtype != x.dtype:
        raise InputError(f"out must be {x.dtype} {list(x.shape)} as x is, not {out.dtype} {list(out.shape)}")


def _forward_out(x: Tensor, scale: Tensor, *others: Any) -> None:
    *optional, out = others
    _check_out(x, out)
    out.copy_(_forward(x, scale, *optional))


def _fake_forward_out(x: Tensor, scale: Tensor, *others: Any) -> None:
    *optional, out = others
    _check_patch_operands(x, scale, *optional)
    _check_out(x, out)


def _fake_add_patch_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, *optional = others
    _check_patch_operands(x, scale, *optional)
    return _contiguous_like(x), _contiguous_like(x)


_TRITON = "linearpatch_kernels.ops.hadamard_patch.triton"

_patch = define_operator(
    "hadamard_patch",
    f"(Tensor x, Tensor scale, {_OMISSIBLE}) -> Tensor",
    _forward,
    _fake_forward,
    triton=_TRITON,
)
_patch_backward = define_operator(
    "hadamard_patch_backward",
    f"(Tensor grad, Tensor x, Tensor scale, {_OPTIONAL}, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    hadamard_patch_backward_reference,
    _fake_backward,
    triton=_TRITON,
)
_patch_out = define_operator(
    "hadamard_patch_out",
    f"(Tensor x, Tensor scale, {_OPTIONAL}, Tensor(a!) out) -> ()",
    _forward_out,
    _fake_forward_out,
    triton=_TRITON,
    mutates_args=("out",),
)
_add_patch_rms_norm = define_operator(
    "add_patch_rms_norm",
    f"(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, float eps, {_OMISSIBLE}) -> (Tensor, Tensor)",
    add_patch_rms_norm_reference,
    _fake_add_patch_rms_norm,
    triton=_TRITON,
)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needs = sum(int(wanted) << i for i, wanted in enumerate(ctx.needs_input_grad))
    gradients = torch.ops.linearpatch.hadamard_patch_backward.default(grad, *inputs, needs)
    # needs_input_grad ends where the call's arguments did, and so must this; what was saved has all six.
    return tuple(
        gradient.to(tensor.dtype) if wanted else None
        for gradient, tensor, wanted in zip(gradients, inputs, ctx.needs_input_grad, strict=False)
    )


# The compiled kernels ask for the matrix H_m of a width when they first meet it.
_matrices = torch.library.Library("linearpatch", "FRAGMENT")
_matrices.define("paley_matrix(int d) -> Tensor")
_matrices.impl("paley_matrix", lambda d: paley_factor(d)[0], "CompositeExplicitAutograd")

_patch.register_autograd(_backward, setup_context=_save)
batch_by_rows(_patch, rows=(0,))
batch_by_rows(_patch_backward, rows=())
batch_by_rows(_add_patch_rms_norm, rows=(0, 1))

_call = torch.ops.linearpatch.hadamard_patch.default
_call_out = torch.ops.linearpatch.hadamard_patch_out.default
_call_add_patch_rms_norm = torch.ops.linearpatch.add_patch_rms_norm.default


def _run(operator: Any, *operands: Any) -> Any:
    """The operator, with as little Python as can be: at one row it costs as much as the arithmetic.

    Under no_grad, as in Transformers' generate, past the Python in which torch.library notes what a gradient needs.
    """
    if torch.compiler.is_compiling():
        return operator(*operands)
    call = operator._op  # what an OpOverload calls when it is called
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return call(*operands)
    with torch._C._AutoDispatchBelowAutograd():
        return call(*operands)


def hadamard_patch(
    x: Tensor,
    scale: Tensor,
    *,
    pre_scale: Tensor | None = None,
    post_scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The map at a joint: ``y = (((x * pre) @ H) * scale) @ H.T * post + (x @ down) @ up`` (LinearPatch, section 3.2).

    H is `hadamard_matrix` of width d. Equivalent to, with ``h = hadamard_transform``::

        (h(h(x.float() * pre) * scale, inverse=True) * post + (x.float() @ down) @ up).to(x.dtype)

    float64 input is computed in float64, all other in float32; the result is rounded once. Differentiable
    once in x and all parameters; works under torch.compile, torch.export and vmap.

    NaN or infinity in x stays in its row. What H mixes with it (the channels of its block; with ``down`` and ``up`` the
    whole row) is not finite then, NaN or infinite as the order of the sums has it, which is not the expression's.

    Args:
        x: [..., d], floating, any strides; N = 0 rows are fine.
        scale: [d], any floating dtype.
        pre_scale: [d] or None, all ones.
        post_scale: [d] or None, all ones.
        down: [d, r], with ``up`` the low-rank term, or None.
        up: [r, d] or None.
        out: written to and returned instead of a new tensor: x's shape and dtype, any strides, may be x itself. Nothing
            is differentiable then.

    Returns:
        [..., d] in x's dtype, contiguous.

    Raises:
        InputError: shapes or dtypes that do not fit each other, by the reference (a kernel raises RuntimeError).
        RuntimeError: ``out`` is given where gradients are being recorded for one of the operands.
    """
    if backend.FORCED is not None:
        backend.check_forced_serves("hadamard_patch", x)
    if out is None:
        y: Tensor = _run(_call, x, scale, pre_scale, post_scale, down, up)
        return y
    operands = (x, scale, pre_scale, post_scale, down, up, out)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands):
        raise RuntimeError("hadamard_patch with out= is not differentiable: call it under torch.no_grad()")
    if torch.compiler.is_compiling():
        _call_out(*operands)
        return out
    # What torch.library does around an operator that writes to an operand, without its 15 microseconds.
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _call_out._op(*operands)
    return out


def add_patch_rms_norm(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    pre_scale: Tensor | None = None,
    post_scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What an inference engine runs at the joint, in one pass; not differentiable. Equivalent to::

        new_residual = hadamard_patch(x + residual, scale, ...)
        normed = torch.nn.functional.rms_norm(new_residual, (d,), norm_weight, eps)

    with float32 arithmetic (float64 for float64) in between: the sum, and the residual before its norm, are not
    rounded; each of the two results is rounded once.

    Args:
        x: [..., d], floating: the last layer's output.
        residual: x's shape and dtype: the residual stream it is to be added to.
        scale: [d], as the other operands those of `hadamard_patch`.
        norm_weight: [d], any floating dtype: the gain of the next layer's norm.
        eps: added to the mean square.

    Returns:
        ``(normed, new_residual)``, both [..., d] in x's dtype.

    Raises:
        InputError: as `hadamard_patch`.
    """
    if backend.FORCED is not None:
        backend.check_forced_serves("add_patch_rms_norm", x)
    results: tuple[Tensor, Tensor] = _run(
        _call_add_patch_rms_norm, x, residual, scale, norm_weight, eps, pre_scale, post_scale, down, up
    )
    return results
