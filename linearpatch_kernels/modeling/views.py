"""Parts of a model that run by themselves, on its own parameters: some layers, or what is behind them.

A part runs the decoder's own code over a list of as many layers, of which those outside the part are passed by. So
masks, rotary tables and what else a layer is handed for its place are what the whole decoder hands it. The first layer
of the part takes the stream that is given in the place of what the decoder made of it (which may have scaled it, or
added positions), and behind the last one the run may stop: no name of a norm or an embedding need be known.

Layers that take more than the stream from in front (what their tokens are, keys and values of an earlier layer) do not
run by themselves. A model with such layers runs from its tokens on, with some layers passed by (`bypassing`).
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from linearpatch_kernels.modeling.stream import LayerCall, difference, rounding, some_tokens, stream_in, traced
from linearpatch_kernels.torch_state import eval_mode

# The type of what a layer returns, and what may stand behind the stream in it.
_Form = tuple[type, tuple[Any, ...]]


@dataclass(frozen=True)
class _Handing:
    """How layers hand the stream on, and why they do not run from the middle on (empty where they do)."""

    form: _Form
    needs: str = ""


# Of the lists of layers that were tried.
_FOUND: weakref.WeakKeyDictionary[nn.ModuleList, _Handing] = weakref.WeakKeyDictionary()
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
        InputError: not ``0 <= start <= end <= L``, a decoder that does not hand one stream from layer to layer, or
            layers without those in front of them that need more of these than the stream (`runs_from_a_layer`).
    """
    count = num_layers(model)
    if not 0 <= start <= end <= count:
        raise InputError(f"layers {start}:{end} are not in this model: it has layers 0:{count}")
    handing = _handing(model)
    if handing.needs and not embed and start < end:
        raise InputError(f"models of type {family_of(model).model_type!r} do not run from a layer on: {handing.needs}")
    return _part(model, start, end, embed=embed, norm=norm, handing=handing)


def runs_from_a_layer(model: nn.Module) -> bool:
    """Whether the layers run on the stream alone, so that a part of the model may start at any of them."""
    return not _handing(model).needs


def _part(model: nn.Module, start: int, end: int, *, embed: bool, norm: bool, handing: _Handing) -> nn.Module:
    stack, layers = decoder(model), decoder_layers(model)
    view: PreTrainedModel = _copy(stack)
    bind(view, Replacements([(stack, view)], gone=[] if stack is model else [model]), "the decoder")
    view.config = copy.deepcopy(stack.config)
    view.config.use_cache = False
    entries: list[nn.Module] = [
        layer if start <= index < end else _Passed(layer, handing.form) for index, layer in enumerate(layers)
    ]
    if not norm:
        entries[max(end, 1) - 1] = _Last(entries[max(end, 1) - 1])
    first: _First | None = None
    if not embed:
        place = min(start, len(entries) - 1)
        entries[place] = first = _First(entries[place])
    if not embed and not handing.needs:
        table = embedding(model)
        view._modules.update({name: None for name, child in view._modules.items() if child is table})
    view._modules[layer_list(stack)] = nn.ModuleList(entries)
    return _Part(view, first, takes_ids=bool(handing.needs))


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
    """In the list of a view's layers in the place of one, whose attributes it shows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._shown = (layer,)
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        for shown in vars(self).get("_shown", ()):
            return getattr(shown, name)
        raise AttributeError(name)


class _Running(_Place):
    """The layer, and something beside it being run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self._modules["layer"] = layer

    @property
    def layer(self) -> Any:
        return self._modules["layer"]


class _First(_Running):
    """The layer at which a given stream enters."""

    given: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.layer(self.given, *args[1:], **kwargs)
        return self.layer(**{**kwargs, "hidden_states": self.given})


class _Last(_Running):
    """The layer behind which the run stops."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(stream_in(self.layer(*args, **kwargs)))


class _Passed(_Place):
    """A layer that is passed by: the stream that enters it comes out, in a tuple with more where the layer's does.

    Args:
        through: a map that the stream goes through instead.
    """

    def __init__(self, layer: nn.Module, form: _Form, through: nn.Module | None = None) -> None:
        super().__init__(layer)
        self._kind, self._rest = form
        self._modules["through"] = through

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        through = self._modules["through"]
        stream = stream if through is None else through(stream)
        return self._kind((stream, *self._rest)) if issubclass(self._kind, tuple | list) else stream


class _Part(nn.Module):
    """A decoder with a list of its own, called like the decoder.

    Args:
        takes_ids: the decoder makes more of tokens than the stream; where no layer runs on it, any tokens will do.
    """

    def __init__(self, stack: nn.Module, first: _First | None, *, takes_ids: bool) -> None:
        super().__init__()
        self.stack = stack
        self.training = stack.training
        # It is a part of the stack.
        self._first = (first,)
        self.takes_ids = takes_ids

    @property
    def first(self) -> _First | None:
        return self._first[0]

    def __getattr__(self, name: str) -> Any:
        stack = vars(self).get("_modules", {}).get("stack")
        return stack if name == "stack" or stack is None else getattr(stack, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = kwargs.get("inputs_embeds")
        # Some causal LMs hand their decoder the ids that they do not have by position.
        first = self.first
        if first is not None and (stream is None or any(arg is not None for arg in args)):
            raise TypeError("a part that begins at a layer is given the stream there, as inputs_embeds")
        try:
            if first is not None and stream is not None:
                first.given = stream
                if self.takes_ids:
                    ids = torch.zeros(stream.shape[:2], dtype=torch.int64, device=stream.device)
                    kwargs = {**kwargs, "inputs_embeds": None, "input_ids": ids}
            return self.stack(*args, **kwargs)
        except _Reached as reached:
            return BaseModelOutputWithPast(last_hidden_state=reached.stream)
        finally:
            if first is not None:
                first.given = None


def _handing(model: nn.Module) -> _Handing:
    """How the layers hand the stream on.

    Raises:
        InputError: they hand on something else. (Of the recorded families this is known, and the others are tried on a
            few tokens.)
    """
    if family_of(model).is_recorded:
        return _Handing((Tensor, ()))
    layers = decoder_layers(model)
    if layers not in _FOUND:
        _FOUND[layers] = _tried(model)
    return _FOUND[layers]


@torch.no_grad()
def _tried(model: nn.Module) -> _Handing:
    ids = some_tokens(model, _TRIED_TOKENS)
    with eval_mode(model):
        calls = traced(model, ids)
        depth, (kind, rest) = len(calls), calls[-1].form
        form = (kind, (None,) * len(rest))
        alone = _Handing(form)
        needs = [_difference_from(model, start, calls, alone) for start in sorted({0, depth // 2, depth - 1})]
        if not any(needs):
            return alone
        more = _Handing(form, next(filter(None, needs)))
        whole = _part(model, 0, depth, embed=True, norm=False, handing=more)(input_ids=ids, use_cache=False)
        normed = _part(model, depth, depth, embed=False, norm=True, handing=more)
        behind = normed(inputs_embeds=calls[-1].result, use_cache=False).last_hidden_state
        wanted = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    if max(difference(whole.last_hidden_state, calls[-1].result), difference(behind, wanted)) > rounding(behind):
        raise InputError(
            f"models of type {family_of(model).model_type!r} cannot be calibrated or cut: {more.needs}, and the whole "
            "of them runs otherwise in parts"
        )
    return more


def _difference_from(model: nn.Module, start: int, calls: Sequence[LayerCall], handing: _Handing) -> str:
    """Why the layers from ``start`` on do not make of the stream there what they did in the whole model, or nothing."""
    try:
        part = _part(model, start, len(calls), embed=False, norm=False, handing=handing)
        found = part(inputs_embeds=calls[start].stream, use_cache=False).last_hidden_state
    except InputError:
        raise
    except Exception as error:
        # Each decoder that wants more than the stream says so in its own way.
        return f"their layers do not run on the stream alone ({said(error)})"
    if difference(found, calls[-1].result) <= rounding(found):
        return ""
    return f"their layers run otherwise from layer {start} on than in the whole model"


def suffix_model(model: PreTrainedModel, start: int) -> PreTrainedModel:
    """A view of the causal LM that runs only the layers from ``start`` on, the final norm and the head.

    Call it as ``view(inputs_embeds=h, use_cache=False).logits`` with h ``[batch, tokens, d]``, the stream entering
    layer ``start``; everything else is as in `partial_decoder`. ``start = L`` is the final norm and the head alone.
    """
    part = cast(_Part, partial_decoder(model, start, num_layers(model), norm=True))
    if not part.takes_ids:
        return _around(model, part)
    # What stands around the decoder may have the tokens' part in what it needs.
    return cast(PreTrainedModel, _Part(_around(model, part.stack), part.first, takes_ids=True))


def bypassing(
    model: PreTrainedModel, layers: Mapping[int, _Form] | Sequence[int], through: Mapping[int, nn.Module] | None = None
) -> PreTrainedModel:
    """A view of the causal LM, called with token ids, that passes layers by.

    Args:
        layers: which, and what each would return (`stream.LayerCall.form`), where that is known of the tokens.
        through: of a layer that is passed by, a map that the stream goes through there.
    """
    stack, maps = decoder(model), through or {}
    forms = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, _handing(model).form)
    view = _copy(stack)
    bind(view, Replacements([(stack, view)], gone=[model]), "the decoder")
    view._modules[layer_list(stack)] = nn.ModuleList(
        [
            _Passed(layer, forms[index], maps.get(index)) if index in forms else layer
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
