"""The units of a model's layers, for a merge: from the family's record, or found and proved.

A layer can be merged where its halves are sums over units, KV groups and neurons, that each read the normed stream
through rows of their own and write through columns of their own. Where these lie is guessed from the shapes, in the
orders that Transformers knows, and then held against the layer:

- other numbers in the rows of one unit change what enters the projection back in that unit's columns and in no other;
- the layer with its units in another order, and with the gain of the norm in front folded into the rows, computes the
  same;
- no weight of the layer is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import (
    Heads,
    Sublayer,
    decoder,
    decoder_layers,
    family_of,
    recorded_sublayers,
)
from linearpatch_kernels.modeling.halves import (
    Half,
    Probe,
    is_of_a_patch,
    kinds_of_halves,
    made_of,
    near,
    rounding_of,
)
from linearpatch_kernels.modeling.stream import some_tokens, traced
from linearpatch_kernels.torch_state import eval_mode, own_state

_TOKENS = 24
# Of layers that were found to be sums over units, by what they are made of: the weights do not matter.
_FOUND: dict[Any, tuple[Sublayer, Sublayer]] = {}


def sublayers(model: nn.Module) -> tuple[Sublayer, Sublayer]:
    """The attention and the feed-forward half of this model's layers.

    Raises:
        InputError: they are no sums over units, or it does not show; says what differs.
    """
    if family_of(model).modules is not None:
        return recorded_sublayers(model)
    # How many layers there are is of no matter.
    key = (family_of(model).model_type, _groups(model), *dict.fromkeys(map(made_of, decoder_layers(model))))
    if key not in _FOUND:
        _FOUND[key] = _found(model)
    return _FOUND[key]


def check_one_kind(model: nn.Module, layers: Sequence[int]) -> None:
    """InputError unless each of these layers, with the weights of the others, computes what the others do."""
    if family_of(model).modules is not None:
        return
    first = layers[0]
    with own_state(), torch.no_grad(), eval_mode(model):
        stream = traced(model, some_tokens(model, _TOKENS))[first].stream
        place = Probe(model, first, stream)
        # A patch in front of the first one stays there.
        stream = next((call.left[None] for call in place.calls if call.path == "patch"), stream)
        for other in layers[1:]:
            wanted = Probe(model, other, stream).result
            found = place.with_weights(dict(decoder_layers(model)[other].named_parameters()))
            if not near(found, wanted, wanted):
                raise InputError(
                    f"the layers {first} and {other} are of different kinds: with the same weights they compute "
                    "different things: merge layers of one kind"
                )


def _refused(model: nn.Module, why: str) -> InputError:
    return InputError(
        f"the layers of models of type {family_of(model).model_type!r} can be removed, not merged: {why} "
        "(docs/add/family.md)"
    )


def _groups(model: nn.Module) -> tuple[int, int]:
    """How many groups of heads share keys and values, and how many heads there are."""
    config = decoder(model).config
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(groups, int) or groups < 1 or heads % groups:
        raise _refused(model, "their config does not say how many heads they have")
    return groups, heads


@own_state()
@torch.no_grad()
def _found(model: nn.Module) -> tuple[Sublayer, Sublayer]:
    try:
        kinds = [*kinds_of_halves(model).values()]
    except InputError as error:
        raise _refused(model, str(error)) from error
    if len(kinds) > 1:
        raise _refused(model, "they are not all made of the same parts")
    (halves,) = kinds
    if [half.name for half in halves] != ["attention", "feed-forward"]:
        raise _refused(model, "they are no attention and a feed-forward half")
    # Not the first one, in which some models do things of their own.
    index = len(decoder_layers(model)) // 2
    with eval_mode(model):
        probe = Probe(model, index, traced(model, some_tokens(model, _TOKENS))[index].stream)
        attention, feed_forward = (_summed(model, probe, half) for half in halves)
        _check_all_is_told(model, probe, (attention, feed_forward))
        _check_order_is_free(model, probe, (attention, feed_forward))
    return attention, feed_forward


def _summed(model: nn.Module, probe: Probe, half: Half) -> Sublayer:
    """The half with the first arrangement of its units in which each of them goes its own way."""
    output = half.behind[0] if half.behind is not None else half.writes[0].projection if len(half.writes) == 1 else None
    if output is None or not half.reads:
        raise _refused(model, half.unread or half.unwritten or f"the {half.name} writes through several projections")
    if any(not isinstance(probe.layer.get_submodule(path), nn.Linear) for path in (output, *half.reads)):
        raise _refused(model, f"the weights of {output} lie with their inputs in front")
    norm, offset = _gain(model, probe, half)
    if half.behind is not None and probe.layer.get_submodule(half.behind[1])._parameters.keys() != {"weight"}:
        raise _refused(model, f"{half.behind[1]} is more than a gain")
    columns = probe.plain[output].entered.shape[1]
    groups, heads = _groups(model) if half.name == "attention" else (columns, columns)
    if columns % heads:
        raise _refused(model, f"the {columns} inputs of {output} are not those of {heads} heads")
    written = Heads(output, 0, heads // groups, columns // heads)
    rows = {path: probe.plain[path].left.shape[1] for path in half.reads}
    for inputs in _arrangements(rows, groups, heads // groups):
        if _each_goes_its_own_way(probe, inputs, written, groups):
            shared = _shared_norms(probe, half, output, {heads.size for heads in inputs})
            return Sublayer(half.name, groups, norm, inputs, written, shared, offset)
    what = "groups of heads" if half.name == "attention" else "neurons"
    raise _refused(model, f"the {half.name} is no sum over {groups} {what}, each with rows of its own")


def _arrangements(rows: Mapping[str, int], units: int, per_unit: int) -> Iterator[tuple[Heads, ...]]:
    """How the rows of units may lie: unit by unit; or in one projection all queries, all keys and all values, or all
    gates and all that they gate."""
    if all(count % units == 0 for count in rows.values()):
        least = min(rows.values()) // units
        yield tuple(
            Heads(path, 0, per_unit, least) if count == units * per_unit * least else Heads(path, 0, 1, count // units)
            for path, count in rows.items()
        )
    if len(rows) == 1:
        ((path, count),) = rows.items()
        for parts in ((per_unit, 1, 1), (1, 1)):
            size, rest = divmod(count, units * sum(parts))
            if rest == 0:
                starts = [units * size * sum(parts[:number]) for number in range(len(parts))]
                yield tuple(Heads(path, start, part, size) for start, part in zip(starts, parts, strict=True))


def _channels(heads: Heads, units: Sequence[int]) -> list[int]:
    """The rows or columns of these units, in their order."""
    width = heads.per_unit * heads.size
    return [heads.offset + unit * width + one for unit in units for one in range(width)]


def _each_goes_its_own_way(probe: Probe, inputs: Sequence[Heads], output: Heads, units: int) -> bool:
    before = probe.plain[output.projection].entered
    for unit in sorted({0, units // 2, units - 1}):
        noise = {heads.projection: torch.zeros_like(probe.plain[heads.projection].left) for heads in inputs}
        for heads in inputs:
            drawn = probe.noise(noise[heads.projection], probe.plain[heads.projection].left)
            rows = _channels(heads, [unit])
            noise[heads.projection][:, rows] = drawn[:, rows]
        calls, _ = probe.run(given=noise)
        after = next(call.entered for call in calls if call.path == output.projection)
        own = _channels(output, [unit])
        others = [column for column in range(before.shape[1]) if column not in set(own)]
        least = rounding_of(before) * float(before.double().norm())
        moved = float((after - before)[:, own].double().norm())
        if not near(after[:, others], before[:, others], before) or moved <= least:
            return False
    return True


def _gain(model: nn.Module, probe: Probe, half: Half) -> tuple[str | None, float]:
    """The norm in front, whose gain and bias what reads its output can take over, and its offset; None where it has
    neither, or where there is none."""
    norm: Any = None if half.norm is None else probe.layer.get_submodule(half.norm)
    if half.norm is None or all(one is None for one in norm._parameters.values()):
        return None, 0.0
    offset = _gain_offset(probe, half.norm)
    if offset is None:
        raise _refused(model, f"{half.norm} is more than a gain and a bias, and cannot be taken into what reads it")
    if norm._parameters.get("bias") is not None:
        for path in half.reads:
            if probe.layer.get_submodule(path).bias is None:
                raise _refused(model, f"{path} has no bias that could take over that of {half.norm}")
    return half.norm, offset


def _gain_offset(probe: Probe, path: str) -> float | None:
    """What a norm adds to its weight to make a gain of it; None where it is no norm with a gain, and a bias at most."""
    norm: Any = probe.layer.get_submodule(path)
    told = {name: one for name, one in norm._parameters.items() if one is not None}
    if "weight" not in told or not told.keys() <= {"weight", "bias"} or norm.weight.dim() != 1:
        return None
    entered = next(call.entered for call in probe.calls if call.path == path)
    drawn = probe.noise(torch.stack([*told.values()]), torch.ones_like(norm.weight))
    random = dict(zip(told, drawn, strict=True))
    for offset in (0.0, 1.0):
        neutral = {"weight": torch.full_like(norm.weight, 1 - offset), "bias": torch.zeros_like(norm.weight)}
        plain, gained = (
            torch.func.functional_call(norm, {name: values[name] for name in told}, (entered,))
            for values in (neutral, random)
        )
        if near(gained, plain * (offset + random["weight"]) + random.get("bias", 0), gained):
            return offset
    return None


def _shared_norms(probe: Probe, half: Half, output: str, sizes: set[int]) -> tuple[str, ...]:
    """The norms of the half whose one gain all units share: of queries and keys, and behind it."""
    room = output.partition(".")[0] + "."
    inside = [call.path for call in probe.calls if call.path.startswith(room) and call.path not in probe.plain]
    gained = [path for path in dict.fromkeys(inside) if _has_one_gain(probe.layer.get_submodule(path), sizes)]
    return (*gained, *([half.behind[1]] if half.behind is not None else []))


def _has_one_gain(norm: Any, sizes: set[int]) -> bool:
    """Whether there is one gain for every head, and not one for each of them."""
    return norm._parameters.keys() == {"weight"} and norm.weight.dim() == 1 and len(norm.weight) in sizes


def _check_all_is_told(model: nn.Module, probe: Probe, halves: Sequence[Sublayer]) -> None:
    told = {path for half in halves for path in (half.norm, half.output.projection, *half.shared_norms)}
    told |= {heads.projection for half in halves for heads in half.inputs}
    names = [name for name, _ in probe.layer.named_parameters() if not is_of_a_patch(name)]
    left = [name for name in names if name.rpartition(".")[0] not in told]
    if left:
        raise _refused(model, f"{left[0]} is neither in a row or column of theirs nor a gain that they share")


def _check_order_is_free(model: nn.Module, probe: Probe, halves: Sequence[Sublayer]) -> None:
    """With the units in another order and the gains folded, the layer must compute what it does."""
    weights: dict[str, Tensor] = {}
    for half in halves:
        order = torch.randperm(half.units, generator=torch.Generator().manual_seed(0)).tolist()
        weights |= _reordered(probe.layer, half, order)
    found = probe.with_weights(weights)
    if not near(found, probe.result, probe.result):
        raise _refused(model, "with their units in another order they compute something else")


def _reordered(layer: nn.Module, half: Sublayer, order: Sequence[int]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    norm: Any = None if half.norm is None else layer.get_submodule(half.norm)
    gain = 1.0 if norm is None else half.gain_offset + norm.weight.double()
    added = None if norm is None else norm._parameters.get("bias")
    parts: dict[str, list[Tensor]] = {}
    for heads in half.inputs:
        projection: Any = layer.get_submodule(heads.projection)
        rows = _channels(heads, order)
        for name, parameter in projection.named_parameters():
            taken = parameter[rows].double()
            if name == "weight":
                taken = taken * gain
            elif added is not None:
                taken = taken + projection.weight[rows].double() @ added.double()
            parts.setdefault(f"{heads.projection}.{name}", []).append(taken.to(parameter.dtype))
    values |= {name: torch.cat(rows) for name, rows in parts.items()}
    output = f"{half.output.projection}.weight"
    values[output] = layer.get_parameter(output)[:, _channels(half.output, order)]
    if norm is not None:
        values[f"{half.norm}.weight"] = torch.full_like(norm.weight, 1 - half.gain_offset)
    if added is not None:
        values[f"{half.norm}.bias"] = torch.zeros_like(added)
    return values
