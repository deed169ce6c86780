"""Make layers one, again and again (CoMe), and save a plain model of the same architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import agreement, report
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.evaluation.report import QualityRow, ReportData
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.healing import merges
from linearpatch_kernels.healing.merge_search import default_variant, plan_merging
from linearpatch_kernels.healing.merges import (
    REFIT,
    REFIT_WINDOWS,
    can_refit,
    check_refit,
    heal_merges,
    lowers_the_loss,
    too_little_to_refit,
)
from linearpatch_kernels.merging.plan import MergePlan
from linearpatch_kernels.merging.settings import VARIANTS, MergeSettings, check_settings
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.loading import ModelSource
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.pruning.fits import FITS, UnusableFit, too_little_text
from linearpatch_kernels.pruning.search import check_rank, rank_for
from linearpatch_kernels.recipes.inputs import (
    ModelName,
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
from linearpatch_kernels.recipes.outputs import DENSE, DROPPED, Result, judged_on, recorded, usage, verdict_on
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.recipes.students import plainly_removed
from linearpatch_kernels.settings import MergeRunSettings

NO_HEALING = "none"
_MERGED = "merged"
# Every merge asks anew: what to score on, and what to choose on, however many windows there are to heal on.
_SCORING_WINDOWS = 16
_CHOICE_WINDOWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeResult(Result):
    """What `merge` did.

    Attributes:
        plan: every merge.
        healing: whether healing the merged layers helps, in a sentence, if it was tried.
    """

    plan: MergePlan
    healing: tuple[str, ...]


def merge(
    model: ModelName, settings: MergeRunSettings | None = None, *, reporter: Reporter | None = None, **named: Any
) -> MergeResult:
    """Merge layers of a model until so many remain (CoMe), and write it with its plan and a report::

        lp.merge("demo", layers=24, output="DIR")

    Does what ``linearpatch merge`` does: the same checks, report and files. ``output`` and ``layers`` are needed. A run
    that was killed goes on where it was when it is called again.

    Args:
        model, settings, reporter, named: as of `prune`.

    Raises:
        InputError: a model, a text, a value or a place for the output that cannot be worked with; before long work
            where that can be known.
    """
    settings = MergeRunSettings.of(settings, named)
    check_alone("merge")
    log = Log(reporter)
    job = _prepare(model, settings, log)
    merged, plan = job.merged(log)
    models = {_MERGED: merged}
    if job.heal != NO_HEALING:
        with log.stage("heal"):
            models[_healed(job.heal)] = job.healed(merged)
    row = job.chosen(models, log)
    result = models[row]
    found: dict[str, Quality] = {}
    with left_out("the comparison on held-out text", log.note):
        found = _compare(job, models, log)
    healing = _whether_healing_helps(found, job.heal)
    against = {DROPPED: "plain removal", _MERGED: "without healing"}
    verdict = verdict_on(found, row, against, job.windows, log)
    drawn: dict[str, bytes] = {}
    with left_out("the report", log.note):
        data = _report_data(job, plan, found, log)
        steps = [*data.steps, *healing]
        data = dataclasses.replace(
            data, steps=steps, notes=[*verdict, *log.notes], usage=usage("DIR", patched=bool(patches(result)))
        )
        drawn = report.draw_report(data, {}, log.note)
    summary = _summarise(plan, found, log) | {"notes": [*log.notes, *verdict]}
    summary |= {"heal": job.heal} if row != _MERGED else {}
    files = recorded(plan.files(), summary, drawn)
    source = job.source
    with log.stage("save"):
        save_checkpoint(
            result, source.tokenizer, settings.output, overwrite=True, extra_files=files, companions=source.companions
        )
    job.unfinished.forget()
    return MergeResult(
        output=settings.output,
        summary=summary,
        quality=found,
        quality_text=job.windows.evaluation_source,
        seconds=log.seconds,
        verdict=tuple(verdict),
        plan=plan,
        healing=tuple(healing),
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """A model, and how it is merged.

    Attributes:
        settings: as they were given; merging: what they come to for this model, by ``variant``.
        heal: `REFIT`, a fit, or `NO_HEALING`; rank: of the fit.
    """

    model: ModelName
    settings: MergeRunSettings
    source: ModelSource
    dense: PreTrainedModel
    windows: Windows
    variant: str
    merging: MergeSettings
    heal: str
    rank: int
    unfinished: Unfinished

    def merged(self, log: Log) -> tuple[PreTrainedModel, MergePlan]:
        """The merged model and its plan, from where an earlier run stopped."""
        start = MergePlan(
            num_layers(self.dense),
            model=fingerprint_model(self.dense),
            settings=dataclasses.asdict(self.merging) | {"variant": self.variant},
            calibration=self.windows.about,
        )
        earlier = self.unfinished.earlier(lambda file: MergePlan.resume(file, "it is made again"), log)
        if earlier is not None and earlier.belongs_to(start):
            log.mention(f"going on from {len(earlier.merges)} merges of a run that did not finish")
            start = earlier
        with log.stage("merge"), self.unfinished.forgotten_if_refused():
            return plan_merging(
                self.dense,
                self.windows.fit[:_SCORING_WINDOWS],
                self.windows.heldout,
                self.merging,
                plan=start,
                keep=lambda plan: self.unfinished.keep(plan.keep),
                batch_size=self.settings.batch_size,
                progress=log.progress,
            )

    def healed(self, merged: PreTrainedModel) -> PreTrainedModel:
        if self.heal == REFIT:
            return merges.refit_merges(self.dense, merged, self.windows.fit)
        try:
            return heal_merges(self.dense, merged, self.windows.fit, self.heal, rank=self.rank)
        except UnusableFit as error:
            raise InputError(f"{error} (the merges are kept: the same command with another `heal` goes on)") from error

    def chosen(self, models: Mapping[str, PreTrainedModel], log: Log) -> str:
        """Which of the models is the result: the healed one, if it was asked for, or if it has the lower loss on the
        windows that merges are chosen on where there are some, else on the report's."""
        if self.heal == NO_HEALING:
            return _MERGED
        row = _healed(self.heal)
        chosen_on = self.windows.heldout if self.windows.heldout is not None else self.windows.evaluation
        if self.settings.heal is not None or chosen_on is None:
            return row
        if lowers_the_loss(models[_MERGED], models[row], chosen_on):
            return row
        log.note(
            f"healing does not lower the loss on {len(chosen_on)} held-out windows: the merged layers stay as they are"
        )
        return _MERGED


def _prepare(model: ModelName, settings: MergeRunSettings, log: Log) -> _Job:
    """All before the first merge: checks, text, model."""
    _check(settings)
    check_output_place(settings.output, model, settings.text, settings.heldout_text)
    unfinished = Unfinished(settings.output, "merges")
    texts = read_texts(settings.text, settings.heldout_text)
    if settings.samples < REFIT_WINDOWS and settings.heal in (None, REFIT):
        raise InputError(
            f"`samples` {settings.samples} is too few for a refit, which fits on some and chooses on others: give at "
            f"least {REFIT_WINDOWS}, or another `heal`"
        )
    source = find_model(model, settings)
    check_can_be_cut(source)
    check_settings(_merging(settings), source.num_layers)
    rank = rank_for(settings.rank, source.hidden_size)
    check_rank(rank, source.hidden_size, [settings.heal] if settings.heal not in (None, REFIT) else [])
    with log.stage("load the model"):
        tokenizer = source.tokenizer
        dense = source.load()
    variant = settings.variant or default_variant(dense, settings.layers)
    merging = _merging(settings, variant)
    heal = settings.heal or (REFIT if can_refit(dense) else NO_HEALING)
    check_output(settings.output, parameter_bytes(dense), overwrite=True)
    with log.stage("tokenise"):
        held = min(heldout_windows(settings.samples), _CHOICE_WINDOWS) if merging.runs_the_model else 0
        windows = make_windows(dense, tokenizer, texts, settings, log, heldout=held)
    if heal == REFIT:
        check_refit(dense, windows.fit)
    _note_little_text(heal, dense, windows, log)
    return _Job(model, settings, source, dense, windows, variant, merging, heal, rank, unfinished)


def _check(settings: MergeRunSettings) -> None:
    """InputError for settings that make no sense for any model."""
    if settings.variant is not None and settings.variant not in VARIANTS:
        raise InputError(f"no variant is called {settings.variant!r}: choose one of {', '.join(VARIANTS)}")
    if settings.heal is not None and settings.heal not in (REFIT, *FITS):
        raise InputError(f"`heal` {settings.heal} is no way to heal: choose one of {', '.join((REFIT, *FITS))}")
    check_settings(_merging(settings), settings.layers + 1)


def _merging(settings: MergeRunSettings, variant: str | None = None) -> MergeSettings:
    """What a variant (by default the one that was named, or the first) and the other settings come to."""
    given: dict[str, Any] = {name: getattr(settings, name) for name in ("repeat", "power", "floor", "least_share")}
    given |= {"skip_score": settings.skip_score} if settings.skip_score is not None else {}
    given |= {"width": settings.width} if settings.width is not None else {}
    of_variant = VARIANTS[variant or settings.variant or next(iter(VARIANTS))]
    return MergeSettings(settings.layers, **{**of_variant, **given})


def merge_rows(plan: MergePlan) -> list[list[str]]:
    """Every merge: which layers (of the dense model) became one, where, how much each gave, by which score, and the
    held-out loss where it was measured."""
    rows = []
    tree: list[Any] = list(range(plan.num_layers))
    for merge, record in zip(plan.merges, plan.records, strict=True):
        span = slice(merge.span.start, merge.span.end)
        nodes = " + ".join(map(written, tree[span]))
        tree[span] = [tree[span]]
        losses = record.get("losses", {})
        rows.append(
            [
                nodes,
                str(merge.span),
                " / ".join(f"{share:.2f}" for share in merge.shares),
                f"{record['score']} {record['ranking'][str(merge.span)]:.4f}",
                f"{min(losses.values()):.4f}" if losses else "",
            ]
        )
    return rows


def written(node: Any) -> str:
    """A node of a merge tree: ``[2, [3, 4]]`` -> ``(2 (3 4))``."""
    return f"({' '.join(map(written, node))})" if isinstance(node, list) else str(node)


def _healed(heal: str) -> str:
    """The row of the comparison that was healed so."""
    return "merged, refitted" if heal == REFIT else f"merged, {heal} patches"


def _note_little_text(heal: str, dense: PreTrainedModel, windows: Windows, log: Log) -> None:
    if heal == REFIT:
        told = too_little_to_refit(dense, windows.fit)
    else:
        instead = "no `heal`, which chooses on other text"
        told = too_little_text([heal], hidden_size(dense), windows.fit, instead=instead)
    if told is not None:
        log.note(told)


def _whether_healing_helps(found: Mapping[str, Quality], heal: str) -> list[str]:
    """Whether healing the merged layers helps, on the report's windows."""
    if _healed(heal) not in found:
        return []
    before, after = found[_MERGED].perplexity, found[_healed(heal)].perplexity
    verdict = "helps" if after < before else "does not help"
    return [f"Healing the merged layers ({heal}) {verdict}: perplexity {before:.2f} without, {after:.2f} with it."]


def _compare(job: _Job, results: Mapping[str, PreTrainedModel], log: Log) -> dict[str, Quality]:
    """Quality on the report's windows: dense, as many layers plainly removed, merged."""
    windows, dense = job.windows, job.dense
    if windows.evaluation is None:
        return {}
    models = {DENSE: dense}
    with log.stage("evaluate"):
        with left_out(DROPPED, log.note):
            models[DROPPED] = plainly_removed(dense, windows.fit, job.merging.layers)
        return agreement.compare_quality(
            models | dict(results), windows.evaluation, dense, noted=log.note, progress=log.progress
        )


def _report_data(job: _Job, plan: MergePlan, found: Mapping[str, Quality], log: Log) -> ReportData:
    about = job.windows.about
    scored = min(about["samples"], _SCORING_WINDOWS)
    return ReportData(
        title=f"{title_of(job.model)}: {plan.num_layers} layers merged to {plan.layers}",
        steps=[
            f"Scored on {scored} windows of {about['length']} tokens from {about['source']}"
            + (f", chose on {about['heldout']} others." if about["heldout"] else "."),
            *(f"Made the layers {row[0]} one, at shares {row[2]} ({row[3]})." for row in merge_rows(plan)),
            *_averaged_gains(plan),
        ],
        quality=[
            QualityRow(name, plan.num_layers if name == DENSE else plan.layers, quality)
            for name, quality in found.items()
        ],
        quality_text=judged_on(job.windows),
        dense=DENSE,
        dropped=DROPPED,
        timings=dict(log.seconds),
        files={
            f"{RECORDS}/merge.json": "every merge: layers, shares, the units that were kept, what chose them",
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/report.md": "this report",
        },
    )


def _averaged_gains(plan: MergePlan) -> Sequence[str]:
    """What was averaged because it cannot fold, and how far off that is at the worst."""
    worst: dict[str, float] = {}
    for record in plan.records:
        for path, error in record["gain_errors"].items():
            worst[path] = max(worst.get(path, 0.0), error)
    paths = ", ".join(f"{path} {100 * error:.1f} %" for path, error in worst.items())
    return [f"Averaged norm gains; farthest from a source layer's own: {paths}."] if paths else []


def _summarise(plan: MergePlan, found: Mapping[str, Quality], log: Log) -> dict[str, Any]:
    return {
        "num_layers": {"dense": plan.num_layers, "merged": plan.layers},
        "settings": dict(plan.settings),
        "tree": plan.tree,
        "shares": [list(merge.shares) for merge in plan.merges],
        "quality": {name: quality.to_dict() for name, quality in found.items()},
        "seconds": log.rounded_seconds(),
    }
