"""Models of some of a model's layers, or of another class around the same modules; parameters are shared."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said
from linearpatch_kernels.modeling.copies import (
    CURE,
    Pair,
    Replacements,
    bind,
    carry_over,
    check_same_structure,
    share_tensors,
    shared_copy,
)
from linearpatch_kernels.modeling.families import (
    decoder,
    decoder_layers,
    embedding,
    family_of,
    hidden_size,
    is_dispatched,
    num_layers,
    text_config,
)
from linearpatch_kernels.modeling.layer_configs import config_for_layers
from linearpatch_kernels.modeling.proof import check_cut
from linearpatch_kernels.modeling.views import partial_decoder


def keep_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A model of the same class with only the layers ``keep``, in their order.

    Layers are renumbered, every per-layer entry of the (copied) config follows, the key/value cache has one slot per
    kept layer. Parameters are shared with ``model``; nothing in it changes. A patch belongs to the layer whose input
    (or, behind the last layer, output) it acts on: it stays with a kept layer and goes with a removed one
    (``patched.carried_patches`` returns those worth keeping).

    A model of a family without a record is run on a few tokens, to see whether the result is right (`proof`).

    Raises:
        InputError: ``keep`` is empty, not strictly increasing or out of range; the model is quantised, spread over
            several devices, or wrapped; its config does not tell what the layers that stay are.
    """
    count = num_layers(model)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise InputError(f"layers to keep must be increasing numbers from 0 to {count - 1}, at least one: got {kept}")
    config = config_for_layers(model.config, kept)
    if family_of(model).is_recorded or len(kept) == count:
        return rebuild(model, type(model), config, kept)
    return _proved(model, config, kept)


def _proved(model: PreTrainedModel, config: PretrainedConfig, kept: Sequence[int]) -> PreTrainedModel:
    """What `rebuild` makes, where it does what is asked of it."""
    check_weights(model)
    # Here what was changed in the model shows, and is told as it is.
    _paired(model, _built(type(model), copy.deepcopy(model.config)), range(num_layers(model)))
    try:
        cut, built = rebuild(model, type(model), config, kept), _built(type(model), _written_and_read(config))
        pairs = _paired(model, built, kept)
    except Exception as error:
        # Classes and configs refuse what they cannot be in as many ways as there are.
        raise InputError(
            f"models of type {family_of(model).model_type!r} cannot be cut like this: their config does not tell what "
            f"the layers that stay are{_periods(config)} ({_without_cure(error)})"
        ) from error
    for pair in pairs:
        share_tensors(pair)
    check_cut(model, cut, built, kept, exact=all(pair.same_class for pair in pairs))
    return cut


def _without_cure(error: Exception) -> str:
    """What an error says, without what would help a model that was changed."""
    return str(error).removesuffix(f": {CURE}") if isinstance(error, InputError) else said(error)


def _periods(config: PretrainedConfig) -> str:
    """What a config says of every so many layers, where it cannot name single ones."""
    names = [
        name for name in sorted(vars(text_config(config))) if name.endswith(("_period", "_pattern", "block_types"))
    ]
    return f", as it has a pattern alone ({', '.join(names)}): remove as many as repeat it" if names else ""


def _written_and_read(config: PretrainedConfig) -> PretrainedConfig:
    """The config as a checkpoint has it: some classes derive lists of layers anew when they are read."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        again: PretrainedConfig = type(config).from_pretrained(folder)
    again._attn_implementation = config._attn_implementation
    return again


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
    check_weights(model)
    twin = _built(model_class, config)
    pairs = _paired(model, twin, kept)
    if not all(pair.same_class for pair in pairs):
        _check_computes_as_built(model, _built(model_class, config), kept)
    copies = [(pair, pair.new if pair.is_built else shared_copy(pair.old)) for pair in pairs]
    for pair, clone in copies:
        if clone is not pair.new:
            _replace(twin, pair.path, clone)
        else:
            carry_over(pair)
    replacements = Replacements(
        [(pair.old, clone) for pair, clone in copies],
        gone=[*model.modules(), *model.parameters()],
        configs=[(model.config, config), (decoder(model).config, text_config(config))],
    )
    for pair, clone in copies:
        replacements.prefer(pair.old, clone)
        bind(clone, replacements, pair.name)
    twin.train(model.training)
    if getattr(model, "generation_config", None) is not None:
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin


def check_weights(model: PreTrainedModel) -> None:
    """InputError unless all weights are plain floating tensors in one place: no other model can be cut."""
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
    layers, count = _path_of(model, decoder_layers(model)), num_layers(model)
    recorded = family_of(model).is_recorded
    pairs = []
    for path, module in twin.named_modules(remove_duplicate=False):
        name, layer = _source_path(path, layers, kept), None
        if path.startswith(layers + "."):
            new = int(path.removeprefix(layers + ".").partition(".")[0])
            layer = (kept[new], new)
        # What is found is proved afterwards, and a record says all there is.
        packs = None if layer is not None or recorded else (kept, count)
        pair = Pair(path, name or "the model", module, sources[name], name == layers, layer, packs)
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
    weight = embedding(model).weight
    generator, count = torch.Generator().manual_seed(0), num_layers(model)
    rows = torch.randn(1, 8, hidden_size(model), generator=generator, dtype=torch.float32, device="cpu")
    # Small beside what a layer adds to it, so that this is what is compared.
    rows = (0.02 * rows).to(weight)
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
