"""``linearpatch prune``: remove layers, heal the joint, save."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    candidates_table,
    console,
    json_text,
    print_quality,
    print_seconds,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.inputs import (
    Windows,
    check_can_be_cut,
    check_places,
    find_model,
    heldout_windows,
    make_windows,
    on_disk,
    read_texts,
    title_of,
)
from linearpatch_kernels.cli.options import (
    BatchSize,
    Device,
    Drop,
    Dtype,
    HeldoutText,
    JsonFile,
    Length,
    Model,
    Output,
    Rank,
    Samples,
    Score,
    Text,
    TrustRemoteCode,
)
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.pruning.fits import AUTO, FITS, fits_of
from linearpatch_kernels.pruning.scores import SCORES, check_drop

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.evaluation.report import ReportData
    from linearpatch_kernels.pruning.plan import PrunePlan
    from linearpatch_kernels.pruning.search import Pruning


def prune(
    model: Model,
    output: Output,
    drop: Drop = None,
    spans: Annotated[
        str | None,
        typer.Option("--spans", metavar="A:B,...", help="Remove these layers instead, half-open.", show_default=False),
    ] = None,
    score: Score = "cosine",
    fit: Annotated[
        str,
        typer.Option(
            "--fit",
            metavar="NAME",
            help=f"{AUTO} (the best of all on held-out windows), {FITS.described()}.",
        ),
    ] = "auto",
    rank: Rank = None,
    structured: Annotated[bool, typer.Option("--structured", help="auto: leave the dense d x d map out.")] = False,
    text: Text = None,
    heldout_text: HeldoutText = None,
    samples: Samples = 64,
    length: Length = 512,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write the plan and the report, not the model.")
    ] = False,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 4,
) -> None:
    """Remove layers from MODEL, heal the joint, write the shallower model to DIR with its plan and a report."""
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.fingerprints import fingerprint_model
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint, save_files
    from linearpatch_kernels.processes import launched_processes
    from linearpatch_kernels.pruning.apply import apply_plan
    from linearpatch_kernels.pruning.plan import checked_spans, parse_spans
    from linearpatch_kernels.pruning.search import check_rank, plan_pruning, rank_for

    if (drop is None) == (spans is None):
        raise InputError("say what to remove: either --drop N or --spans START:END")
    chooses = SCORES.named(score).runs_the_model or fit == AUTO
    fits_of(fit, structured=structured)
    wanted = parse_spans(spans) if spans is not None else []
    if wanted:
        # Whatever the model's depth, these must not touch.
        checked_spans(wanted, max(span.end for span in wanted) + 1)
    reads = [on_disk(model), text, heldout_text]
    check_places(output, json_file, reads)
    run = Reporter()
    texts = read_texts(text, heldout_text)
    processes = launched_processes()
    notes = Notes(shown=processes.first)
    place = str(processes.device) if processes.device is not None and device is None else device
    with run.stage("load the model"):
        source = find_model(model, dtype, place, trust_remote_code)
        check_can_be_cut(source)
    if wanted:
        checked_spans(wanted, source.num_layers)
    else:
        check_drop(drop, source.num_layers)
    with run.stage("tokenise"):
        rank = rank_for(rank, source.hidden_size)
        check_rank(rank, source.hidden_size, [fit], score)
        windows = make_windows(
            source,
            source.tokenizer,
            texts,
            samples=samples,
            heldout=heldout_windows(samples) if chooses else 0,
            length=length,
        )
    with run.stage("load the model"):
        dense = source.load()
    check_output(output, 0 if plan_only else parameter_bytes(dense), overwrite=True)
    with run.stage("calibrate and fit"):
        pruning = plan_pruning(
            dense,
            windows.fit,
            windows.heldout,
            drop=drop,
            spans=wanted,
            score=score,
            fit=fit,
            rank=rank,
            structured=structured,
            about=windows.about,
            fingerprint=fingerprint_model(dense),
            batch_size=batch_size,
            ranks=processes,
            noted=notes,
            progress=run if processes.first else None,
        )
    if not processes.first:
        return
    found: dict[str, Quality] = {}
    with left_out("the comparison on held-out text", notes):
        found = _compare(dense, pruning, windows, run, notes)
    verdict = _verdict(pruning.plan, found, windows, notes)
    report = _drawn(model, pruning, found, windows, run, dense, notes, verdict)
    summary = summarise(pruning.plan, found, run) | {"notes": [*notes.all, *verdict]}
    files = recorded(pruning.plan.files(), summary, report)
    with run.stage("save"):
        if plan_only:
            save_files(output, files, overwrite=True)
        else:
            save_checkpoint(
                apply_plan(dense, pruning.plan),
                source.tokenizer,
                output,
                overwrite=True,
                extra_files=files,
                companions=source.companions,
            )
    write_json(json_file, summary)
    for table in candidates_table(pruning.plan):
        print_table(*table)
    print_quality(found, windows.evaluation_source)
    print_seconds(run)
    say_where("Plan" if plan_only else "Model, plan", output)
    for line in verdict:
        console.print(line, soft_wrap=True)


DROPPED, PAPERS = "dropped (no patch)", "LinearPatch (the paper's)"
COMPARED = {DROPPED: "none", PAPERS: "linearpatch"}
"""Rows for comparison and their fits."""


def _row(plan: PrunePlan) -> str:
    """In which row of the comparison the result is."""
    fit = plan.joints[0].fit
    return next((row for row, its in COMPARED.items() if its == fit), f"healed ({fit})")


def _compare(
    dense: PreTrainedModel, pruning: Pruning, windows: Windows, run: Reporter, notes: Notes
) -> dict[str, Quality]:
    """Quality on the report's windows: dense, plain removal, the paper's patch, and what was kept."""
    from linearpatch_kernels.forward import Run
    from linearpatch_kernels.pruning.selection import compare_candidates, usable_candidates

    if windows.evaluation is None:
        return {}
    candidates = usable_candidates(pruning.statistics, pruning.plan.spans, COMPARED, noted=notes)
    candidates[_row(pruning.plan)] = pruning.plan.joints
    with run.stage("evaluate"):
        return compare_candidates(
            dense, windows.evaluation, candidates, description="evaluating", noted=notes, run=Run(progress=run)
        )


def _verdict(plan: PrunePlan, found: Mapping[str, Quality], windows: Windows, notes: Notes) -> list[str]:
    """That the result is worse than plain removal, if it is; on which windows; and what to do."""
    if windows.evaluation is None and (windows.heldout is not None or plan.joints[0].fit == "none"):
        return []
    told = verdict_on(found, _row(plan), {DROPPED: "plain removal"}, windows, notes)
    instead = ", or --fit auto, which chooses on held-out text" if not plan.candidates else ""
    return [f"{line} Give more text (--samples){instead}." for line in told]


class Judged(Protocol):
    """The windows of a report, and whose they are."""

    @property
    def evaluation(self) -> Tensor | None: ...

    @property
    def evaluation_source(self) -> str: ...


def verdict_on(
    found: Mapping[str, Quality], row: str, against: Mapping[str, str], windows: Judged, notes: Notes
) -> list[str]:
    """That the result in ``row`` is worse than another row, if it is, and on which windows.

    Args:
        against: the other rows -> what they are called in a sentence.
    """
    from linearpatch_kernels.evaluation.agreement import told_if_worse

    if windows.evaluation is None:
        notes("no text is left to compare the result with plain removal on: give more text, or --heldout-text")
        return []
    judged = f"{len(windows.evaluation)} windows of {windows.evaluation_source}"
    return [line for other, than in against.items() for line in told_if_worse(found, row, other, judged, than=than)]


def _drawn(
    model: str,
    pruning: Pruning,
    found: Mapping[str, Quality],
    windows: Windows,
    run: Reporter,
    dense: PreTrainedModel,
    notes: Notes,
    verdict: list[str],
) -> dict[str, bytes]:
    """The report's files; what cannot be drawn is left out, with a note."""
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.pruning.reporting import joint_magnitudes, prune_report

    shown = windows.heldout if windows.heldout is not None else windows.fit[:4]
    magnitudes = None
    report: dict[str, bytes] = {}
    with run.stage("draw the report"), left_out("the report", notes):
        with left_out("the picture of the channels' magnitudes", notes):
            magnitudes = joint_magnitudes(dense, shown, pruning.plan.joints[0])
        data = report_data(model, pruning, found, windows, run, dense)
        data = dataclasses.replace(data, notes=[*verdict, *notes.all])
        report = prune_report(data, pruning.plan, pruning.statistics, magnitudes, title_of(model), noted=notes)
    return report


def report_data(
    model: str, pruning: Pruning, found: Mapping[str, Quality], windows: Windows, run: Reporter, dense: PreTrainedModel
) -> ReportData:
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData
    from linearpatch_kernels.pruning.reporting import candidate_rows, span_rows

    plan = pruning.plan
    layers = plan.num_layers
    kept = len(plan.kept_layers)
    about = windows.about
    return ReportData(
        title=f"{title_of(model)}: {layers} layers to {kept}",
        steps=[
            f"Calibrated on {about['samples']} windows of {about['length']} tokens from {about['source']}.",
            f"Removed the layers {', '.join(map(str, plan.spans))} (half-open; chosen by: {plan.score}).",
            f"Healed the joint{'s' if len(plan.joints) > 1 else ''} with the fit {plan.joints[0].fit}.",
        ],
        quality=[QualityRow(name, layers if name == "dense" else kept, quality) for name, quality in found.items()],
        quality_text=f"{len(windows.evaluation)} windows of {windows.evaluation_source}"
        if windows.evaluation is not None
        else "",
        dense="dense",
        dropped=DROPPED,
        candidates=candidate_rows(plan),
        spans=span_rows(plan, pruning.statistics),
        timings=dict(run.seconds),
        usage=usage("DIR", patched=any(joint.patch is not None for joint in plan.joints)),
        files={
            f"{RECORDS}/plan.json": "spans, kind of patch, what chose them",
            f"{RECORDS}/plan.safetensors": "the patches",
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/report.md": "this report",
        },
    )


def usage(directory: str, *, patched: bool) -> str:
    place = json.dumps(directory, ensure_ascii=False)  # Python's string, too, whatever is in the name
    registers = "import linearpatch_kernels.modeling  # registers the patched classes\n" if patched else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{registers}"
        f"model = AutoModelForCausalLM.from_pretrained({place})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})"
    )


def summarise(plan: PrunePlan, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
    return {
        "spans": [str(span) for span in plan.spans],
        "num_layers": {"dense": plan.num_layers, "pruned": len(plan.kept_layers)},
        "fit": plan.joints[0].fit,
        "score": plan.score,
        "quality": {name: quality.to_dict() for name, quality in found.items()},
        "candidates": [dict(row) for row in plan.candidates],
        "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
    }


def recorded(
    plan: Mapping[str, bytes], summary: Mapping[str, Any], report: Mapping[str, bytes]
) -> dict[str, bytes | str]:
    """What an output carries beside a model: plan, summary and report, in a directory that no engine looks into."""
    files: dict[str, bytes | str] = {**plan, "summary.json": json_text(summary)}
    files |= {f"report/{name}": content for name, content in report.items()}
    return {f"{RECORDS}/{name}": content for name, content in files.items()}


def say_where(what: str, output: Path) -> None:
    """The last line of a command that wrote an output."""
    report = output / RECORDS / "report" / "report.md"
    console.print(f"{what} and report: {output} (report: {report})", soft_wrap=True)
