"""Running a model, or a part of it, on windows of tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import decoder_layers, num_layers, text_config
from linearpatch_kernels.modeling.views import partial_decoder, suffix_model
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.torch_internals import accelerate_hook
from linearpatch_kernels.torch_state import evaluation_mode

#: Called with what is being done, how many windows are done, and how many there are.
Progress = Callable[[str, int, int], None]
#: A Transformers model, or anything that maps token ids [B, T] to logits [B, T, V] (or to an object with `.logits`).
Model = nn.Module | Callable[[Tensor], Any]
Start = int | Literal["tokens"]
End = int | Literal["hidden", "logits"]


def check_windows(model: Any, windows: Tensor) -> None:
    """Raise InputError where windows are malformed, or hold ids or positions that the model does not have.

    The model's ``config`` tells, if there is one: what has just that will do.
    """
    if not isinstance(windows, Tensor):
        raise InputError(
            f"windows must be a tensor of token ids [count >= 1, length >= 2], not {type(windows).__name__}"
        )
    whole = not windows.is_floating_point() and not windows.is_complex() and windows.dtype != torch.bool
    if windows.dim() != 2 or not whole or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"windows must be token ids [count >= 1, length >= 2], not {windows.dtype} {[*windows.shape]}")
    if int(windows.min()) < 0:
        raise InputError(f"windows must be token ids, and {int(windows.min())} is none")
    config = text_config(getattr(model, "config", None))
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise InputError(
            f"the text has token id {int(windows.max())} but the model's vocabulary ends at {vocabulary - 1}: "
            "the tokenizer does not belong to this model"
        )
    positions = getattr(config, "max_position_embeddings", None)
    # XLNet's config says -1.
    if positions is not None and 0 < positions < windows.shape[1]:
        raise InputError(f"windows of {windows.shape[1]} tokens exceed the model's {positions} positions: shorten them")


def batches(
    windows: Tensor, batch_size: int, description: str, progress: Progress | None
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first window, windows ``[<= batch_size, T]``), reporting each batch once it has been worked on."""
    check_batch_size(batch_size)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        yield start, batch
        if progress:
            progress(description, start + len(batch), len(windows))


def check_batch_size(batch_size: int) -> None:
    """InputError for a number of windows per forward pass that no tensor can be split into."""
    if not 1 <= batch_size < 1 << 31:
        raise InputError(f"the batch size must be a number from 1 to {(1 << 31) - 1}, not {batch_size}")


def model_logits(model: Model, windows: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of token ids ``[B, T]``, without a key/value cache and without gradients."""
    # Not inference_mode: what a module caches on its first call must stay usable in training.
    with torch.no_grad():
        if isinstance(model, nn.Module):
            windows = windows.to(model_device(model))
            output = model(input_ids=windows, use_cache=False) if hasattr(model, "config") else model(windows)
        else:
            output = model(windows)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def model_device(model: nn.Module) -> torch.device:
    """Where the model's input belongs: the device of its first parameter (its embedding), or the one that accelerate
    brings it to for a call; the CPU where there is none."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type == "meta":
        hooks = map(accelerate_hook, model.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), "meta"))
    return torch.device("cpu") if parameter is None else parameter.device


@dataclasses.dataclass(frozen=True)
class Run:
    """How passes over windows are made: it travels from whoever asks for a result down to every pass.

    Attributes:
        batch_size: windows per forward pass.
        processes: they share the work out among them, and all of them get the whole result; by default this one alone.
        progress: called after every batch.
    """

    batch_size: int = 1
    processes: Processes = dataclasses.field(default_factory=Processes)
    progress: Progress | None = None

    def batches(self, windows: Tensor, description: str) -> Iterator[tuple[int, Tensor]]:
        """`batches` of this size, with a report of each."""
        return batches(windows, self.batch_size, description, self.progress)

    def report(self, description: str, done: int, total: int) -> None:
        """Tell what is being done, how many windows are done, and how many there are."""
        if self.progress is not None:
            self.progress(description, done, total)


PLAIN = Run()
"""One window at a time, in this process alone, without reports."""


class PartialRun(nn.Module):
    """A part of a decoder as one map: from the tokens or the stream at a depth, to another depth or to the logits.

    ``PartialRun(model, "tokens", 4)`` maps token ids [B, T] to the residual stream [B, T, d] at depth 4,
    ``PartialRun(model, 4, 9)`` that to the stream at depth 9, and ``PartialRun(model, 9, "logits")`` to the logits
    [B, T, V]; ``"hidden"`` is what the head is applied to, the stream behind the final norm. Parts that follow on each
    other make the whole model, bit for bit: masks and position embeddings come from Transformers' own code.

    Every parameter is shared with the model, in which nothing changes, and has gradients where it is trained. The
    layers that run are those that the model has now; they have no key/value cache. Parts with other maps between them,
    such as patches, make an `nn.Sequential`.

    Args:
        model: a causal LM of a supported family (or its decoder, where the logits are not asked for).
        start: ``"tokens"``, or the depth i of the stream that is given: what enters layer i, before a patch there.
        end: the depth of the stream that comes out (L: behind the last layer), or ``"hidden"`` or ``"logits"``.

    Raises:
        InputError: not ``0 <= start <= end <= L``.
    """

    def __init__(self, model: nn.Module, start: Start, end: End) -> None:
        super().__init__()
        self._embeds, self._to_logits = start == "tokens", end == "logits"
        first = 0 if start == "tokens" else start
        last = end if isinstance(end, int) else num_layers(model)
        if end != "logits":
            view = partial_decoder(model, first, last, embed=self._embeds, norm=end == "hidden")
        else:
            view = model if self._embeds else suffix_model(cast(PreTrainedModel, model), first)
        self.view, self.training = view, view.training
        # The depth of a stream that comes out, and of those on the way the layers that they enter.
        self._end = end
        self._entered = dict(zip(range(first, last), decoder_layers(model)[first:last], strict=True))

    def forward(self, given: Tensor) -> Tensor:
        """Token ids [B, T], which are brought to the model's device, or the stream [B, T, d], which is where it is."""
        if self._embeds:
            output = self.view(input_ids=given.to(model_device(self.view)), use_cache=False)
        else:
            output = self.view(inputs_embeds=given, use_cache=False)
        result: Tensor = output.logits if self._to_logits else output.last_hidden_state
        return result

    def states(self, given: Tensor, depths: Iterable[int]) -> dict[int, Tensor]:
        """The stream [B, T, d] at each of ``depths``, from the first layer's to ``end``, in one run."""
        found: dict[int, Tensor] = {}
        on_the_way = [depth for depth in depths if depth != self._end]
        with entering((self._entered[depth], functools.partial(found.__setitem__, depth)) for depth in on_the_way):
            result = self(given)
        if isinstance(self._end, int):
            found[self._end] = result
        return found


def residual_stream(model: nn.Module, ids: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream [B, T, d] at each of ``depths`` for token ids [B, T]; no layer behind the last one is run."""
    return PartialRun(model, "tokens", max(depths)).states(ids, depths)


class Stream:
    """A model's residual stream over windows [W, T], at one depth after the other: ``states``, W tensors [T, d]."""

    def __init__(self, windows: Tensor) -> None:
        self.states: list[Tensor] = list(windows)
        self._depth: Start = "tokens"

    @property
    def depth(self) -> int:
        """Where it is; 0 also before the embedding."""
        return 0 if self._depth == "tokens" else self._depth

    def copy(self) -> Stream:
        """Another one at the same place, which shares its states: going on replaces them."""
        twin = copy.copy(self)
        twin.states = list(self.states)
        return twin

    @torch.no_grad()
    def advance(self, model: PreTrainedModel, depth: int) -> None:
        """Run the layers up to ``depth``; ``model`` may differ from that of the last call from the depth reached on."""
        if self._depth == depth:
            return
        run = PartialRun(model, self._depth, depth)
        with evaluation_mode(model):
            # One by one in the same list: the stream is held once.
            for index, state in enumerate(self.states):
                self.states[index] = run(state.unsqueeze(0))[0]
        self._depth = depth

    @torch.no_grad()
    def hidden(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """What the model's head is applied to, [T, d] per window; the stream stays where it is."""
        run = PartialRun(model, self._depth, "hidden")
        with evaluation_mode(model):
            for state in self.states:
                yield run(state.unsqueeze(0))[0]


@contextmanager
def entering(modules: Iterable[tuple[nn.Module, Callable[[Tensor], object]]]) -> Iterator[None]:
    """While it is open, each module's function is called with what enters it, the hidden state."""
    with ExitStack() as hooks:
        for module, function in modules:

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tell: Any = function) -> None:
                tell(args[0] if args else kwargs["hidden_states"])

            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def leaving(modules: Iterable[tuple[nn.Module, Callable[[Tensor], object]]]) -> Iterator[None]:
    """While it is open, each module's function is called with what leaves it."""
    with ExitStack() as hooks:
        for module, function in modules:

            def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor, tell: Any = function) -> None:
                tell(output)

            hooks.callback(module.register_forward_hook(hook).remove)
        yield
