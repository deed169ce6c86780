"""Where the layers, norms and embeddings of a decoder live: the one place that knows Transformers' classes.

What a model shows is found: its decoder, the list of its layers, its embedding. In a model that reads more than text
that is the decoder of the text; what is around it stays as it is. A record (`Family`) adds what does not show, such as
which rows of a projection are one head's; without one, layers are removed, joints patched, weights fitted again
(`halves` measures which), and layers merged where they show what they are sums over (`units`).

A layer index counts decoder layers from 0; a span is half-open, ``[start, end)``. The *stream entering layer i* is the
hidden state handed to layer ``i`` as its input, before a patch that layer ``i`` may carry (the patch of a joint is a
part of the layer behind it).
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.records import Registry
from linearpatch_kernels.torch_internals import accelerate_hook

PATCHED_PREFIX = "linearpatch_"
PATCHED_CLASS = "LinearPatch"

# A merge adds a level at most, and models have fewer layers than that.
_DEEPEST_NODE = 300


@dataclass(frozen=True)
class LayerModules:
    """What the halves of a decoder layer are made of, by the paths of modules in the layer.

    Attributes:
        attention, feed_forward: paths of the norms in front of the halves.
        queries_keys_values, gates: paths of the projections that read the normed stream, rows of units; one path
            several times is a fused projection, in this order.
        attention_output, feed_forward_output: paths of the projections back.
        attention_shared, feed_forward_shared: norms whose one gain all units share (of queries and keys, behind a
            half).
        gain_offset: a norm's gain is ``gain_offset + weight``.
    """

    attention: str = "input_layernorm"
    feed_forward: str = "post_attention_layernorm"
    queries_keys_values: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    attention_output: str = "self_attn.o_proj"
    feed_forward_output: str = "mlp.down_proj"
    attention_shared: tuple[str, ...] = ()
    feed_forward_shared: tuple[str, ...] = ()
    gain_offset: float = 0.0


def logits_options(config: PretrainedConfig) -> tuple[float, float | None]:
    """By what a model multiplies its head's output, and the soft-cap before that, under the names Transformers uses."""
    factor, divisor = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "logits_scaling"))
    return float(factor) / float(divisor), getattr(config, "final_logit_softcapping", None) or None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: of the stock config, ``"llama"``; about: what people call its models.
        config_class, layer_class, decoder_class, causal_lm_class: the stock Transformers classes. The layer's is None
            where there is no record. Of a model that reads more than text they are those of all of it, which holds the
            text's decoder.
        modules: what a layer is made of; None where that is not known, and measured where it is needed.
        per_layer: config attributes with one entry per decoder layer. A record names them: a list of special token ids
            may well have as many entries as the model has layers. None: they are guessed, and the cut is proved.
        logits_options: of a config, the factor on the logits and their soft-cap.
        gguf: what a GGUF file calls the architecture, where `gguf` reads it (of several families as the first).
    """

    model_type: str
    about: str
    config_class: type[PretrainedConfig]
    layer_class: type[nn.Module] | None
    decoder_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    modules: LayerModules | None = LayerModules()
    per_layer: tuple[str, ...] | None = ("layer_types",)
    logits_options: Callable[[PretrainedConfig], tuple[float, float | None]] = logits_options
    gguf: str | None = None

    @property
    def name(self) -> str:
        return self.model_type

    @property
    def is_recorded(self) -> bool:
        """Whether there is a record, or the family is what Transformers says of the model type and no more."""
        return self.model_type in STOCK_FAMILIES and self.modules is not None and self.per_layer is not None


def twin_name(stock: Any, stock_config: Any) -> str:
    """What the patched class of a stock one is called, in the family of a config.

    Types of models may share a class: InternLM3 has that of Llama, with another config. Of those that did not
    bring the class along, the name has the config's in it.
    """
    brought = stock.__module__.rpartition(".")[0] == stock_config.__module__.rpartition(".")[0]
    return PATCHED_CLASS + ("" if brought else stock_config.__name__.removesuffix("Config")) + stock.__name__


# Configs of the halves of a layer. One that has others is of a model that has more than one stack of layers.
_OF_LAYERS = {"attn_config", "ffn_config"}
# That of the decoder in a model that reads more than text.
_OF_TEXT = "text_config"
_QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

STOCK_FAMILIES: Registry[Family] = Registry(
    "family",
    (
        Family(
            "llama",
            "Llama",
            modeling_llama.LlamaConfig,
            modeling_llama.LlamaDecoderLayer,
            modeling_llama.LlamaModel,
            modeling_llama.LlamaForCausalLM,
            gguf="llama",
        ),
        Family(
            "mistral",
            "Mistral (a GGUF file calls it llama)",
            modeling_mistral.MistralConfig,
            modeling_mistral.MistralDecoderLayer,
            modeling_mistral.MistralModel,
            modeling_mistral.MistralForCausalLM,
            gguf="llama",
        ),
        Family(
            "qwen2",
            "Qwen2",
            modeling_qwen2.Qwen2Config,
            modeling_qwen2.Qwen2DecoderLayer,
            modeling_qwen2.Qwen2Model,
            modeling_qwen2.Qwen2ForCausalLM,
            gguf="qwen2",
        ),
        Family(
            "qwen3",
            "Qwen3",
            modeling_qwen3.Qwen3Config,
            modeling_qwen3.Qwen3DecoderLayer,
            modeling_qwen3.Qwen3Model,
            modeling_qwen3.Qwen3ForCausalLM,
            LayerModules(attention_shared=_QUERY_KEY_NORMS),
            gguf="qwen3",
        ),
        Family(
            "gemma3_text",
            "Gemma 3, its text-only checkpoints",
            modeling_gemma3.Gemma3TextConfig,
            modeling_gemma3.Gemma3DecoderLayer,
            modeling_gemma3.Gemma3TextModel,
            modeling_gemma3.Gemma3ForCausalLM,
            # What comes out of a half is normed, too, by a norm of the name that others give to the one in between.
            LayerModules(
                feed_forward="pre_feedforward_layernorm",
                attention_shared=(*_QUERY_KEY_NORMS, "post_attention_layernorm"),
                feed_forward_shared=("post_feedforward_layernorm",),
                gain_offset=1.0,
            ),
            gguf="gemma3",
        ),
        Family(
            "phi3",
            "Phi-3",
            modeling_phi3.Phi3Config,
            modeling_phi3.Phi3DecoderLayer,
            modeling_phi3.Phi3Model,
            modeling_phi3.Phi3ForCausalLM,
            LayerModules(queries_keys_values=("self_attn.qkv_proj",) * 3, gates=("mlp.gate_up_proj",) * 2),
            gguf="phi3",
        ),
    ),
)


def model_types() -> tuple[str, ...]:
    """Those of all families, and of their patched twins."""
    return (*STOCK_FAMILIES, *(PATCHED_PREFIX + model_type for model_type in STOCK_FAMILIES))


def family_of(source: nn.Module | PretrainedConfig | str) -> Family:
    """The family of a model, a config or a model type; a patched twin (``linearpatch_llama``) is of its stock family.

    A type without a record has a family, too, where Transformers has a causal LM of it.

    Raises:
        InputError: Transformers has none, or one of several stacks of layers.
    """
    model_type = source if isinstance(source, str) else getattr(getattr(source, "config", source), "model_type", None)
    name = str(model_type).removeprefix(PATCHED_PREFIX)
    family = STOCK_FAMILIES.get(name) or _unrecorded(name)
    if family is None:
        raise InputError(
            f"models of type {model_type!r} are not supported: Transformers has no causal LM of that type with one "
            "decoder"
        )
    return family


def _unrecorded(model_type: str) -> Family | None:
    """What Transformers' own mappings say of a model type."""
    if model_type not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[model_type]
    # GPT-SW3 is GPT-2 by another name.
    model_type = config_class.model_type
    if model_type in STOCK_FAMILIES:
        return STOCK_FAMILIES[model_type]
    whole = _OF_TEXT in config_class.sub_configs
    heads = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if whole else MODEL_FOR_CAUSAL_LM_MAPPING
    mapped = [mapping.get(config_class, None) for mapping in (MODEL_MAPPING, heads)]
    decoder_class, causal_lm_class = (one[0] if isinstance(one, tuple) else one for one in mapped)
    single = whole or config_class.sub_configs.keys() <= _OF_LAYERS
    if decoder_class is None or causal_lm_class is None or not single or config_class.is_encoder_decoder:
        return None
    # What the layers of the text's decoder are made of is known where it is one of a recorded type.
    text = STOCK_FAMILIES.get(str(getattr(config_class.sub_configs.get(_OF_TEXT), "model_type", None)))
    return Family(
        model_type,
        f"what Transformers calls {model_type}",
        config_class,
        None,
        decoder_class,
        causal_lm_class,
        modules=None if text is None else text.modules,
        per_layer=None if text is None else text.per_layer,
    )


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that makes a model of its family's class of a config, or loads one.

    For some models that read more than text `AutoModelForCausalLM` has the text part alone, or nothing.
    """
    if _OF_TEXT not in config.sub_configs or str(config.model_type).startswith(PATCHED_PREFIX):
        return AutoModelForCausalLM
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return AutoModelForCausalLM if stock is family_of(config).causal_lm_class else AutoModelForImageTextToText


def text_config(config: Any) -> Any:
    """The part of a config that is the decoder's; all of it, but for a model that reads more than text."""
    get: Any = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def depth_name(config: Any) -> str:
    """What a decoder's config calls the number of its layers."""
    # LongCat-Flash derives another number from it, of halves of layers.
    derived = isinstance(getattr(type(config), "num_hidden_layers", None), property)
    return "num_layers" if derived and hasattr(config, "num_layers") else "num_hidden_layers"


def depth_of(config: Any) -> int:
    """How many decoder layers the model of a config has."""
    text = text_config(config)
    return int(getattr(text, depth_name(text)))


@dataclass(frozen=True)
class Heads:
    """Rows of a projection that come in heads: head h is the rows ``offset + h * size`` up to the next head's.

    Attributes:
        projection: path of an ``nn.Linear`` inside the layer (several `Heads` may share a fused one).
        per_unit: heads that go together, one after the other: the query heads of a KV group.
    """

    projection: str
    offset: int
    per_unit: int
    size: int


@dataclass(frozen=True)
class Sublayer:
    """The attention or the feed-forward half of every decoder layer; modules are named by their path in the layer.

    It is a sum over *units* (KV groups with their query heads, or neurons) that read the normed stream through rows of
    ``inputs`` and write to it through columns of ``output``, so a unit can move to another layer of the model.

    Attributes:
        name: ``"attention"`` or ``"feed-forward"``; units: how many there are.
        norm: the RMSNorm in front, whose gain the columns of ``inputs`` can take over; None where there is no gain.
        inputs: the rows of every unit; output: ``Heads`` over the *columns* of the projection back.
        shared_norms: norms whose one gain all units share (of queries and keys, behind ``output``).
        gain_offset: a norm's gain is ``gain_offset + weight`` (1 in Gemma, else 0).
    """

    name: str
    units: int
    norm: str | None
    inputs: tuple[Heads, ...]
    output: Heads
    shared_norms: tuple[str, ...]
    gain_offset: float

    @property
    def output_norm(self) -> str | None:
        """The norm between the projection back and the stream (Gemma); None where what comes out is added as it is."""
        room = self.output.projection.partition(".")[0] + "."
        return next((norm for norm in self.shared_norms if not norm.startswith(room)), None)


def recorded_sublayers(model: nn.Module) -> tuple[Sublayer, Sublayer]:
    """The attention and the feed-forward half of this model's layers, of whose family there is a record."""
    config = decoder(model).config
    modules: Any = family_of(model).modules
    layer: Any = decoder_layers(model)[0]
    groups, queries = config.num_key_value_heads, config.num_attention_heads
    size, neurons = layer.self_attn.head_dim, config.intermediate_size
    per_group = queries // groups
    return (
        Sublayer(
            "attention",
            groups,
            modules.attention,
            _rows(modules.queries_keys_values, (per_group, 1, 1), size, groups),
            Heads(modules.attention_output, 0, per_group, size),
            modules.attention_shared,
            modules.gain_offset,
        ),
        Sublayer(
            "feed-forward",
            neurons,
            modules.feed_forward,
            _rows(modules.gates, (1,) * len(modules.gates), 1, neurons),
            Heads(modules.feed_forward_output, 0, 1, 1),
            modules.feed_forward_shared,
            modules.gain_offset,
        ),
    )


def _rows(paths: Sequence[str], per_unit: Sequence[int], size: int, units: int) -> tuple[Heads, ...]:
    """The rows of the units in each projection; those of one path lie behind each other."""
    ends: dict[str, int] = {}
    found = []
    for path, heads in zip(paths, per_unit, strict=True):
        found.append(Heads(path, ends.get(path, 0), heads, size))
        ends[path] = ends.get(path, 0) + heads * units * size
    return tuple(found)


def decoder(model: nn.Module) -> Any:
    """The stack of layers with what is around them (embedding, final norm), also inside a PEFT wrapper."""
    family_of(model)
    get_decoder: Any = model.get_decoder
    stack = get_decoder()
    if not isinstance(stack, PreTrainedModel):  # a head that is called decoder (ModernBERT)
        stack = model.base_model
    # Transformers finds no decoder in a causal LM whose base model has another name than the class says (Llama 4).
    inner = [child for child in stack.children() if isinstance(child, PreTrainedModel)]
    return inner[0] if len(inner) == 1 and not _lists(stack) else stack


def embedding(model: nn.Module) -> Any:
    """The module that makes token ids rows of the stream's width."""
    return decoder(model).get_input_embeddings()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order.

    Raises:
        InputError: no list of as many modules as there are layers stands in the decoder, or more than one.
    """
    stack = decoder(model)
    layers: nn.ModuleList = stack._modules[layer_list(stack)]
    return layers


def layer_list(stack: nn.Module) -> str:
    """What a decoder calls the list of its layers."""
    config: Any = stack.config
    lists = _lists(stack)
    fitting = [name for name, child in lists.items() if len(child) == depth_of(config)] or [*lists]
    if len(fitting) != 1:
        raise InputError(
            f"models of type {config.model_type!r} cannot be cut: the {type(stack).__name__} holds {len(fitting)} "
            f"lists of modules that could be its {depth_of(config)} layers, and one is needed"
        )
    return fitting[0]


def _lists(stack: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: child for name, child in stack.named_children() if isinstance(child, nn.ModuleList)}


def num_layers(model: nn.Module) -> int:
    """How many decoder layers the model has."""
    return len(decoder_layers(model))


def merge_tree(model: nn.Module) -> list[Any]:
    """Per layer the layers of the model it was merged from: ``[0, 1, [2, [3, 4]], 5]``; their numbers if none was.

    Raises:
        InputError: the config has something else there.
    """
    count = num_layers(model)
    tree = getattr(decoder(model).config, "linearpatch_merge_tree", None)
    if tree is None:
        return list(range(count))
    if not isinstance(tree, list) or len(tree) != count or not all(_is_node(node, _DEEPEST_NODE) for node in tree):
        raise InputError(
            f"the config's linearpatch_merge_tree is {reprlib.repr(tree)}, not the layers that each of {count} was "
            "merged from: restore config.json"
        )
    return list(tree)


def _is_node(node: object, depth: int) -> bool:
    if isinstance(node, list):
        return depth > 0 and len(node) > 1 and all(_is_node(child, depth - 1) for child in node)
    return type(node) is int and node >= 0


def hidden_size(model: nn.Module) -> int:
    """The width d of the residual stream."""
    return int(decoder(model).config.hidden_size)


def norm_eps(model: nn.Module) -> float:
    """The eps of the model's RMSNorms; InputError where its config names none."""
    eps = getattr(decoder(model).config, "rms_norm_eps", None)
    if eps is None:
        raise InputError(
            "the model's config has no rms_norm_eps, which a fit of the normed stream needs: give another fit"
        )
    return float(eps)


def rms_norms(model: nn.Module, start: int) -> list[nn.Module]:
    """The RMSNorms in the layers from ``start`` on, and the final norm."""
    layers, table = decoder_layers(model), embedding(model)
    places = [*layers[start:], *(one for one in decoder(model).children() if one not in (layers, table))]
    # By what they are: libraries put norms of other names in their place.
    return [module for place in places for module in place.modules() if _is_rms_norm(module)]


def _is_rms_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return own.keys() == {"weight"} and own["weight"].dim() == 1


def norm_gains(model: nn.Module, start: int) -> dict[str, nn.Parameter]:
    """The gains of :func:`rms_norms`, under their state-dict names."""
    norms = {id(module) for module in rms_norms(model, start)}
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if id(module) in norms}


def linear_layers(model: nn.Module, start: int) -> list[str]:
    """The names of the linear projections in the layers from ``start`` on."""
    inside = {id(module) for layer in decoder_layers(model)[start:] for module in layer.modules()}
    return [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and id(one) in inside]


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves the model's weights, or what flows between them, about (``device_map``)."""
    return any(accelerate_hook(module) is not None for module in model.modules())
