"""Decoders whose joints carry patches: configuration, classes, Auto registration.

A patched model is the stock model with a `PatchChain` in front of some layers: ``model.layers.13.patch`` acts on the
stream entering layer 13, inside the layer's forward (so inside gradient checkpointing). Joint L, behind the last of L
layers, is ``model.layers.<L-1>.output_patch``. The config lists the patches of every joint, in this model's own
numbering (docs/reference/checkpoint-format.md)::

    config.linearpatch == {"format": 2, "joints": {"13": [{"kind": "hadamard", ...}]}, "provenance": [...]}

The config file may have come a long way, so `checked_record` looks at it before anything is built.

`patched_classes` makes the three classes of a family. With what it needs, it also travels inside the modeling file of
a checkpoint (`modeling_file`).
"""

from __future__ import annotations

import copy
import functools
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.config_forms import both_forms, one_form
from linearpatch_kernels.modeling.cut import rebuild
from linearpatch_kernels.modeling.families import (
    PATCHED_CLASS,
    STOCK_FAMILIES,
    Family,
    decoder,
    decoder_layers,
    depth_of,
    embedding,
    family_of,
    hidden_size,
    num_layers,
    text_config,
    twin_name,
)
from linearpatch_kernels.modeling.modeling_file import modeling_source
from linearpatch_kernels.nn import Patch, PatchChain, build_chain, check_descriptions

FORMAT = 2
# Format 1 numbered the patches of a joint only where they were several: a pattern of its names, and what stands there
# now. In the form that Transformers takes (``key_mapping``).
_NAMES_OF_FORMAT_1 = {r"\.patch\.(?!\d)": ".patch.0.", r"\.output_patch\.(?!\d)": ".output_patch.0."}


def present_name(name: str) -> str:
    """What a tensor that a file of either format calls ``name`` is called in a model."""
    for pattern, now in _NAMES_OF_FORMAT_1.items():
        name = re.sub(pattern, now, name)
    return name


def listed(entry: Any) -> Any:
    """A joint's entry in a file of either format, as format 2 has it: format 1 wrote a single patch without a list."""
    return [entry] if isinstance(entry, Mapping) else entry


def joint_place(joint: int, depth: int) -> tuple[int, str]:
    """Where a joint of a model of ``depth`` layers stands: the number of a layer, and the name of the chain in it."""
    return (joint, "patch") if joint < depth else (depth - 1, "output_patch")


def checked_record(record: Any, depth: int, dim: int) -> dict[str, Any]:
    """The entry ``linearpatch`` of a config, in format 2, after a look at all that is built from.

    Args:
        record: as the config has it, of either format; None stands for no joints.
        depth, dim: how many layers the model has, and how wide they are.

    Raises:
        InputError: another type or format, a joint that the model does not have, a description that does not fit it.
    """
    if record is None:
        return {"format": FORMAT, "joints": {}}
    joints = record.get("joints") if isinstance(record, Mapping) else None
    provenance = record.get("provenance", []) if isinstance(record, Mapping) else None
    if not isinstance(joints, Mapping) or not isinstance(provenance, list):
        raise InputError(
            f"the config's linearpatch is {reprlib.repr(record)}, no record of joints: restore config.json"
        )
    written = record.get("format", 1)
    if written not in (1, FORMAT):
        raise InputError(f"the config's linearpatch is of format {reprlib.repr(written)}: update linearpatch-kernels")
    chains = {joint: entry if written == FORMAT else listed(entry) for joint, entry in joints.items()}
    for joint, chain in chains.items():
        # As it is looked up, so no "02"; and not all that there could be, which a depth of 10**9 would make many.
        if not isinstance(joint, str) or not re.fullmatch("0|[1-9][0-9]{0,8}", joint) or int(joint) > depth:
            named = ", ".join(sorted(map(str, joints)))
            raise InputError(f"the config patches joints [{named:.200}] of a model with {depth} layers")
        try:
            check_descriptions(chain, dim)
        except InputError as error:
            raise InputError(f"joint {joint} of the config: {error}") from None
    return {**record, "format": FORMAT, "joints": chains}


def build_joint(descriptions: Any, dim: int) -> PatchChain | None:
    """The chain of a joint of a model of width ``dim``; None for an empty list.

    In the default dtype, which `from_pretrained` sets to that of the model while it builds one.
    """
    return build_chain(descriptions, dim=dim).to(torch.get_default_dtype()) if descriptions else None


class PatchedPreTrained:
    """What a patched model does differently from a stock one when it is loaded and saved."""

    own_code: Callable[[], str]

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: what a checkpoint does not hold (Falcon H1's multipliers) is then initialised as in a stock model."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, but a checkpoint whose weights are not those of its config raises: it warns, and goes on
        without the patches or the biases, or with random ones."""
        kwargs["key_mapping"] = {**_NAMES_OF_FORMAT_1, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]  # a mixin
        # A decoder alone leaves the head of its checkpoint where it is.
        apart = () if hasattr(model, "lm_head") else ("lm_head.",)
        unexpected = {key for key in info["unexpected_keys"] if not key.startswith(apart)}
        wrong = sorted({*info["missing_keys"], *unexpected, *(key for key, *_ in info["mismatched_keys"])})
        # The patches are what is most likely to be lost: named first.
        wrong.sort(key=lambda key: re.search(r"\.\d+\.(output_)?patch\.", key) is None)
        if wrong:
            what = "patch weights" if "patch." in wrong[0] else "weights"
            some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise InputError(f"the {what} do not fit the config ({some}): the checkpoint is incomplete or mixed")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, and the modeling file with which the directory loads where this package is missing."""
        # Transformers 5 gives the tensors the names back that the file they were loaded from had, which may be of
        # format 1; where it knows of no file, they get those of the stock model's files.
        loaded_by = vars(self).pop("_weight_conversions", None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # a mixin
        finally:
            if loaded_by is not None:
                self._weight_conversions = loaded_by
        Path(save_directory, "modeling_linearpatch.py").write_text(self.own_code(), encoding="utf-8")


# What configs call the activation in the feed-forward half.
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act", "afn")


def _patched_config(stock_config: Any, stock_decoder: Any, stock_causal_lm: Any) -> Any:
    """The stock config with a record of the joints, and a file that no stock class takes for its own."""
    stock = stock_config()
    written, new = stock.to_dict(), hasattr(type(text_config(stock)), "rope_parameters")
    # On disk the activation is masked, or the dtype where the config names none: a stock class does not know one of
    # this name and says so, instead of loading the layers without their patches.
    masked = next((name for name in _ACTIVATIONS if isinstance(written.get(name), str)), "dtype")
    heads = ["AutoModelForCausalLM", *["AutoModelForImageTextToText"] * ("text_config" in stock_config.sub_configs)]
    mask = " (some layers are patched: `import linearpatch_kernels.modeling`, or pass trust_remote_code=True)"

    class Config(stock_config):
        model_type = f"linearpatch_{stock_config.model_type}"
        auto_map = {  # noqa: RUF012 - the configs of Transformers are dataclasses: an annotation would make it a field
            auto_class: f"modeling_linearpatch.{twin_name(stock_class, stock_config)}"
            for auto_class, stock_class in (
                ("AutoConfig", stock_config),
                ("AutoModel", stock_decoder),
                *((head, stock_causal_lm) for head in heads),
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
            for name in (masked, "torch_dtype") if masked == "dtype" else (masked,):
                if isinstance(entries.get(name), str):
                    entries[name] = entries[name].removesuffix(mask)
            # What the names of Transformers 5 say, its classes have; those of 4 know the old names only.
            entries = one_form(entries, new=new)
            # These two belong to the class.
            super().__init__(**{name: entries[name] for name in entries if name not in ("auto_map", "model_type")})
            self.linearpatch = checked_record(record, depth_of(self), text_config(self).hidden_size)

        def to_dict(self) -> dict[str, Any]:
            entries = super().to_dict()
            # A model that was made in memory may have no dtype to mask.
            return {**entries, masked: f"{entries.get(masked) or 'float32'}{mask}", "auto_map": dict(self.auto_map)}

        def to_json_string(self, use_diff: bool = True) -> str:
            entries = both_forms(json.loads(super().to_json_string(use_diff)))
            return json.dumps(entries, indent=2, sort_keys=True) + "\n"

    return Config


# Of stock layers, once they were asked for.
_PATCHED_LAYERS: dict[Any, Any] = {}


def patched_layer(stock_layer: Any) -> Any:
    """The class of a layer with the chain of the joint in front of it; the last layer also has that of the joint
    behind. A stock layer is made one of it (`_attach`)."""
    if stock_layer in _PATCHED_LAYERS:
        return _PATCHED_LAYERS[stock_layer]

    class Layer(stock_layer):
        stock_class = stock_layer

        def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if self.patch is not None:
                hidden_states = self.patch(hidden_states)
            output = super().forward(hidden_states, *args, **kwargs)
            if self.output_patch is None:
                return output
            # Some layers return a tuple; before Transformers 5, also Gemma's.
            return (self.output_patch(output[0]), *output[1:]) if type(output) is tuple else self.output_patch(output)

    _name(Layer, PATCHED_CLASS + stock_layer.__name__)
    _PATCHED_LAYERS[stock_layer] = Layer
    return Layer


def _name(patched: Any, name: str) -> None:
    patched.__name__ = patched.__qualname__ = name
    # A pickle names classes by their place in a module.
    globals()[name] = patched


def _attach(stack: Any) -> None:
    """Put the joints of a model's config at the layers of its decoder, which are stock ones."""
    config, depth = text_config(stack.config), depth_of(stack.config)
    # In a model that reads more than text, what reads the rest may be as deep.
    decoders = (one for one in stack.modules() if type(getattr(one, "config", None)) is type(config))
    lists = (one for part in decoders for one in part.modules() if isinstance(one, nn.ModuleList) and len(one) == depth)
    layers = next(lists)
    # Checked when the config was made, which may have been changed since.
    joints = checked_record(stack.config.linearpatch, depth, config.hidden_size)["joints"]
    for index in {joint_place(int(joint), depth)[0] for joint in joints}:
        layers[index].__class__ = patched_layer(type(layers[index]))
        for name in ("patch", "output_patch"):
            layers[index].register_module(name, None)
    for joint, descriptions in joints.items():
        index, name = joint_place(int(joint), depth)
        layers[index].register_module(name, build_joint(descriptions, config.hidden_size))


def _share_names(stock: Mapping[Any, Any]) -> None:
    """Let a patched model's tensors have the names in a file that the stock one's have: engines know no others.

    Transformers 5 holds some otherwise in memory (all experts of a layer as one tensor), and tells by the type and by
    the classes which.

    Args:
        stock: the stock class of each patched one.
    """
    try:
        from transformers import conversion_mapping
    except ImportError:
        # Transformers 4 holds them as they are in the file.
        return
    for patched, base in stock.items():
        for name in ("model_type", "__name__"):
            mapping = conversion_mapping.get_checkpoint_conversion_mapping(getattr(base, name, None))
            if mapping is not None:
                conversion_mapping.register_checkpoint_conversion_mapping(
                    getattr(patched, name), mapping, overwrite=True
                )


def patched_classes(
    stock_config: Any, stock_decoder: Any, stock_causal_lm: Any, *, own_code: Callable[[], str]
) -> tuple[Any, Any, Any]:
    """The config, decoder and causal LM of a patched family, named as `twin_name` says.

    The stock constructors build the model, of which some layers are then made patched ones.

    Args:
        own_code: returns the text of the modeling file that `save_pretrained` writes beside the weights.
    """
    Config = _patched_config(stock_config, stock_decoder, stock_causal_lm)
    whole = [*(stock_decoder._no_split_modules or ())]

    class Decoder(PatchedPreTrained, stock_decoder):
        config_class = Config
        _no_split_modules = [*whole, *(PATCHED_CLASS + name for name in whole)]  # noqa: RUF012 - as in the stock class

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            _attach(self)
            self.post_init()

    class CausalLM(PatchedPreTrained, stock_causal_lm):
        config_class = Config
        _no_split_modules = Decoder._no_split_modules

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            # Llama 4 and Kosmos-2.5 have no class between their parts and the whole.
            stack = next((one for one in self.modules() if isinstance(one, stock_decoder)), self)
            if not isinstance(stack, Decoder):
                if stack is not self:
                    stack.__class__ = Decoder
                    # Transformers 5.16 notes in a constructor, by class, what else than its output a model can give.
                    PreTrainedModel.__init__(Decoder.__new__(Decoder), stack.config)
                _attach(stack)
            self.post_init()

    made: Any = CausalLM if stock_decoder is stock_causal_lm else Decoder
    stock: dict[Any, Any] = {Config: stock_config, made: stock_decoder, CausalLM: stock_causal_lm}
    for patched, base in stock.items():
        patched.stock_class = base
        _name(patched, twin_name(base, stock_config))
    _share_names(stock)
    for patched in (made, CausalLM):
        patched.own_code = staticmethod(own_code)
    return Config, made, CausalLM


def twin_of(family: Family) -> tuple[Any, Any, Any]:
    """The config, decoder and causal LM of a family's patched twin, made and registered when they are first needed:
    those of all would take the import of all of Transformers."""
    if family.model_type not in PATCHED_CLASSES:
        PATCHED_CLASSES[family.model_type] = registered(family)
    return PATCHED_CLASSES[family.model_type]


def registered(family: Family) -> tuple[Any, Any, Any]:
    """The config, decoder and causal LM of a family's patched twin, known to the Auto classes."""
    config_class, decoder_class, causal_lm_class = patched_classes(
        family.config_class,
        family.decoder_class,
        family.causal_lm_class,
        own_code=functools.partial(modeling_source, family),
    )
    if family.layer_class is not None:
        # A pickle looks it up in a process that has not made it yet.
        patched_layer(family.layer_class)
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, decoder_class)
    AutoModelForCausalLM.register(config_class, causal_lm_class)
    if "AutoModelForImageTextToText" in config_class.auto_map:
        AutoModelForImageTextToText.register(config_class, causal_lm_class)
    return config_class, decoder_class, causal_lm_class


PATCHED_CLASSES = {model_type: registered(family) for model_type, family in STOCK_FAMILIES.items()}


def patches(model: nn.Module) -> dict[int, PatchChain]:
    """The chain of every joint: index of the layer whose input it acts on -> patches (the depth: behind the last)."""
    layers = decoder_layers(model)
    depth = len(layers)
    places = {joint: joint_place(joint, depth) for joint in range(depth + 1)}
    found = {joint: getattr(layers[layer], name, None) for joint, (layer, name) in places.items()}
    return {joint: chain for joint, chain in found.items() if chain is not None}


def patched_model(
    model: PreTrainedModel,
    joints: Mapping[int, Patch | Iterable[Patch]],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The patched twin of a causal LM that has already been cut (`cut.keep_layers`).

    It shares the model's parameters and holds copies of the patches, in the model's dtype and on its device. A patch
    that the model already has at one of these joints stays, behind the new one: the stream entering a layer is measured
    before the layer's own patch, so a new patch leads up to it.

    Args:
        model: stock or patched.
        joints: layer index -> patch (of `nn`), or several in their order, for the layer's input; the number of layers
            stands for the output of the last one.
        provenance: JSON values for the record in ``config.linearpatch["provenance"]`` (dense depth, spans, ...), added
            behind those of earlier cuts.

    Raises:
        InputError: a joint that the model does not have, a patch of another width, or a model that is not a plain
            causal LM of a supported family.
    """
    family = family_of(model)
    config_class, _, causal_lm_class = twin_of(family)
    if not isinstance(model, family.causal_lm_class):
        raise InputError(f"only a {family.causal_lm_class.__name__} can be patched, not a {type(model).__name__}")
    _check_format(model)
    depth = num_layers(model)
    config = config_class()
    own = ("auto_map", "model_type")
    vars(config).update(copy.deepcopy({name: value for name, value in vars(model.config).items() if name not in own}))
    config.linearpatch = dict(config.linearpatch)
    if provenance is not None:
        config.linearpatch["provenance"] = [*config.linearpatch.get("provenance", []), dict(provenance)]
    there = patches(model)
    chains: dict[int, PatchChain] = {}
    for joint, new in sorted(joints.items()):
        if not 0 <= joint <= depth:
            raise InputError(f"there is no joint {joint} in a model with {depth} layers")
        try:
            chain = PatchChain.of(new)
        except InputError as error:
            raise InputError(f"at joint {joint}: {error}") from None
        if chain.dim != hidden_size(model):
            raise InputError(f"the patch of joint {joint} is {chain.dim} wide, the model {hidden_size(model)}")
        chains[joint] = PatchChain(*chain, *there.get(joint, ()))
        # A place for what is new; what is there comes with the model's modules.
        config.linearpatch["joints"].setdefault(str(joint), [])
    twin = rebuild(model, causal_lm_class, config, range(depth))
    weight = embedding(model).weight
    for joint, chain in chains.items():
        _put(twin, joint, copy.deepcopy(chain).to(device=weight.device, dtype=weight.dtype))
    return twin


def _check_format(model: nn.Module) -> None:
    """InputError for a model that its checkpoint's own code made, of format 1: its joints hold no chains."""
    record = getattr(getattr(model, "config", None), "linearpatch", None)
    if record is not None and record.get("format") != FORMAT:
        raise InputError("the code that the checkpoint brought is of format 1: load it without trust_remote_code")


def _put(model: PreTrainedModel, joint: int, chain: PatchChain) -> None:
    """Set what stands at a joint, in the model and in its config."""
    layer, name = joint_place(joint, num_layers(model))
    decoder_layers(model)[layer].register_module(name, chain)
    for config in {id(one): one for one in (model.config, decoder(model).config)}.values():
        # In a model that reads more than text that of the decoder has no record.
        if getattr(config, "linearpatch", None) is not None:
            config.linearpatch["joints"][str(joint)] = chain.description()


def replace_patch(model: PreTrainedModel, joint: int, patch: Patch | Iterable[Patch]) -> None:
    """Put ``patch``, or several, in the place of whatever stands at a joint of a patched model, here and in its config.

    Unlike `patched_model` it changes ``model`` itself, and keeps the patch's own dtype.
    """
    if joint not in patches(model):
        raise InputError(f"the model has no patch at joint {joint}: it has some at {sorted(patches(model))}")
    _put(model, joint, PatchChain.of(patch).to(embedding(model).weight.device))


def carried_patches(model: nn.Module, keep: Sequence[int]) -> dict[int, PatchChain]:
    """The patches of the layers that ``keep`` leaves out, by the joint where they still make sense.

    For a *plain* removal, where no new patch is fitted: a removed layer counts as the identity, but the patch in front
    of it still heals an earlier cut. ``patched_model(keep_layers(model, keep), carried_patches(model, keep))`` keeps
    it. A newly fitted patch has measured through the old one, so a joint that gets one needs no carried patch.
    """
    _check_format(model)
    depth = num_layers(model)
    kept = set(keep)
    carried: dict[int, list[Patch]] = {}
    for joint, chain in patches(model).items():
        if joint_place(joint, depth)[0] not in kept:
            carried.setdefault(sum(layer < joint for layer in kept), []).extend(chain)
    return {joint: PatchChain(*found) for joint, found in carried.items()}
