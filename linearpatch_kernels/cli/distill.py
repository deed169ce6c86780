"""``linearpatch distill``: train what heals the joint against the dense model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    console,
    print_quality,
    print_seconds,
    print_table,
    problems,
    write_json,
)
from linearpatch_kernels.cli.inputs import (
    EVALUATION_WINDOWS,
    Texts,
    check_places,
    find_model,
    on_disk,
    read_texts,
    title_of,
    windows_up_to,
)
from linearpatch_kernels.cli.options import (
    Device,
    Dtype,
    HeldoutText,
    JsonFile,
    Length,
    Output,
    Rank,
    Text,
    TrustRemoteCode,
    given_path,
)
from linearpatch_kernels.cli.prune import DROPPED, recorded, say_where, usage, verdict_on
from linearpatch_kernels.cli.shallower import Pruned, Shallower, open_shallower
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import (
    RECORDS,
    check_work_directory,
    claim_work_directory,
    lies_in,
    remove_work_directory,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearpatch_kernels.distillation.teacher_store import TeacherStore
    from linearpatch_kernels.distillation.trainer import Distillation, Step, TrainingSettings
    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.modeling.loading import ModelSource

_BEFORE, _AFTER, _STRUCTURED = "before distillation", "distilled", "distilled, structured"


def distill(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="What prune, merge or distill wrote.", show_default=False, parser=given_path
        ),
    ],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="The dense model DIR was made from.", show_default=False)
    ],
    output: Output,
    text: Text = None,
    heldout_text: HeldoutText = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Optimizer steps.")] = 100,
    length: Length = 512,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", min=1, help="Likeliest tokens kept of the teacher's distribution.")
    ] = 50,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            help="patch, patch+norms (and the RMSNorm gains behind it), lora (and LoRA behind it), suffix (and all "
            "weights of the layers behind it), or merged (the merged layers' weights). Default: patch, and merged for "
            "what merge wrote.",
            show_default=False,
        ),
    ] = None,
    patch: Annotated[
        str,
        typer.Option(
            "--patch",
            metavar="FORM",
            help="Train the patch as it is (keep), or turned into a scale (H D H'), scales (between two diagonals), "
            "low-rank (and a low-rank term) or dense one first.",
        ),
    ] = "keep",
    rank: Rank = None,
    loss: Annotated[
        str, typer.Option("--loss", help="tail (one bucket for the rest), topk (the paper's), or full.")
    ] = "tail",
    label_weight: Annotated[
        float,
        typer.Option(
            "--label-weight",
            metavar="X",
            help="Of the text's own next tokens in what is learnt; the teacher's distribution has the rest. It adapts "
            "the model to the text. The best step is always that nearest to the teacher.",
        ),
    ] = 0.0,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="Peak; scales and gains take ten times as much, but with suffix the same.",
        ),
    ] = 3e-4,
    warmup_steps: Annotated[int, typer.Option("--warmup-steps", metavar="N", min=0, help="Linear warm-up.")] = 5,
    weight_decay: Annotated[float, typer.Option("--weight-decay", metavar="X", min=0)] = 0.0,
    clip: Annotated[
        float, typer.Option("--clip", metavar="X", min=0, help="Largest norm of the gradient; 0: no limit.")
    ] = 1.0,
    windows_per_step: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Windows per step, over all processes.")
    ] = 1,
    micro_batch: Annotated[
        int, typer.Option("--micro-batch", metavar="N", min=1, help="Of these at once; the rest is accumulated.")
    ] = 1,
    heldout: Annotated[
        int, typer.Option("--heldout", metavar="N", min=1, help="Windows on which the best step is chosen.")
    ] = 8,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", metavar="N", min=0, help="Steps between two looks at them; 0: ten looks.")
    ] = 0,
    patience: Annotated[
        int, typer.Option("--patience", metavar="N", min=0, help="Stop after N looks without a better one; 0: never.")
    ] = 0,
    lora_rank: Annotated[int, typer.Option("--lora-rank", metavar="R", min=1, help="For --train lora.")] = 16,
    precision: Annotated[
        str, typer.Option("--precision", help="Of the matrix products in training: float32 or bfloat16.")
    ] = "float32",
    recompute: Annotated[
        str,
        typer.Option(
            "--recompute",
            metavar="WHAT",
            help="What the backward pass computes again instead of keeping it: none, activation (a sixth less "
            "memory) or layer (a quarter of the memory, 1.4 times the time). The result is the same.",
        ),
    ] = "activation",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the order of windows and LoRA's start.")] = 0,
    structured: Annotated[
        int | None,
        typer.Option(
            "--structured",
            metavar="R",
            min=0,
            help="Afterwards turn dense patches into Hadamard + rank R, and tell what it costs.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="DIR",
            help="Where the teacher's answers are kept for other runs (default: beside the output, until it is done).",
            show_default=False,
            parser=given_path,
        ),
    ] = None,
    store_states: Annotated[
        bool,
        typer.Option("--store-states", help="Keep the states at the joint too: faster steps, 2 bytes x width a token."),
    ] = False,
    layer_weight: Annotated[
        float,
        typer.Option(
            "--layer-weight",
            metavar="X",
            min=0,
            help="Merged layers: weight of their outputs' error against the dense model's, beside the KL.",
        ),
    ] = 1.0,
    layer_error: Annotated[
        str,
        typer.Option("--layer-error", metavar="NAME", help="That error: relative (to each token's norm), or mse."),
    ] = "relative",
    group_steps: Annotated[
        int,
        typer.Option(
            "--group-steps",
            metavar="N",
            min=0,
            help="Merged layers: train each on its own first, N steps; several processes share them out.",
        ),
    ] = 0,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    teacher_device_map: Annotated[
        str | None,
        typer.Option(
            "--teacher-device-map",
            metavar="MAP",
            help="Spread a teacher that is larger than a device: auto, balanced or sequential (by accelerate).",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train DIR's patch, or its merged layers one by one, against the dense model it was made from; write the result
    like prune's or merge's. Killed or interrupted: the same command goes on."""
    from linearpatch_kernels.distillation.forms import check_form
    from linearpatch_kernels.distillation.hierarchical import HierarchySettings
    from linearpatch_kernels.distillation.teacher_store import write_teacher_store
    from linearpatch_kernels.distillation.trainable import check_trainable
    from linearpatch_kernels.distillation.trainer import TrainingSettings, heldout_losses, joint_depth
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.fingerprints import fingerprint_tokenizer, model_difference
    from linearpatch_kernels.modeling.patched import patches
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint
    from linearpatch_kernels.processes import launched_processes
    from linearpatch_kernels.pruning.search import rank_for

    settings = TrainingSettings(
        steps=steps,
        train=train or "patch",
        loss=loss,
        label_weight=label_weight,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        clip=clip,
        windows_per_step=windows_per_step,
        micro_batch=micro_batch,
        evaluate_every=evaluate_every,
        patience=patience,
        lora_rank=lora_rank,
        precision=precision,
        recompute=recompute,
        seed=seed,
    )
    check_form(patch)
    reads = [directory, on_disk(teacher), text, heldout_text, store]
    check_places(output, json_file, reads)
    work = _Work(output, store)
    for replaced in (output, work.run):
        if store is not None and lies_in(store, replaced):
            raise InputError(f"--store {store} is inside {replaced}, which this run replaces: give another --store")
    work.check()
    if loss == "topk" and top_k == 1:
        raise InputError(
            "one likeliest token alone always has all of the mass, so there is nothing to learn: give a "
            "larger --top-k, or another --loss"
        )
    source = open_shallower(directory, HierarchySettings(layer_weight, layer_error, group_steps))
    settings = dataclasses.replace(settings, train=train or source.default_train)
    texts = read_texts(text, heldout_text)
    processes = launched_processes()
    settings.check_processes(processes.count)
    if teacher_device_map is not None and processes.count > 1:
        raise InputError("--teacher-device-map spreads the teacher over all devices of one process: start only one")
    place = str(processes.device) if processes.device is not None and device is None else device
    run, notes = Reporter(), Notes(shown=processes.first)
    progress = run if processes.first else None
    with run.stage("load the models"):
        shallower = find_model(str(directory), dtype, place, trust_remote_code)
        deeper = find_model(teacher, dtype, place, trust_remote_code, teacher_device_map)
        tokenizer = _check_teacher(directory, source, shallower, deeper)
    with run.stage("tokenise"):
        windows = _windows(shallower, tokenizer, texts, settings, heldout, length)
    with run.stage("load the models"):
        student, dense = shallower.load(), deeper.load()
    difference = model_difference(source.model, dense) if source.model else ""
    if difference:
        raise InputError(f"{directory} was made from another model than this teacher ({difference}): give the same")
    check_output(output, parameter_bytes(student), overwrite=True)
    source.check_student(student, dense)
    source.check_teacher(dense, patch)
    student = source.prepare(student, patch, rank_for(rank, shallower.hidden_size), structured)
    joint = source.begin(student)
    check_trainable(student, joint_depth(student, joint), settings.train, lora_rank=settings.lora_rank)
    with work.claimed() if processes.first else contextlib.nullcontext(), run.stage("ask the teacher"):
        answers = write_teacher_store(
            dense,
            windows.all,
            work.store,
            top_k=top_k,
            depths=[*source.depths(student), *([joint_depth(student, joint)] if store_states else [])],
            tokenizer=fingerprint_tokenizer(tokenizer),
            processes=processes,
            progress=progress,
        )
    for name in answers.repaired:
        problems.print(f"note: {name} of the teacher store was damaged and has been written again", soft_wrap=True)
    found: dict[str, Quality] = {}
    if processes.first:
        with run.stage("evaluate"), left_out("the comparison before the training", notes):
            found |= _quality_before(dense, student, source, windows, run, notes)
    with run.stage("distil"):
        result = source.train(
            student,
            answers,
            _shown(run, settings, length) if processes.first else None,
            training=windows.training,
            heldout=windows.heldout,
            settings=settings,
            directory=work.run,
            processes=processes,
            noted=notes,
        )
    if not processes.first:
        return
    found |= _quality_after(dense, student, windows.evaluation, _AFTER, run, notes)
    costs: dict[str, float] = {}
    if structured is not None and isinstance(source, Pruned):
        with run.stage("structure"):
            before = heldout_losses(student, answers, joint, windows.heldout)["tail"]
            source.structure(student, answers, windows.training, structured)
            after = heldout_losses(student, answers, joint, windows.heldout)["tail"]
        costs = {"rank": structured, "heldout_before": before, "heldout_after": after}
        found |= _quality_after(dense, student, windows.evaluation, _STRUCTURED, run, notes)
    source.keep(student, patch, structured)
    verdict = verdict_on(
        found,
        _STRUCTURED if costs else _AFTER,
        {DROPPED: "plain removal", _BEFORE: "before distillation"},
        windows,
        notes,
    )
    summary = source.summary(found, run) | {"distillation": _about(result, settings, answers, windows, costs)}
    report: dict[str, bytes] = {}
    with run.stage("draw the report"), left_out("the report", notes):
        told = [*verdict, *notes.all]
        report = _report(directory, summary, found, result, windows, run, source, told, notes, bool(patches(student)))
    summary["notes"] = [*notes.all, *verdict]
    files = recorded(source.files(), summary, report)
    with run.stage("save"):
        save_checkpoint(student, tokenizer, output, overwrite=True, extra_files=files, companions=shallower.companions)
    work.remove()
    write_json(json_file, summary)
    print_quality(found, windows.evaluation_source)
    print_table(*distillation_table(summary["distillation"]))
    if costs:
        lost = costs["heldout_after"] - costs["heldout_before"]
        console.print(
            f"Hadamard + rank {structured} instead of the dense patch costs {lost:+.4f} nats of held-out KL "
            f"({costs['heldout_before']:.4f} before, {costs['heldout_after']:.4f} after).",
            soft_wrap=True,
        )
    print_seconds(run)
    say_where("Model, plan", output)
    for line in verdict:
        console.print(line, soft_wrap=True)


class _Work:
    """What a run keeps beside its output until it is done: ``OUT.work/run``, and ``OUT.work/store`` unless the person
    named a store, which stays.

    Attributes:
        run, store: the two directories.
    """

    def __init__(self, output: Path, store: Path | None) -> None:
        from linearpatch_kernels.distillation.teacher_store import STORE_FILES
        from linearpatch_kernels.distillation.trainer import RUN_FILES

        self._parent = output.with_name(f"{output.name}.work")
        self.run, self.store = self._parent / "run", store or self._parent / "store"
        self._ours = {self.run: RUN_FILES} | ({self.store: STORE_FILES} if store is None else {})

    def check(self) -> None:
        """InputError where something else stands there."""
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

    def remove(self) -> None:
        """Remove what the runs into this output wrote; what else somebody keeps there stays."""
        for directory, names in self._ours.items():
            if not remove_work_directory(directory, names):
                problems.print(f"note: {directory} was there before this run, so it stays", soft_wrap=True)
        self._remove_parent()

    def _remove_parent(self) -> None:
        with contextlib.suppress(OSError):  # what else somebody keeps there stays
            self._parent.rmdir()


# The name of no file.
_NOTHING = re.compile(r"(?!)")


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Token ids [W, T] in the store's order, which of them train and choose, and the report's own."""

    all: Tensor
    training: range
    heldout: range
    evaluation: Tensor | None
    evaluation_source: str
    source: str


def _windows(
    model: ModelSource, tokenizer: Any, texts: Texts, settings: TrainingSettings, heldout: int, length: int
) -> _Windows:
    import torch

    from linearpatch_kernels.forward import check_windows
    from linearpatch_kernels.text import split_windows, token_windows

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
            "are needed: give a longer text, a smaller --heldout or a shorter --length"
        )
    if training < wanted:
        problems.print(
            f"note: the text has {training} windows to train on for {wanted}, so they are used again", soft_wrap=True
        )
    shares = split_windows(windows, {"training": training, "heldout": heldout, "evaluation": extra})
    evaluation = shares["evaluation"] if extra else None
    if texts.report is not None:
        evaluation = token_windows(tokenizer, texts.report, length=length, count=EVALUATION_WINDOWS)
    everything = torch.cat([shares["training"], shares["heldout"]])
    for share in (everything, evaluation):
        if share is not None:
            check_windows(model, share)
    source = texts.report_source if texts.report is not None or extra else ""
    return _Windows(everything, range(training), range(training, training + heldout), evaluation, source, texts.source)


def _check_teacher(directory: Path, source: Shallower, student: ModelSource, teacher: ModelSource) -> Any:
    """The tokenizer of both; InputError where what is known before the weights are loaded does not fit together."""
    from linearpatch_kernels.fingerprints import tokenizer_difference

    if teacher.num_layers != source.num_layers or teacher.hidden_size != student.hidden_size:
        raise InputError(
            f"{directory} was made from a model of {source.num_layers} layers of width {student.hidden_size} and the "
            f"teacher has {teacher.num_layers} of width {teacher.hidden_size}: give the model it was made from"
        )
    difference = tokenizer_difference(student.tokenizer, teacher.tokenizer)
    if difference:
        raise InputError(
            f"{directory} and the teacher have different tokenizers ({difference}): give the model it was made from"
        )
    return student.tokenizer


def _quality_before(
    dense: PreTrainedModel,
    student: PreTrainedModel,
    source: Shallower,
    windows: _Windows,
    run: Reporter,
    notes: Notes,
) -> dict[str, Quality]:
    from linearpatch_kernels.evaluation.agreement import compare_quality
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.modeling.families import is_dispatched

    if windows.evaluation is None:
        return {}
    removed: dict[str, PreTrainedModel] = {}
    if is_dispatched(dense):
        problems.print("note: a teacher spread over devices cannot be cut, so plain removal is not measured")
    else:
        with left_out(DROPPED, notes):
            removed[DROPPED] = source.removed(dense, windows.all[: len(windows.training)])
    models = {"dense": dense, **removed, _BEFORE: student}
    return compare_quality(models, windows.evaluation, dense, noted=notes, progress=run)


def _quality_after(
    dense: PreTrainedModel, student: PreTrainedModel, windows: Tensor | None, name: str, run: Reporter, notes: Notes
) -> dict[str, Quality]:
    from linearpatch_kernels.evaluation.agreement import compare_quality
    from linearpatch_kernels.evaluation.notes import left_out

    if windows is None:
        return {}
    found: dict[str, Quality] = {}
    with run.stage("evaluate"), left_out(f"the comparison of the model, {name},", notes):
        found = compare_quality({name: student}, windows, dense, noted=notes, progress=run)
    return found


def _shown(run: Reporter, settings: TrainingSettings, length: int) -> Any:
    def show(what: str, step: Step) -> None:
        tokens = (step.steps - step.done) * settings.windows_per_step * length
        minutes, seconds = divmod(round(tokens / step.tokens_per_second), 60)
        run(
            what,
            step.done,
            step.steps,
            f"loss {step.loss:.3f}, held out {step.heldout:.3f}, {step.tokens_per_second:,.0f} tokens/s, "
            f"{minutes}:{seconds:02} left",
        )

    return show


def _about(
    result: Distillation,
    settings: TrainingSettings,
    store: TeacherStore,
    windows: _Windows,
    structured: Mapping[str, float],
) -> dict[str, Any]:
    return {
        **dataclasses.asdict(settings),
        "parameters": result.parameters,
        "steps_made": result.steps,
        "best_step": result.best_step,
        "curve": [dict(point) for point in result.curve],
        "top_k": store.request.top_k,
        "length": store.request.length,
        "training_windows": len(windows.training),
        "heldout_windows": len(windows.heldout),
        "text": windows.source,
        "training_seconds": round(result.seconds, 2),
        "structured": dict(structured),
    }


def distillation_table(about: Mapping[str, Any]) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    """What `print_table` takes: a run in a few rows."""
    curve = {int(point["step"]): point for point in about["curve"]}
    labels = f", {about['label_weight']:.0%} the text's own next tokens" if about.get("label_weight") else ""
    rows = [
        ["trained", f"{about['train']}: {about['parameters']:,} parameters"],
        ["loss", f"{about['loss']} over the teacher's {about['top_k']} likeliest tokens{labels}"],
        ["text", f"{about['training_windows']} windows of {about['length']} tokens from {about['text']}"],
        ["steps", f"{about['steps_made']} of {about['steps']}, the best is {about['best_step']}"],
        ["held-out KL", f"{curve[0]['tail']:.4f} before, {curve[about['best_step']]['tail']:.4f} after"],
        ["training", f"{about['training_seconds']:.0f} s"],
    ]
    return "Distillation", ["what", "value"], rows


def _report(
    directory: Path,
    summary: Mapping[str, Any],
    found: Mapping[str, Quality],
    result: Distillation,
    windows: _Windows,
    run: Reporter,
    source: Shallower,
    told: Sequence[str],
    notes: Notes,
    patched: bool,
) -> dict[str, bytes]:
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData, draw_report, plot_training

    about = summary["distillation"]
    data = ReportData(
        title=f"{title_of(str(directory))}, distilled",
        notes=told,
        steps=[f"{name.capitalize()}: {value}." for name, value in distillation_table(about)[2]],
        quality=[
            QualityRow(name, source.num_layers if name == "dense" else source.layers, one)
            for name, one in found.items()
        ],
        quality_text=f"{len(windows.evaluation)} windows of {windows.evaluation_source}"
        if windows.evaluation is not None
        else "",
        dense="dense",
        dropped=DROPPED,
        spans=source.spans(),
        timings=dict(run.seconds),
        usage=usage("DIR", patched=patched),
        files={
            **{f"{RECORDS}/{name}": what for name, what in source.plan_files.items()},
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/log.jsonl": "loss, learning rate, norm of the gradient and speed of every step",
        },
    )
    measured = [name for name in result.curve[0] if name != "step"]
    heldout = {name: {int(point["step"]): point[name] for point in result.curve} for name in measured}
    losses = [line["loss"] for line in result.log]
    curve = (
        "Loss of every step, and on held-out windows now and then.",
        lambda path: plot_training(path, losses, heldout, result.best_step),
    )
    files = draw_report(data, {"distillation.png": curve}, notes)
    return files | {"log.jsonl": "".join(json.dumps(line) + "\n" for line in result.log).encode()}
