"""Adjacent layers made one of the same shape: the most sensitive units of each, concatenated (CoMe, arXiv 2510.15304).

A layer is two sums over units (`modeling.families.Sublayer`), so a layer with some units of one layer and some of the
next is again a layer of the model: the result is a stock model with fewer layers and saves as a plain checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.merging.sensitivity import LayerScores
from linearpatch_kernels.merging.settings import AUTHORS, EXACT, RULES
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import (
    Heads,
    Sublayer,
    decoder_layers,
    merge_tree,
    num_layers,
    text_config,
)
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.modeling.patterns import pattern_of
from linearpatch_kernels.modeling.units import check_one_kind, sublayers
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import own_state


@dataclasses.dataclass(frozen=True)
class Merge:
    """One merge: which units of which layers make the new layer, over the layer numbers of the model it is applied to.

    Attributes:
        span: the layers that become one, in the place of the first.
        shares: how much each was to give, summing to 1.
        units: per half of a layer (``"attention"``, ``"feed-forward"``) and per layer of the span, the units it gives,
            increasing; together as many as a layer has.
        rule: ``"exact"`` or ``"authors"``.

    Raises:
        InputError: a span of fewer than two layers, or shares, units or a rule that do not fit.
    """

    span: Span
    shares: tuple[float, ...]
    units: dict[str, tuple[tuple[int, ...], ...]]
    rule: str = EXACT

    def __post_init__(self) -> None:
        if self.span.length < 2:
            raise InputError(f"the span {self.span} holds nothing to merge: give at least two layers")
        if self.rule not in RULES:
            raise InputError(f"no rule of merging is called {self.rule!r}: choose one of {', '.join(RULES)}")
        if any(len(given) != self.span.length for given in (self.shares, *self.units.values())):
            raise InputError(f"the merge of {self.span} does not say for each of its layers what it gives: merge again")

    def weights(self, half: str) -> tuple[float, ...]:
        """How much each layer's say is worth where the units share a parameter (a bias, the norm of queries)."""
        if self.rule == AUTHORS:
            return self.shares
        counts = [len(given) for given in self.units[half]]
        return tuple(count / sum(counts) for count in counts)


def unit_counts(total: int, shares: Sequence[float]) -> list[int]:
    """How many of ``total`` units each layer gives: rounded down for all but the largest share, which takes the rest.

    Of equal largest shares the first counts as the largest (arXiv 2510.15304; as in the public code).
    """
    largest = max(range(len(shares)), key=lambda i: shares[i])
    counts = [0 if i == largest else int(total * share) for i, share in enumerate(shares)]
    counts[largest] = total - sum(counts)
    return counts


def choose_units(scores: LayerScores, span: Span, shares: Sequence[float], rule: str = EXACT) -> Merge:
    """The merge of ``span`` that keeps the most sensitive units of every layer.

    Raises:
        InputError: shares that are negative or do not sum to 1, not one per layer, or a span outside the model.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"shares must be at least 0 and sum to 1: got {[round(share, 4) for share in shares]}")
    layers = len(scores.influence)
    if not 0 <= span.start < span.end <= layers:
        raise InputError(f"the span {span} does not lie in the model's {layers} layers")
    units = {
        half: tuple(
            tuple(sorted(sensitivity[layer].argsort(stable=True)[len(sensitivity[layer]) - count :].tolist()))
            for layer, count in zip(range(*span), unit_counts(sensitivity.shape[1], shares), strict=True)
        )
        for half, sensitivity in scores.sensitivity.items()
    }
    return Merge(span, tuple(shares), units, rule)


def check_mergeable(model: nn.Module, span: Span) -> None:
    """InputError where the layers of ``span`` cannot become one: they are no sums over units, they are of other kinds,
    or there is a patch between them."""
    sublayers(model)
    layers = num_layers(model)
    if not 0 <= span.start < span.end <= layers:
        raise InputError(f"the span {span} does not lie in the model's {layers} layers: give 0 <= START < END")
    kinds = dict.fromkeys(pattern_of(model).kinds[span.start : span.end])
    if len(kinds) > 1:
        raise InputError(f"the layers {span} are of different kinds ({', '.join(kinds)}): merge layers of one kind")
    patched = [joint for joint in patches(model) if span.start < joint < span.end or joint == span.end == layers]
    if patched:
        raise InputError(f"there is a patch at joint {patched[0]} inside the layers {span}: merge first, patch then")
    check_one_kind(model, range(*span))


@own_state()
@torch.no_grad()
def merge_layers(model: PreTrainedModel, merge: Merge) -> PreTrainedModel:
    """The model with the layers of ``merge.span`` made one: of the same class, with fewer layers.

    ``model`` is not changed and the result shares every parameter but those of the new layer (computed in float64,
    rounded once). ``config.linearpatch_merge_tree`` says per layer which layers of the first model it stands for:
    ``[0, 1, [2, [3, 4]], 5]``.

    With the rule ``exact``, shares (1, 0) give the model without the second layer and (0, 1) the one without the first.
    The gain of a norm that the units share (of queries and keys; behind a half) cannot fold: see :func:`gain_errors`.

    Raises:
        InputError: layers that cannot be merged, units that do not fit the model, a model that cannot be cut.
    """
    check_mergeable(model, merge.span)
    halves = sublayers(model)
    for half in halves:
        _check_units(half, merge)
    tree = merge_tree(model)
    start, end = merge.span
    shallower = keep_layers(model, [i for i in range(num_layers(model)) if not start < i < end])
    sources = list(decoder_layers(model)[start:end])
    target = decoder_layers(shallower)[start]
    for half in halves:
        for path, value in _merged_half(half, sources, merge).items():
            set_parameter(target, path, value)
    text_config(shallower.config).linearpatch_merge_tree = [*tree[:start], tree[start:end], *tree[end:]]
    return shallower


def gain_errors(model: nn.Module, merge: Merge) -> dict[str, float]:
    """What averaging costs: norm whose gain is averaged -> the largest |merged - own| / |own| of a layer that gives.

    Under the rule ``exact`` these are the norms that all units share; none in a Llama.
    """
    sources = list(decoder_layers(model)[merge.span.start : merge.span.end])
    errors = {}
    for half in sublayers(model):
        for path in (*half.shared_norms, *((half.norm,) if half.norm and merge.rule == AUTHORS else ())):
            gains = [half.gain_offset + layer.get_parameter(f"{path}.weight").detach().double() for layer in sources]
            merged = half.gain_offset + _averaged(half, path, sources, merge)
            given = [gain for gain, units in zip(gains, merge.units[half.name], strict=True) if units]
            errors[path] = max(float((merged - gain).norm() / gain.norm()) for gain in given)
    return errors


def _check_units(half: Sublayer, merge: Merge) -> None:
    given = merge.units.get(half.name, ())
    beyond = [unit for layer in given for unit in layer if not 0 <= unit < half.units]
    if beyond or sum(map(len, given)) != half.units or any(len(set(layer)) < len(layer) for layer in given):
        raise InputError(
            f"the merge of {merge.span} does not choose {half.units} units of the {half.name} halves: "
            "it was made for another model"
        )


def _merged_half(half: Sublayer, sources: Sequence[nn.Module], merge: Merge) -> dict[str, Tensor]:
    """Path of a parameter in the layer -> its value in the merged layer, float64."""
    given = list(zip(sources, merge.units[half.name], strict=True))
    values = input_parameters(half, given, merge.rule)
    columns = [
        layer.get_submodule(half.output.projection).get_parameter("weight")[
            :, channel_indices(half.output, units, half.units, merge.rule)
        ]
        for layer, units in given
    ]
    values[f"{half.output.projection}.weight"] = torch.cat(columns, dim=1).double()
    bias = f"{half.output.projection}.bias"
    if sources[0].get_submodule(half.output.projection).bias is not None:
        values[bias] = _weighted(sources, bias, merge.weights(half.name))
    for path in half.shared_norms:
        values[f"{path}.weight"] = _averaged(half, path, sources, merge)
    if merge.rule == EXACT or half.norm is None:
        return values
    values[f"{half.norm}.weight"] = _averaged(half, half.norm, sources, merge)
    if getattr(sources[0].get_submodule(half.norm), "bias", None) is not None:
        values[f"{half.norm}.bias"] = _weighted(sources, f"{half.norm}.bias", (1 / len(sources),) * len(sources))
    return values


def input_parameters(
    half: Sublayer, given: Sequence[tuple[nn.Module, Sequence[int]]], rule: str = EXACT
) -> dict[str, Tensor]:
    """What lets a layer read the stream as units of several layers do: path of a parameter -> its value, float64.

    With the rule ``exact``, every unit brings its own layer's norm along, its gain and bias folded into its rows, and
    the norm's own become 1 and 0.

    Args:
        given: layers and the units that they give, in the order in which the new layer has them.
    """
    parts: dict[str, list[Tensor]] = {}
    for heads in half.inputs:
        for layer, units in given:
            projection: Any = layer.get_submodule(heads.projection)
            norm: Any = None if half.norm is None or rule == AUTHORS else layer.get_submodule(half.norm)
            rows = channel_indices(heads, units, half.units, rule)
            for name, parameter in projection.named_parameters():
                taken = parameter[rows.to(parameter.device)].double()
                if name == "weight" and norm is not None:
                    taken = taken * (half.gain_offset + norm.weight.double()).to(taken.device)
                elif norm is not None and getattr(norm, "bias", None) is not None:
                    read = projection.weight[rows.to(parameter.device)].double()
                    taken = taken + read @ norm.bias.double().to(taken.device)
                parts.setdefault(f"{heads.projection}.{name}", []).append(taken)
    # A fused projection holds all units' queries, then all units' keys: the order of `inputs`.
    values = {path: torch.cat([rows.to(taken[0].device) for rows in taken]) for path, taken in parts.items()}
    if half.norm is not None and rule == EXACT:
        for name, parameter in given[0][0].get_submodule(half.norm).named_parameters():
            whole = 1 - half.gain_offset if name == "weight" else 0.0
            values[f"{half.norm}.{name}"] = torch.full_like(parameter, whole, dtype=torch.float64)
    return values


def channel_indices(heads: Heads, units: Sequence[int], total: int, rule: str = EXACT) -> Tensor:
    """The rows (columns, of the output projection) of a projection that belong to ``units``, in their order.

    A unit's heads lie one after the other. The rule ``authors`` takes the units' pattern repeated over all heads
    instead, which with several query heads per KV group are other heads than the group's own.
    """
    chosen = torch.tensor(sorted(units), dtype=torch.long)
    within = torch.arange(heads.per_unit)
    if rule == AUTHORS:
        of_heads = (within.unsqueeze(1) * total + chosen).flatten()
    else:
        of_heads = (chosen.unsqueeze(1) * heads.per_unit + within).flatten()
    return (heads.offset + of_heads.unsqueeze(1) * heads.size + torch.arange(heads.size)).flatten()


def _averaged(half: Sublayer, path: str, sources: Sequence[nn.Module], merge: Merge) -> Tensor:
    """The weight of an averaged norm: as many units, as much say; the authors' plain mean for the norm in front."""
    equal = (1 / len(sources),) * len(sources)
    return _weighted(sources, f"{path}.weight", equal if path == half.norm else merge.weights(half.name))


def _weighted(sources: Sequence[nn.Module], path: str, weights: Sequence[float]) -> Tensor:
    values = [layer.get_parameter(path).detach().double() for layer in sources]
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(dim=0)


def set_parameter(layer: nn.Module, path: str, value: Tensor) -> None:
    """A new parameter in the place of a shared one."""
    old = layer.get_parameter(path)
    module, _, name = path.rpartition(".")
    new = nn.Parameter(value.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)
    layer.get_submodule(module).register_parameter(name, new)
