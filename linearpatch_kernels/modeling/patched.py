"""Decoders whose joints carry a patch: configuration, classes, Auto registration.

A patched model is the stock model with a patch in front of some layers: ``model.layers.13.patch`` acts on the stream
entering layer 13, inside the layer's forward (so inside gradient checkpointing). Joint L, behind the last of L layers,
is ``model.layers.<L-1>.output_patch``. The config names the joints, in this model's own numbering::

    config.linearpatch == {"joints": {"13": {"kind": "hadamard", ...}}, "provenance": [...]}

A joint that was cut twice holds a list of descriptions, applied in order (``patch`` is then an ``nn.Sequential``).

`patched_classes` makes the three classes of a family. With what it needs, it also travels inside the modeling file of
a checkpoint (`modeling_file`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from linearpatch_kernels.errors import InputError
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
from linearpatch_kernels.nn import Patch, build_patch


def build_joint(description: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> nn.Module | None:
    """The module of a joint: one patch, the patches of a list one after the other, or nothing.

    In the default dtype, which `from_pretrained` sets to that of the model while it builds one.
    """
    if description is None:
        return None
    chain = [description] if isinstance(description, Mapping) else description
    links = [build_patch(link) for link in chain]
    return (links[0] if len(links) == 1 else nn.Sequential(*links)).to(torch.get_default_dtype())


class PatchedPreTrained:
    """What a patched model does differently from a stock one when it is loaded and saved."""

    own_code: Callable[[], str]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, but a checkpoint whose patch weights are not those its config names raises."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]  # a mixin
        keys = {*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])}
        wrong = sorted(key for key in keys if re.search(r"layers\.\d+\.(output_)?patch\.", key))
        if wrong:
            raise InputError(
                f"the patch weights do not fit the config ({', '.join(wrong)}): the checkpoint is incomplete or mixed"
            )
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
    activation = "hidden_activation" if hasattr(stock_config, "hidden_activation") else "hidden_act"
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

        def __post_init__(self, **kwargs: Any) -> None:
            kwargs.pop("auto_map", None)
            setattr(self, activation, getattr(self, activation).removesuffix(mask))
            self.linearpatch = {"joints": {}} if self.linearpatch is None else self.linearpatch
            super().__post_init__(**kwargs)

        def to_dict(self) -> dict[str, Any]:
            entries = super().to_dict()
            return {**entries, activation: entries[activation] + mask, "auto_map": dict(self.auto_map)}

    class Layer(stock_layer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            joints = config.linearpatch["joints"]
            last = layer_idx == config.num_hidden_layers - 1
            self.register_module("patch", build_joint(joints.get(str(layer_idx))))
            self.register_module("output_patch", build_joint(joints.get(str(layer_idx + 1)) if last else None))

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if self.patch is not None:
                hidden_states = self.patch(hidden_states)
            hidden_states = super().forward(hidden_states, *args, **kwargs)
            return hidden_states if self.output_patch is None else self.output_patch(hidden_states)

    class Decoder(PatchedPreTrained, stock_decoder):
        config_class = Config
        _no_split_modules = [stock_layer.__name__, "LinearPatch" + stock_layer.__name__]  # noqa: RUF012 - as in the stock class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            depth = len(self.layers)
            joints = {int(joint) for joint in config.linearpatch["joints"]}
            if not joints <= {*range(depth + 1)}:
                raise InputError(f"the config patches joints {sorted(joints)} of a model with {depth} layers")
            for layer in {min(joint, depth - 1) for joint in joints}:
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

    stock = {Config: stock_config, Layer: stock_layer, Decoder: stock_decoder, CausalLM: stock_causal_lm}
    for patched, base in stock.items():
        patched.__name__ = patched.__qualname__ = "LinearPatch" + base.__name__
    for patched in (Decoder, CausalLM):
        patched.own_code = staticmethod(own_code)
    return Config, Decoder, CausalLM


def _registered(family: Family) -> tuple[Any, Any, Any]:
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


PATCHED_CLASSES = {model_type: _registered(family) for model_type, family in STOCK_FAMILIES.items()}
LinearPatchLlamaConfig, LinearPatchLlamaModel, LinearPatchLlamaForCausalLM = PATCHED_CLASSES["llama"]
LinearPatchMistralConfig, LinearPatchMistralModel, LinearPatchMistralForCausalLM = PATCHED_CLASSES["mistral"]
LinearPatchQwen2Config, LinearPatchQwen2Model, LinearPatchQwen2ForCausalLM = PATCHED_CLASSES["qwen2"]
LinearPatchQwen3Config, LinearPatchQwen3Model, LinearPatchQwen3ForCausalLM = PATCHED_CLASSES["qwen3"]
LinearPatchGemma3TextConfig, LinearPatchGemma3TextModel, LinearPatchGemma3ForCausalLM = PATCHED_CLASSES["gemma3_text"]
LinearPatchPhi3Config, LinearPatchPhi3Model, LinearPatchPhi3ForCausalLM = PATCHED_CLASSES["phi3"]


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
    vars(config).update(copy.deepcopy({k: v for k, v in vars(model.config).items() if k != "auto_map"}))
    config.linearpatch = dict(config.linearpatch)
    if provenance is not None:
        config.linearpatch["provenance"] = [*config.linearpatch.get("provenance", []), dict(provenance)]
    chains: dict[int, list[Any]] = {}
    for joint, patch in sorted(joints.items()):
        if not 0 <= joint <= depth:
            raise InputError(f"there is no joint {joint} in a model with {depth} layers")
        chains[joint] = _links(patch) + _links(patches(model).get(joint))
        for link in chains[joint]:
            if link.dim != config.hidden_size:
                raise InputError(f"the patch of joint {joint} is {link.dim} wide, the model {config.hidden_size}")
        descriptions = [link.description() for link in chains[joint]]
        config.linearpatch["joints"][str(joint)] = descriptions if len(descriptions) > 1 else descriptions[0]
    twin = rebuild(model, causal_lm_class, config, range(depth))
    weight = decoder(model).embed_tokens.weight
    for joint, chain in chains.items():
        copies = [copy.deepcopy(link).to(device=weight.device, dtype=weight.dtype) for link in chain]
        layer = decoder_layers(twin)[min(joint, depth - 1)]
        setattr(layer, "patch" if joint < depth else "output_patch", _joined(copies))
    return twin


def replace_patch(model: PreTrainedModel, joint: int, patch: Patch) -> None:
    """Put ``patch`` in the place of whatever stands at a joint of a patched model, here and in its config.

    Unlike `patched_model` it changes ``model`` itself, and keeps the patch's own dtype.
    """
    depth = num_layers(model)
    if joint not in patches(model):
        raise InputError(f"the model has no patch at joint {joint}: it has some at {sorted(patches(model))}")
    weight = decoder(model).embed_tokens.weight
    setattr(decoder_layers(model)[min(joint, depth - 1)], "patch" if joint < depth else "output_patch", patch)
    patch.to(weight.device)
    for config in (model.config, decoder(model).config):
        config.linearpatch["joints"][str(joint)] = patch.description()


def _links(patch: nn.Module | None) -> list[Any]:
    if patch is None:
        return []
    return list(patch) if isinstance(patch, nn.Sequential) else [patch]


def _joined(links: list[Any]) -> nn.Module:
    return links[0] if len(links) == 1 else nn.Sequential(*links)


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
