"""Which parameters of a student are trained, and how they are held while they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.settings import TRAIN
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.families import (
    decoder_layers,
    hidden_size,
    linear_layers,
    merge_tree,
    norm_gains,
    num_layers,
)
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.modeling.views import partial_decoder

# Relative to the learning rate: gains and scales are near 1 and each of them moves a whole channel.
_RATES = {"matrix": 1.0, "vector": 10.0}
# Where the matrices around a gain are trained whole, they do that themselves.
_RATES_OF_WHOLE_LAYERS = {"matrix": 1.0, "vector": 1.0}


@dataclasses.dataclass
class Trainable:
    """The parameters in training, by name, and what undoes the preparations.

    Attributes:
        parameters: float32, in the order of the model.
        dtype: what they were, and become again.
        rates: of matrices and of vectors, relative to the learning rate.
        before: the student's parameters as the caller gave them, by name, and whether each was to be trained.
        wrapper: the PEFT model around the student, None without LoRA.
    """

    student: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    rates: Mapping[str, float]
    before: Mapping[str, tuple[nn.Parameter, bool]] = dataclasses.field(default_factory=dict)
    wrapper: Any = None

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, each with its ``rate`` relative to the learning rate."""
        kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": []}
        for parameter in self.parameters.values():
            kinds["matrix" if parameter.dim() > 1 else "vector"].append(parameter)
        return [{"params": found, "rate": self.rates[kind]} for kind, found in kinds.items() if found]

    def release(self) -> None:
        """Merge LoRA into the weights, give the parameters back their dtype, and freeze what was frozen before."""
        if self.wrapper is not None:
            self.wrapper.merge_and_unload()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(self.dtype)
            parameter.grad = None
        # Also those whose place was taken: another model may hold them.
        for parameter, trained in self.before.values():
            parameter.requires_grad_(trained)
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name not in self.before or self.before[name][1])


def check_trainable(student: PreTrainedModel, begin: int, train: str, *, lora_rank: int = 1) -> list[str]:
    """The names of the student's own parameters that ``train`` is about; all of them lie from depth ``begin`` on.

    Raises:
        InputError: none, an unknown name, LoRA without PEFT or of a rank beyond the student's width, weights that
            autograd cannot work with, or layers that do not run from ``begin`` on.
    """
    if train not in TRAIN:
        raise InputError(f"`train` {train} is not known: choose one of {', '.join(TRAIN)}")
    if train == "lora":
        _need_peft()
        if lora_rank > hidden_size(student):
            raise InputError(f"`lora_rank` {lora_rank} is more than the model's width {hidden_size(student)}")
    partial_decoder(student, begin, num_layers(student))
    joints = [patch for joint, patch in sorted(patches(student).items()) if joint >= begin]
    chosen = {id(parameter) for patch in joints for parameter in patch.parameters()}
    if train in ("patch+norms", "lora", "suffix"):
        chosen |= {id(parameter) for parameter in norm_gains(student, begin).values()}
    if train == "suffix":
        chosen |= {id(parameter) for layer in decoder_layers(student)[begin:] for parameter in layer.parameters()}
    if train == "merged":
        nodes = enumerate(merge_tree(student))
        merged = [layer for layer, node in nodes if isinstance(node, list) and layer >= begin]
        if not merged:
            raise InputError("there is no merged layer to train from the joint on: give another `train`")
        chosen |= {id(parameter) for layer in merged for parameter in decoder_layers(student)[layer].parameters()}
    names = [name for name, parameter in student.named_parameters() if id(parameter) in chosen]
    if not names:
        raise InputError("there is no patch to train: make one with `patch` dense, or train more with `train`")
    if any(parameter.is_inference() for parameter in student.parameters()):
        raise InputError("weights made in torch.inference_mode cannot be trained: load the model outside of it")
    return names


def prepare(student: PreTrainedModel, begin: int, train: str, *, lora_rank: int, seed: int) -> Trainable:
    """Freeze the student but for what ``train`` names behind depth ``begin``.

    A trained parameter becomes a float32 one of the student's own: a model that shares it keeps the old.

    Raises:
        InputError: what `check_trainable` raises.
    """
    names = check_trainable(student, begin, train, lora_rank=lora_rank)
    before = {name: (parameter, parameter.requires_grad) for name, parameter in student.named_parameters()}
    dtype = student.get_input_embeddings().weight.dtype
    wrapper = None
    if train == "lora":
        targets = linear_layers(student, begin)
        for name in targets:
            _own(student, f"{name}.weight", dtype)
        wrapper = _with_lora(student, targets, lora_rank, seed)
        # What LoRA adds is trained as well, and the names of what it wraps have changed, but not those of the patches.
        adapters = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        names += [name for name in adapters if name not in names]
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for name in names:
        _own(student, name, torch.float32).requires_grad_(True)
    trained = dict(student.named_parameters())
    rates = _RATES_OF_WHOLE_LAYERS if train == "suffix" else _RATES
    return Trainable(student, {name: trained[name] for name in names}, dtype, rates, before, wrapper)


def _own(student: nn.Module, name: str, dtype: torch.dtype) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module = student.get_submodule(path)
    own = nn.Parameter(getattr(module, leaf).detach().to(dtype, copy=True))
    setattr(module, leaf, own)
    return own


def _with_lora(student: PreTrainedModel, targets: list[str], rank: int, seed: int) -> Any:
    peft = _need_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(student, config)


def _need_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "`train` lora needs peft, which is not installed: pip install 'linearpatch-kernels[train]'"
        ) from error
    return peft
