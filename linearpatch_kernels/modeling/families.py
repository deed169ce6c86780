"""Where the layers, norms and embeddings of a decoder live: the one place that knows Transformers' classes.

A layer index counts decoder layers from 0; a span is half-open, ``[start, end)``. The *stream entering layer i* is the
hidden state handed to layer ``i`` as its input, before a patch that layer ``i`` may carry (the patch of a joint is a
part of the layer behind it).
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.copies import (
    Pair,
    Replacements,
    bind,
    carry_over,
    check_same_structure,
    shallow_copy,
    share_tensors,
    shared_copy,
)
from linearpatch_kernels.records import Registry
from linearpatch_kernels.torch_internals import accelerate_hook

PATCHED_PREFIX = "linearpatch_"

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
        config_class, layer_class, decoder_class, causal_lm_class: the stock Transformers classes.
        modules: what a layer is made of.
        per_layer: config attributes with one entry per decoder layer. Named, not guessed from their length: a list of
            special token ids may well have as many entries as the model has layers.
        logits_options: of a config, the factor on the logits and their soft-cap.
        gguf: what a GGUF file calls the architecture, where `gguf` reads it.
    """

    model_type: str
    about: str
    config_class: type[PretrainedConfig]
    layer_class: type[nn.Module]
    decoder_class: type[PreTrainedModel]
    causal_lm_class: type[PreTrainedModel]
    modules: LayerModules = LayerModules()
    per_layer: tuple[str, ...] = ("layer_types",)
    logits_options: Callable[[PretrainedConfig], tuple[float, float | None]] = logits_options
    gguf: str | None = None

    @property
    def name(self) -> str:
        return self.model_type


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

    Raises:
        InputError: the model type is not supported.
    """
    model_type = source if isinstance(source, str) else getattr(getattr(source, "config", source), "model_type", None)
    family = STOCK_FAMILIES.get(str(model_type).removeprefix(PATCHED_PREFIX))
    if family is None:
        raise InputError(f"models of type {model_type!r} are not supported: use one of {', '.join(STOCK_FAMILIES)}")
    return family


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
        norm: the RMSNorm in front, whose gain the columns of ``inputs`` can take over.
        inputs: the rows of every unit; output: ``Heads`` over the *columns* of the projection back.
        shared_norms: norms whose one gain all units share (of queries and keys, behind ``output``).
        gain_offset: a norm's gain is ``gain_offset + weight`` (1 in Gemma, else 0).
    """

    name: str
    units: int
    norm: str
    inputs: tuple[Heads, ...]
    output: Heads
    shared_norms: tuple[str, ...]
    gain_offset: float

    @property
    def output_norm(self) -> str | None:
        """The norm between the projection back and the stream (Gemma); None where what comes out is added as it is."""
        room = self.output.projection.partition(".")[0] + "."
        return next((norm for norm in self.shared_norms if not norm.startswith(room)), None)


def sublayers(model: nn.Module) -> tuple[Sublayer, Sublayer]:
    """The attention and the feed-forward half of this model's layers."""
    config, modules = decoder(model).config, family_of(model).modules
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


def layer_kinds(model: nn.Module) -> list[str]:
    """What each layer is by the config's lists, ``"full_attention"`` for example; one kind where there are none."""
    lists = [getattr(decoder(model).config, name, None) for name in family_of(model).per_layer]
    told = [entries for entries in lists if entries is not None]
    if not told:
        return ["full_attention"] * num_layers(model)
    return [", ".join(map(str, entries)) for entries in zip(*told, strict=True)]


def decoder(model: nn.Module) -> Any:
    """The stack with ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``, also inside a PEFT wrapper."""
    family_of(model)
    get_decoder: Any = model.get_decoder
    return get_decoder()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, in order."""
    layers: nn.ModuleList = decoder(model).layers
    return layers


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


def linear_head(model: nn.Module) -> Tensor | None:
    """The weight [V, d] with which the model's logits are ``hidden @ weight.T``; None where they are more than that.

    The model itself is asked, on two random states: a soft-cap, a bias, a factor or a hook shows, whatever its name.
    """
    get_head: Any = model.get_output_embeddings
    head = get_head()
    if type(head) is not nn.Linear:
        return None
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 2, hidden_size(model), generator=generator, dtype=torch.float32, device="cpu")
    state = state.to(head.weight)
    dtype = head.weight.dtype
    # In training, gains are float32 beside a head of half precision.
    mixed = torch.autocast(state.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    with torch.no_grad(), mixed:
        view: Any = suffix_model(cast(PreTrainedModel, model), num_layers(model))
        logits = view(inputs_embeds=state, use_cache=False).logits
        plain = decoder(model).norm(state) @ head.weight.T
    rounding = 8 * torch.finfo(plain.dtype).eps * plain.abs().max()
    return head.weight if bool((logits - plain).abs().max() <= rounding) else None


def rms_norms(model: nn.Module, start: int) -> list[nn.Module]:
    """The RMSNorms in the layers from ``start`` on, and the final norm."""
    places = [*decoder_layers(model)[start:], decoder(model).norm]
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


def partial_decoder(model: nn.Module, start: int, end: int, *, embed: bool = False, norm: bool = False) -> nn.Module:
    """A view of the decoder that runs only the layers ``[start, end)``.

    It shares every parameter with ``model``, changes nothing in it, and copies no tensor. Call it as
    ``view(inputs_embeds=h, use_cache=False).last_hidden_state`` with h ``[batch, tokens, d]``, the stream entering
    layer ``start`` (or with ``input_ids=`` where ``embed``); ``attention_mask`` and ``position_ids`` are as in the
    whole decoder. With ``norm=False`` the final norm is left out: the result is the stream entering layer ``end``.
    ``partial_decoder(m, 0, s, embed=True)`` followed by ``partial_decoder(m, s, L, norm=True)`` equals the whole
    decoder bit for bit.

    The view has no key/value cache (its layers keep their numbers) and is made for the attention implementation the
    model has now.

    Raises:
        InputError: not ``0 <= start <= end <= L``.
    """
    stack = decoder(model)
    layers = decoder_layers(model)
    if not 0 <= start <= end <= len(layers):
        raise InputError(f"layers {start}:{end} are not in this model: it has layers 0:{len(layers)}")
    config = _config_for_layers(stack.config, range(start, end))
    config.use_cache = False
    view: PreTrainedModel = shallow_copy(stack)
    bind(view, Replacements([(stack, view)], gone=[] if stack is model else [model]), "the decoder")
    view.config = config
    view._modules["layers"] = nn.ModuleList(layers[start:end])
    if not embed:
        view._modules["embed_tokens"] = None
    if not norm:
        view._modules["norm"] = nn.Identity()
    return view


def suffix_model(model: PreTrainedModel, start: int) -> PreTrainedModel:
    """A view of the causal LM that runs only the layers from ``start`` on, the final norm and the head.

    Call it as ``view(inputs_embeds=h, use_cache=False).logits`` with h ``[batch, tokens, d]``, the stream entering
    layer ``start``; everything else is as in `partial_decoder`. ``start = L`` is the final norm and the head alone.
    """
    view = shallow_copy(model)
    part = partial_decoder(model, start, num_layers(model), norm=True)
    bind(view, Replacements([(model, view), (decoder(model), part)]), "the model")
    name = next(name for name, child in model._modules.items() if child is decoder(model))
    view._modules[name] = part
    return view


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate moves the model's weights, or what flows between them, about (``device_map``)."""
    return any(accelerate_hook(module) is not None for module in model.modules())


def keep_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A model of the same class with only the layers ``keep``, in their order.

    Layers are renumbered, every per-layer entry of the (copied) config follows, the key/value cache has one slot per
    kept layer. Parameters are shared with ``model``; nothing in it changes. A patch belongs to the layer whose input
    (or, behind the last layer, output) it acts on: it stays with a kept layer and goes with a removed one
    (``patched.carried_patches`` returns those worth keeping).

    Raises:
        InputError: ``keep`` is empty, not strictly increasing or out of range; the model is quantised, spread over
            several devices, or wrapped.
    """
    count = num_layers(model)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise InputError(f"layers to keep must be increasing numbers from 0 to {count - 1}, at least one: got {kept}")
    return rebuild(model, type(model), _config_for_layers(model.config, kept), kept)


def rebuild(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config: PretrainedConfig, kept: Sequence[int]
) -> PreTrainedModel:
    """``model_class(config)`` around the modules of ``model``: layer ``i`` of the result is layer ``kept[i]`` there.

    Whatever a class derives from its config (layer numbers, windows, masks) is derived anew; the leaves (projections,
    norms, embeddings, rotary tables, patches) are shallow copies that share their parameters with ``model``. Hooks and
    methods that were put on its modules go along, bound to the copies. A module may be of another class than
    ``model_class`` builds (a fused norm, say) where the model computes what it would with the built class, with which
    a saved checkpoint is read.

    Raises:
        InputError: the model is wrapped (PEFT), quantised, or spread over several devices; it has other parts or
            weights than ``model_class`` builds, or computes something else; something that holds it, such as a closure
            put in the place of a ``forward``, cannot be bound to another model.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a {type(model).__name__} cannot be cut: merge or unload the wrapper first")
    _check_weights(model)
    twin = _built(model_class, config)
    pairs = _paired(model, twin, kept)
    if not all(pair.same_class for pair in pairs):
        _check_computes_as_built(model, _built(model_class, config), kept)
    copies = [(pair, shared_copy(pair.old) if pair.is_leaf else pair.new) for pair in pairs]
    for pair, clone in copies:
        if pair.is_leaf:
            _replace(twin, pair.path, clone)
        else:
            carry_over(pair)
    replacements = Replacements(
        [(pair.old, clone) for pair, clone in copies],
        gone=[*model.modules(), *model.parameters()],
        configs=[(one.config, config) for one in (model, decoder(model))],
    )
    for pair, clone in copies:
        replacements.prefer(pair.old, clone)
        bind(clone, replacements, pair.name)
    twin.train(model.training)
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def _check_weights(model: PreTrainedModel) -> None:
    """InputError unless all weights are plain floating tensors in one place."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError("a quantised model cannot be cut: cut the full-precision model, then quantise the result")
    if is_dispatched(model):
        raise InputError("a model dispatched by accelerate cannot be cut: load it on one device, without offloading")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.element_size() < 2:
            raise InputError(
                f"{name} is a {type(parameter).__name__} of {parameter.dtype}, quantised or sharded: cut the model in "
                "full precision and on one device"
            )


def _built(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def _paired(model: PreTrainedModel, twin: PreTrainedModel, kept: Sequence[int]) -> list[Pair]:
    """Every module of the twin with the one of ``model`` that it stands for, parents first; InputError where they have
    other parts or weights."""
    # With all the names of a module that stands in several places.
    sources = dict(model.named_modules(remove_duplicate=False))
    layers = ".".join(filter(None, [_path_of(model, decoder(model)), "layers"]))
    pairs = []
    for path, module in twin.named_modules(remove_duplicate=False):
        name = _source_path(path, layers, kept)
        in_layer = name.startswith(layers + ".")
        pair = Pair(path, name or "the model", module, sources[name], is_list=name == layers, in_layer=in_layer)
        check_same_structure(pair)
        pairs.append(pair)
    return pairs


@torch.no_grad()
def _check_computes_as_built(model: PreTrainedModel, built: PreTrainedModel, kept: Sequence[int]) -> None:
    """InputError unless ``model``, with modules of other classes in it, computes what ``built`` does with its weights.

    On a few random rows, part by part: the embedding and the final norm, each layer, the head.
    """
    pairs = _paired(model, built, kept)
    other = next(pair for pair in pairs if not pair.same_class)
    refused = InputError(
        f"{other.name} is a {type(other.old).__name__} in the place of a {type(other.new).__name__} and computes "
        "something else, or cannot be compared: undo what changed the model first"
    )
    for pair in pairs:
        if pair.old._buffers.keys() != pair.new._buffers.keys():
            raise refused
        share_tensors(pair)
    modes = {module: module.training for module in model.modules()}
    try:
        outputs = zip(_part_outputs(model.eval(), kept), _part_outputs(built.eval(), range(len(kept))), strict=True)
        alike = all(_alike(*pair) for pair in outputs)
    except Exception as error:
        # A class that was not made for this place fails in its own way.
        raise refused from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not alike:
        raise refused


def _part_outputs(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[Tensor]:
    weight = decoder(model).embed_tokens.weight
    generator, count = torch.Generator().manual_seed(0), num_layers(model)
    # Small beside what a layer adds to it, so that this is what is compared.
    rows = 0.02 * torch.randn(1, 8, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(weight)
    ids = torch.arange(8, device=weight.device)[None] % len(weight)
    yield partial_decoder(model, count, count, embed=True, norm=True)(input_ids=ids, use_cache=False).last_hidden_state
    for layer in layers:
        yield partial_decoder(model, layer, layer + 1)(inputs_embeds=rows, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    if head is not None:
        yield head(rows)


def _alike(one: Tensor, other: Tensor) -> bool:
    tolerance = 8 * torch.finfo(other.dtype).eps + 1e-5
    return float((one - other).double().norm()) <= tolerance * float(other.double().norm())


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, candidate in model.named_modules() if candidate is module)


def _source_path(path: str, layer_path: str, kept: Sequence[int]) -> str:
    if not path.startswith(layer_path + "."):
        return path
    index, _, rest = path.removeprefix(layer_path + ".").partition(".")
    return ".".join(filter(None, [layer_path, str(kept[int(index)]), rest]))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _config_for_layers(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy of the config for a model of the layers ``kept`` of this one."""
    count = config.num_hidden_layers
    sliced = copy.deepcopy(config)
    if len(kept) == count:
        return sliced
    for name in (*family_of(config).per_layer, "linearpatch_merge_tree"):
        entries = getattr(config, name, None)
        if entries is None:
            continue
        if not isinstance(entries, list | tuple) or len(entries) != count:
            raise InputError(f"the config's {name} does not have an entry for each of {count} layers: restore it")
        setattr(sliced, name, [entries[i] for i in kept])
    if getattr(config, "max_window_layers", None) is not None:
        # Qwen: the first `max_window_layers` layers attend to everything.
        sliced.max_window_layers = sum(i < config.max_window_layers for i in kept)
    # Every sixth layer of Gemma 3 is global before a cut; afterwards only `layer_types` tells.
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        vars(sliced).pop(name, None)
    sliced.num_hidden_layers = len(kept)
    joints = (getattr(config, "linearpatch", None) or {}).get("joints")
    if joints:
        sliced.linearpatch["joints"] = _joints_of_layers(joints, kept, count)
    return sliced


def _joints_of_layers(joints: dict[str, object], kept: Sequence[int], count: int) -> dict[str, object]:
    follows = {str(old): str(new) for new, old in enumerate(kept)}
    if kept and kept[-1] == count - 1:
        follows[str(count)] = str(len(kept))
    return {follows[joint]: patch for joint, patch in joints.items() if joint in follows}
