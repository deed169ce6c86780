"""``linearpatch sweep``: quality against depth."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    TableContent,
    console,
    figure,
    json_text,
    print_seconds,
    print_table,
    problems,
    write_json,
)
from linearpatch_kernels.cli.inputs import (
    check_can_be_cut,
    check_places,
    find_model,
    forget,
    make_windows,
    num_layers_of,
    on_disk,
    read_texts,
    title_of,
)
from linearpatch_kernels.cli.options import (
    BatchSize,
    Device,
    Dtype,
    HeldoutText,
    JsonFile,
    Length,
    Model,
    Output,
    Rank,
    Samples,
    ScoreOfStatistics,
    Text,
    TrustRemoteCode,
)
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import check_file
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES, check_drop, scores_of_statistics

if TYPE_CHECKING:
    from linearpatch_kernels.calibration import CalibrationStatistics


def sweep(
    model: Model,
    output: Output,
    drop: Annotated[
        str,
        typer.Option("--drop", metavar="A-B", help="Numbers of layers to drop: 1-12, or 2,4,8.", show_default=False),
    ],
    fits: Annotated[
        str, typer.Option("--fits", metavar="A,B,...", help=f"Fits to compare: {', '.join(FITS)}.")
    ] = "none,linearpatch,low-rank,least-squares",
    score: ScoreOfStatistics = "cosine",
    rank: Rank = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    samples: Samples = 64,
    length: Length = 512,
    evaluation_windows: Annotated[
        int,
        typer.Option("--windows", metavar="N", min=1, help="Held-out windows that every n and fit is evaluated on."),
    ] = 8,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 4,
) -> None:
    """Quality against depth: every number of dropped layers with every fit, from one calibration; table and plot."""
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData
    from linearpatch_kernels.fingerprints import fingerprint_model
    from linearpatch_kernels.modeling.saving import save_files
    from linearpatch_kernels.processes import check_alone
    from linearpatch_kernels.pruning.reporting import sweep_report
    from linearpatch_kernels.pruning.search import check_rank, rank_for
    from linearpatch_kernels.pruning.search import sweep as run_sweep

    check_alone("sweep")
    names = list(dict.fromkeys(name.strip() for name in fits.split(",")))
    for name in names:
        FITS.named(name)
    SCORES.named(score, among=scores_of_statistics())
    drops = _depths(drop)
    reads = [on_disk(model), text, heldout_text]
    check_places(output, json_file, reads)
    target = output.resolve()
    unfinished = target.with_name(f".{target.name}.statistics")
    check_file(unfinished, f"{unfinished}, where the calibration of an unfinished run is kept,", parents=True)
    run, notes = Reporter(), Notes()
    texts = read_texts(text, heldout_text)
    with run.stage("load the model"):
        source = find_model(model, dtype, device, trust_remote_code)
        check_can_be_cut(source)
    for count in drops:
        check_drop(count, source.num_layers)
    with run.stage("tokenise"):
        rank = rank_for(rank, source.hidden_size)
        check_rank(rank, source.hidden_size, names)
        windows = make_windows(
            source,
            source.tokenizer,
            texts,
            samples=samples,
            heldout=0,
            length=length,
            report=evaluation_windows,
        )
    if windows.evaluation is None:
        raise InputError(
            "the text leaves no windows to evaluate on: give more text, fewer --samples, or --heldout-text"
        )
    with run.stage("load the model"):
        dense = source.load()
    identity = f"{fingerprint_model(dense)} {json.dumps(windows.about, sort_keys=True)}"
    earlier = _resumed(unfinished, identity)
    with run.stage("calibrate, fit and evaluate"):
        try:
            quality, points, _ = run_sweep(
                dense,
                windows.fit,
                windows.evaluation,
                drops,
                names,
                score=score,
                rank=rank,
                statistics=earlier,
                keep=partial(_keep, unfinished, identity),
                batch_size=batch_size,
                noted=notes,
                progress=run,
            )
        except InputError:
            # Not killed but refused: the same sweep would be refused again.
            forget(unfinished)
            raise
    rows = [QualityRow("dense", num_layers_of(dense), quality)] + [
        QualityRow(f"{p.fit}, {','.join(map(str, p.plan.spans))}", num_layers_of(dense) - p.drop, p.quality)
        for p in points
    ]
    data = ReportData(
        title=f"{title_of(model)}: quality against depth",
        notes=list(notes.all),
        steps=[
            f"Calibrated once on {samples} windows of {length} tokens from {texts.source}.",
            f"Chose the span of every n by {score}; fitted {', '.join(names)}.",
        ],
        quality=rows,
        quality_text=f"{len(windows.evaluation)} windows of {windows.evaluation_source}",
        timings=run.seconds,
    )
    summary = {
        "text": windows.evaluation_source,
        "calibration": windows.about,
        "score": score,
        "dense": quality.to_dict(),
        "points": [
            {"drop": p.drop, "fit": p.fit, "spans": [str(span) for span in p.plan.spans], **p.quality.to_dict()}
            for p in points
        ],
        "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
        "notes": notes.all,
    }
    files: dict[str, bytes] = {}
    with left_out("the report", notes):
        files |= sweep_report(data, quality.perplexity, points, title_of(model), noted=notes)
    files["sweep.json"] = json_text(summary).encode()
    save_files(output, files, overwrite=True)
    forget(unfinished)
    write_json(json_file, summary)
    print_table(*sweep_table(summary))
    print_seconds(run)
    console.print(f"Table, plot and figures: {output}", soft_wrap=True)


def sweep_table(summary: Mapping[str, Any]) -> TableContent:
    """The content of ``sweep.json`` as a table: a row per number of dropped layers, a column per fit."""
    points = {(point["drop"], point["fit"]): point for point in summary["points"]}
    fits = list(dict.fromkeys(fit for _, fit in points))
    rows = []
    for drop in dict.fromkeys(drop for drop, _ in points):
        # Some fits may have been left out at some depths.
        there = {fit: points[drop, fit] for fit in fits if (drop, fit) in points}
        spans = next(iter(there.values()))["spans"]
        cells = [figure(there[fit]["perplexity"]) if fit in there else "" for fit in fits]
        rows.append([str(drop), ",".join(spans), *cells])
    title = f"Perplexity on {summary['text']} (dense: {figure(summary['dense']['perplexity'])})"
    return title, ["dropped", "span", *map(str, fits)], rows


def _keep(file: Path, fingerprint: str, statistics: CalibrationStatistics) -> None:
    """Save what a killed sweep goes on from; where there is no room or directory for it, do without."""
    with contextlib.suppress(InputError):
        statistics.save(file, fingerprint=fingerprint)


def _resumed(file: Path, fingerprint: str) -> CalibrationStatistics | None:
    """What a killed sweep into the same directory had collected of the same model and text, if anything."""
    from linearpatch_kernels.calibration import CalibrationStatistics
    from linearpatch_kernels.files import left_by_us

    if not left_by_us(file):
        return None
    try:
        statistics = CalibrationStatistics.load(file, fingerprint=fingerprint, cure="it is made again")
    except InputError as error:
        problems.print(f"note: {error}", soft_wrap=True)
        return None
    problems.print("going on from the calibration of a sweep that did not finish")
    return statistics


# More layers than any model has: a slip of the finger must not fill the memory.
_MOST_LAYERS = 10_000


def _depths(text: str) -> list[int]:
    """``"1-12"`` or ``"2,4,8"`` -> numbers of layers to drop, in order."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise InputError(f"--drop {text} is not understood: write a range such as 1-12 or a list such as 2,4,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise InputError(f"--drop {part.strip()} is an empty range: write the smaller number first")
        if first < 1 or last > _MOST_LAYERS:
            raise InputError(f"--drop {part.strip()} fits no model: give numbers from 1 on, below the model's depth")
        found |= set(range(first, last + 1))
    return sorted(found)
