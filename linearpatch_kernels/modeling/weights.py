"""The files of a checkpoint directory, held against each other before anything is allocated.

What a file says and the loader drops is refused here, or told: weights without a place in the model, patches under a
stock config, an adapter, a second set of weights, sizes that the config and the weights do not agree on.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.initialization import no_init_weights
from transformers.quantizers import AutoHfQuantizer

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import read_json, reading
from linearpatch_kernels.modeling.config_forms import of_decoder
from linearpatch_kernels.modeling.families import auto_class, depth_of, family_of
from linearpatch_kernels.modeling.patched import present_name

Shapes = Mapping[str, tuple[int, ...]]

AGAIN = "copy the model again"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
MERGE_ADAPTER = "merge it into the model (PEFT's merge_and_unload), save that, and give it"
# What torch.distributed.checkpoint writes; where such a file lies Transformers reads all of them and nothing else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
# Tables that old checkpoints hold and every model makes anew from its config.
_TABLES = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]+)\.")


def check_directory(path: Path) -> Shapes:
    """The shapes of the weights in a directory, where it holds a sound model of a supported family and nothing that
    would be left out; empty for quantised weights, whose names and shapes are their library's.

    Raises:
        InputError: no model, an adapter, damaged or missing files, sizes in the config that the weights do not have.
    """
    if (path / _ADAPTER).exists():
        raise InputError(f"{path} holds an adapter ({_ADAPTER}): {MERGE_ADAPTER}; or take the adapter's files out")
    file = path / "config.json"
    if not file.exists():
        others = sorted(other.name for other in path.glob("*.gguf"))
        hint = f"; give the file {others[0]} in it" if others else ""
        raise InputError(f"{path} is not a model: it has no config.json{hint}")
    config = read_json(file, AGAIN)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{file} is not a model's: it names no model_type")
    family = family_of(config["model_type"])
    if config.get("transformers_weights") is not None:
        raise InputError(f"{file} names a file of weights itself (transformers_weights): take that out, or {AGAIN}")
    for name in _SIZES:
        size = of_decoder(config).get(name)
        if size is not None and (type(size) is not int or size < 1):
            raise InputError(f"{file} says {name} is {str(size)[:40]!r}, which is no size: {AGAIN}")
    settings = path / "generation_config.json"
    if settings.exists():
        # Transformers passes over one that it cannot read.
        read_json(settings, f"{AGAIN}, or delete it")
    shapes = _stored_shapes(path, _weight_files(path))
    _check_depth(path, config.get("num_hidden_layers"), _without_ignored(family.causal_lm_class, shapes))
    if config.get("quantization_config") is not None:
        _check_quantisation(file, config["quantization_config"])
        return {}
    _check_embedding(path, config, shapes)
    return shapes


def _check_quantisation(file: Path, settings: Any) -> None:
    """Transformers loads a model as if it were not quantised where it does not know how it is."""
    if not isinstance(settings, dict):
        raise InputError(f"{file}: its quantization_config is no object: {AGAIN}")
    with reading(file, AGAIN):
        known = AutoHfQuantizer.supports_quant_method(settings)
    if not known:
        raise InputError(
            f"{file}: its quantization_config is of a method that Transformers does not know "
            f"({str(settings.get('quant_method'))[:40]!r}): give the full-precision model"
        )


def _weight_files(path: Path) -> list[Path]:
    distributed = next((file.name for file in path.iterdir() if _DISTRIBUTED.fullmatch(file.name)), None)
    if distributed is not None:
        raise InputError(f"{path} holds a distributed checkpoint ({distributed}): save it as one, with save_pretrained")
    whole, index = path / _WEIGHTS, path / _INDEX
    if not index.exists():
        if not whole.exists():
            raise InputError(f"{path} has no safetensors weights (model.safetensors, or shards with an index)")
        return [whole]
    shards = [path / name for name in _shard_names(index)]
    if not whole.exists():
        return shards
    others = [shard.name for shard in shards if shard != whole and shard.exists()]
    if others:
        raise InputError(
            f"{path} holds two sets of weights, {_WEIGHTS} and those of {_INDEX} ({others[0]}, ...): delete one of them"
        )
    return [whole]


def _shard_names(index: Path) -> list[str]:
    content = read_json(index, AGAIN)
    names = content.get("weight_map")
    metadata = content.get("metadata", {})
    if not isinstance(names, dict) or not names or not isinstance(metadata, dict):
        raise InputError(f"{index} cannot be read (it maps no weights to files): {AGAIN}")
    for name in names.values():
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{index} cannot be read ({str(name)[:40]!r} is no file beside it): {AGAIN}")
    return sorted(set(names.values()))


def _stored_shapes(path: Path, files: list[Path]) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.exists():
            raise InputError(f"{path} is incomplete: {file.name} is missing")
        if not os.access(file, os.R_OK):
            # safetensors says of such a file that it is not there; Transformers writes weights for their owner alone.
            raise InputError(f"{file} may not be read by you: ask its owner for chmod +r")
        try:
            with safe_open(file, framework="pt") as weights:
                found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (no mapping)
        except Exception as error:
            raise InputError(f"{file} is damaged or cut short ({error}): {AGAIN}") from error
        twice = found.keys() & shapes.keys()
        if twice:
            raise InputError(f"{path} holds {min(twice)} twice, once in {file.name}: {AGAIN}")
        shapes |= found
    return shapes


def _check_depth(path: Path, layers: Any, names: Collection[str]) -> None:
    if layers is None:
        return
    stored = _depth(names)
    if stored > layers:
        raise InputError(_deeper(str(path), layers))
    if stored < layers:
        raise InputError(
            f"{path} has weights of {stored} layers and its config is of {layers}: restore its config.json, or {AGAIN}"
        )


def _depth(names: Collection[str]) -> int:
    return 1 + max((int(layer) for name in names for layer in _LAYER.findall(name)), default=-1)


def _deeper(source: str, layers: int) -> str:
    return f"{source} has weights of more layers than the {layers} of its config: restore its config.json"


def _check_embedding(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """The sizes that a model's own constructor believes, whatever they are."""
    embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), "")
    for name, stored in zip(("vocab_size", "hidden_size"), shapes.get(embedding, ()), strict=False):
        said = config.get(name)
        if said is not None and said != stored:
            raise InputError(
                f"{path}: its config says {name} is {said} and its weights say {stored} ({embedding} is "
                f"{_shown(shapes[embedding])}): restore its config.json, or {AGAIN}"
            )


def check_weights(source: str, config: PretrainedConfig, shapes: Shapes) -> None:
    """Whether the weights of these names and shapes are those of the model that the config describes, no more, no less.

    The model is built on the meta device: nothing is allocated. A config of a checkpoint's own code passes: the names
    are known to that code alone.

    Raises:
        InputError: a weight without a place, one that is missing, or one of another shape.
    """
    if not shapes or type(config).__module__.startswith("transformers_modules."):
        return
    with torch.device("meta"), no_init_weights():
        twin = auto_class(config).from_config(copy.deepcopy(config))
    expected = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    plain, converted = _converted(twin, expected, shapes)
    stored = _named_as(expected, plain, twin.base_model_prefix)
    dropped = (stored.keys() | converted) - expected.keys()
    refuse_dropped(source, _without_ignored(twin, dropped), depth_of(config))
    if not converted:  # else loading tells, as one tensor may become several
        refuse_missing(source, expected.keys() - stored.keys() - _supplied(twin.all_tied_weights_keys, stored))
    for name in sorted(expected.keys() & stored.keys()):
        if stored[name] != expected[name]:
            raise InputError(
                f"{source}: {name} is {_shown(stored[name])} and by its config {_shown(expected[name])}: restore its "
                f"config.json, or {AGAIN}"
            )


def _without_ignored(model: PreTrainedModel | type[PreTrainedModel], names: Iterable[str]) -> list[str]:
    """Those without what Transformers knows that it has no place for: layers that predict further tokens, for one."""
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored or ())]


def _converted(twin: PreTrainedModel, expected: Shapes, shapes: Shapes) -> tuple[Shapes, set[str]]:
    """The weights as Transformers renames them, and the names of those that it makes of others: of a mixture's experts,
    which a checkpoint holds one by one and a model in one tensor."""
    names = names_in(twin, expected, shapes)
    plain = {now: shapes[name] for name, (now, made) in names.items() if not made}
    return plain, {now for now, made in names.values() if made}


def names_in(model: PreTrainedModel, state: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """What the model calls the weights of a file, and whether it makes what it calls so of several.

    Args:
        state: what the model has, by its names.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    others = [one for one in mapping if not isinstance(one, WeightConverter)]
    found, known = {}, dict(state)
    for name in names:
        now, converter = rename_source_key(name, others, converters, model.base_model_prefix, known)
        found[name] = (now, converter is not None)
    return found


def _named_as(expected: Collection[str], shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The weights as the model calls them: a decoder saved alone has no ``model.`` in front, and patches were called
    otherwise in format 1."""

    def named(name: str) -> str:
        others = (f"{prefix}.{name}", present_name(name), f"{prefix}.{present_name(name)}")
        return name if name in expected else next((other for other in others if other in expected), name)

    return {named(name): shape for name, shape in shapes.items()}


def _supplied(tied: Mapping[str, str], stored: Collection[str]) -> set[str]:
    """The weights that are another one's, where that one is there."""
    pairs = [(one, other) for pair in tied.items() for one, other in (pair, pair[::-1])]
    return {one for one, other in pairs if other in stored}


def refuse_dropped(source: str, names: Collection[str], layers: int) -> None:
    """InputError where one of the names, of weights without a place in the model, is of something that computes."""
    dropped = sorted(name for name in names if not _TABLES.search(name))
    if not dropped:
        return
    if _depth(dropped) > layers:
        raise InputError(_deeper(source, layers))
    patch = next((name for name in dropped if re.search(r"\.(output_)?patch\.", name)), None)
    if patch is not None:
        raise InputError(
            f"{source} has weights of patches ({patch}) that its config does not name, so that it would load as an "
            "unpatched model: restore the config.json that was written with them"
        )
    adapter = next((name for name in dropped if re.search(r"lora_|base_layer|modules_to_save", name)), None)
    if adapter is not None:
        raise InputError(f"{source} holds an adapter among its weights ({adapter}): {MERGE_ADAPTER}")
    raise InputError(
        f"{source} has {len(dropped)} weights that the model of its config has no place for, {dropped[0]} for one: "
        "restore the config.json that was written with them"
    )


def refuse_missing(source: str, names: Collection[str]) -> None:
    """InputError where weights are missing."""
    if names:
        raise InputError(f"{source} is incomplete: {len(names)} weights are missing, {min(names)} for one")


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
