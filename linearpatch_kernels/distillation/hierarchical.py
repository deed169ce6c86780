"""Distilling a merged model layer by layer: the hierarchical distillation of CoMe (arXiv 2510.15304).

Every merged layer knows which layers of the dense model it stands for, so its output is drawn towards the dense model's
stream behind the last of them: each group on its own first, if wished (the paper's multi-process form; groups need
nothing of each other), then all groups in one run together with the Top-K KL of the output (its single-process form).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.settings import HierarchySettings, TrainingSettings
from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import (
    Distillation,
    Step,
    SuffixLoss,
    check_same_run,
    distill,
    heldout_losses,
    joint_state,
)
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.notes import Noted, warn
from linearpatch_kernels.files import Entries, left_by_us, read_seal, reading, write_sealed
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import PartialRun, leaving
from linearpatch_kernels.merging.plan import leaves
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import decoder, decoder_layers, merge_tree
from linearpatch_kernels.modeling.patched import patches, present_name
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.span import Span
from linearpatch_kernels.torch_state import own_state

LAYERS = "layers"
"""Name of the streams' error among the losses of a run: the mean over the merged layers."""

_EPSILON = 1e-12
_CURE = "delete it to train its layer again"


@dataclasses.dataclass(frozen=True)
class Group:
    """A merged layer of a student, and the dense model's layers ``span`` that it stands for."""

    layer: int
    span: Span


@dataclasses.dataclass(frozen=True)
class GroupOutcome:
    """How a group's own training went: held-out stream error before and after, the best step, seconds of training."""

    before: float
    after: float
    best_step: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class HierarchicalDistillation:
    """The run of all groups together, and what the groups' own training before it gave (by the student's layer)."""

    together: Distillation
    alone: Mapping[int, GroupOutcome]


def merged_groups(student: PreTrainedModel) -> list[Group]:
    """The merged layers, from the front. InputError where there is none."""
    groups = [
        Group(layer, Span(leaves(node)[0], leaves(node)[-1] + 1))
        for layer, node in enumerate(merge_tree(student))
        if isinstance(node, list)
    ]
    if not groups:
        raise InputError("the model has no merged layers: give one that linearpatch merge wrote")
    return groups


def stream_depths(student: PreTrainedModel, hierarchy: HierarchySettings) -> list[int]:
    """The depths whose states a teacher store must hold for this run."""
    groups = merged_groups(student)
    ends = {group.span.end for group in groups}
    return sorted(ends | {group.span.start for group in groups} if hierarchy.group_steps else ends)


def stream_error(found: Tensor, wanted: Tensor, error: str) -> Tensor:
    """How far states [..., d] are from the teacher's, a float32 scalar; `STREAM_ERRORS` says by which measure.

    ``relative``: ``((x - y)**2).sum(-1).div((y**2).sum(-1)).mean()``; ``mse``: ``((x - y)**2).mean()``.
    """
    wanted = wanted.float()
    squares = (found.float() - wanted).square()
    if error == "mse":
        return squares.mean()
    return (squares.sum(dim=-1) / wanted.square().sum(dim=-1).clamp_min(_EPSILON)).mean()


@own_state()
def distill_merged(
    student: PreTrainedModel,
    store: TeacherStore,
    *,
    training: Sequence[int],
    heldout: Sequence[int],
    settings: TrainingSettings | None = None,
    hierarchy: HierarchySettings | None = None,
    directory: str | Path | None = None,
    checkpoint_seconds: float = 30.0,
    processes: Processes | None = None,
    on_step: Callable[[str, Step], None] | None = None,
    noted: Noted = warn,
) -> HierarchicalDistillation:
    """Train a merged student on the store's windows, layer by layer; in place, as `trainer.distill` does.

    Several processes take whole groups each in the groups' own training, and shares of a batch afterwards. The result
    of the former does not depend on how many they are. Killed at any moment, the same call with the same ``directory``
    goes on: finished groups are kept there. Where groups trained on their own and then together end with a larger
    held-out KL than the student began with, it stays as it was, and a note says so.

    Args:
        student: its config holds the merge tree; a patch behind a merged layer counts as a part of it.
        store: with the states of `stream_depths`.
        settings: of both; ``steps`` are those of the groups together.
        directory: needed by several processes with groups to share out: they exchange them there.
        on_step: called with what is in training, and the step.
        noted: as for `trainer.distill`, and told where the student stays as it was.

    Raises:
        InputError: no merged layers, states that the store lacks, patches with ``group_steps``, or what
            `trainer.distill` raises.
    """
    settings, hierarchy = settings or TrainingSettings(), hierarchy or HierarchySettings()
    processes = processes or Processes()
    groups = merged_groups(student)
    lacking = set(stream_depths(student, hierarchy)) - set(store.request.depths)
    if lacking:
        raise InputError(
            f"the teacher store lacks the states of depth {', '.join(map(str, sorted(lacking)))}: give another `store`"
        )
    folder = None if directory is None else Path(directory).expanduser()
    alone: dict[int, GroupOutcome] = {}
    # Parameters that are trained are replaced by others, so these stay as they are.
    original, before = dict(student.named_parameters()), math.inf
    if hierarchy.group_steps:
        if patches(student):
            raise InputError("a group is trained on its own without patches: merge without `heal`, or no `group_steps`")
        if folder is None and processes.count > 1:
            raise InputError("several processes exchange their groups through a directory: give one")
        before = heldout_losses(student, store, groups[0].layer, heldout)["tail"]
        own = dataclasses.replace(settings, steps=hierarchy.group_steps)
        trained = _Groups(student, store, own, hierarchy, training, heldout, folder, checkpoint_seconds, noted)
        alone = trained.train(groups, processes, on_step)

    def together(
        student: PreTrainedModel, store: TeacherStore, begin: int, settings: TrainingSettings, precision: torch.dtype
    ) -> _Together:
        return _Together(student, store, begin, settings, precision, hierarchy, groups)

    run = distill(
        student,
        store,
        joint=groups[0].layer,
        training=training,
        heldout=heldout,
        settings=settings,
        directory=None if folder is None else folder / "together",
        checkpoint_seconds=checkpoint_seconds,
        processes=processes,
        on_step=None if on_step is None else lambda step: on_step("all layers", step),
        noted=noted,
        objective=together,
    )
    after = run.heldout(run.best_step)
    if after > before:
        _put(student, original)
        noted(f"training took the held-out KL from {before:.4f} to {after:.4f}: the layers stay as they were")
    return HierarchicalDistillation(run, alone)


class GroupsLoss(nn.Module):
    """The losses of `SuffixLoss`, and the streams' error behind the merged layers (named `LAYERS`)."""

    def __init__(
        self, student: PreTrainedModel, begin: int, precision: torch.dtype, groups: Sequence[Group], error: str
    ) -> None:
        super().__init__()
        self.final = SuffixLoss(student, begin, precision)
        self._error = error
        joints = patches(student)
        layers = decoder_layers(student)
        # Not as children: they are the student's, and below `final` already.
        self._ends = [[joints.get(group.layer + 1, layers[group.layer])] for group in groups]

    def forward(
        self, state: Tensor, probs: Tensor, ids: Tensor, targets: Sequence[Tensor], losses: Sequence[str]
    ) -> Tensor:
        """``losses`` [len(losses)] as `SuffixLoss`, given the teacher's states [B, T, d] behind each group too."""
        streams: list[Tensor] = []
        with leaving((end, streams.append) for (end,) in self._ends):
            of_output = [name for name in losses if name != LAYERS]
            found = dict(zip(of_output, self.final(state, probs, ids, of_output), strict=True))
        errors = [stream_error(x, y, self._error) for x, y in zip(streams, targets, strict=True)]
        found[LAYERS] = torch.stack(errors).mean()
        return torch.stack([found[name] for name in losses])


class _Together:
    """All groups at once and the Top-K KL (an `Objective`)."""

    def __init__(
        self,
        student: PreTrainedModel,
        store: TeacherStore,
        begin: int,
        settings: TrainingSettings,
        precision: torch.dtype,
        hierarchy: HierarchySettings,
        groups: Sequence[Group],
    ) -> None:
        self._student, self._store, self._begin = student, store, begin
        self._depths = [group.span.end for group in groups]
        self.module: nn.Module = GroupsLoss(student, begin, precision, groups, hierarchy.error)
        self.weights: Mapping[str, float] = {settings.loss: 1.0, LAYERS: hierarchy.weight}
        self.measured: Sequence[str] = list(dict.fromkeys(("tail", "topk", settings.loss, LAYERS)))
        self.about: Mapping[str, Any] = dataclasses.asdict(hierarchy)

    def inputs(self, windows: Sequence[int], label_weight: float = 0.0) -> tuple[Any, ...]:
        batch = self._store.batch(windows, [self._begin, *self._depths]).with_labels(label_weight)
        state = joint_state(self._student, batch, self._begin)
        targets = [batch.states[depth].to(state.device) for depth in self._depths]
        return state, batch.probs.to(state.device), batch.ids.to(state.device), targets


class LayerLoss(nn.Module):
    """The stream error behind the only layer of a model, given the stream that enters it."""

    def __init__(self, lone: PreTrainedModel, precision: torch.dtype, error: str) -> None:
        super().__init__()
        self.layer = PartialRun(lone, 0, 1)
        self._precision, self._error = precision, error

    def forward(self, state: Tensor, target: Tensor, losses: Sequence[str]) -> Tensor:
        """The error [1] of states and the teacher's [B, T, d]."""
        assert list(losses) == [LAYERS]
        mixed = torch.autocast(state.device.type, self._precision, enabled=self._precision != torch.float32)
        with mixed:
            found = self.layer(state)
        return stream_error(found, target, self._error).unsqueeze(0)


class _Alone:
    """One group, from the teacher's stream in front of it to that behind it (an `Objective`)."""

    def __init__(
        self,
        lone: PreTrainedModel,
        store: TeacherStore,
        span: Span,
        precision: torch.dtype,
        hierarchy: HierarchySettings,
    ) -> None:
        self._store, self._span = store, span
        self._like = lone.get_input_embeddings().weight
        self.module: nn.Module = LayerLoss(lone, precision, hierarchy.error)
        self.weights: Mapping[str, float] = {LAYERS: 1.0}
        self.measured: Sequence[str] = [LAYERS]
        self.about: Mapping[str, Any] = {"span": str(span), "error": hierarchy.error}

    def inputs(self, windows: Sequence[int], label_weight: float = 0.0) -> tuple[Any, ...]:
        states = self._store.batch(windows, list(self._span)).states
        return tuple(states[depth].to(self._like.device, self._like.dtype) for depth in self._span)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Every group's own training."""

    student: PreTrainedModel
    store: TeacherStore
    settings: TrainingSettings
    hierarchy: HierarchySettings
    training: Sequence[int]
    heldout: Sequence[int]
    folder: Path | None
    checkpoint_seconds: float
    noted: Noted

    def train(
        self, groups: Sequence[Group], processes: Processes, on_step: Callable[[str, Step], None] | None
    ) -> dict[int, GroupOutcome]:
        """Train this process's share of the groups; afterwards the student has the layers of all."""
        found: dict[int, tuple[dict[str, Tensor], GroupOutcome]] = {}
        for group in groups[processes.rank :: processes.count]:
            found[group.layer] = self._trained(group, on_step)
        processes.wait()
        for group in groups:
            tensors, outcome = found.get(group.layer) or self._finished(self._file(group))
            _put(decoder_layers(self.student)[group.layer], tensors)
            found[group.layer] = tensors, outcome
        return {layer: outcome for layer, (_, outcome) in sorted(found.items())}

    def _trained(
        self, group: Group, on_step: Callable[[str, Step], None] | None
    ) -> tuple[dict[str, Tensor], GroupOutcome]:
        lone = _lone_layer(self.student, group.layer)
        about = self._about(lone)
        if self.folder is not None and left_by_us(self._file(group)):
            file = self._file(group)
            told, _ = read_seal(file, _CURE)
            with reading(file, _CURE):
                check_same_run(told["run"], about, self.folder)
            return self._finished(file)

        def alone(
            lone: PreTrainedModel, store: TeacherStore, _begin: int, _settings: TrainingSettings, precision: torch.dtype
        ) -> _Alone:
            return _Alone(lone, store, group.span, precision, self.hierarchy)

        run = distill(
            lone,
            self.store,
            joint=0,
            training=self.training,
            heldout=self.heldout,
            settings=self.settings,
            directory=None if self.folder is None else self.folder / f"group-{group.layer}",
            checkpoint_seconds=self.checkpoint_seconds,
            on_step=None if on_step is None else lambda step: on_step(f"layer {group.layer}", step),
            noted=self.noted,
            objective=alone,
        )
        tensors = {name: value.detach().cpu() for name, value in decoder_layers(lone)[0].state_dict().items()}
        before, after = run.heldout(0, LAYERS), run.heldout(run.best_step, LAYERS)
        outcome = GroupOutcome(before, after, run.best_step, run.seconds)
        if self.folder is not None:
            write_sealed(self._file(group), tensors, {"run": about, "outcome": dataclasses.asdict(outcome)})
        return tensors, outcome

    def _about(self, lone: PreTrainedModel) -> dict[str, Any]:
        return {
            "student": fingerprint_model(lone),
            "store": self.store.request.to_json(),
            "training": list(self.training),
            "heldout": list(self.heldout),
            "settings": dataclasses.asdict(self.settings),
            "error": self.hierarchy.error,
        }

    def _file(self, group: Group) -> Path:
        assert self.folder is not None  # several processes without one are refused
        return self.folder / f"group-{group.layer}.safetensors"

    def _finished(self, file: Path) -> tuple[dict[str, Tensor], GroupOutcome]:
        about, _ = read_seal(file, _CURE)
        with reading(file, _CURE):
            told = Entries(about).entries("outcome")
            outcome = GroupOutcome(
                told.real("before"), told.real("after"), told.whole("best_step"), told.real("seconds")
            )
            return {present_name(name): tensor for name, tensor in load_file(file).items()}, outcome


def _lone_layer(student: PreTrainedModel, layer: int) -> PreTrainedModel:
    """A model of this layer alone, without a final norm, which is no part of it; it shares the student's parameters."""
    lone = keep_layers(student, [layer])
    decoder(lone).norm = nn.Identity()
    return lone


@torch.no_grad()
def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Other parameters in the place of a module's, which another model may share."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter) and old is not value:
            new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=old.requires_grad)
            setattr(owner, leaf, value if isinstance(value, nn.Parameter) else new)
