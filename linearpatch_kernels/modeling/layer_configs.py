"""The config of a model of some of a model's layers: all that it says layer by layer follows the layers that stay.

A record names the config's lists (`families.Family.per_layer`). Where there is none they are known by what they look
like, which can be wrong: `proof` shows whether the model of the config is the one that was meant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import depth_name, depth_of, family_of, text_config

# How many of the first layers are of another kind.
_LEADING = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "num_hash_layers")
# How many of the last ones.
_TRAILING = ("num_kv_shared_layers",)
# Words in the names of lists of layers' numbers.
_NUMBERS = ("layers", "idx", "indices", "layer_ids")
# As long as the model is deep by chance only.
_NEVER = ("token_id", "token_ids", "architectures")


def config_for_layers(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of the config for a model of the layers ``kept`` of this one.

    Raises:
        InputError: a list that does not have an entry for every layer, or settings that cannot follow.
    """
    count = depth_of(config)
    sliced: Any = copy.deepcopy(config)
    if len(kept) == count:
        return sliced
    joints = (getattr(config, "linearpatch", None) or {}).get("joints")
    if joints:
        sliced.linearpatch["joints"] = _joints_of_layers(joints, kept, count)
    _slice(text_config(config), text_config(sliced), kept, family_of(config).per_layer)
    return sliced


def _slice(config: PretrainedConfig, sliced: Any, kept: Sequence[int], per_layer: Sequence[str] | None) -> None:
    """Make of a copy of a decoder's config that of the layers ``kept``."""
    count = depth_of(config)
    named = tuple(_lists(config)) if per_layer is None else per_layer
    for name in (*named, "linearpatch_merge_tree"):
        entries = getattr(config, name, None)
        if entries is None:
            continue
        if not isinstance(entries, list | tuple) or len(entries) != count:
            raise InputError(f"the config's {name} does not have an entry for each of {count} layers: restore it")
        setattr(sliced, name, [entries[i] for i in kept])
    for name, numbers in _numbers(config) if per_layer is None else ():
        setattr(sliced, name, [new for new, old in enumerate(kept) if old in numbers])
    for names, counted in _counts(count):
        for name in names:
            told = getattr(config, name, None)
            # As many as the model has layers, or more: all that a cut leaves.
            if type(told) is int and (name == "max_window_layers" or 0 < told < count):
                setattr(sliced, name, sum(counted(layer, told) for layer in kept))
    # Every sixth layer of Gemma 3 is global before a cut; afterwards only `layer_types` tells.
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        vars(sliced).pop(name, None)
    setattr(sliced, depth_name(config), len(kept))
    # As a config file has them: settings of single layers under their numbers, as text.
    singles = config.to_dict().get("per_layer_config")
    if singles is not None:
        settings = {int(layer): own for layer, own in singles.items()}
        sliced.per_layer_config = {new: settings[old] for new, old in enumerate(kept) if old in settings}


def _counts(count: int) -> Iterator[tuple[tuple[str, ...], Callable[[int, int], bool]]]:
    """Names of counts, and whether a layer is among those counted."""
    yield _LEADING, lambda layer, told: layer < told
    yield _TRAILING, lambda layer, told: layer >= count - told


def per_layer_entries(config: Any, named: Sequence[str] | None = None) -> dict[str, Sequence[Any]]:
    """What a config says layer by layer: for each list of entries its entries, for a list of layers' numbers which are
    in it.

    Args:
        named: the lists of entries; None: all that look like either.
    """
    lists = {name: getattr(config, name, None) for name in (_lists(config) if named is None else named)}
    found: dict[str, Sequence[Any]] = {name: entries for name, entries in lists.items() if entries is not None}
    for name, numbers in _numbers(config) if named is None else ():
        found[name] = [f"{'in' if i in numbers else 'not in'} {name}" for i in range(config.num_hidden_layers)]
    return found


def _lists(config: PretrainedConfig) -> Iterator[str]:
    """The names of what looks like a list with an entry per layer."""
    numbers = {name for name, _ in _numbers(config)}
    for name, value in vars(config).items():
        told = isinstance(value, list | tuple) and len(value) == depth_of(config)
        if told and name not in numbers and name != "linearpatch_merge_tree" and not name.endswith(_NEVER):
            yield name


def _numbers(config: PretrainedConfig) -> Iterator[tuple[str, Sequence[int]]]:
    """What looks like a list of the numbers of some layers, under its name."""
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and value and any(word in name for word in _NUMBERS):
            whole = all(type(one) is int and 0 <= one < depth_of(config) for one in value)
            # Of 0 and 1 alone it would be a list of switches; those of two layers are told by their length.
            if whole and list(value) == sorted(set(value)) and not (len(value) == depth_of(config) == 2):
                yield name, value


def _joints_of_layers(joints: dict[str, object], kept: Sequence[int], count: int) -> dict[str, object]:
    follows = {str(old): str(new) for new, old in enumerate(kept)}
    if kept and kept[-1] == count - 1:
        follows[str(count)] = str(len(kept))
    return {follows[joint]: patch for joint, patch in joints.items() if joint in follows}
