"""Quality against depth: every number of dropped layers with every fit, from one calibration."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels.calibration import CalibrationStatistics
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.files import json_text
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import Run
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.patterns import Pattern, pattern_of
from linearpatch_kernels.modeling.saving import save_files
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.pruning import search
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES, check_drop, scores_of_statistics
from linearpatch_kernels.pruning.search import SweepPoint, check_rank, rank_for
from linearpatch_kernels.recipes.inputs import (
    GivenModel,
    Windows,
    check_can_be_cut,
    check_output_place,
    find_model,
    make_windows,
    names_in,
    read_texts,
    title_of,
)
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.recipes.outputs import Result, judged_on
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.report.page import DENSE, QualityRow, ReportData
from linearpatch_kernels.report.pruning import sweep_report
from linearpatch_kernels.settings import SweepSettings
from linearpatch_kernels.span import MOST_LAYERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult(Result):
    """What `sweep` found.

    Attributes:
        points: one a number of layers and fit; ``quality`` has the dense model's alone.
    """

    points: tuple[SweepPoint, ...]


def sweep(
    model: GivenModel,
    settings: SweepSettings | None = None,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **named: Any,
) -> SweepResult:
    """Quality against depth: every number of dropped layers with every fit, from one calibration; table and plot::

        lp.sweep("demo", drop="1-12", output="DIR")

    Does what ``linearpatch sweep`` does: the same checks, report and files. ``output`` and ``drop`` are needed. A run
    that was killed goes on from its calibration when it is called again.

    Args:
        model, settings, tokenizer, reporter, named: as of `prune`.

    Raises:
        InputError: a model, a text, a value or a place for the output that cannot be worked with; before long work
            where that can be known.
    """
    settings = SweepSettings.of(settings, named)
    check_alone("sweep")
    log = Log(reporter)
    job = _prepare(model, settings, tokenizer, log)
    dense, points = job.measured(log)
    summary = _summarise(job, dense, points, log)
    files: dict[str, bytes] = {}
    with left_out("the report", log.note):
        data = _report_data(job, dense, points, log)
        files |= sweep_report(data, dense.perplexity, points, title_of(model), noted=log.note)
    files["sweep.json"] = json_text(summary).encode()
    save_files(settings.output, files, overwrite=True)
    job.unfinished.forget()
    return SweepResult(
        output=settings.output,
        summary=summary,
        quality={DENSE: dense},
        quality_text=job.windows.evaluation_source,
        seconds=log.seconds,
        points=tuple(points),
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """A model, and what of it is measured."""

    model: GivenModel
    settings: SweepSettings
    dense: PreTrainedModel
    windows: Windows
    drops: Sequence[int]
    fits: Sequence[str]
    rank: int
    pattern: Pattern | None
    unfinished: Unfinished

    def measured(self, log: Log) -> tuple[Quality, list[SweepPoint]]:
        """Quality of the dense model, and of every point; from the calibration that an earlier run left."""
        assert self.windows.evaluation is not None
        identity = f"{fingerprint_model(self.dense)} {json.dumps(self.windows.about, sort_keys=True)}"

        def load(file: Any) -> CalibrationStatistics:
            return CalibrationStatistics.load(file, fingerprint=identity, cure="it is made again")

        def keep(statistics: CalibrationStatistics) -> None:
            self.unfinished.keep(lambda file: statistics.save(file, fingerprint=identity))

        earlier = self.unfinished.earlier(load, log)
        if earlier is not None:
            log.mention("going on from the calibration of a sweep that did not finish")
        with log.stage("calibrate, fit and evaluate"), self.unfinished.forgotten_if_refused():
            quality, points, _ = search.sweep(
                self.dense,
                self.windows.fit,
                self.windows.evaluation,
                self.drops,
                self.fits,
                score=self.settings.score,
                rank=self.rank,
                pattern=self.pattern,
                statistics=earlier,
                keep=keep,
                noted=log.note,
                run=Run(self.settings.batch_size, progress=log.progress),
            )
        return quality, points


def _prepare(model: GivenModel, settings: SweepSettings, tokenizer: Any, log: Log) -> _Job:
    """All before the calibration: checks, text, model."""
    fits = names_in(settings.fits)
    for name in fits:
        FITS.named(name)
    SCORES.named(settings.score, among=scores_of_statistics())
    drops = _depths(settings.drop)
    check_output_place(settings.output, model, *(settings.text or ()), settings.heldout_text)
    unfinished = Unfinished(settings.output, "statistics")
    texts = read_texts(settings.text, settings.heldout_text)
    with log.stage("load the model"):
        source = find_model(model, settings, log, tokenizer=tokenizer)
        check_can_be_cut(source)
    for count in drops:
        check_drop(count, source.num_layers)
    with log.stage("tokenise"):
        rank = rank_for(settings.rank, source.hidden_size)
        check_rank(rank, source.hidden_size, fits)
        windows = make_windows(source, source.tokenizer, texts, settings, log, heldout=0, report=settings.windows)
    if windows.evaluation is None:
        raise InputError(
            "the text leaves no windows to evaluate on: give more text, fewer `samples`, or `heldout_text`"
        )
    with log.stage("load the model"):
        dense = source.load()
    pattern = pattern_of(dense) if settings.keep_pattern else None
    if pattern is not None:
        drops = _that_keep(pattern, drops, log)
    return _Job(model, settings, dense, windows, drops, fits, rank, pattern, unfinished)


def _that_keep(pattern: Pattern, drops: Sequence[int], log: Log) -> list[int]:
    """The numbers of layers that can go and leave the pattern; a note names the others."""
    found = [count for count in drops if count in pattern.lengths]
    if not found:
        pattern.spans(drops[0])
    gone = [str(count) for count in drops if count not in found]
    if gone:
        log.note(f"left out: {', '.join(gone)} layers less, without which their kinds do not stay {pattern}")
    return found


def _depths(given: str | int | Sequence[int]) -> list[int]:
    """``"1-12"`` or ``"2,4,8"``, or numbers -> numbers of layers to drop, in order."""
    text = given if isinstance(given, str) else ",".join(map(str, [given] if isinstance(given, int) else given))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise InputError(f"`drop` {text} is not understood: write a range such as 1-12 or a list such as 2,4,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise InputError(f"`drop` {part.strip()} is an empty range: write the smaller number first")
        if first < 1 or last > MOST_LAYERS:
            raise InputError(f"`drop` {part.strip()} fits no model: give numbers from 1 on, below the model's depth")
        found |= set(range(first, last + 1))
    return sorted(found)


def _report_data(job: _Job, dense: Quality, points: Sequence[SweepPoint], log: Log) -> ReportData:
    about, layers = job.windows.about, num_layers(job.dense)
    rows = [
        QualityRow(f"{point.fit}, {','.join(map(str, point.plan.spans))}", layers - point.drop, point.quality)
        for point in points
    ]
    return ReportData(
        title=f"{title_of(job.model)}: quality against depth",
        notes=list(log.notes),
        steps=[
            f"Calibrated once on {about['samples']} windows of {about['length']} tokens from {about['source']}.",
            f"Chose the span of every n by {job.settings.score}; fitted {', '.join(job.fits)}.",
        ],
        quality=[QualityRow(DENSE, layers, dense), *rows],
        quality_text=judged_on(job.windows),
        timings=log.seconds,
    )


def _summarise(job: _Job, dense: Quality, points: Sequence[SweepPoint], log: Log) -> dict[str, Any]:
    return {
        "text": job.windows.evaluation_source,
        "calibration": job.windows.about,
        "score": job.settings.score,
        "dense": dense.to_dict(),
        "points": [
            {
                "drop": point.drop,
                "fit": point.fit,
                "spans": [str(span) for span in point.plan.spans],
                **point.quality.to_dict(),
            }
            for point in points
        ],
        "seconds": log.rounded_seconds(),
        "notes": log.notes,
    }
