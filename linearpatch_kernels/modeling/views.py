"""Parts of a model that run by themselves, on its own parameters: some layers, or what is behind them.

A part runs the decoder's own code over a shorter list of layers, so masks, rotary tables and what else the layers are
handed come from there. In the list the first layer takes the stream that is given in the place of what the decoder
made of it (which may have scaled it, or added positions), and behind the last one the run may stop: no name of a norm
or an embedding need be known.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import said
from linearpatch_kernels.modeling.copies import ModuleT, Replacements, bind, shallow_copy
from linearpatch_kernels.modeling.families import (
    decoder,
    decoder_layers,
    embedding,
    family_of,
    hidden_size,
    layer_list,
    num_layers,
)
from linearpatch_kernels.modeling.layer_configs import config_for_layers
from linearpatch_kernels.modeling.stream import LayerCall, difference, rounding, some_tokens, stream_in, traced
from linearpatch_kernels.torch_state import eval_mode

# The type of what a layer returns, and what may stand behind the stream in it.
_Form = tuple[type, tuple[Any, ...]]
# The lists of layers that were found to hand the stream on, and how.
_FOUND: weakref.WeakKeyDictionary[nn.ModuleList, _Form] = weakref.WeakKeyDictionary()
_TRIED_TOKENS = 5


def partial_decoder(model: nn.Module, start: int, end: int, *, embed: bool = False, norm: bool = False) -> nn.Module:
    """A view of the decoder that runs only the layers ``[start, end)``.

    It shares every parameter with ``model``, changes nothing in it, and copies no tensor. Call it as
    ``view(inputs_embeds=h, use_cache=False).last_hidden_state`` with h ``[batch, tokens, d]``, the stream entering
    layer ``start`` (or with ``input_ids=`` where ``embed``); ``attention_mask`` and ``position_ids`` are as in the
    whole decoder. With ``norm=False`` it stops before the final norm: the result is the stream entering layer ``end``.
    ``partial_decoder(m, 0, s, embed=True)`` followed by ``partial_decoder(m, s, L, norm=True)`` equals the whole
    decoder bit for bit.

    The view has no key/value cache (its layers keep their numbers) and is made for the attention implementation the
    model has now.

    Raises:
        InputError: not ``0 <= start <= end <= L``, or a decoder that does not hand one stream from layer to layer.
    """
    count = num_layers(model)
    if not 0 <= start <= end <= count:
        raise InputError(f"layers {start}:{end} are not in this model: it has layers 0:{count}")
    return _part(model, start, end, embed=embed, norm=norm, form=_form(model))


def _part(model: nn.Module, start: int, end: int, *, embed: bool, norm: bool, form: _Form | None = None) -> nn.Module:
    stack, layers = decoder(model), decoder_layers(model)
    # Where no layer runs, one stands for its place alone.
    kept = range(start, end) if start < end else [min(start, len(layers) - 1)]
    config = config_for_layers(stack.config, kept)
    config.use_cache = False
    view: PreTrainedModel = _copy(stack)
    bind(view, Replacements([(stack, view)], gone=[] if stack is model else [model]), "the decoder")
    view.config = config
    entries: list[nn.Module] = [layers[i] for i in kept]
    if start == end:
        entries = [_Passed(entries[0], *(form or ()))]
    if not norm:
        entries[-1] = _Last(entries[-1])
    if not embed:
        entries[0] = _First(entries[0])
        table = embedding(model)
        view._modules.update({name: None for name, child in view._modules.items() if child is table})
    view._modules[layer_list(stack)] = nn.ModuleList(entries)
    return _Part(view, None if embed else cast(_First, entries[0]))


def _copy(module: ModuleT) -> ModuleT:
    """A shallow copy that is neither saved nor loaded, so that nothing that waits for that need be bound to it."""
    clone = shallow_copy(module)
    hooks = [name for name in vars(clone) if "state_dict" in name and isinstance(vars(clone)[name], dict)]
    vars(clone).update({name: OrderedDict() for name in hooks})
    return clone


class _Reached(Exception):
    """Where a run stops; carries the stream there."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _Place(nn.Module):
    """In the list of a view's layers in the place of one, which does for it what is asked beside being run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        layer = vars(self).get("_modules", {}).get("layer")
        return layer if name == "layer" or layer is None else getattr(layer, name)


class _First(_Place):
    """The layer at which a given stream enters."""

    given: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.layer(self.given, *args[1:], **kwargs)
        return self.layer(**{**kwargs, "hidden_states": self.given})


class _Last(_Place):
    """The layer behind which the run stops."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(stream_in(self.layer(*args, **kwargs)))


class _Passed(_Place):
    """A layer that is passed by: the stream that enters it comes out, in a tuple with more where the layer's does."""

    def __init__(self, layer: nn.Module, kind: type = Tensor, rest: Sequence[Any] = ()) -> None:
        super().__init__(layer)
        self._kind, self._rest = kind, rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return self._kind((stream, *self._rest)) if issubclass(self._kind, tuple | list) else stream


class _Part(nn.Module):
    """A decoder with a list of its own, called like the decoder."""

    def __init__(self, stack: nn.Module, first: _First | None) -> None:
        super().__init__()
        self.stack = stack
        self.training = stack.training
        self._first = [] if first is None else [first]

    def __getattr__(self, name: str) -> Any:
        stack = vars(self).get("_modules", {}).get("stack")
        return stack if name == "stack" or stack is None else getattr(stack, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = kwargs.get("inputs_embeds")
        # Some causal LMs hand their decoder the ids that they do not have by position.
        if self._first and (stream is None or any(arg is not None for arg in args)):
            raise TypeError("a part that begins at a layer is given the stream there, as inputs_embeds")
        try:
            for first in self._first:
                first.given = stream
            return self.stack(*args, **kwargs)
        except _Reached as reached:
            return BaseModelOutputWithPast(last_hidden_state=reached.stream)
        finally:
            for first in self._first:
                first.given = None


def _form(model: nn.Module) -> _Form:
    """How the layers hand the stream on.

    Raises:
        InputError: they hand on something else, or run otherwise from the middle on. (Of the recorded families this is
            known, and the others are tried on a few tokens.)
    """
    if family_of(model).is_recorded:
        return Tensor, ()
    layers = decoder_layers(model)
    if layers not in _FOUND:
        _FOUND[layers] = _tried(model)
    return _FOUND[layers]


@torch.no_grad()
def _tried(model: nn.Module) -> _Form:
    ids = some_tokens(model, _TRIED_TOKENS)
    with eval_mode(model):
        calls = traced(model, ids)
        for start in {0, len(calls) // 2}:
            if not _runs_from(model, start, calls):
                raise InputError(
                    f"models of type {family_of(model).model_type!r} cannot be calibrated or cut: their layers run "
                    f"otherwise from layer {start} on than in the whole model"
                )
    kind, rest = calls[-1].form
    return kind, (None,) * len(rest)


def _runs_from(model: nn.Module, start: int, calls: Sequence[LayerCall]) -> bool:
    """Whether the layers from ``start`` on make of the stream there what they did in the whole model."""
    try:
        part = _part(model, start, len(calls), embed=False, norm=False)
        found = part(inputs_embeds=calls[start].stream, use_cache=False).last_hidden_state
    except InputError:
        raise
    except Exception as error:
        # Each decoder that wants more than the stream says so in its own way.
        raise InputError(
            f"models of type {family_of(model).model_type!r} cannot be calibrated or cut: their layers do not run on "
            f"the stream alone ({said(error)})"
        ) from error
    return difference(found, calls[-1].result) <= rounding(found)


def suffix_model(model: PreTrainedModel, start: int) -> PreTrainedModel:
    """A view of the causal LM that runs only the layers from ``start`` on, the final norm and the head.

    Call it as ``view(inputs_embeds=h, use_cache=False).logits`` with h ``[batch, tokens, d]``, the stream entering
    layer ``start``; everything else is as in `partial_decoder`. ``start = L`` is the final norm and the head alone.
    """
    return _around(model, partial_decoder(model, start, num_layers(model), norm=True))


def bypassing(model: PreTrainedModel, calls: Mapping[int, LayerCall]) -> PreTrainedModel:
    """A view of the causal LM that passes layers by: ``calls`` are theirs on the tokens that it will be given."""
    stack = decoder(model)
    view = _copy(stack)
    bind(view, Replacements([(stack, view)], gone=[model]), "the decoder")
    view._modules[layer_list(stack)] = nn.ModuleList(
        [
            _Passed(layer, *calls[index].form) if index in calls else layer
            for index, layer in enumerate(decoder_layers(model))
        ]
    )
    return _around(model, view)


def _around(model: PreTrainedModel, part: nn.Module) -> PreTrainedModel:
    """A view of the causal LM with a view of its decoder."""
    stack = decoder(model)
    path = next(path for path, module in model.named_modules() if module is stack).split(".")
    # Copies of all that hold it, the innermost first.
    copies: list[tuple[nn.Module, nn.Module]] = [(stack, part)]
    for depth in reversed(range(len(path))):
        holder = model.get_submodule(".".join(path[:depth]))
        clone = _copy(holder)
        clone._modules[path[depth]] = copies[-1][1]
        copies.append((holder, clone))
    for _, clone in copies[1:]:
        bind(clone, Replacements(copies), "the model")
    return cast(PreTrainedModel, copies[-1][1])


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
        normed = partial_decoder(model, num_layers(model), num_layers(model), norm=True)
        plain = normed(inputs_embeds=state, use_cache=False).last_hidden_state @ head.weight.T
    rounding = 8 * torch.finfo(plain.dtype).eps * plain.abs().max()
    return head.weight if bool((logits - plain).abs().max() <= rounding) else None
