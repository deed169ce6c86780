"""How an operator gets into torch's dispatcher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, custom_op

from linearpatch_kernels._ops import NAMESPACE
from linearpatch_kernels.backend import check_reference_allowed, compiled_for_gpus, triton_serves
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import without_autocast
from linearpatch_kernels.ops.backends import Kernel, add_operator, added_kernels
from linearpatch_kernels.torch_internals import called_by, may_be_dual, transformed

_AUTOGRAD = Library(NAMESPACE, "IMPL")

# What the caller of an operator named, for the derivatives that no kernel has: they are computed by none in its place.
_NAMED: ContextVar[str] = ContextVar("impl", default="auto")


@contextmanager
def named(impl: str) -> Iterator[None]:
    """While it is open, a derivative that the named implementation does not have raises."""
    before = _NAMED.set(impl)
    try:
        yield
    finally:
        _NAMED.reset(before)


def _check_named(name: str) -> None:
    if (impl := _NAMED.get()) not in ("auto", "reference"):
        raise InputError(f"impl={impl!r} has no such derivative of {name}: impl='reference' has, and 'auto' takes it")


class DerivativeError(InputError, NotImplementedError):
    """A derivative that an operator does not have, and that would else be taken for zero."""


def _in_forward_mode(operands: Iterable[Any]) -> bool:
    """Whether an operand carries a tangent."""
    return may_be_dual() and any(
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


def _recorded(operands: Iterable[Any]) -> bool:
    """Whether autograd is to differentiate by an operand."""
    return torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in operands)


_BELOW_AUTOGRAD: dict[int, Any] = {}


def _below_autograd(keys: Any) -> Any:
    """The dispatch keys of a call without autograd's and those before it."""
    known = keys.raw_repr()
    if known not in _BELOW_AUTOGRAD:  # a key's name is slow to come by
        found = False
        while not found:
            key = keys.highestPriorityTypeId()
            keys, found = keys.remove(key), "Autograd" in key.name
        _BELOW_AUTOGRAD[known] = keys
    return _BELOW_AUTOGRAD[known]


class Operator:
    """An operator in torch's dispatcher, with derivatives that torch.library's own registration gets wrong or lacks.

    Args:
        name, schema, kernel, fake, mutates_args: as of `define_operator`; the functions take every argument.
        told: the operator's name in messages.
        variants: operators of the same schema that are one implementation each, by its name.

    Attributes:
        overload: what ``torch.ops`` has under the name; what a compiler traces.
        call: the same, called directly.
        arguments: ``(type, name)`` of each argument of the schema.
        otherwise: what computes in the operator's place for a derivative that it has no formula for; None: it raises.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        mutates_args: Iterable[str],
        told: str,
        otherwise: Callable[..., Any] | None,
        variants: Mapping[str, Operator] | None = None,
    ) -> None:
        self.variants = dict(variants or {})
        self._definition = custom_op(f"{NAMESPACE}::{name}", kernel, mutates_args=tuple(mutates_args), schema=schema)
        self._definition.register_fake(fake)
        self.register_kernel = self._definition.register_kernel
        self.register_vmap = self._definition.register_vmap
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.call = called_by(self.overload)
        self._told, self._otherwise = told, otherwise
        declared = schema.partition(" -> ")[0].strip("()").split(", ")
        self.arguments = [(kind, name.partition("=")[0]) for kind, name in map(str.split, declared)]
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., None] | None = None
        self._function = self._differentiated()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two registrations
            _AUTOGRAD.impl(name, self._under_autograd, "Autograd", with_keyset=True, allow_override=True)

    def __call__(self, *operands: Any) -> Any:
        return self.overload(*operands)

    def by(self, impl: str) -> Operator:
        """What an implementation runs: the operator itself where torch's dispatcher chooses it, by the device."""
        return self.variants.get(impl, self)

    def completed(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the last ones, which callers may leave out, and which torch takes away where they are None."""
        return *operands, *(None,) * (len(self.arguments) - len(operands))

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """The formula, as ``torch.library.register_autograd`` takes it; a gradient for every argument of the schema."""
        self._backward, self._setup_context = backward, setup_context

    def _under_autograd(self, keys: Any, *operands: Any) -> Any:
        recorded = _recorded(operands)
        in_torch_func = recorded and transformed(operands)
        if self._otherwise is not None and (
            in_torch_func or (recorded and self._backward is None) or _in_forward_mode(operands)
        ):
            return self._otherwise(*operands)
        refuse_forward_mode(self._told, operands)
        if in_torch_func:
            raise DerivativeError(
                f"{self._told} cannot be differentiated by torch.func (grad, vjp, jacrev, hessian):"
                " use torch.autograd.grad or backward()"
            )
        if recorded:
            return self._function.apply(*self.completed(operands), keys)
        return self.overload.redispatch(_below_autograd(keys), *operands)

    def _differentiated(self) -> Any:
        """The operator and its formula as an ``autograd.Function``, whose last operand are the dispatch keys."""
        operator = self

        class Differentiated(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *operands_and_keys: Any) -> Any:
                *operands, keys = operands_and_keys
                ctx.named = _NAMED.get()
                result = operator.overload.redispatch(_below_autograd(keys), *operands)
                if operator._setup_context is not None:
                    operator._setup_context(ctx, tuple(operands), result)
                return result

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if operator._backward is None:
                    raise DerivativeError(f"{operator._told} has no derivative")
                with named(ctx.named):
                    return *operator._backward(ctx, *grads), None

        return Differentiated


def refuse_second_derivative(operator: Operator, of: str) -> None:
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
    kernels: Mapping[str, Kernel] | None = None,
    otherwise: Callable[..., Any] | None = None,
) -> Operator:
    """Define ``linearpatch::name`` with its reference on every device, and ``linearpatch::name_reference``.

    ``linearpatch::name_IMPL`` is defined for every other implementation that can be named and is not the dispatcher's.

    A compiled kernel registered for a device (``STABLE_TORCH_LIBRARY_IMPL(linearpatch, CPU, m)``, before or after)
    takes the place of the reference there: no Python runs below ``torch.ops`` then, except for autograd's record. Where
    the kernel does not cover a case, such as float64, it calls ``linearpatch::name_reference`` through the dispatcher.

    Args:
        schema: arguments and returns, ``(Tensor x, ...) -> Tensor``; the first argument is a tensor. Those with a
            default, which is None, may be left out by callers; the functions below are given all of them.
        reference: the operator in plain PyTorch; takes every argument of the schema positionally.
        fake: the shapes, dtypes and strides of the result; the same arguments, whose tensors are on one device.
        triton: the module whose function ``name`` runs on tensors of the devices that Triton serves; imported then.
        compiled: an operator of the extension that this module uses, too: where it is there, Triton need not be.
        kernels: by the name of an implementation, what runs where a call names it; takes the same arguments.
        mutates_args: names of the arguments that are written to.
        otherwise: computes in the operator's place, on any device, where a derivative is asked for that it has no
            formula for: in forward mode, under torch.func's transforms, in reverse mode if none is registered. The
            reference, if it is differentiable; None: such a derivative raises. Takes the same arguments.
    """

    def in_its_own_precision(run: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            with without_autocast(arguments[0].device):
                return run(*operator.completed(arguments))

        return kernel

    by_reference = in_its_own_precision(reference)

    def without_formula(*arguments: Any) -> Any:
        assert otherwise is not None
        _check_named(name)
        check_reference_allowed(f"such derivative of {name}", arguments[0].device)
        with without_autocast(arguments[0].device):
            return otherwise(*operator.completed(arguments))

    def where_no_kernel_is(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if triton is not None and (triton_serves(device) or (compiled and compiled_for_gpus(device, compiled))):
            with without_autocast(arguments[0].device):
                return getattr(import_module(triton), name)(*operator.completed(arguments))
        check_reference_allowed(name, arguments[0].device)
        return by_reference(*arguments)

    def on_one_device(*arguments: Any) -> Any:
        # One meta tensor is enough for torch to come here, and memory that nobody writes would be the result.
        devices = sorted({argument.device.type for argument in arguments if isinstance(argument, Tensor)})
        if len(devices) > 1:
            raise InputError(f"{name} needs its tensors on one device, not on {' and '.join(devices)}")
        return fake(*operator.completed(arguments))

    def defined(variant: str, run: Callable[..., Any], variants: Mapping[str, Operator] | None = None) -> Operator:
        derived = otherwise and without_formula
        return Operator(variant, schema, run, on_one_device, mutates_args, name, derived, variants)

    added = added_kernels(name)
    kernels = {**(kernels or {}), **{impl: one for impl, one in added.items() if one is not None}}
    variants = {impl: defined(f"{name}_{impl}", in_its_own_precision(one.run)) for impl, one in kernels.items()}
    # Where an implementation was added without a kernel of this operator, none takes its place.
    variants |= {impl: defined(f"{name}_{impl}", _no_kernel(name, impl)) for impl in added if impl not in kernels}
    variants["reference"] = defined(f"{name}_reference", by_reference)
    operator = defined(name, where_no_kernel_is, variants)
    add_operator(name, kernels)
    return operator


def _no_kernel(name: str, impl: str) -> Callable[..., Any]:
    """What stands for an operator that an added implementation lacks: it raises."""

    def refuse(*_: Any) -> Any:
        raise InputError(f"impl={impl!r} has no kernel of {name}: name another implementation, or none")

    return refuse


def batch_by_rows(operator: Operator, rows: Sequence[int]) -> None:
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
