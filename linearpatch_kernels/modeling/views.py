"""Parts of a model that run by themselves, on its own parameters: some layers, or what is behind them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.copies import Replacements, bind, shallow_copy
from linearpatch_kernels.modeling.families import decoder, decoder_layers, family_of, hidden_size, num_layers


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
    config = config_for_layers(stack.config, range(start, end))
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


def config_for_layers(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
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
