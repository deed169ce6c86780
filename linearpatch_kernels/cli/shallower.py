"""What ``linearpatch distill`` is given: a model that layers were pruned from, or one whose layers were merged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from linearpatch_kernels.cli.console import Reporter
from linearpatch_kernels.cli.prune import summarise
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import read_json, reading, record

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearpatch_kernels.distillation.hierarchical import HierarchySettings
    from linearpatch_kernels.distillation.teacher_store import TeacherStore
    from linearpatch_kernels.distillation.trainer import Distillation, Step
    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.evaluation.report import SpanRow
    from linearpatch_kernels.nn import PatchChain
    from linearpatch_kernels.pruning.plan import PrunePlan

# Windows on which the layers of a plain removal beside a merged model are chosen.
_REMOVAL_WINDOWS = 8

Shown = Callable[[str, "Step"], None]


class Shallower(Protocol):
    """A checkpoint with fewer layers than its teacher.

    Attributes:
        num_layers, model: depth and fingerprint of the teacher ("" if not known).
        default_train: what is trained unless told.
        files: file name -> what it holds, of the plan's files.
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

    def check_teacher(self, dense: PreTrainedModel, form: str) -> None:
        """InputError for a teacher that the student cannot be held against, with patches in this form."""
        ...

    def prepare(self, student: PreTrainedModel, form: str, rank: int, structured: int | None) -> PreTrainedModel:
        """The student as it goes into the training; InputError for flags that are not for it."""
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

    def train(self, student: PreTrainedModel, store: TeacherStore, show: Shown | None, **run: Any) -> Distillation:
        """Train the student in place."""
        ...

    def keep(self, student: PreTrainedModel, form: str, structured: int | None) -> None:
        """Take over what the training made of the student."""
        ...

    def files(self) -> dict[str, bytes]:
        """The plan's files."""
        ...

    def summary(self, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
        """For ``summary.json``."""
        ...

    def spans(self) -> list[SpanRow]:
        """For the report."""
        ...


def open_shallower(directory: Path, hierarchy: HierarchySettings) -> Shallower:
    """What ``directory`` holds; InputError where it is neither, and for a hierarchy without merged layers."""
    from linearpatch_kernels.distillation.hierarchical import HierarchySettings
    from linearpatch_kernels.merging.consistency import check_merges
    from linearpatch_kernels.merging.plan import MERGE_FILE, MergePlan
    from linearpatch_kernels.pruning.consistency import check_plan
    from linearpatch_kernels.pruning.plan import PrunePlan

    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give one that linearpatch prune or merge wrote")
    merge_file = record(directory, MERGE_FILE)
    merged = merge_file.exists()
    if not merged and hierarchy != HierarchySettings():
        raise InputError(f"{directory} has no merged layers: leave out --layer-weight, --layer-error and --group-steps")
    merges = MergePlan.load(merge_file) if merged else None
    plan = None if merged else PrunePlan.load(directory)
    config = read_json(directory / "config.json", "give a directory with a model that linearpatch prune or merge wrote")
    with reading(directory / "config.json", "make the directory again"):
        if merges is not None:
            check_merges(merges, config, directory)
            return Merged(merges, hierarchy)
        assert plan is not None
        check_plan(plan, config, directory)
        return Pruned(plan, directory)


class Pruned:
    """Layers removed, with patches in their place."""

    default_train = "patch"
    plan_files: Mapping[str, str] = {
        "plan.json": "spans, kind of patch, what chose them",
        "plan.safetensors": "the trained patches",
    }

    def __init__(self, plan: PrunePlan, directory: Path) -> None:
        """``directory``: where it lies, for what is said."""
        self.plan, self._directory = plan, directory
        self.num_layers, self.model = plan.num_layers, plan.model

    @property
    def layers(self) -> int:
        return len(self.plan.kept_layers)

    def check_student(self, student: PreTrainedModel, dense: PreTrainedModel) -> None:
        from linearpatch_kernels.pruning.consistency import check_kept_layers, check_patches

        check_patches(self.plan, student, self._directory)
        check_kept_layers(self.plan, student, dense, self._directory)

    def check_teacher(self, dense: PreTrainedModel, form: str) -> None:
        """Where a patch of the teacher's own is at a joint too, both would be made one, and the plan tells of ours."""
        from linearpatch_kernels.modeling.patched import patches

        theirs = {span.start for span in self.plan.spans if {span.start, span.end} & patches(dense).keys()}
        if theirs and form != "keep":
            raise InputError(
                f"at layer {min(theirs)} the patch stands with that of an earlier cut: give --patch keep, or make both "
                "cuts in one go"
            )

    def prepare(self, student: PreTrainedModel, form: str, rank: int, structured: int | None) -> PreTrainedModel:
        if form != "keep":
            student = self._with_form(student, form, rank)
        if structured is not None:
            self._dense_patches(student, structured)
        return student

    def begin(self, student: PreTrainedModel) -> int:
        return self.plan.spans[0].start

    def depths(self, student: PreTrainedModel) -> list[int]:
        return []

    def removed(self, dense: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
        from linearpatch_kernels.modeling.families import keep_layers

        return keep_layers(dense, self.plan.kept_layers)

    def train(self, student: PreTrainedModel, store: TeacherStore, show: Shown | None, **run: Any) -> Distillation:
        from linearpatch_kernels.distillation.trainer import distill

        on_step = None if show is None else lambda step: show("distilling", step)
        return distill(student, store, joint=self.begin(student), on_step=on_step, **run)

    def structure(self, student: PreTrainedModel, store: TeacherStore, windows: Sequence[int], rank: int) -> None:
        """Hadamard + rank r in the place of every dense patch at a joint of the plan."""
        from linearpatch_kernels.distillation.structure import structure

        dense = self._dense_patches(student, rank)
        structure(student, store, joint=self.begin(student), windows=windows, dense=dense, rank=rank)

    def keep(self, student: PreTrainedModel, form: str, structured: int | None) -> None:
        from linearpatch_kernels.modeling.patched import patches
        from linearpatch_kernels.nn import DensePatch
        from linearpatch_kernels.pruning.plan import Joint

        def trained(chain: PatchChain, joint: Joint) -> Joint:
            # Behind the plan's own patches there may stand those of earlier cuts.
            own = chain.patches[: 1 if joint.patch is None else len(joint.patch)]
            words = [joint.fit, *([form] if form != "keep" else []), "distilled"]
            if structured is not None and not any(isinstance(patch, DensePatch) for patch in own):
                words.append("structured")
            return Joint(joint.span, [copy.deepcopy(patch).float() for patch in own], ", ".join(words))

        there, places = patches(student), self.plan.joint_positions()
        joints = [trained(there[at], joint) if at in there else joint for at, joint in places.items()]
        self.plan = dataclasses.replace(self.plan, joints=tuple(joints))

    def files(self) -> dict[str, bytes]:
        return self.plan.files()

    def summary(self, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
        return summarise(self.plan, found, run)

    def spans(self) -> list[SpanRow]:
        from linearpatch_kernels.evaluation.report import SpanRow
        from linearpatch_kernels.pruning.reporting import describe_patch

        return [SpanRow(str(joint.span), self.plan.score, None, describe_patch(joint)) for joint in self.plan.joints]

    def _with_form(self, student: PreTrainedModel, form: str, rank: int) -> PreTrainedModel:
        """The student with the patch of every joint in this form; a joint without one gets the identity."""
        from linearpatch_kernels.distillation.forms import reformed
        from linearpatch_kernels.modeling.families import hidden_size
        from linearpatch_kernels.modeling.patched import patched_model, patches, replace_patch
        from linearpatch_kernels.nn import HadamardPatch, PatchChain

        there = patches(student)
        identity = PatchChain(HadamardPatch(hidden_size(student)))
        new = {joint: reformed(there.get(joint, identity), form, rank) for joint in self.plan.joint_positions()}
        missing = {joint: patch for joint, patch in new.items() if joint not in there}
        if missing:
            student = patched_model(student, missing)
        for joint in new.keys() - missing.keys():
            replace_patch(student, joint, new[joint].to(student.dtype))
        return student

    def _dense_patches(self, student: PreTrainedModel, rank: int) -> dict[int, PatchChain]:
        """The chains that ``--structured`` is about, each of one dense patch, by joint."""
        from linearpatch_kernels.modeling.families import hidden_size
        from linearpatch_kernels.modeling.patched import patches
        from linearpatch_kernels.nn import DensePatch

        there, places = patches(student), self.plan.joint_positions()
        kinds = {joint: [type(patch) for patch in chain] for joint, chain in there.items()}
        dense = {joint: there[joint] for joint in places if kinds.get(joint) == [DensePatch]}
        if not dense:
            raise InputError("--structured is for dense patches and there is none: leave it out, or give --patch dense")
        if rank > hidden_size(student):
            raise InputError(f"--structured {rank} is more than the model's width {hidden_size(student)}")
        return dense


class Merged:
    """Layers made one: distilled layer by layer."""

    default_train = "merged"
    plan_files: Mapping[str, str] = {"merge.json": "every merge: layers, shares, the units that were kept"}

    def __init__(self, plan: Any, hierarchy: HierarchySettings) -> None:
        self.plan, self._hierarchy = plan, hierarchy
        self.num_layers, self.model = plan.num_layers, plan.model
        self._alone: Mapping[int, Any] = {}

    @property
    def layers(self) -> int:
        return int(self.plan.layers)

    def check_student(self, student: PreTrainedModel, dense: PreTrainedModel) -> None:
        """The plan holds no weights."""

    def check_teacher(self, dense: PreTrainedModel, form: str) -> None:
        """Which of its layers a merged layer stands for is told in those of the first model."""
        from linearpatch_kernels.modeling.families import merge_tree
        from linearpatch_kernels.modeling.patched import patches

        if patches(dense) or any(isinstance(node, list) for node in merge_tree(dense)):
            raise InputError(
                "the teacher is itself a model that layers were removed from or merged in: merge the first model in "
                "one go, and distil from that"
            )

    def prepare(self, student: PreTrainedModel, form: str, rank: int, structured: int | None) -> PreTrainedModel:
        from linearpatch_kernels.distillation.hierarchical import merged_groups

        if form != "keep" or structured is not None:
            raise InputError("--patch and --structured are for pruned models: leave them out for merged layers")
        merged_groups(student)
        return student

    def begin(self, student: PreTrainedModel) -> int:
        from linearpatch_kernels.distillation.hierarchical import merged_groups

        return merged_groups(student)[0].layer

    def depths(self, student: PreTrainedModel) -> list[int]:
        from linearpatch_kernels.distillation.hierarchical import stream_depths

        return stream_depths(student, self._hierarchy)

    def removed(self, dense: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
        return plainly_removed(dense, windows, self.layers)

    def train(self, student: PreTrainedModel, store: TeacherStore, show: Shown | None, **run: Any) -> Distillation:
        from linearpatch_kernels.distillation.hierarchical import distill_merged

        on_step = None if show is None else lambda what, step: show(f"distilling {what}", step)
        result = distill_merged(student, store, hierarchy=self._hierarchy, on_step=on_step, **run)
        self._alone = result.alone
        return result.together

    def keep(self, student: PreTrainedModel, form: str, structured: int | None) -> None:
        """The plan says how the layers were merged, and still does."""

    def files(self) -> dict[str, bytes]:
        files: dict[str, bytes] = self.plan.files()
        return files

    def summary(self, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
        return {
            "num_layers": {"dense": self.num_layers, "merged": self.layers},
            "tree": self.plan.tree,
            "hierarchy": dataclasses.asdict(self._hierarchy),
            "groups": {str(layer): dataclasses.asdict(outcome) for layer, outcome in self._alone.items()},
            "quality": {name: quality.to_dict() for name, quality in found.items()},
            "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
        }

    def spans(self) -> list[SpanRow]:
        return []


def plainly_removed(dense: PreTrainedModel, windows: Tensor, layers: int) -> PreTrainedModel:
    """The dense model without the neighbouring layers that change the stream least, ``layers`` of them left."""
    from linearpatch_kernels.merging.sensitivity import score_layers
    from linearpatch_kernels.modeling.families import keep_layers, num_layers

    count = num_layers(dense)
    scores = score_layers(dense, windows[:_REMOVAL_WINDOWS], width=count - layers)
    gone = min(scores.span_influence, key=lambda span: scores.span_influence[span])
    return keep_layers(dense, [layer for layer in range(count) if layer not in range(*gone)])
