"""Copies of modules that share their parameters with the source and compute with their own.

A module is more than its class and its parameters: libraries set a ``forward`` of their own on instances (Liger,
Unsloth, kernels from the hub), register hooks, keep references to other modules. What is bound to the source would go
on computing with the source's weights in the copy. So it is bound to the copy, and where that cannot be done from
outside (a closure over the source) the copy is refused.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.torch_internals import ACCELERATE_ATTRIBUTES, accelerate_hook, forward_before_accelerate

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_MACHINERY = frozenset(vars(nn.Module()))
_HOOKS = frozenset(name for name in _MACHINERY if "hook" in name)
_STRUCTURE = ("_parameters", "_buffers", "_modules")
# Calls compiled for the source, which are made anew where they are needed, and handles that remove its hooks.
_NOT_COPIED = frozenset(
    ("_compiled_call_impl", "_compiled_call", "_last_compile_config", "_require_grads_hook", "_require_grads_hooks")
)
_VALUES = (type(None), bool, int, float, complex, str, bytes)
_LEAVES = (*_VALUES, type, torch.dtype, torch.device, Tensor, types.ModuleType)
_REFERENCES: dict[type, Any] = {
    weakref.ref: weakref.ref,
    weakref.ProxyType: weakref.proxy,
    weakref.CallableProxyType: weakref.proxy,
}
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
# How many steps from a function or an object a reference to a module is looked for.
_DEPTH = 6
CURE = "merge or unload the adapter, or undo what changed the model, first"


class _BoundToSource(Exception):
    """A value that would go on using the source, and that cannot be bound to the copy from outside."""


class Replacements:
    """What stands in a copy for the things of its source.

    Args:
        pairs: ``(module of the source, module of the copy)``.
        gone: modules and weights of the source for which nothing stands. A weight that is held apart from its module
            is not followed when the module gets another.
        configs: ``(config of the source, config of the copy)``.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Module, nn.Module]],
        gone: Iterable[nn.Module | Tensor] = (),
        configs: Iterable[tuple[object, object]] = (),
    ) -> None:
        # With what they are found by, which must stay alive: an id is given again.
        self._modules = {id(old): (old, new) for old, new in pairs}
        self._gone = {id(thing): thing for thing in gone if id(thing) not in self._modules}
        self._configs = {id(old): (old, new) for old, new in configs}
        self._new = {id(new) for _, new in self._modules.values()}

    def prefer(self, old: nn.Module, new: nn.Module) -> None:
        """From now on, ``new`` stands for ``old``: one module may stand in several places of the source."""
        self._modules[id(old)] = (old, new)
        self._new.add(id(new))

    def bound(self, value: Any) -> Any:
        """``value`` with everything of the source in it replaced; itself where there is nothing.

        Raises:
            _BoundToSource: it holds the source where nothing outside can reach, as a closure does.
        """
        for replaced in (self._modules, self._configs):
            if id(value) in replaced:
                return replaced[id(value)][1]
        if id(value) not in self._gone:
            if isinstance(value, _LEAVES):
                return value
            if isinstance(value, types.MethodType):
                owner, function = self.bound(value.__self__), self.bound(value.__func__)
                return value if owner is value.__self__ else types.MethodType(function, owner)
            if type(value) is functools.partial:
                old = (value.func, value.args, value.keywords)
                func, args, keywords = new = tuple(map(self.bound, old))
                return value if _same(new, old) else functools.partial(func, *args, **keywords)
            if type(value) in _REFERENCES:
                target = self.bound(_target(value))
                return value if target is _target(value) else _REFERENCES[type(value)](target)
            if type(value) in _CONTAINERS:
                return self._bound_container(value)
        if self._reaches(value, _DEPTH, set()):
            raise _BoundToSource
        return value

    def _bound_container(self, value: Any) -> Any:
        if not isinstance(value, dict):
            items = [*map(self.bound, value)]
            return value if _same(items, value) else type(value)(items)
        new = [(self.bound(key), self.bound(item)) for key, item in value.items()]
        return value if all(map(_same, new, value.items())) else type(value)(new)

    def _reaches(self, value: Any, depth: int, seen: set[int]) -> bool:
        """Whether a module or a weight of the source can be reached from a value."""
        if id(value) in self._modules or id(value) in self._gone:
            return True
        # What stands in the copy is bound for itself, and shares its weights with the source.
        if depth == 0 or id(value) in seen or id(value) in self._new or isinstance(value, _LEAVES):
            return False
        seen.add(id(value))
        return any(self._reaches(part, depth - 1, seen) for part in _parts(value))


def _same(one: Iterable[object], other: Iterable[object]) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def _target(reference: Any) -> Any:
    """What a weak reference or a weak proxy of a module stands for."""
    # A proxy hands out everything of the module, and so a method that knows it.
    return reference() if type(reference) is weakref.ref else getattr(reference.__repr__, "__self__", None)


def _parts(value: Any) -> Iterator[Any]:
    """What a function, a container or an object holds."""
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from (value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).values()
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        # Of the globals, modules only: from the rest all of the program can be reached.
        names = (value.__globals__.get(name) for name in value.__code__.co_names)
        yield from (module for module in names if isinstance(module, nn.Module))
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif type(value) in _REFERENCES:
        yield _target(value)
    elif isinstance(value, Mapping):
        yield from (*value, *value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    else:
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            yield from (getattr(value, slot, None) for slot in ([slots] if isinstance(slots, str) else slots))


def shallow_copy(module: ModuleT) -> ModuleT:
    """A copy with containers of its own (children, parameters, buffers, hooks) that hold the same things.

    What was bound to the source still is: see `bind`.
    """
    clone = copy.copy(module)
    for name, value in vars(module).items():
        if name in _NOT_COPIED:
            vars(clone).pop(name, None)
        elif name.startswith("_") and isinstance(value, dict | set):
            vars(clone)[name] = copy.copy(value)
    if accelerate_hook(clone) is not None and clone._modules:
        _without_accelerate(clone)
    return clone


def _without_accelerate(clone: nn.Module) -> None:
    """Take off what accelerate put around the methods of a module that it dispatched.

    It is bound to that module, and would run it instead of the copy. Weights that accelerate keeps elsewhere stay with
    the modules that hold them, whose own hooks bring them.
    """
    before = forward_before_accelerate(clone)
    for name in [name for name in vars(clone) if name in ACCELERATE_ATTRIBUTES or name in vars(nn.Module)]:
        if name not in _MACHINERY:
            del vars(clone)[name]
    if before is not None and getattr(before, "__func__", before) is not type(clone).forward:
        vars(clone)["forward"] = before


def shared_copy(module: ModuleT) -> ModuleT:
    """A `shallow_copy` with buffers of its own: a rotary table is updated in place by some scalings."""
    clone = shallow_copy(module)
    clone._buffers.update({name: None if b is None else b.clone() for name, b in clone._buffers.items()})
    return clone


def bind(clone: nn.Module, replacements: Replacements, name: str) -> None:
    """Bind the hooks and the attributes of a shallow copy to what the replacements say, instead of to the source.

    An attribute that cannot be bound and that neither stands for one of the class nor is a hook is left out.

    Raises:
        InputError: a method or a hook holds the source in a closure or an object; ``name`` says which module it is.
    """
    for attribute, value in list(vars(clone).items()):
        if attribute in _STRUCTURE:
            continue
        try:
            vars(clone)[attribute] = replacements.bound(value)
        except _BoundToSource:
            if attribute not in _MACHINERY and not hasattr(type(clone), attribute):
                del vars(clone)[attribute]
                continue
            raise InputError(
                f"{'a hook' if attribute in _HOOKS else f'the {attribute}'} that was put on {name} holds this very "
                "model, whose weights another one would compute with: undo what put it there first"
            ) from None


@dataclass(frozen=True)
class Pair:
    """A module of a source and the one that Transformers builds in its place.

    Attributes:
        path, name: of ``new`` and of ``old`` in their models.
        is_list: they are the lists of the layers, which are of different lengths.
        layer: the numbers of the layers of ``old`` and ``new`` that they lie in, and so derive nothing from the model's
            other layers; None outside.
        layers: what stays of how many layers, for a module that may hold their parts of a tensor beside each other;
            else None.
    """

    path: str
    name: str
    new: nn.Module
    old: nn.Module
    is_list: bool
    layer: tuple[int, int] | None
    layers: tuple[Sequence[int], int] | None = None

    def packed(self, name: str) -> int | None:
        """The dimension of a tensor along which the parts of all layers of ``old`` lie, and in ``new`` of those that
        stay (the embeddings of Gemma 4's layers); None where the tensor is as large in both."""
        tensors = [_own_tensors(one).get(name) for one in (self.old, self.new)]
        old, new = (() if tensor is None else tuple(tensor.shape) for tensor in tensors)
        if self.layers is None or len(old) != len(new):
            return None
        kept, count = self.layers
        other = [at for at, (one, another) in enumerate(zip(old, new, strict=True)) if one != another]
        fits = len(other) == 1 and old[other[0]] % count == 0 and new[other[0]] * count == old[other[0]] * len(kept)
        return other[0] if fits else None

    @property
    def is_built(self) -> bool:
        """Whether a copy of ``old`` would not do in its place: it has children, or sizes that ``new`` does not have."""
        return bool(_children(self.new)) or any(self.packed(name) is not None for name in _own_tensors(self.old))

    @property
    def same_class(self) -> bool:
        """Whether ``new`` does by its class what ``old`` does; a patched class does what its stock class does."""
        return type(self.old) in (type(self.new), getattr(type(self.new), "stock_class", None))


def check_same_structure(pair: Pair) -> None:
    """Whether a module has the children, the parameters and the saved buffers of the one built in its place.

    Raises:
        InputError: it does not (adapters, quantised or pruned projections, wrappers), or was compiled by TorchScript.
    """
    kind, built = type(pair.old).__name__, type(pair.new).__name__
    if isinstance(pair.old, torch.jit.ScriptModule):
        raise InputError(f"{pair.name} is TorchScript, which cannot be cut: load the model without it")
    shapes, expected = _state_shapes(pair.old), _state_shapes(pair.new)
    parts = (set[str](), set[str]()) if pair.is_list else ({*_children(pair.old)}, {*_children(pair.new)})
    for found, wanted in (parts, ({*shapes}, {*expected})):
        other = [f"has {name}" for name in sorted(found - wanted)] + [
            f"has no {name}" for name in sorted(wanted - found)
        ]
        if other:
            raise InputError(f"{pair.name} is not the {built} of Transformers but a {kind} that {other[0]}: {CURE}")
    for name, shape in shapes.items():
        if shape != expected[name] and pair.packed(name) is None:
            raise InputError(
                f"{pair.name}.{name} has the shape {[*shape]}, and by the model's config {[*expected[name]]}: {CURE}"
            )


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _state_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """The module's own part of its state dict."""
    left_out = module._non_persistent_buffers_set
    return {name: tensor.shape for name, tensor in _own_tensors(module).items() if name not in left_out}


def carry_over(pair: Pair) -> None:
    """Give a newly built module the tensors, the hooks and what else was put on the one whose place it takes.

    What its class derives from the config and the place in the model is its own.

    Raises:
        InputError: a method was put on the old one that would run in the place of one that the new class has.
    """
    share_tensors(pair)
    for name, value in vars(pair.old).items():
        if name in _HOOKS and "state_dict" in name and len(value) == len(vars(pair.new)[name]):
            continue  # those that the class itself registers, on the new one
        elif name in _HOOKS or name == "_non_persistent_buffers_set":
            vars(pair.new)[name] = copy.copy(value)
        elif name in _MACHINERY or name in _NOT_COPIED:
            continue
        elif name not in vars(pair.new):
            stock, own = (getattr(type(one), name, None) for one in (pair.old, pair.new))
            if callable(own) and own is not stock:
                if not pair.same_class:  # compared, and found to compute the same
                    continue
                raise InputError(
                    f"the {name} that was put on {pair.name} would run in the place of the patched one: undo what put "
                    "it there first"
                )
            vars(pair.new)[name] = copy.copy(value) if isinstance(value, dict | set) else value
        elif pair.layer is not None and isinstance(value, _VALUES) and not _is_number(name, pair):
            # As it was built, or changed by hand since (`is_causal`): what the source computes with.
            vars(pair.new)[name] = value


def _is_number(name: str, pair: Pair) -> bool:
    """Whether an attribute is the number of the layer, which most call ``layer_idx``."""
    values = (vars(pair.old)[name], vars(pair.new)[name])
    return name == "layer_idx" or (values == pair.layer and type(values[0]) is int)


def share_tensors(pair: Pair) -> None:
    """Give a newly built module the parameters, and copies of the buffers, of the one whose place it takes.

    Of those that hold the parts of all layers (`Pair.packed`) it gets copies of the parts of the layers that stay.
    """
    for name, parameter in pair.old._parameters.items():
        pair.new._parameters[name] = _stays(pair, name, parameter)
    for name, buffer in pair.old._buffers.items():
        pair.new._buffers[name] = None if buffer is None else _stays(pair, name, buffer).clone()


def _stays(pair: Pair, name: str, tensor: Any) -> Any:
    """Of a tensor of ``pair.old`` what there is of it in ``pair.new``: itself, or the parts of the layers that stay."""
    dim = pair.packed(name)
    if dim is None or pair.layers is None:
        return tensor
    kept, count = pair.layers
    places = torch.tensor(list(kept), dtype=torch.int64, device=tensor.device)
    part = tensor.detach().unflatten(dim, (count, -1)).index_select(dim, places).flatten(dim, dim + 1)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part
