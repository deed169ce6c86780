"""Train what heals the joint against the dense model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels import processes
from linearpatch_kernels.distillation.forms import check_form
from linearpatch_kernels.distillation.settings import TrainingSettings
from linearpatch_kernels.distillation.teacher_store import STORE_FILES, TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainable import check_trainable
from linearpatch_kernels.distillation.trainer import RUN_FILES, Distillation, Step, joint_depth
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import agreement
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.files import (
    RECORDS,
    check_work_directory,
    claim_work_directory,
    lies_in,
    remove_work_directory,
)
from linearpatch_kernels.fingerprints import fingerprint_tokenizer, model_difference, tokenizer_difference
from linearpatch_kernels.forward import check_windows
from linearpatch_kernels.modeling.families import is_dispatched
from linearpatch_kernels.modeling.loading import Source, terms_among
from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.recipes.inputs import (
    EVALUATION_WINDOWS,
    Texts,
    check_output_place,
    find_model,
    on_disk,
    read_texts,
    title_of,
    windows_up_to,
    with_own_text,
)
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.recipes.outputs import (
    Result,
    card,
    judged_on,
    recorded,
    told_before,
    told_of_base,
    told_of_result,
    verdict_on,
)
from linearpatch_kernels.recipes.students import Student, Training, open_student
from linearpatch_kernels.report.card import usage
from linearpatch_kernels.report.page import DENSE, DROPPED, QualityRow, ReportData, draw_report
from linearpatch_kernels.report.plots import plot_training
from linearpatch_kernels.report.steps import steps
from linearpatch_kernels.settings import DistillSettings, given_path
from linearpatch_kernels.text import split_windows, token_windows

_BEFORE, _AFTER, _STRUCTURED = "before distillation", "distilled", "distilled, structured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillResult(Result):
    """What `distill` did.

    Attributes:
        about: the run, as ``summary.json`` has it under ``distillation``; empty in processes that do not write.
    """

    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def distill(
    directory: str | os.PathLike[str],
    settings: DistillSettings | None = None,
    *,
    reporter: Reporter | None = None,
    **named: Any,
) -> DistillResult:
    """Train the patch in a directory, or its merged layers, against the dense model it was made from::

        lp.recipes.distill("DIR", teacher="demo", output="OUT", steps=200)

    Does what ``linearpatch distill`` does: the same checks, report and files. ``teacher`` and ``output`` are needed. A
    run that was killed goes on where it was when it is called again. (`linearpatch_kernels.distill` is the training
    loop alone.)

    Args:
        directory: what `prune`, `merge` or this function wrote.
        settings, reporter, named: as of `prune`.

    Raises:
        InputError: a directory, a teacher, a text, a value or a place for the output that cannot be worked with; before
            long work where that can be known.
    """
    settings = DistillSettings.of(settings, named)
    log = Log(reporter)
    job = _prepare(given_path(directory), settings, log)
    answers = job.ask_the_teacher(log)
    found: dict[str, Quality] = {}
    if job.processes.first:
        with log.stage("evaluate"), left_out("the comparison before the training", log.note):
            found |= job.quality_before(log)
    run = job.training_on(answers, log)
    with log.stage("distil"):
        result = job.plan.train(job.student, run)
    if not job.processes.first:
        return DistillResult(output=settings.output, written=False)
    found |= job.quality(_AFTER, log)
    costs: dict[str, float] = {}
    if settings.structured is not None:
        with log.stage("structure"):
            costs = job.plan.restructured(job.student, run)
        found |= job.quality(_STRUCTURED, log)
    plan = job.plan.trained(job.student)
    against = {DROPPED: "plain removal", _BEFORE: "before distillation"}
    row = _STRUCTURED if costs else _AFTER
    verdict = verdict_on(found, row, against, job.windows, log)
    about = _about(result.together, run, job.windows, costs)
    summary = {
        **job.told(),
        **plan.summary(found, result, log),
        "distillation": about,
        **told_of_result(job.student, row, job.windows),
    }
    report: dict[str, bytes] = {}
    with log.stage("draw the report"), left_out("the report", log.note):
        data = _report_data(job, plan, summary, found, log)
        data = dataclasses.replace(data, notes=[*verdict, *log.notes])
        report = _draw(data, result.together, log)
    summary["notes"] = [*log.notes, *verdict]
    with log.stage("save"):
        job.save(recorded(plan.files(), summary, report) | card(summary, log))
    job.work.remove(log)
    return DistillResult(
        output=settings.output,
        summary=summary,
        quality=found,
        quality_text=job.windows.evaluation_source,
        seconds=log.seconds,
        verdict=tuple(verdict),
        about=about,
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """A student, its teacher, and how it is trained.

    Attributes:
        plan: what is known of the student; source, student: where its model is from, and the model.
        teacher, dense: the same of the teacher.
        training: what the training loop is told.
    """

    directory: Path
    settings: DistillSettings
    training: TrainingSettings
    plan: Student
    source: Source
    student: PreTrainedModel
    teacher: Source
    dense: PreTrainedModel
    windows: _Windows
    work: _Work
    processes: Processes

    def ask_the_teacher(self, log: Log) -> TeacherStore:
        settings, student = self.settings, self.student
        joint = [joint_depth(student, self.plan.begin(student))] if settings.store_states else []
        claimed = self.work.claimed() if self.processes.first else contextlib.nullcontext()
        with claimed, log.stage("ask the teacher"):
            answers = write_teacher_store(
                self.dense,
                self.windows.all,
                self.work.store,
                top_k=settings.top_k,
                depths=[*self.plan.depths(student), *joint],
                tokenizer=fingerprint_tokenizer(self.source.tokenizer),
                processes=self.processes,
                progress=log.progress if self.processes.first else None,
            )
        for name in answers.repaired:
            log.aside(f"{name} of the teacher store was damaged and has been written again")
        return answers

    def training_on(self, answers: TeacherStore, log: Log) -> Training:
        return Training(
            answers,
            self.windows.training,
            self.windows.heldout,
            self.training,
            self.work.run,
            self.processes,
            log.note,
            _shown(log, self.training, self.settings.length) if self.processes.first else None,
        )

    def quality_before(self, log: Log) -> dict[str, Quality]:
        """On the report's windows: the teacher, as many of its layers plainly removed, the student."""
        windows, dense = self.windows, self.dense
        if windows.evaluation is None:
            return {}
        removed: dict[str, PreTrainedModel] = {}
        if is_dispatched(dense):
            log.aside("a teacher spread over devices cannot be cut, so plain removal is not measured")
        else:
            with left_out(DROPPED, log.note):
                removed[DROPPED] = self.plan.removed(dense, windows.all[: len(windows.training)])
        models = {DENSE: dense, **removed, _BEFORE: self.student}
        return agreement.compare_quality(models, windows.evaluation, dense, noted=log.note, progress=log.progress)

    def quality(self, name: str, log: Log) -> dict[str, Quality]:
        """Of the student as it is now, called so."""
        windows = self.windows.evaluation
        if windows is None:
            return {}
        found: dict[str, Quality] = {}
        with log.stage("evaluate"), left_out(f"the comparison of the model, {name},", log.note):
            found = agreement.compare_quality(
                {name: self.student}, windows, self.dense, noted=log.note, progress=log.progress
            )
        return found

    def told(self) -> dict[str, Any]:
        """For ``summary.json``: how the student was made, and of what."""
        before = told_before(self.directory)
        base = before.get("base") or told_of_base(title_of(self.settings.teacher), self.teacher)["base"]
        # What is carried along is what lies beside the student.
        return before | {"base": base | {"terms": terms_among(self.source.companions)}}

    def save(self, files: Mapping[str, bytes | str]) -> None:
        save_checkpoint(
            self.student,
            self.source.tokenizer,
            self.settings.output,
            overwrite=True,
            extra_files=files,
            companions=self.source.companions,
        )


def _prepare(directory: Path, settings: DistillSettings, log: Log) -> _Job:
    """All before the teacher is asked: checks, text, models."""
    # Whatever the student is, the settings must make sense.
    settings.training("patch")
    check_form(settings.patch)
    reads = (on_disk(settings.teacher), *(settings.text or ()), settings.heldout_text, settings.store)
    check_output_place(settings.output, directory, *reads)
    work = _Work(settings.output, settings.store)
    work.check()
    if settings.loss == "topk" and settings.top_k == 1:
        raise InputError(
            "one likeliest token alone always has all of the mass, so there is nothing to learn: give a larger "
            "`top_k`, or another `loss`"
        )
    plan = open_student(directory, settings)
    training = settings.training(plan.default_train)
    texts = read_texts(settings.text, settings.heldout_text)
    siblings = processes.launched_processes()
    if not siblings.first:
        log.silence()
    training.check_processes(siblings.count)
    if settings.teacher_device_map is not None and siblings.count > 1:
        raise InputError("`teacher_device_map` spreads the teacher over all devices of one process: start only one")
    with log.stage("load the models"):
        source = find_model(directory, settings, log, processes=siblings)
        teacher = find_model(
            settings.teacher, settings, log, processes=siblings, device_map=settings.teacher_device_map
        )
        _check_teacher(directory, plan, source, teacher)
    with log.stage("tokenise"):
        texts = _with_own_text(texts, teacher, settings, siblings, log)
        windows = _make_windows(source, texts, settings, log)
    with log.stage("load the models"):
        student, dense = source.load(), teacher.load()
    difference = model_difference(plan.model, dense) if plan.model else ""
    if difference:
        raise InputError(f"{directory} was made from another model than this teacher ({difference}): give the same")
    check_output(settings.output, parameter_bytes(student), overwrite=True)
    plan.check_student(student, dense)
    plan.check_teacher(dense)
    student = plan.prepared(student)
    check_trainable(student, joint_depth(student, plan.begin(student)), training.train, lora_rank=training.lora_rank)
    return _Job(directory, settings, training, plan, source, student, teacher, dense, windows, work, siblings)


class _Work:
    """What a run keeps beside its output until it is done: ``OUT.work/run``, and ``OUT.work/store`` unless the person
    named a store, which stays.

    Attributes:
        run, store: the two directories.
    """

    def __init__(self, output: Path, store: Path | None) -> None:
        self._output, self._given_store = output, store
        self._parent = output.with_name(f"{output.name}.work")
        self.run, self.store = self._parent / "run", store or self._parent / "store"
        self._ours = {self.run: RUN_FILES} | ({self.store: STORE_FILES} if store is None else {})

    def check(self) -> None:
        """InputError where something else stands there, or where the store that was named would be replaced."""
        for replaced in (self._output, self.run):
            if self._given_store is not None and lies_in(self._given_store, replaced):
                raise InputError(
                    f"`store` {self._given_store} is inside {replaced}, which this run replaces: give another `store`"
                )
        for directory, names in self._ours.items():
            check_work_directory(directory, names)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the directories; where the run is refused before it wrote anything there, nothing stays of them."""
        for directory in self._ours:
            claim_work_directory(directory)
        try:
            yield
        except InputError:
            for directory in self._ours:
                remove_work_directory(directory, _NOTHING)
            self._remove_parent()
            raise

    def remove(self, log: Log) -> None:
        """Remove what the runs into this output wrote; what else somebody keeps there stays."""
        for directory, names in self._ours.items():
            if not remove_work_directory(directory, names):
                log.aside(f"{directory} was there before this run, so it stays")
        self._remove_parent()

    def _remove_parent(self) -> None:
        with contextlib.suppress(OSError):  # what else somebody keeps there stays
            self._parent.rmdir()


# The name of no file.
_NOTHING = re.compile(r"(?!)")


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Token ids [W, T] in the store's order, which of them train and choose, and the report's own; and the share of
    each of several texts in the first."""

    all: Tensor
    training: range
    heldout: range
    evaluation: Tensor | None
    evaluation_source: str
    source: str
    shares: Mapping[str, float]


def _with_own_text(texts: Texts, teacher: Source, settings: DistillSettings, siblings: Processes, log: Log) -> Texts:
    """The texts, with what the teacher writes where one of them is its own."""
    windows = settings.steps * settings.windows_per_step + settings.heldout + EVALUATION_WINDOWS
    return with_own_text(texts, teacher, teacher.tokenizer, windows, settings.length, siblings, log)


def _make_windows(model: Source, texts: Texts, settings: DistillSettings, log: Log) -> _Windows:
    """The windows of a run: as many as its steps take, or all there are, and those held out."""
    tokenizer, heldout, length = model.tokenizer, settings.heldout, settings.length
    wanted = settings.steps * settings.windows_per_step
    extra = EVALUATION_WINDOWS if texts.report is None else 0
    windows = windows_up_to(tokenizer, texts.calibration, length, wanted + heldout + extra)
    there = len(windows)
    if there < wanted + heldout + extra:
        extra = min(extra, max(0, there - heldout) // 4)
    training = min(wanted, there - heldout - extra)
    if training < 1:
        raise InputError(
            f"the text has {there} windows of {length} tokens, and {heldout} held out with one to train on at least "
            "are needed: give a longer text, a smaller `heldout` or a shorter `length`"
        )
    if training < wanted:
        log.aside(f"the text has {training} windows to train on for {wanted}, so they are used again")
    shares = split_windows(windows, {"training": training, "heldout": heldout, "evaluation": extra})
    evaluation = shares["evaluation"] if extra else None
    if texts.report is not None:
        evaluation = token_windows(tokenizer, texts.report, length=length, count=EVALUATION_WINDOWS)
    everything = torch.cat([shares["training"], shares["heldout"]])
    for share in (everything, evaluation):
        if share is not None:
            check_windows(model, share)
    source = texts.report_source if texts.report is not None or extra else ""
    ranges = range(training), range(training, training + heldout)
    return _Windows(everything, *ranges, evaluation, source, texts.source, texts.shares())


def _check_teacher(directory: Path, plan: Student, student: Source, teacher: Source) -> None:
    """InputError where what is known before the weights are loaded does not fit together."""
    if teacher.num_layers != plan.num_layers or teacher.hidden_size != student.hidden_size:
        raise InputError(
            f"{directory} was made from a model of {plan.num_layers} layers of width {student.hidden_size} and the "
            f"teacher has {teacher.num_layers} of width {teacher.hidden_size}: give the model it was made from"
        )
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if difference:
        raise InputError(
            f"{directory} and the teacher have different tokenizers ({difference}): give the model it was made from"
        )


def _shown(log: Log, settings: TrainingSettings, length: int) -> Callable[[str, Step], None]:
    def show(what: str, step: Step) -> None:
        tokens = (step.steps - step.done) * settings.windows_per_step * length
        minutes, seconds = divmod(round(tokens / step.tokens_per_second), 60)
        log.progress(
            what,
            step.done,
            step.steps,
            f"loss {step.loss:.3f}, held out {step.heldout:.3f}, {step.tokens_per_second:,.0f} tokens/s, "
            f"{minutes}:{seconds:02} left",
        )

    return show


def _about(result: Distillation, run: Training, windows: _Windows, structured: Mapping[str, float]) -> dict[str, Any]:
    """For ``summary.json``."""
    request = run.answers.request
    return {
        **dataclasses.asdict(run.settings),
        "parameters": result.parameters,
        "steps_made": result.steps,
        "best_step": result.best_step,
        "curve": [dict(point) for point in result.curve],
        "top_k": request.top_k,
        "length": request.length,
        "training_windows": len(run.training),
        "heldout_windows": len(run.heldout),
        "text": windows.source,
        "shares": dict(windows.shares),
        "training_seconds": round(result.seconds, 2),
        "structured": dict(structured),
    }


def _report_data(
    job: _Job, plan: Student, summary: Mapping[str, Any], found: Mapping[str, Quality], log: Log
) -> ReportData:
    result = summary["result"]
    return ReportData(
        title=f"{title_of(job.directory)}, distilled",
        steps=steps(summary),
        quality=[
            QualityRow(name, plan.num_layers if name == DENSE else plan.layers, one) for name, one in found.items()
        ],
        quality_text=judged_on(job.windows),
        dense=DENSE,
        dropped=DROPPED,
        spans=plan.spans(),
        timings=dict(log.seconds),
        usage=usage("DIR", result["loader"], patched=result["patched"]),
        files={
            **{f"{RECORDS}/{name}": what for name, what in plan.plan_files.items()},
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/log.jsonl": "loss, learning rate, norm of the gradient and speed of every step",
        },
    )


def _draw(data: ReportData, result: Distillation, log: Log) -> dict[str, bytes]:
    """The files of the report, with the curve of the losses and the log of every step."""
    measured = [name for name in result.curve[0] if name != "step"]
    heldout = {name: {int(point["step"]): point[name] for point in result.curve} for name in measured}
    losses = [line["loss"] for line in result.log]
    curve = (
        "Loss of every step, and on held-out windows now and then.",
        lambda path: plot_training(path, losses, heldout, result.best_step),
    )
    files = draw_report(data, {"distillation.png": curve}, log.note)
    return files | {"log.jsonl": "".join(json.dumps(line) + "\n" for line in result.log).encode()}
