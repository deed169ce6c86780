"""What `recipes.distill` trains: a model that layers were pruned from, or one whose layers were merged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.distillation.forms import reformed
from linearpatch_kernels.distillation.hierarchical import (
    HierarchicalDistillation,
    distill_merged,
    merged_groups,
    stream_depths,
)
from linearpatch_kernels.distillation.settings import HierarchySettings, TrainingSettings
from linearpatch_kernels.distillation.structure import structure
from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import Step, distill, heldout_losses
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import Noted
from linearpatch_kernels.files import read_json, reading, record
from linearpatch_kernels.merging.consistency import check_merges
from linearpatch_kernels.merging.plan import MERGE_FILE, MergePlan
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import hidden_size, merge_tree, num_layers
from linearpatch_kernels.modeling.patched import patched_model, patches, replace_patch
from linearpatch_kernels.nn import DensePatch, HadamardPatch, PatchChain
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.consistency import check_kept_layers, check_patches, check_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.search import rank_for
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.recipes.prune import summarise
from linearpatch_kernels.report.page import SpanRow
from linearpatch_kernels.report.pruning import describe_patch
from linearpatch_kernels.settings import DistillSettings

# Windows on which the layers of a plain removal beside a merged model are chosen.
_REMOVAL_WINDOWS = 8
_KEEP = "keep"


@dataclasses.dataclass(frozen=True)
class Training:
    """What a student is trained with.

    Attributes:
        answers: the teacher's, to its windows ``training`` and ``heldout``.
        directory: for what a killed run goes on from.
        show: called after every step with what is trained; None: nobody is told.
    """

    answers: TeacherStore
    training: range
    heldout: range
    settings: TrainingSettings
    directory: Path
    processes: Processes
    noted: Noted
    show: Callable[[str, Step], None] | None


class Student(Protocol):
    """A checkpoint with fewer layers than its teacher: what its plan tells, and how it is trained.

    Attributes:
        num_layers, model: depth and fingerprint of the teacher ("" if not known).
        default_train: what is trained unless told.
        plan_files: file name -> what it holds, of the plan's files.
    """

    num_layers: int
    model: str
    default_train: str
    plan_files: Mapping[str, str]

    @property
    def layers(self) -> int:
        """How many there are."""
        ...

    def check_student(self, student: PreTrainedModel, dense: PreTrainedModel) -> None:
        """InputError for weights that are not those the plan tells of."""
        ...

    def check_teacher(self, dense: PreTrainedModel) -> None:
        """InputError for a teacher that the student cannot be held against."""
        ...

    def prepared(self, student: PreTrainedModel) -> PreTrainedModel:
        """The student as it goes into the training; InputError for settings that are not for it."""
        ...

    def begin(self, student: PreTrainedModel) -> int:
        """The depth from which the student differs from the teacher."""
        ...

    def depths(self, student: PreTrainedModel) -> list[int]:
        """Whose states the teacher must give."""
        ...

    def removed(self, dense: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
        """The teacher with as many layers plainly removed."""
        ...

    def train(self, student: PreTrainedModel, run: Training) -> HierarchicalDistillation:
        """Train the student in place."""
        ...

    def restructured(self, student: PreTrainedModel, run: Training) -> dict[str, float]:
        """Make what was trained cheaper, in place, if the settings say so; what that cost, or nothing."""
        ...

    def trained(self, student: PreTrainedModel) -> Student:
        """The same, its plan as the training left the student."""
        ...

    def files(self) -> dict[str, bytes]:
        """The plan's files."""
        ...

    def summary(self, found: Mapping[str, Quality], result: HierarchicalDistillation, log: Log) -> dict[str, Any]:
        """For ``summary.json``."""
        ...

    def spans(self) -> list[SpanRow]:
        """For the report."""
        ...


def open_student(directory: Path, settings: DistillSettings) -> Student:
    """What ``directory`` holds; InputError where it is neither, and for a hierarchy without merged layers."""
    hierarchy = settings.hierarchy
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give one that linearpatch prune or merge wrote")
    merge_file = record(directory, MERGE_FILE)
    merged = merge_file.exists()
    if not merged and hierarchy != HierarchySettings():
        raise InputError(f"{directory} has no merged layers: leave out `layer_weight`, `layer_error` and `group_steps`")
    merges = MergePlan.load(merge_file) if merged else None
    plan = None if merged else PrunePlan.load(directory)
    config = read_json(directory / "config.json", "give a directory with a model that linearpatch prune or merge wrote")
    with reading(directory / "config.json", "make the directory again"):
        if merges is not None:
            check_merges(merges, config, directory)
            return MergedStudent(merges, settings)
        assert plan is not None
        check_plan(plan, config, directory)
        return PrunedStudent(plan, settings, directory)


class PrunedStudent:
    """Layers removed, with patches in their place.

    Args:
        directory: where it lies, for messages.
    """

    plan_files: Mapping[str, str] = {
        "plan.json": "spans, kind of patch, what chose them",
        "plan.safetensors": "the trained patches",
    }

    def __init__(self, plan: PrunePlan, settings: DistillSettings, directory: Path) -> None:
        self.plan, self._directory = plan, directory
        self.num_layers, self.model = plan.num_layers, plan.model
        self._settings = settings
        patched = settings.patch != _KEEP or any(joint.patch is not None for joint in plan.joints)
        self.default_train = "patch" if patched else "suffix"

    @property
    def layers(self) -> int:
        return len(self.plan.kept_layers)

    def check_student(self, student: PreTrainedModel, dense: PreTrainedModel) -> None:
        check_patches(self.plan, student, self._directory)
        check_kept_layers(self.plan, student, dense, self._directory)

    def check_teacher(self, dense: PreTrainedModel) -> None:
        """Where a patch of the teacher's own is at a joint too, both would be made one, and the plan tells of ours."""
        theirs = {span.start for span in self.plan.spans if {span.start, span.end} & patches(dense).keys()}
        if theirs and self._settings.patch != _KEEP:
            raise InputError(
                f"at layer {min(theirs)} the patch stands with that of an earlier cut: give `patch` keep, or make both "
                "cuts in one go"
            )

    def prepared(self, student: PreTrainedModel) -> PreTrainedModel:
        settings = self._settings
        if settings.patch != _KEEP:
            student = self._reformed(student, rank_for(settings.rank, hidden_size(student)))
        if settings.structured is not None:
            self._dense_patches(student, settings.structured)
        return student

    def begin(self, student: PreTrainedModel) -> int:
        return self.plan.first_change

    def depths(self, student: PreTrainedModel) -> list[int]:
        return []

    def removed(self, dense: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
        return keep_layers(dense, self.plan.kept_layers)

    def train(self, student: PreTrainedModel, run: Training) -> HierarchicalDistillation:
        show = run.show
        together = distill(
            student,
            run.answers,
            joint=self.begin(student),
            training=run.training,
            heldout=run.heldout,
            settings=run.settings,
            directory=run.directory,
            processes=run.processes,
            on_step=None if show is None else lambda step: show("distilling", step),
            noted=run.noted,
        )
        return HierarchicalDistillation(together, {})

    def restructured(self, student: PreTrainedModel, run: Training) -> dict[str, float]:
        """Hadamard + rank r in the place of every dense patch at a joint of the plan."""
        rank = self._settings.structured
        if rank is None:
            return {}
        joint, answers = self.begin(student), run.answers
        before = heldout_losses(student, answers, joint, run.heldout)["tail"]
        dense = self._dense_patches(student, rank)
        structure(student, answers, joint=joint, windows=run.training, dense=dense, rank=rank)
        after = heldout_losses(student, answers, joint, run.heldout)["tail"]
        return {"rank": rank, "heldout_before": before, "heldout_after": after}

    def trained(self, student: PreTrainedModel) -> PrunedStudent:
        there, places = patches(student), self.plan.joint_positions()
        joints = [self._trained_joint(there[at], joint) if at in there else joint for at, joint in places.items()]
        plan = dataclasses.replace(self.plan, joints=tuple(joints))
        return PrunedStudent(plan, self._settings, self._directory)

    def files(self) -> dict[str, bytes]:
        return self.plan.files()

    def summary(self, found: Mapping[str, Quality], result: HierarchicalDistillation, log: Log) -> dict[str, Any]:
        return summarise(self.plan, found, log)

    def spans(self) -> list[SpanRow]:
        return [SpanRow(str(joint.span), self.plan.score, None, describe_patch(joint)) for joint in self.plan.joints]

    def _trained_joint(self, chain: PatchChain, joint: Joint) -> Joint:
        # Behind the plan's own patches there may stand those of earlier cuts.
        own = chain.patches[: 1 if joint.patch is None else len(joint.patch)]
        form = self._settings.patch
        words = [joint.fit, *([form] if form != _KEEP else []), "distilled"]
        if self._settings.structured is not None and not any(isinstance(patch, DensePatch) for patch in own):
            words.append("structured")
        return Joint(joint.span, [copy.deepcopy(patch).float() for patch in own], ", ".join(words))

    def _reformed(self, student: PreTrainedModel, rank: int) -> PreTrainedModel:
        """The student with the patch of every joint in this form; a joint without one gets the identity."""
        there = patches(student)
        identity = PatchChain(HadamardPatch(hidden_size(student)))
        form = self._settings.patch
        new = {joint: reformed(there.get(joint, identity), form, rank) for joint in self.plan.joint_positions()}
        missing = {joint: patch for joint, patch in new.items() if joint not in there}
        if missing:
            student = patched_model(student, missing)
        for joint in new.keys() - missing.keys():
            replace_patch(student, joint, new[joint].to(student.dtype))
        return student

    def _dense_patches(self, student: PreTrainedModel, rank: int) -> dict[int, PatchChain]:
        """The chains that ``structured`` is about, each of one dense patch, by joint."""
        there, places = patches(student), self.plan.joint_positions()
        kinds = {joint: [type(patch) for patch in chain] for joint, chain in there.items()}
        dense = {joint: there[joint] for joint in places if kinds.get(joint) == [DensePatch]}
        if not dense:
            raise InputError("`structured` is for dense patches and there is none: leave it out, or give `patch` dense")
        if rank > hidden_size(student):
            raise InputError(f"`structured` {rank} is more than the model's width {hidden_size(student)}")
        return dense


class MergedStudent:
    """Layers made one: distilled layer by layer."""

    default_train = "merged"
    plan_files: Mapping[str, str] = {"merge.json": "every merge: layers, shares, the units that were kept"}

    def __init__(self, plan: MergePlan, settings: DistillSettings) -> None:
        self.plan, self._settings = plan, settings
        self.num_layers, self.model = plan.num_layers, plan.model

    @property
    def layers(self) -> int:
        return int(self.plan.layers)

    def check_student(self, student: PreTrainedModel, dense: PreTrainedModel) -> None:
        """The plan holds no weights."""

    def check_teacher(self, dense: PreTrainedModel) -> None:
        """Which of its layers a merged layer stands for is told in those of the first model."""
        if patches(dense) or any(isinstance(node, list) for node in merge_tree(dense)):
            raise InputError(
                "the teacher is itself a model that layers were removed from or merged in: merge the first model in "
                "one go, and distil from that"
            )

    def prepared(self, student: PreTrainedModel) -> PreTrainedModel:
        if self._settings.patch != _KEEP or self._settings.structured is not None:
            raise InputError("`patch` and `structured` are for pruned models: leave them out for merged layers")
        merged_groups(student)
        return student

    def begin(self, student: PreTrainedModel) -> int:
        return merged_groups(student)[0].layer

    def depths(self, student: PreTrainedModel) -> list[int]:
        return stream_depths(student, self._settings.hierarchy)

    def removed(self, dense: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
        return plainly_removed(dense, windows, self.layers)

    def train(self, student: PreTrainedModel, run: Training) -> HierarchicalDistillation:
        show = run.show
        return distill_merged(
            student,
            run.answers,
            training=run.training,
            heldout=run.heldout,
            settings=run.settings,
            hierarchy=self._settings.hierarchy,
            directory=run.directory,
            processes=run.processes,
            on_step=None if show is None else lambda what, step: show(f"distilling {what}", step),
            noted=run.noted,
        )

    def restructured(self, student: PreTrainedModel, run: Training) -> dict[str, float]:
        """There is no patch."""
        return {}

    def trained(self, student: PreTrainedModel) -> MergedStudent:
        """The plan says how the layers were merged, and still does."""
        return self

    def files(self) -> dict[str, bytes]:
        return self.plan.files()

    def summary(self, found: Mapping[str, Quality], result: HierarchicalDistillation, log: Log) -> dict[str, Any]:
        return {
            "num_layers": {"dense": self.num_layers, "merged": self.layers},
            "tree": self.plan.tree,
            "hierarchy": dataclasses.asdict(self._settings.hierarchy),
            "groups": {str(layer): dataclasses.asdict(outcome) for layer, outcome in result.alone.items()},
            "quality": {name: quality.to_dict() for name, quality in found.items()},
            "seconds": log.rounded_seconds(),
        }

    def spans(self) -> list[SpanRow]:
        return []


def plainly_removed(dense: PreTrainedModel, windows: Tensor, layers: int) -> PreTrainedModel:
    """The dense model without the neighbouring layers that change the stream least, ``layers`` of them left."""
    count = num_layers(dense)
    scores = score_layers(dense, windows[:_REMOVAL_WINDOWS], width=count - layers)
    gone = min(scores.span_influence, key=lambda span: scores.span_influence[span])
    return keep_layers(dense, [layer for layer in range(count) if layer not in range(*gone)])
