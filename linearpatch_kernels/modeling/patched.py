"""Decoders whose joints carry a patch: configuration, classes, Auto registration.

A patched model is the stock model with a patch in front of some layers: ``model.layers.13.patch`` acts on the stream
entering layer 13, inside the layer's forward (so inside gradient checkpointing). Joint L, behind the last of L layers,
is ``model.layers.<L-1>.output_patch``. The config names the joints, in this model's own numbering::

    config.linearpatch == {"joints": {"13": {"kind": "hadamard", ...}}, "provenance": [...]}

A joint that was cut twice holds a list of descriptions, applied in order (``patch`` is then an ``nn.Sequential``).
The config file may have come a long way, so `checked_record` looks at it before anything is built.

`patched_classes` makes the three classes of a family. With what it needs, it also travels inside the modeling file of
a checkpoint (`modeling_file`).
"""

from __future__ import annotations

import copy
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.config_forms import both_forms, one_form
from linearpatch_kernels.modeling.families import (
    STOCK_FAMILIES,
    Family,
    decoder,
    decoder_layers,
    family_of,
    num_layers,
    rebuild,
)
from linearpatch_kernels.modeling.modeling_file import modeling_source
from linearpatch_kernels.nn import Patch, build_patch, check_description

# A joint has a patch for every time that it was cut.
_MOST_LINKS = 256
_FORMATS = (1, 2)


def checked_record(record: Any, depth: int, dim: int) -> dict[str, Any]:
    """The entry ``linearpatch`` of a config, ``{"joints": {"13": ...}, ...}``, after a look at all that is built from.

    Args:
        record: as the config has it; None stands for no joints.
        depth, dim: how many layers the model has, and how wide they are.

    Raises:
        InputError: another type or format, a joint that the model does not have, a description that does not fit it.
    """
    if record is None:
        return {"joints": {}}
    joints = record.get("joints") if isinstance(record, Mapping) else None
    provenance = record.get("provenance", []) if isinstance(record, Mapping) else None
    if not isinstance(joints, Mapping) or not isinstance(provenance, list):
        raise InputError(
            f"the config's linearpatch is {reprlib.repr(record)}, no record of joints: restore config.json"
        )
    if record.get("format", 1) not in _FORMATS:
        raise InputError(
            f"the config's linearpatch is of format {reprlib.repr(record['format'])}: update linearpatch-kernels"
        )
    for joint, description in joints.items():
        # As it is looked up, so no "02"; and not all that there could be, which a depth of 10**9 would make many.
        if not isinstance(joint, str) or not re.fullmatch("0|[1-9][0-9]{0,8}", joint) or int(joint) > depth:
            named = ", ".join(sorted(map(str, joints)))
            raise InputError(f"the config patches joints [{named:.200}] of a model with {depth} layers")
        chain = description if isinstance(description, list) else [description]
        if len(chain) > _MOST_LINKS:
            raise InputError(f"the config has {len(chain)} patches at joint {joint}: restore config.json")
        for link in chain:
            try:
                check_description(link, dim)
            except InputError as error:
                raise InputError(f"joint {joint} of the config: {error}") from None
    return dict(record)


def build_joint(description: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, dim: int) -> nn.Module | None:
    """The module of a joint of a model of width ``dim``: one patch, those of a list one after the other, or nothing.

    In the default dtype, which `from_pretrained` sets to that of the model while it builds one.
    """
    chain = [description] if isinstance(description, Mapping) else description
    links = [build_patch(link, dim=dim) for link in chain or ()]
    return _joined(links).to(torch.get_default_dtype()) if links else None


def _joined(links: Sequence[nn.Module]) -> nn.Module:
    return links[0] if len(links) == 1 else nn.Sequential(*links)


class PatchedPreTrained:
    """What a patched model does differently from a stock one when it is loaded and saved."""

    own_code: Callable[[], str]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, but a checkpoint whose weights are not those of its config raises: it warns, and goes on
        without the patches or the biases, or with random ones."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]  # a mixin
        # A decoder alone leaves the head of its checkpoint where it is.
        apart = () if hasattr(model, "lm_head") else ("lm_head.",)
        unexpected = {key for key in info["unexpected_keys"] if not key.startswith(apart)}
        wrong = sorted({*info["missing_keys"], *unexpected, *(key for key, *_ in info["mismatched_keys"])})
        # The patches are what is most likely to be lost: named first.
        wrong.sort(key=lambda key: re.search(r"layers\.\d+\.(output_)?patch\.", key) is None)
        if wrong:
            what = "patch weights" if "patch." in wrong[0] else "weights"
            some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise InputError(f"the {what} do not fit the config ({some}): the checkpoint is incomplete or mixed")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, and the modeling file with which the directory loads where this package is missing."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # a mixin
        Path(save_directory, "modeling_linearpatch.py").write_text(self.own_code(), encoding="utf-8")


def patched_classes(
    stock_config: Any, stock_layer: Any, stock_decoder: Any, stock_causal_lm: Any, *, own_code: Callable[[], str]
) -> tuple[Any, Any, Any]:
    """The config, decoder and causal LM of a patched family, named ``LinearPatch`` + the stock name.

    Args:
        own_code: returns the text of the modeling file that `save_pretrained` writes beside the weights.
    """
    activation = "hidden_activation" if hasattr(stock_config(), "hidden_activation") else "hidden_act"
    # On disk the activation is masked: a stock class does not know one of this name and says so, instead of loading
    # the layers without their patches.
    mask = " (some layers are patched: `import linearpatch_kernels.modeling`, or pass trust_remote_code=True)"

    class Config(stock_config):
        model_type = f"linearpatch_{stock_config.model_type}"
        auto_map = {  # noqa: RUF012 - the configs of Transformers are dataclasses: an annotation would make it a field
            auto_class: f"modeling_linearpatch.LinearPatch{stock_class.__name__}"
            for auto_class, stock_class in (
                ("AutoConfig", stock_config),
                ("AutoModel", stock_decoder),
                ("AutoModelForCausalLM", stock_causal_lm),
            )
        }
        linearpatch: dict[str, Any] | None = None

        def __init__(self, **entries: Any) -> None:
            record, kind = entries.pop("linearpatch", None), entries.get("model_type")
            if kind not in (None, self.model_type, stock_config.model_type):
                raise InputError(
                    f"a model of type {reprlib.repr(kind)} is no {self.model_type}: load it with AutoModelForCausalLM, "
                    "which chooses the class by the type"
                )
            entries["model_type"] = self.model_type
            if isinstance(entries.get(activation), str):
                entries[activation] = entries[activation].removesuffix(mask)
            # What the names of Transformers 5 say, its classes have; those of 4 know the old names only.
            entries = one_form(entries, new=hasattr(stock_config, "rope_parameters"))
            # These two belong to the class.
            super().__init__(**{name: entries[name] for name in entries if name not in ("auto_map", "model_type")})
            self.linearpatch = checked_record(record, self.num_hidden_layers, self.hidden_size)

        def to_dict(self) -> dict[str, Any]:
            entries = super().to_dict()
            return {**entries, activation: entries[activation] + mask, "auto_map": dict(self.auto_map)}

        def to_json_string(self, use_diff: bool = True) -> str:
            entries = both_forms(json.loads(super().to_json_string(use_diff)))
            return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    class Layer(stock_layer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            joints, dim = config.linearpatch["joints"], config.hidden_size
            behind = str(layer_idx + 1) if layer_idx == config.num_hidden_layers - 1 else None
            self.register_module("patch", build_joint(joints.get(str(layer_idx)), dim))
            self.register_module("output_patch", build_joint(joints.get(behind), dim))

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if self.patch is not None:
                hidden_states = self.patch(hidden_states)
            output = super().forward(hidden_states, *args, **kwargs)
            if self.output_patch is None:
                return output
            # Before Transformers 5, Gemma's layers return a tuple.
            return (self.output_patch(output[0]), *output[1:]) if type(output) is tuple else self.output_patch(output)

    class Decoder(PatchedPreTrained, stock_decoder):
        config_class = Config
        _no_split_modules = [stock_layer.__name__, "LinearPatch" + stock_layer.__name__]  # noqa: RUF012 - as in the stock class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            depth = len(self.layers)
            # Checked when the config was made, which may have been changed since.
            joints = checked_record(config.linearpatch, depth, config.hidden_size)["joints"]
            for layer in {min(int(joint), depth - 1) for joint in joints}:
                self.layers[layer] = Layer(config, layer)
            self.post_init()

    class CausalLM(PatchedPreTrained, stock_causal_lm):
        config_class = Config
        _no_split_modules = Decoder._no_split_modules

        def __init__(self, config: Any) -> None:
            # The stock constructor would build the stock decoder, so this one repeats its few lines.
            super(stock_causal_lm, self).__init__(config)
            self.model = Decoder(config)
            self.vocab_size = config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

    stock: dict[Any, Any] = {
        Config: stock_config,
        Layer: stock_layer,
        Decoder: stock_decoder,
        CausalLM: stock_causal_lm,
    }
    for patched, base in stock.items():
        patched.__name__ = patched.__qualname__ = "LinearPatch" + base.__name__
        patched.stock_class = base
        # A pickle names classes by their place in a module.
        globals()[patched.__name__] = patched
    for patched in (Decoder, CausalLM):
        patched.own_code = staticmethod(own_code)
    return Config, Decoder, CausalLM


def registered(family: Family) -> tuple[Any, Any, Any]:
    """The config, decoder and causal LM of a family's patched twin, known to the Auto classes."""
    config_class, decoder_class, causal_lm_class = patched_classes(
        family.config_class,
        family.layer_class,
        family.decoder_class,
        family.causal_lm_class,
        own_code=partial(modeling_source, family),
    )
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, decoder_class)
    AutoModelForCausalLM.register(config_class, causal_lm_class)
    return config_class, decoder_class, causal_lm_class


PATCHED_CLASSES = {model_type: registered(family) for model_type, family in STOCK_FAMILIES.items()}


def patches(model: nn.Module) -> dict[int, nn.Module]:
    """The patch of every joint: index of the layer whose input it acts on -> module (the depth: behind the last)."""
    layers = decoder_layers(model)
    found = {index: getattr(layer, "patch", None) for index, layer in enumerate(layers)}
    found[len(layers)] = getattr(layers[-1], "output_patch", None)
    return {joint: patch for joint, patch in found.items() if patch is not None}


def patched_model(
    model: PreTrainedModel, joints: Mapping[int, nn.Module], *, provenance: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The patched twin of a causal LM that has already been cut (`families.keep_layers`).

    It shares the model's parameters and holds copies of the patches, in the model's dtype and on its device. A patch
    that the model already has at one of these joints stays, behind the new one: the stream entering a layer is measured
    before the layer's own patch, so a new patch leads up to it.

    Args:
        model: stock or patched.
        joints: layer index -> patch (of `nn`; an ``nn.Sequential`` of several) for the layer's input; the number of
            layers stands for the output of the last one.
        provenance: JSON values for the record in ``config.linearpatch["provenance"]`` (dense depth, spans, ...), added
            behind those of earlier cuts.

    Raises:
        InputError: a joint that the model does not have, a patch of another width, or a model that is not a plain
            causal LM of a supported family.
    """
    family = family_of(model)
    config_class, _, causal_lm_class = PATCHED_CLASSES[family.model_type]
    if not isinstance(model, family.causal_lm_class):
        raise InputError(f"only a {family.causal_lm_class.__name__} can be patched, not a {type(model).__name__}")
    depth = num_layers(model)
    config = config_class()
    own = ("auto_map", "model_type")
    vars(config).update(copy.deepcopy({name: value for name, value in vars(model.config).items() if name not in own}))
    config.linearpatch = dict(config.linearpatch)
    if provenance is not None:
        config.linearpatch["provenance"] = [*config.linearpatch.get("provenance", []), dict(provenance)]
    there = patches(model)
    chains: dict[int, list[Any]] = {}
    for joint, patch in sorted(joints.items()):
        if not 0 <= joint <= depth:
            raise InputError(f"there is no joint {joint} in a model with {depth} layers")
        chains[joint] = _links(patch) + _links(there.get(joint))
        for link in chains[joint]:
            width = getattr(link, "dim", None)
            if width != config.hidden_size:
                kind = type(link).__name__
                raise InputError(f"the patch of joint {joint} ({kind}) is {width} wide, the model {config.hidden_size}")
        if not chains[joint]:
            raise InputError(f"there is no patch to put at joint {joint}: leave the joint out")
        # A place for what is new; what is there comes with the model's modules.
        config.linearpatch["joints"].setdefault(str(joint), [])
    twin = rebuild(model, causal_lm_class, config, range(depth))
    weight = decoder(model).embed_tokens.weight
    for joint, chain in chains.items():
        copies = [copy.deepcopy(link).to(device=weight.device, dtype=weight.dtype) for link in chain]
        _put(twin, joint, _joined(copies))
    return twin


def _put(model: PreTrainedModel, joint: int, patch: nn.Module) -> None:
    """Set what stands at a joint, in the model and in its config."""
    layers = decoder_layers(model)
    layer = layers[min(joint, len(layers) - 1)]
    layer.register_module("patch" if joint < len(layers) else "output_patch", patch)
    descriptions = [link.description() for link in _links(patch)]
    for config in (model.config, decoder(model).config):
        config.linearpatch["joints"][str(joint)] = descriptions if len(descriptions) > 1 else descriptions[0]


def replace_patch(model: PreTrainedModel, joint: int, patch: Patch) -> None:
    """Put ``patch`` in the place of whatever stands at a joint of a patched model, here and in its config.

    Unlike `patched_model` it changes ``model`` itself, and keeps the patch's own dtype.
    """
    if joint not in patches(model):
        raise InputError(f"the model has no patch at joint {joint}: it has some at {sorted(patches(model))}")
    _put(model, joint, patch.to(decoder(model).embed_tokens.weight.device))


def _links(patch: nn.Module | None) -> list[Any]:
    if patch is None:
        return []
    return list(patch) if isinstance(patch, nn.Sequential) else [patch]


def carried_patches(model: nn.Module, keep: Sequence[int]) -> dict[int, nn.Module]:
    """The patches of the layers that ``keep`` leaves out, by the joint where they still make sense.

    For a *plain* removal, where no new patch is fitted: a removed layer counts as the identity, but the patch in front
    of it still heals an earlier cut. ``patched_model(keep_layers(model, keep), carried_patches(model, keep))`` keeps
    it. A newly fitted patch has measured through the old one, so a joint that gets one needs no carried patch.
    """
    depth = num_layers(model)
    kept = set(keep)
    carried: dict[int, list[Any]] = {}
    for joint, patch in patches(model).items():
        if min(joint, depth - 1) not in kept:
            carried.setdefault(sum(layer < joint for layer in kept), []).extend(_links(patch))
    return {joint: _joined(chain) for joint, chain in carried.items()}
