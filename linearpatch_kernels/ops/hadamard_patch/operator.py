"""Contract and registration of the patch operators; the maths is in `reference`."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels._ops import NAMESPACE
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import paley_factor
from linearpatch_kernels.ops.backends import Kernel, check_served
from linearpatch_kernels.ops.hadamard_patch.reference import (
    _arithmetic_dtype,
    _check_norm_operands,
    _check_out,
    _check_out_is_apart,
    _check_patch_operands,
    add_patch_rms_norm_reference,
    hadamard_patch_backward_reference,
    hadamard_patch_reference,
)
from linearpatch_kernels.ops.overlap import share_memory
from linearpatch_kernels.ops.registration import (
    DerivativeError,
    Operator,
    batch_by_rows,
    define_operator,
    named,
    refuse_forward_mode,
)
from linearpatch_kernels.torch_internals import below_autograd, below_versions, may_be_dual

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


def _forward_out(x: Tensor, scale: Tensor, *others: Any) -> None:
    *optional, out = others
    _check_out(x, out)
    _check_out_is_apart(out, scale, *optional)
    out.copy_(_forward(x, scale, *optional))


def _fake_forward_out(x: Tensor, scale: Tensor, *others: Any) -> None:
    *optional, out = others
    _check_patch_operands(x, scale, *optional)
    _check_out(x, out)


def _fake_add_patch_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, *optional = others
    _check_patch_operands(x, scale, *optional)
    return _contiguous_like(x), _contiguous_like(x)


def _no_derivative(*_: Any) -> Any:
    raise DerivativeError(
        "add_patch_rms_norm is not differentiable: use hadamard_patch and torch.nn.functional.rms_norm instead"
    )


_TRITON = f"{__package__}.triton"


def _kernels(name: str) -> dict[str, Kernel]:
    """Triton's, imported when they are first run or asked for."""
    return {
        "triton": Kernel(
            lambda *operands: getattr(import_module(_TRITON), name)(*operands),
            lambda device, width: import_module(_TRITON).serves(device, width),
        )
    }


_patch = define_operator(
    "hadamard_patch",
    f"(Tensor x, Tensor scale, {_OMISSIBLE}) -> Tensor",
    _forward,
    _fake_forward,
    triton=_TRITON,
    kernels=_kernels("hadamard_patch"),
    otherwise=_forward,
)
_patch_backward = define_operator(
    "hadamard_patch_backward",
    f"(Tensor grad, Tensor x, Tensor scale, {_OPTIONAL}, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    hadamard_patch_backward_reference,
    _fake_backward,
    triton=_TRITON,
    kernels=_kernels("hadamard_patch_backward"),
    otherwise=hadamard_patch_backward_reference,
)
_patch_out = define_operator(
    "hadamard_patch_out",
    f"(Tensor x, Tensor scale, {_OPTIONAL}, Tensor(a!) out) -> ()",
    _forward_out,
    _fake_forward_out,
    triton=_TRITON,
    kernels=_kernels("hadamard_patch_out"),
    mutates_args=("out",),
)
_add_patch_rms_norm = define_operator(
    "add_patch_rms_norm",
    f"(Tensor x, Tensor residual, Tensor scale, Tensor norm_weight, float eps, {_OMISSIBLE}) -> (Tensor, Tensor)",
    add_patch_rms_norm_reference,
    _fake_add_patch_rms_norm,
    triton=_TRITON,
    kernels=_kernels("add_patch_rms_norm"),
    otherwise=_no_derivative,
)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(gradients_of: Operator) -> Any:
    """The formula, by the operator that computes the gradients."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:6]
        gradients = gradients_of(grad, *inputs, sum(int(one) << i for i, one in enumerate(wanted)))
        return tuple(
            gradient.to(tensor.dtype) if one else None
            for gradient, tensor, one in zip(gradients, inputs, wanted, strict=True)
        )

    return backward


def _into_bits(patch: Operator) -> Any:
    """`_forward_out` where an operand is a view that torch negates, or conjugates, when it is read or written."""

    def forward_into_bits(x: Tensor, scale: Tensor, *others: Any) -> None:
        *optional, out = others
        _check_out(x, out)
        _check_out_is_apart(out, scale, *optional)
        out.copy_(patch(x, scale, *optional))

    return forward_into_bits


# What the compiled kernels ask Python: the matrix H_m of a width when they first meet it, and whether tensors whose
# address ranges meet share memory.
_asked = torch.library.Library(NAMESPACE, "FRAGMENT")
_asked.define("paley_matrix(int d) -> Tensor")
_asked.impl("paley_matrix", lambda d: paley_factor(d)[0], "CompositeExplicitAutograd")
_asked.define("share_memory(Tensor a, Tensor? b) -> bool")
_asked.impl("share_memory", share_memory, "CompositeExplicitAutograd")
# torch's own fallback for such views takes every operator that writes for one that returns what it wrote.
for _bit in ("Negative", "Conjugate"):
    _asked.impl("hadamard_patch_out", _into_bits(_patch), _bit)
    for _impl in _patch_out.variants:
        _asked.impl(f"hadamard_patch_out_{_impl}", _into_bits(_patch.by(_impl)), _bit)

# The reference needs no formula: autograd records it.
for _impl in ("auto", *((_patch.variants.keys() & _patch_backward.variants.keys()) - {"reference"})):
    _patch.by(_impl).register_autograd(_backward(_patch_backward.by(_impl)), setup_context=_save)
for _one in (_add_patch_rms_norm, *_add_patch_rms_norm.variants.values()):
    _one.register_autograd(_no_derivative)
for _operator, _rows in ((_patch, (0,)), (_patch_backward, ()), (_add_patch_rms_norm, (0, 1))):
    for _one in (_operator, *_operator.variants.values()):
        batch_by_rows(_one, rows=_rows)


def _run(impl: str, operator: Operator, *operands: Any) -> Any:
    """The operator, with as little Python as can be: at one row it costs as much as the arithmetic."""
    operator = operator if impl == "auto" else operator.by(impl)
    if torch.compiler.is_compiling():
        return operator.overload(*operands)
    if impl == "auto":
        return _eagerly(operator, operands)
    with named(impl):
        return _eagerly(operator, operands)


def _eagerly(operator: Operator, operands: tuple[Any, ...]) -> Any:
    """Under no_grad, as in Transformers' generate, past the Python that notes what a gradient needs."""
    call = operator.call
    try:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or may_be_dual():
            return call(*operands)
        with below_autograd():
            return call(*operands)
    except RuntimeError:
        _check(operator, operands)
        raise


def _check(operator: Operator, operands: tuple[Any, ...]) -> None:
    """Say in the function's words what a kernel, or torch's dispatcher, says in its own; asked when one has raised."""
    _check_tensors(operator, operands)
    named = {name: operand for (_, name), operand in zip(operator.arguments, operands, strict=True)}
    x, out, optional = named["x"], named.get("out"), [named[name] for name in ("pre_scale", "post_scale", "down", "up")]
    with suppress(RuntimeError):  # memory that cannot be looked at, as that of a batch under vmap
        _check_patch_operands(x, named["scale"], *optional)
        if "residual" in named:
            _check_norm_operands(x, named["residual"], named["norm_weight"])
        if out is not None:
            _check_out(x, out)
            _check_out_is_apart(out, named["scale"], *optional)


def _check_tensors(operator: Operator, operands: tuple[Any, ...]) -> None:
    for (kind, name), operand in zip(operator.arguments, operands, strict=True):
        if not kind.startswith("Tensor") or (operand is None and kind.endswith("?")):
            continue
        if not isinstance(operand, Tensor):
            raise InputError(f"{name} must be a tensor, not {type(operand).__name__}") from None
        if operand.is_nested:
            raise InputError(f"{name} must be a dense tensor, not a nested one: give its values") from None


def hadamard_patch(
    x: Tensor,
    scale: Tensor,
    *,
    pre_scale: Tensor | None = None,
    post_scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The map at a joint: ``y = (((x * pre) @ H) * scale) @ H.T * post + (x @ down) @ up`` (LinearPatch, section 3.2).

    H is `hadamard_matrix` of width d. Equivalent to, with ``h = hadamard_transform``::

        (h(h(x.float() * pre) * scale, inverse=True) * post + (x.float() @ down) @ up).to(x.dtype)

    float64 input is computed in float64, all other in float32; the result is rounded once. Differentiable in x and all
    parameters; works under torch.compile, torch.export and vmap. The kernels have a first derivative in reverse mode;
    for higher ones, forward mode and torch.func's transforms the expression above computes, in plain PyTorch.

    NaN or infinity in x stays in its row. What H mixes with it (the channels of its block; with ``down`` and ``up`` the
    whole row) is not finite then, NaN or infinite as the order of the sums has it, which is not the expression's.

    Args:
        x: [..., d], floating, any strides; N = 0 rows are fine.
        scale: [d], any floating dtype.
        pre_scale: [d] or None, all ones.
        post_scale: [d] or None, all ones.
        down: [d, r], with ``up`` the low-rank term, or None.
        up: [r, d] or None.
        out: written to and returned instead of a new tensor: x's shape and dtype, any strides with a place of its own
            for every element. It may be x itself or share memory with it, not with another operand. Nothing is
            differentiable then.
        impl: the implementation: "auto" (``LINEARPATCH_BACKEND``, else the one for x's device), "reference" (plain
            PyTorch), "cpu", "triton" or "cuda". The gradient is computed by the same one.

    Returns:
        [..., d] in x's dtype, contiguous.

    Raises:
        InputError: operands that do not fit each other (in compiled code a kernel says so, in a RuntimeError); the
            implementation that is named does not serve x (`linearpatch_kernels.ops.backends`), or has no such
            derivative.
        RuntimeError: ``out`` is given where gradients are being recorded for one of the operands, or in forward mode.
    """
    check_served(impl, "hadamard_patch", x)
    if out is None:
        y: Tensor = _run(impl, _patch, x, scale, pre_scale, post_scale, down, up)
        return y
    operands = (x, scale, pre_scale, post_scale, down, up, out)
    if not isinstance(out, Tensor):
        raise InputError(f"out must be a tensor, not {type(out).__name__}")
    refuse_forward_mode("hadamard_patch with out=", operands)
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in operands):
        raise RuntimeError("hadamard_patch with out= is not differentiable: call it under torch.no_grad()")
    operator = _patch_out.by(impl)
    if torch.compiler.is_compiling():
        operator.overload(*operands)
        return out
    try:
        if below_versions is None:
            operator.overload(*operands)
            return out
        with below_versions():
            operator.call(*operands)
    except RuntimeError:
        _check(operator, operands)
        raise
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
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
    impl: str = "auto",
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
        impl: as of `hadamard_patch`.

    Returns:
        ``(normed, new_residual)``, both [..., d] in x's dtype.

    Raises:
        InputError: as `hadamard_patch`.
    """
    check_served(impl, "add_patch_rms_norm", x)
    results: tuple[Tensor, Tensor] = _run(
        impl, _add_patch_rms_norm, x, residual, scale, norm_weight, eps, pre_scale, post_scale, down, up
    )
    return results
