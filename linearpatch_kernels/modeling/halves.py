"""What of a layer reads the stream and what writes to it, for a refit: from the family's record, or measured.

A record is not needed, as a layer shows on a few tokens what is in it. What reads the stream are the projections that
the stream, or what one norm makes of it, enters. What writes to it are the projections whose output arrives in the
stream as it is, times a factor: noise that is added to the output is added there, and nothing else sees it first.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import Sublayer, decoder_layers, family_of, recorded_sublayers
from linearpatch_kernels.modeling.stream import some_tokens, traced
from linearpatch_kernels.modeling.views import partial_decoder
from linearpatch_kernels.torch_state import eval_mode, own_state

_TOKENS = 24
# Of noise that is added, beside what it is added to: large, so that little of it is lost where that is rounded.
_LOUD = 4.0
# What `patched` calls the patches in a layer.
_PATCHES = ("patch", "output_patch")


@dataclass(frozen=True)
class Write:
    """A projection whose output is added to the stream, ``factor`` times."""

    projection: str
    factor: float = 1.0


@dataclass(frozen=True)
class Half:
    """A part of a layer that reads the stream and adds to it; modules are named by their path in the layer.

    Attributes:
        name: ``"attention"``, ``"feed-forward"``, or ``"layer"`` where a layer is one such part.
        norm: what makes of the stream what the projections read; None: they read the stream itself.
        reads: all projections that what ``norm`` gives enters; empty where they are to be left alone, ``unread`` says
            why.
        writes: what adds to the stream; empty where nothing of it can be fitted, ``unwritten`` says why.
        behind: a projection and the norm that stands between it and the stream (Gemma), where there is one.
        ends: the module that the stream behind this half enters; None: the stream leaves the layer.
    """

    name: str
    norm: str | None
    reads: tuple[str, ...]
    writes: tuple[Write, ...]
    ends: str | None
    unread: str = ""
    unwritten: str = ""
    behind: tuple[str, str] | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All that a refit may change."""
        return (*self.reads, *(write.projection for write in self.writes))


def layer_halves(model: PreTrainedModel, indices: Iterable[int]) -> dict[int, tuple[Half, ...]]:
    """The halves of some layers of a model, by the layer's index: recorded, or measured.

    Raises:
        InputError: nothing in one of the layers can be fitted again; says which and why.
    """
    wanted = sorted(set(indices))
    if family_of(model).modules is not None:
        return dict.fromkeys(wanted, recorded_halves(model))
    return measured_halves(model, wanted)


@own_state()
@torch.no_grad()
def measured_halves(model: PreTrainedModel, indices: Sequence[int]) -> dict[int, tuple[Half, ...]]:
    """Those of `layer_halves`, from what the layers do with 24 tokens, whatever a record says."""
    with eval_mode(model):
        calls = traced(model, some_tokens(model, _TOKENS))
        return {index: _measured(model, index, calls[index].stream) for index in indices}


def kinds_of_halves(model: PreTrainedModel) -> dict[int, tuple[Half, ...]]:
    """`layer_halves` of the first layer of every structure: what can be fitted again in the layers of this model.

    Raises:
        InputError: as for `layer_halves`; or a record says otherwise than the layers show.
    """
    first: dict[Any, int] = {}
    for index, layer in enumerate(decoder_layers(model)):
        first.setdefault(made_of(layer), index)
    measured = measured_halves(model, [*first.values()])
    if family_of(model).modules is not None:
        told = recorded_halves(model)
        for index, shown in measured.items():
            for one, other in zip(told, shown, strict=False):
                _check_record(model, index, one, other)
    return measured


def _check_record(model: PreTrainedModel, index: int, told: Half, shown: Half) -> None:
    why = shown.unread or shown.unwritten
    for what in ("name", "norm", "reads", "writes", "ends"):
        one, other = getattr(told, what), getattr(shown, what)
        if set(one) != set(other) if isinstance(one, tuple) else one != other:
            raise InputError(
                f"the record of models of type {family_of(model).model_type!r} is wrong: of the {told.name} of layer "
                f"{index} it says {what}={one!r}, and the layer shows {other!r}" + (f" ({why})" if why else "")
            )


def made_of(layer: nn.Module) -> tuple[Any, ...]:
    """What is the same of layers of one structure: their modules' classes and shapes, without the patches of joints."""
    return tuple(
        (name, getattr(one, "stock_class", type(one)), *(own.shape for own in one.parameters(recurse=False)))
        for name, one in layer.named_modules()
        if not is_of_a_patch(name)
    )


def is_of_a_patch(name: str) -> bool:
    """Whether a name in a layer is that of a patch, or of something in one."""
    return name.partition(".")[0] in _PATCHES


def recorded_halves(model: nn.Module) -> tuple[Half, ...]:
    """Those that the family's record describes."""
    attention, feed_forward = recorded_sublayers(model)
    return _recorded(attention, feed_forward.norm), _recorded(feed_forward, None)


def _recorded(half: Sublayer, ends: str | None) -> Half:
    reads = tuple(dict.fromkeys(heads.projection for heads in half.inputs))
    path, normed_by = half.output.projection, half.output_norm
    if normed_by is not None:
        why, behind = _normed(normed_by, path), (path, normed_by)
        return Half(half.name, half.norm, reads, (), ends, unwritten=why, behind=behind)
    return Half(half.name, half.norm, reads, (Write(path),), ends)


def _normed(norm: str, projection: str) -> str:
    return f"{norm} norms what comes out of {projection}"


@dataclass(frozen=True)
class Call:
    """A module's call: its path in the layer, what entered it and what left it, [T, n] each.

    ``count`` of them were before; ``places`` are those of the tensors themselves, which two may share.
    """

    path: str
    count: int
    entered: Tensor
    left: Tensor
    places: tuple[int, int]


class Probe:
    """Runs one layer on a stream [1, T, d], as it is or with changes to what its modules take or give."""

    def __init__(self, model: PreTrainedModel, index: int, stream: Tensor) -> None:
        self.layer = decoder_layers(model)[index]
        self._run, self._stream = partial_decoder(model, index, index + 1), stream
        self._parts = {
            path: module
            for path, module in self.layer.named_modules()
            if path in _PATCHES
            or (path and not is_of_a_patch(path) and (not [*module.children()] or module._parameters))
        }
        self.calls, self.result = self.run()
        self.plain = {call.path: call for call in self.calls if self._is_plain(call)}

    def run(
        self, given: Mapping[str, Tensor] | None = None, taken: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Call], Tensor]:
        """The calls in the order in which they begin, and the stream behind the layer, [T, d].

        Args:
            given: noise for what leaves modules; taken: for what enters them.
        """
        # With the tensors themselves, so that no other takes their place; the copies are what they were at the time.
        begun: list[tuple[str, Tensor, Tensor]] = []
        left: dict[int, tuple[Tensor, Tensor]] = {}
        open_calls: list[int] = []

        def begin(path: str, _: Any, args: Any, kwargs: Any) -> Any:
            first = next(
                (one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)),
                torch.empty(0, 0, dtype=torch.float32, device="cpu"),
            )
            if taken and path in taken and args:
                args = (args[0] + taken[path].view_as(args[0]), *args[1:])
                first = args[0]
            open_calls.append(len(begun))
            begun.append((path, first, _rows(first)))
            return args, kwargs

        def end(path: str, _: Any, __: Any, output: Any) -> Any:
            found = output[0] if isinstance(output, tuple | list) else output
            if given and path in given and found is output:
                output = found = found + given[path].view_as(found)
            found = found if isinstance(found, Tensor) else torch.empty(0, 0, dtype=torch.float32, device="cpu")
            left[open_calls.pop()] = found, _rows(found)
            return output

        with ExitStack() as hooks:
            for path, module in self._parts.items():
                before, behind = functools.partial(begin, path), functools.partial(end, path)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(behind).remove)
            result = self._run(inputs_embeds=self._stream, use_cache=False).last_hidden_state
        # Of a layer that maps what it leaves (a patch behind all layers), what it would leave without.
        result = next((one for path, _, one in begun if path == "output_patch"), _rows(result))
        calls, counts = [], Counter[str]()
        for number, (path, tensor, entered) in enumerate(begun):
            places = tensor.data_ptr(), left[number][0].data_ptr()
            calls.append(Call(path, counts[path], entered, left[number][1], places))
            counts[path] += 1
        return calls, result

    def _is_plain(self, call: Call) -> bool:
        """Whether it is a linear map of what enters, of every token, once: then its weights can be fitted again."""
        module: Any = self.layer.get_submodule(call.path)
        calls = [one for one in self.calls if one.path == call.path]
        if not isinstance(module, nn.Linear | Conv1D) or len(calls) > 1 or len(call.entered) != self._stream.shape[1]:
            return False
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        return near(functional.linear(call.entered, weight, module.bias), call.left, call.left)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The stream behind the layer with these in the place of its parameters, by their names in it."""
        run = self._run
        names = {id(parameter): name for name, parameter in run.named_parameters()}
        given = {names[id(self.layer.get_parameter(name))]: value for name, value in weights.items()}
        arguments = {"inputs_embeds": self._stream, "use_cache": False}
        return _rows(functional_call(run, given, (), arguments).last_hidden_state)

    def noise(self, like: Tensor, beside: Tensor) -> Tensor:
        """Random rows of a shape, louder than a tensor."""
        drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        return (_LOUD * float(beside.double().square().mean().sqrt()) * drawn).to(like)

    def holds_matrices(self, path: str) -> bool:
        """Whether a module has weights of its own that are more than a gain or a bias."""
        return any(parameter.dim() > 1 for parameter in self._parts[path].parameters(recurse=False))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).clone()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def near(one: Tensor, other: Tensor, beside: Tensor) -> bool:
    """Whether two differ by rounding, beside a tensor that both were computed from."""
    return float((one.double() - other.double()).norm()) <= rounding_of(one) * float(beside.double().norm())


def rounding_of(tensor: Tensor) -> float:
    # A sum of several terms, each of them rounded.
    return max(1e-4, 4 * torch.finfo(tensor.dtype).eps)


def _factor(moved: Tensor, noise: Tensor, beside: Tensor) -> float | None:
    """s where what moved is s times the noise, but for rounding; None where it is not."""
    change, drawn = moved.double(), noise.double()
    factor = float((change * drawn).sum() / drawn.square().sum())
    if not math.isfinite(factor) or abs(factor) < 1e-3:
        return None
    rounding = rounding_of(noise) * (float(beside.double().norm()) + float(change.norm()))
    if float((change - factor * drawn).norm()) > min(rounding, 0.1 * float(change.norm())):
        return None
    return 1.0 if abs(factor - 1) < max(1e-5, torch.finfo(noise.dtype).eps) else factor


@dataclass(frozen=True)
class _Writer:
    """A module whose output arrives in a stream, ``factor`` times: what enters a module, or (None) leaves the layer."""

    call: Call
    factor: float
    enters: str | None


@dataclass(frozen=True)
class _Readers:
    """The projections that what a norm makes of a stream enters, or (None) the stream itself; ``others``: what reads it
    beside them."""

    norm: str | None
    paths: tuple[str, ...]
    others: tuple[str, ...] | None


def _measured(model: PreTrainedModel, index: int, stream: Tensor) -> tuple[Half, ...]:
    probe = Probe(model, index, stream)
    x = next((call.left for call in probe.calls if call.path == "patch"), _rows(stream))
    writers = _writers(probe)
    last = [one for one in writers if one.enters is None]
    behind = _behind_first(probe, x, writers)
    if behind is None:
        halves = _side_by_side(probe, x, last)
    else:
        first = [one for one in writers if one.enters == behind.path]
        halves = (
            _half(probe, "attention", _readers(probe, x), first, behind.path),
            _half(probe, "feed-forward", _readers(probe, behind.entered), last, None),
        )
    if not any(half.projections for half in halves):
        raise InputError(
            f"the weights of models of type {family_of(model).model_type!r} cannot be fitted again: in layer {index} "
            "no projection was found that reads the stream or writes to it"
        )
    return halves


def _writers(probe: Probe) -> list[_Writer]:
    found = [one for call in probe.calls if (one := _writer(probe, call)) is not None]
    # What leaves a module is often what leaves the last one inside.
    return [one for one in found if not any(other.call.path.startswith(f"{one.call.path}.") for other in found)]


def _writer(probe: Probe, call: Call) -> _Writer | None:
    """What noise that is added to the output of a call becomes in a stream, if nothing but noise."""
    if call.left.shape != probe.result.shape or _same(call.entered, call.left):
        return None
    noise = probe.noise(call.left, probe.result)
    calls, result = probe.run(given={call.path: noise})
    found = {(one.path, one.count): one for one in calls}
    for before in (one for one in probe.calls if one.path != "output_patch"):
        after = found.get((before.path, before.count))
        # What hands on what it is given (a dropout) sees it and does nothing.
        if after is not None and not _same(before.entered, after.entered) and not _same(before.entered, before.left):
            if before.count or before.entered.shape != noise.shape:
                return None
            factor = _factor(after.entered - before.entered, noise, after.entered)
            return None if factor is None else _Writer(call, factor, before.path)
    factor = _factor(result - probe.result, noise, result)
    return None if factor is None else _Writer(call, factor, None)


def _behind_first(probe: Probe, x: Tensor, writers: Sequence[_Writer]) -> Call | None:
    """The call that the stream behind the first half enters: x and what is written there, and nothing else."""
    for call in probe.calls:
        inner = [one for one in writers if one.enters == call.path]
        if not inner:
            continue
        written = torch.stack([one.factor * one.call.left.double() for one in inner]).sum(0)
        # A norm behind a half takes what was written, and no stream.
        alone = any(_same(one.call.left, call.entered) for one in inner)
        if near(call.entered, x.double() + written, call.entered) and not alone:
            return call
    return None


def _readers(probe: Probe, stream: Tensor) -> list[_Readers]:
    """What reads a stream, by the norm between."""
    reading = [call for call in probe.calls if _same(call.entered, stream)]
    norms = [one for one in reading if not probe.holds_matrices(one.path) and not _same(one.left, stream)]
    found = [_behind(probe, norm, norms) for norm in norms]
    direct = [one.path for one in reading if one.path in probe.plain]
    if direct or any(probe.holds_matrices(one.path) for one in reading):
        found.append(_Readers(None, tuple(direct), _apart(probe, stream, direct)))
    return [one for one in found if one.paths or one.others]


def _behind(probe: Probe, norm: Call, norms: Sequence[Call]) -> _Readers:
    """What reads what a norm gives."""
    reading = [one for one in probe.plain.values() if _same(one.entered, norm.left)]
    if any(one is not norm and _same(one.left, norm.left) for one in norms):
        # Two norms of the same gains and the same stream: only the tensor itself tells whose it is.
        reading = [one for one in reading if one.places[0] == norm.places[1]]
    paths = tuple(one.path for one in reading)
    others = _apart(probe, norm.left, paths)
    if others or not paths:
        return _Readers(norm.path, paths, others)
    noise = probe.noise(norm.left, norm.left)
    all_read, these_read = probe.run(given={norm.path: noise})[1], probe.run(taken=dict.fromkeys(paths, noise))[1]
    return _Readers(norm.path, paths, () if near(all_read, these_read, all_read) else None)


def _apart(probe: Probe, normed: Tensor, paths: Sequence[str]) -> tuple[str, ...]:
    """The modules with matrices of their own that read the same and are no projections: routers and experts."""
    reading = [call.path for call in probe.calls if _same(call.entered, normed) and probe.holds_matrices(call.path)]
    around = [path for path in reading if any(inside.startswith(f"{path}.") for inside in paths)]
    return tuple(path for path in reading if path not in probe.plain and path not in around)


def _side_by_side(probe: Probe, x: Tensor, writers: Sequence[_Writer]) -> tuple[Half, ...]:
    """The halves of a layer in which all read the stream that enters it: by the module of the layer they lie in."""
    groups = _readers(probe, x)
    used = {path for group in groups for path in group.paths} | {one.call.path for one in writers}
    rooms = dict.fromkeys(_room(call.path) for call in probe.calls if call.path in used and call.path in probe.plain)
    names = {0: (), 1: ("layer",), 2: ("attention", "feed-forward")}.get(len(rooms))
    if names is None:
        return ()
    halves = []
    for name, room in zip(names, rooms, strict=True):
        inside = [
            _Readers(group.norm, paths, group.others)
            for group in groups
            if (paths := tuple(path for path in group.paths if _room(path) == room))
        ]
        halves.append(_half(probe, name, inside, [one for one in writers if _room(one.call.path) == room], None))
    return tuple(halves)


def _room(path: str) -> str:
    return path.partition(".")[0]


def _half(probe: Probe, name: str, groups: Sequence[_Readers], writers: Sequence[_Writer], ends: str | None) -> Half:
    found = groups[0] if len(groups) == 1 else None
    reads, unread = found.paths if found is not None else (), ""
    if found is None:
        unread = f"there is no one norm of the stream whose output the projections of the {name} read"
    elif found.others != ():
        gives = f"what {found.norm} gives" if found.norm else "the stream"
        reads, unread = (), f"something that is no module reads {gives}, too"
        if found.others:
            unread = f"{', '.join(found.others)} read {gives} and are no projections"
    writes = tuple(Write(one.call.path, one.factor) for one in writers if one.call.path in probe.plain)
    behind = None if writes else _behind_norm(probe, writers)
    unwritten = "" if writes else f"no projection's output is added to the stream as it is, in the {name}"
    if behind is not None:
        unwritten = _normed(behind[1], behind[0])
    return Half(
        name,
        found.norm if found is not None else None,
        reads,
        writes,
        ends,
        unread,
        unwritten,
        behind,
    )


def _behind_norm(probe: Probe, writers: Sequence[_Writer]) -> tuple[str, str] | None:
    """The projection whose output a writer norms, and that norm."""
    pairs = ((path, one.call) for one in writers for path in probe.plain if path != one.call.path)
    return next(((path, norm.path) for path, norm in pairs if _same(probe.plain[path].left, norm.entered)), None)
