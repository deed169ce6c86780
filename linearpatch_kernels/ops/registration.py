"""How an operator gets into torch's dispatcher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.library import custom_op

from linearpatch_kernels.backend import check_reference_allowed, compiled_for_gpus, triton_serves
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import without_autocast


class DerivativeError(InputError, NotImplementedError):
    """A derivative that an operator does not have, and that would else be taken for zero."""


def _in_forward_mode(operands: Iterable[Any]) -> bool:
    """Whether an operand carries a tangent."""
    return forward_ad._current_level >= 0 and any(
        isinstance(operand, Tensor) and forward_ad.unpack_dual(operand).tangent is not None for operand in operands
    )


def refuse_forward_mode(name: str, operands: Iterable[Any]) -> None:
    """Raise where an operand carries a tangent, which an operator of torch.library drops without a word.

    Every operator that `define_operator` makes asks this itself; a caller that goes past autograd has to ask it.

    Raises:
        DerivativeError: the call is differentiated in forward mode (jvp, jacfwd, linearize, dual tensors).
    """
    if _in_forward_mode(operands):
        raise DerivativeError(
            f"{name} has no forward-mode derivative (jvp, jacfwd): use reverse mode, torch.autograd.grad or backward()"
        )


def _in_torch_func(operands: Iterable[Any]) -> bool:
    """Whether torch.func differentiates: it has no way into torch.library's formulas, and blames other code."""
    return (
        torch._C._are_functorch_transforms_active()
        and torch.is_grad_enabled()
        and torch._C._any_requires_grad(*operands)
    )


def _guard_derivatives(operator: CustomOpDef, otherwise: Callable[..., Any] | None) -> None:
    """Take torch.library's place under the autograd key, for the derivatives that it gets wrong or has no formula for.

    Args:
        otherwise: what computes in the operator's place then; None: it raises.
    """
    differentiate = make_autograd_impl(operator._opoverload, operator)
    name = operator._name.removesuffix("_reference")

    def guarded(keyset: Any, *operands: Any) -> Any:
        if otherwise is not None and (_in_forward_mode(operands) or _in_torch_func(operands) or unknown(operands)):
            return otherwise(*operands)
        refuse_forward_mode(name, operands)
        if _in_torch_func(operands):
            raise DerivativeError(
                f"{name} cannot be differentiated by torch.func (grad, vjp, jacrev, hessian): use torch.autograd.grad"
                " or backward()"
            )
        return differentiate(keyset, *operands)

    def unknown(operands: tuple[Any, ...]) -> bool:
        return operator._backward_fn is None and torch.is_grad_enabled() and torch._C._any_requires_grad(*operands)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two registrations
        operator._lib.impl(operator._name, guarded, "Autograd", with_keyset=True, allow_override=True)


def refuse_second_derivative(operator: CustomOpDef, of: str) -> None:
    """Register the autograd of an operator that computes gradients: it raises, in the name of the function."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise second_derivative_error(of)

    operator.register_autograd(backward)


def second_derivative_error(of: str) -> DerivativeError:
    return DerivativeError(f"{of} is differentiable once: it has no second derivative (create_graph=True, hessians)")


def define_operator(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates_args: Iterable[str] = (),
    triton: str | None = None,
    compiled: str | None = None,
    otherwise: Callable[..., Any] | None = None,
) -> CustomOpDef:
    """Define ``linearpatch::name`` with its reference on every device, and ``linearpatch::name_reference``.

    A compiled kernel registered for a device (``STABLE_TORCH_LIBRARY_IMPL(linearpatch, CPU, m)``, before or after)
    takes the place of the reference there: no Python runs below ``torch.ops`` then, except for autograd's record. Where
    the kernel does not cover a case, such as float64, it calls ``linearpatch::name_reference`` through the dispatcher.

    Args:
        schema: arguments and returns, ``(Tensor x, ...) -> Tensor``; the first argument is a tensor. Those with a
            default may be left out by callers; the functions below are given all of them.
        reference: the operator in plain PyTorch; takes every argument of the schema positionally.
        fake: the shapes, dtypes and strides of the result; the same arguments, whose tensors are on one device.
        triton: the module whose function ``name`` runs on tensors of the devices that Triton serves; imported then.
        compiled: an operator of the extension that this module uses, too: where it is there, Triton need not be.
        mutates_args: names of the arguments that are written to.
        otherwise: computes in the operator's place, on any device, where a derivative is asked for that it has no
            formula for: in forward mode, under torch.func's transforms, in reverse mode if none is registered. The
            reference, if it is differentiable; None: such a derivative raises. Takes the same arguments.
    """

    declared = torch._C.parse_schema(f"linearpatch::{name}{schema}").arguments

    def completed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the last ones, which torch takes away where they are equal to their defaults."""
        return *arguments, *(argument.default_value for argument in declared[len(arguments) :])

    def in_its_own_precision(*arguments: Any) -> Any:
        with without_autocast(arguments[0].device):
            return reference(*completed(arguments))

    def without_formula(*arguments: Any) -> Any:
        assert otherwise is not None
        check_reference_allowed(f"such derivative of {name}", arguments[0].device)
        with without_autocast(arguments[0].device):
            return otherwise(*completed(arguments))

    def where_no_kernel_is(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if triton is not None and (triton_serves(device) or (compiled and compiled_for_gpus(device, compiled))):
            with without_autocast(arguments[0].device):
                return getattr(import_module(triton), name)(*completed(arguments))
        check_reference_allowed(name, arguments[0].device)
        return in_its_own_precision(*arguments)

    def on_one_device(*arguments: Any) -> Any:
        # One meta tensor is enough for torch to come here, and memory that nobody writes would be the result.
        devices = sorted({argument.device.type for argument in arguments if isinstance(argument, Tensor)})
        if len(devices) > 1:
            raise InputError(f"{name} needs its tensors on one device, not on {' and '.join(devices)}")
        return fake(*completed(arguments))

    for variant, implementation in ((name + "_reference", in_its_own_precision), (name, where_no_kernel_is)):
        operator = custom_op(f"linearpatch::{variant}", implementation, mutates_args=tuple(mutates_args), schema=schema)
        operator.register_fake(on_one_device)
        _guard_derivatives(operator, otherwise and without_formula)
    return operator


def batch_by_rows(operator: CustomOpDef, rows: Sequence[int]) -> None:
    """Register the vmap rule: a batch of row arguments is more rows, any other batch is a loop.

    Args:
        rows: positions of the arguments [..., d] that the operator maps row by row onto results [..., d].
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        leading = [a if dim is None else a.movedim(dim, 0) for a, dim in zip(arguments, in_dims, strict=True)]
        batched = [position for position, dim in enumerate(in_dims) if dim is not None]
        if batched == list(rows):
            results = operator(*leading)
        else:
            size = info.batch_size
            each = [
                operator(*[one(a, i, size) if position in batched else a for position, a in enumerate(leading)])
                for i in range(size or 1)
            ]
            several = isinstance(each[0], tuple)
            results = tuple(map(torch.stack, zip(*each, strict=True))) if several else torch.stack(each)
            if not size:
                results = tuple(result[:0] for result in results) if several else results[:0]
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    def one(batch: Tensor, i: int, size: int) -> Tensor:
        """Of an empty batch, something of the shape that its members would have: what a result's depends on."""
        return batch[i] if size else batch.new_zeros(batch.shape[1:])

    operator.register_vmap(rule)
