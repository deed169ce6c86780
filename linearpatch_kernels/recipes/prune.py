"""Remove layers, heal the joint, measure, save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels import processes
from linearpatch_kernels.evaluation.agreement import Quality, compare_quality
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing.choice import Healed
from linearpatch_kernels.modeling.halves import kinds_of_halves
from linearpatch_kernels.modeling.loading import Source
from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint, save_files
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning import selection
from linearpatch_kernels.pruning.fits import AUTO
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.search import Pruning, check_rank, plan_pruning, rank_for
from linearpatch_kernels.pruning.selection import usable_candidates
from linearpatch_kernels.recipes.healing import Healing, asked, heal, possible, told
from linearpatch_kernels.recipes.inputs import (
    GivenModel,
    Windows,
    check_can_be_cut,
    check_output_place,
    find_model,
    heldout_windows,
    make_windows,
    read_texts,
    title_of,
)
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.recipes.outputs import (
    Result,
    card,
    judged_on,
    recorded,
    told_of_base,
    told_of_result,
    verdict_on,
)
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.recipes.searching import Removal, found_by_search
from linearpatch_kernels.report import pruning as pruning_report
from linearpatch_kernels.report.card import usage
from linearpatch_kernels.report.page import DENSE, DROPPED, QualityRow, ReportData
from linearpatch_kernels.report.pruning import candidate_rows, prune_report, span_rows
from linearpatch_kernels.report.steps import steps
from linearpatch_kernels.settings import PruneSettings

PAPERS = "LinearPatch (the paper's)"
COMPARED = {DROPPED: "none", PAPERS: "linearpatch"}
"""Rows for comparison and their fits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneResult(Result):
    """What `prune` did.

    Attributes:
        plan: what was removed, and what heals it.
    """

    plan: PrunePlan


def prune(
    model: GivenModel,
    settings: PruneSettings | None = None,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **named: Any,
) -> PruneResult:
    """Remove layers from a model, heal the joint, and write the shallower model with its plan and a report::

        lp.prune("demo", drop=6, output="DIR")

    Does what ``linearpatch prune`` does: the same checks, report and files. ``output`` is needed, and ``drop`` or
    ``spans``.

    Args:
        model: a directory, a hub id, a ``.gguf`` file, or ``"demo"``; or a loaded causal LM of Transformers, which does
            not change: ``dtype`` and ``device`` are then its own.
        tokenizer: of a loaded model, and needed with one.
        settings: or their fields by ``named``.
        reporter: is told progress and notes; by default notes are Python warnings, and progress is not shown.

    Raises:
        InputError: a model, a text, a value or a place for the output that cannot be worked with; before long work
            where that can be known.
    """
    settings = PruneSettings.of(settings, named)
    log = Log(reporter)
    cut = plan_cut(model, settings, log, tokenizer=tokenizer)
    healed = heal(
        cut.dense,
        cut.pruning.plan,
        cut.windows,
        cut.healing,
        unfinished=cut.unfinished,
        processes=cut.processes,
        log=log,
    )
    plan = healed.plan
    if not cut.processes.first:
        return PruneResult(output=settings.output, written=False, plan=plan)
    found: dict[str, Quality] = {}
    with left_out("the comparison on held-out text", log.note):
        found = cut.compare(cut.candidates({} if healed.rows else {_row(healed): plan}, log), log)
        found |= cut.compare_models({_row(healed): healed.model} if healed.rows else {}, log)
    verdict = _verdict(cut, healed, found, log)
    summary = cut.summary(healed, _row(healed), found, log)
    report = _report(cut, healed, found, verdict, summary, log)
    summary |= {"seconds": log.rounded_seconds(), "notes": [*log.notes, *verdict]}
    files = recorded(plan.files(), summary, report)
    with log.stage("save"):
        if settings.plan_only:
            save_files(settings.output, files, overwrite=True)
        else:
            cut.save(healed.model, settings.output, files | card(summary, log))
    cut.forget()
    return PruneResult(
        output=settings.output,
        summary=summary,
        quality=found,
        quality_text=cut.windows.evaluation_source,
        seconds=log.seconds,
        verdict=tuple(verdict),
        plan=plan,
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model, and the plan that was made for it.

    Attributes:
        model: as it was named; source, dense: where it is from, and the model itself.
        processes: this one among its siblings, which all have the same plan.
        healing: what it is to be healed by.
        unfinished: where a refit keeps its work; searched: where a search does.
    """

    model: GivenModel
    source: Source
    dense: PreTrainedModel
    windows: Windows
    pruning: Pruning
    healing: Healing
    processes: Processes
    unfinished: Unfinished
    searched: Unfinished

    def forget(self) -> None:
        """Remove what a killed run would have gone on from."""
        self.unfinished.forget()
        self.searched.forget()

    def candidates(self, plans: Mapping[str, PrunePlan], log: Log) -> dict[str, tuple[Joint, ...]]:
        """The rows of a comparison: plain removal, the paper's patch, and these plans."""
        found = usable_candidates(self.pruning.statistics, self.pruning.plan.spans, COMPARED, noted=log.note)
        return found | {row: plan.joints for row, plan in plans.items()}

    def compare(self, candidates: Mapping[str, tuple[Joint, ...]], log: Log) -> dict[str, Quality]:
        """Quality of the dense model and the candidates on the report's windows."""
        if self.windows.evaluation is None:
            return {}
        with log.stage("evaluate"):
            return selection.compare_candidates(
                self.dense,
                self.windows.evaluation,
                candidates,
                description="evaluating",
                noted=log.note,
                run=Run(progress=log.progress),
            )

    def compare_models(self, models: Mapping[str, PreTrainedModel], log: Log) -> dict[str, Quality]:
        """Quality of models with weights of their own: no comparison from the dense model's states knows them."""
        if self.windows.evaluation is None or not models:
            return {}
        with log.stage("evaluate"):
            return compare_quality(models, self.windows.evaluation, self.dense, noted=log.note, progress=log.progress)

    def magnitudes(self, log: Log) -> tuple[Tensor, Tensor, Tensor] | None:
        """The channels' magnitudes at the first joint, for a picture; None, with a note, where that fails."""
        shown = self.windows.heldout if self.windows.heldout is not None else self.windows.fit[:4]
        found = None
        with left_out("the picture of the channels' magnitudes", log.note):
            found = pruning_report.joint_magnitudes(self.dense, shown, self.pruning.plan.joints[0])
        return found

    def draw(self, data: ReportData, magnitudes: tuple[Tensor, Tensor, Tensor] | None, log: Log) -> dict[str, bytes]:
        """The files of a report directory."""
        pruning = self.pruning
        name = title_of(self.model)
        return prune_report(data, pruning.plan, pruning.statistics, magnitudes, name, noted=log.note)

    def summary(self, healed: Healed, row: str, found: Mapping[str, Quality], log: Log) -> dict[str, Any]:
        """For ``summary.json``: the model that was healed so, ``row`` of what was found."""
        return {
            **told_of_base(title_of(self.model), self.source),
            **self.windows.told(),
            **summarise(healed.plan, found, log),
            **told(healed),
            **told_of_result(healed.model, row, self.windows),
        }

    def save(self, shallower: PreTrainedModel, output: Path, files: Mapping[str, bytes | str]) -> None:
        """Write what was made of the model, with its tokenizer and these files."""
        save_checkpoint(
            shallower,
            self.source.tokenizer,
            output,
            overwrite=True,
            extra_files=files,
            companions=self.source.companions,
        )


def plan_cut(model: GivenModel, settings: PruneSettings, log: Log, *, tokenizer: Any = None, copies: int = 1) -> Cut:
    """All of `prune` before the comparison: checks, text, model, plan.

    Args:
        tokenizer: of a loaded model.
        copies: how many models will be written.
    """
    removal, healing = Removal.of(settings), asked(settings)
    check_output_place(settings.output, model, *(settings.text or ()), settings.heldout_text)
    unfinished, searched = (Unfinished(settings.output, what) for what in ("refit", "search"))
    texts = read_texts(settings.text, settings.heldout_text)
    siblings = processes.launched_processes()
    if not siblings.first:
        log.silence()
    with log.stage("load the model"):
        source = find_model(model, settings, log, tokenizer=tokenizer, processes=siblings)
        check_can_be_cut(source)
    removal.check(source.num_layers)
    with log.stage("tokenise"):
        rank = rank_for(settings.rank, source.hidden_size)
        check_rank(rank, source.hidden_size, [healing.fit], settings.score)
        chooses = healing.fit == AUTO or removal.runs_the_model or healing.refits
        heldout = heldout_windows(settings.samples) if chooses else 0
        windows = make_windows(source, source.tokenizer, texts, settings, log, heldout=heldout, processes=siblings)
    with log.stage("load the model"):
        dense = source.load()
    check_output(settings.output, 0 if settings.plan_only else copies * parameter_bytes(dense), overwrite=True)
    healing = possible(healing, dense, log)
    removal = removal.counted(dense)
    if removal.searches:
        kinds_of_halves(dense)
        removal = found_by_search(
            dense, windows, removal, settings.batch_size, unfinished=searched, processes=siblings, log=log
        )
    with log.stage("calibrate and fit"):
        pruning = plan_pruning(
            dense,
            windows.fit,
            windows.heldout,
            drop=None if removal.spans else removal.drop,
            spans=removal.spans,
            score="cosine" if removal.spans else removal.score,
            fit=healing.fit,
            rank=rank,
            structured=settings.structured,
            keep_pattern=settings.keep_pattern,
            noted=log.note,
            run=Run(settings.batch_size, siblings, log.progress),
        )
        plan = dataclasses.replace(
            pruning.plan,
            model=fingerprint_model(dense),
            calibration=windows.about,
            score=removal.score,
        )
        pruning = dataclasses.replace(pruning, plan=plan)
    return Cut(model, source, dense, windows, pruning, healing, siblings, unfinished, searched)


def _row(healed: Healed) -> str:
    """In which row of the comparison the result is."""
    fit = healed.plan.joints[0].fit
    if healed.rows:
        return f"healed ({healed.heal.name}{f', {fit}' if healed.heal.patched else ''})"
    return next((row for row, its in COMPARED.items() if its == fit), f"healed ({fit})")


def _verdict(cut: Cut, healed: Healed, found: Mapping[str, Quality], log: Log) -> list[str]:
    """That the result is worse than plain removal, if it is; on which windows; and what to do."""
    plan, windows = healed.plan, cut.windows
    if windows.evaluation is None and (windows.heldout is not None or healed.heal.name == "none"):
        return []
    lines = verdict_on(found, _row(healed), {DROPPED: "plain removal"}, windows, log)
    instead = ", or `fit` auto, which chooses on held-out text" if not plan.candidates else ""
    return [f"{line} Give more text (`samples`){instead}." for line in lines]


def _report(
    cut: Cut,
    healed: Healed,
    found: Mapping[str, Quality],
    verdict: Sequence[str],
    summary: Mapping[str, Any],
    log: Log,
) -> dict[str, bytes]:
    """The report's files; what cannot be drawn is left out, with a note."""
    report: dict[str, bytes] = {}
    with log.stage("draw the report"), left_out("the report", log.note):
        magnitudes = cut.magnitudes(log)
        data = report_data(cut, healed.plan, found, summary, log)
        data = dataclasses.replace(data, notes=[*verdict, *log.notes])
        report = cut.draw(data, magnitudes, log)
    return report


def report_data(
    cut: Cut, plan: PrunePlan, found: Mapping[str, Quality], summary: Mapping[str, Any], log: Log
) -> ReportData:
    """What the report of a plan says; ``summary``: what its model's summary does."""
    layers, kept = plan.num_layers, len(plan.kept_layers)
    result = summary["result"]
    return ReportData(
        title=f"{title_of(cut.model)}: {layers} layers to {kept}",
        steps=steps(summary),
        quality=[QualityRow(name, layers if name == DENSE else kept, quality) for name, quality in found.items()],
        quality_text=judged_on(cut.windows),
        dense=DENSE,
        dropped=DROPPED,
        candidates=candidate_rows(plan),
        spans=span_rows(plan, cut.pruning.statistics),
        timings=dict(log.seconds),
        usage=usage("DIR", result["loader"], patched=result["patched"]),
        files={
            f"{RECORDS}/plan.json": "spans, kind of patch, what chose them",
            f"{RECORDS}/plan.safetensors": "the patches",
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/report.md": "this report",
        },
    )


def summarise(plan: PrunePlan, found: Mapping[str, Quality], log: Log) -> dict[str, Any]:
    """For ``summary.json``."""
    return {
        "spans": [str(span) for span in plan.spans],
        "num_layers": {"dense": plan.num_layers, "pruned": len(plan.kept_layers)},
        "fit": plan.joints[0].fit,
        "score": plan.score,
        "quality": {name: quality.to_dict() for name, quality in found.items()},
        "candidates": [dict(row) for row in plan.candidates],
        "seconds": log.rounded_seconds(),
    }
