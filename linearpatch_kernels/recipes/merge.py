"""Make layers one, again and again (CoMe), and save a plain model of the same architecture."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import agreement
from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing import merges
from linearpatch_kernels.healing.choice import decide
from linearpatch_kernels.healing.merge_search import default_variant, plan_merging
from linearpatch_kernels.healing.merges import REFIT_WINDOWS, can_refit, check_refit, too_little_to_refit
from linearpatch_kernels.healing.refit import Refit, RefitRow
from linearpatch_kernels.healing.ways import AUTO, BEHIND, HEALS, MERGE_FIT, Heal
from linearpatch_kernels.merging.plan import MergePlan
from linearpatch_kernels.merging.settings import VARIANTS, MergeSettings, check_settings
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.loading import Source
from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint
from linearpatch_kernels.modeling.units import sublayers
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.pruning.fits import FITS, UnusableFit, too_little_text
from linearpatch_kernels.pruning.search import check_rank, rank_for
from linearpatch_kernels.recipes.healing import RefitWork
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
from linearpatch_kernels.recipes.students import plainly_removed
from linearpatch_kernels.report import page
from linearpatch_kernels.report.card import usage
from linearpatch_kernels.report.page import DENSE, DROPPED, QualityRow, ReportData
from linearpatch_kernels.report.steps import refit_in_words, written
from linearpatch_kernels.settings import MergeRunSettings

_AS_MERGED, _REFIT = HEALS["none"], HEALS["refit"]
# A row of the comparison.
_MERGED = "merged"
# Every merge asks anew: what to score on, and what to choose on, however many windows there are to heal on.
_SCORING_WINDOWS = 16
_CHOICE_WINDOWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeResult(Result):
    """What `merge` did.

    Attributes:
        plan: every merge.
        healing: a sentence about each way to heal that was tried: whether it helps.
    """

    plan: MergePlan
    healing: tuple[str, ...]


def merge(
    model: GivenModel,
    settings: MergeRunSettings | None = None,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **named: Any,
) -> MergeResult:
    """Merge layers of a model until so many remain (CoMe), and write it with its plan and a report::

        lp.merge("demo", layers=24, output="DIR")

    Does what ``linearpatch merge`` does: the same checks, report and files. ``output`` and ``layers`` are needed. A run
    that was killed goes on where it was when it is called again.

    Args:
        model, settings, tokenizer, reporter, named: as of `prune`.

    Raises:
        InputError: a model, a text, a value or a place for the output that cannot be worked with; before long work
            where that can be known.
    """
    settings = MergeRunSettings.of(settings, named)
    check_alone("merge")
    log = Log(reporter)
    job = _prepare(model, settings, tokenizer, log)
    merged, plan = job.merged(log)
    tried = job.healed(merged, plan, log)
    way, compared = job.chosen({name: one.model for name, one in tried.items()}, log)
    result, row = tried[way.name], job.healing.row(way)
    found: dict[str, Quality] = {}
    with left_out("the comparison on held-out text", log.note):
        found = _compare(job, {job.healing.row(HEALS[name]): one.model for name, one in tried.items()}, log)
    healing = _whether_healing_helps(job, found, tried)
    against = {DROPPED: "plain removal", _MERGED: "without healing"}
    verdict = verdict_on(found, row, against, job.windows, log)
    summary = {
        **told_of_base(title_of(job.model), job.source),
        **job.windows.told(),
        **_summarise(plan, found, log),
        **_healing_told(job, way, result.rows, compared),
        **told_of_result(result.model, row, job.windows),
    }
    drawn: dict[str, bytes] = {}
    with left_out("the report", log.note):
        data = _report_data(job, plan, found, summary, log)
        steps = [*data.steps, *healing]
        drawn = page.draw_report(dataclasses.replace(data, steps=steps, notes=[*verdict, *log.notes]), {}, log.note)
    summary |= {"seconds": log.rounded_seconds(), "notes": [*log.notes, *verdict]}
    files = recorded(plan.files(), summary, drawn) | card(summary, log)
    source = job.source
    with log.stage("save"):
        save_checkpoint(
            result.model,
            source.tokenizer,
            settings.output,
            overwrite=True,
            extra_files=files,
            companions=source.companions,
        )
    for unfinished in (job.unfinished, job.unfinished_refit):
        unfinished.forget()
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
class _Healing:
    """How the merged layers are healed.

    Attributes:
        ways: those to try, beside leaving the layers as they are.
        asked: whether the only one of them is the result, whatever it does to the loss.
        fit: of a patch; behind: layers behind every merged one that a refit fits again, too.
    """

    ways: Sequence[Heal]
    asked: bool
    fit: str
    behind: int

    @property
    def refits(self) -> bool:
        return any(way.refitted for way in self.ways)

    @property
    def patches(self) -> bool:
        return any(way.patched for way in self.ways)

    def row(self, way: Heal) -> str:
        """The row of the comparison that was healed so."""
        return ", ".join([_MERGED, *[f"{self.fit} patches"] * way.patched, *["refitted"] * way.refitted])

    def told(self, way: Heal) -> str:
        """A way in a sentence."""
        if not way.refitted:
            return self.fit
        fit, behind = [self.fit] * way.patched, [f"{self.behind} behind"] * (self.behind > 0)
        return ", ".join([way.name, *fit, *behind])


@dataclasses.dataclass(frozen=True)
class _Job:
    """A model, and how it is merged.

    Attributes:
        settings: as they were given; merging: what they come to for this model, by ``variant``.
        rank: of a patch.
        unfinished, unfinished_refit: where merges and refits keep their work.
    """

    model: GivenModel
    settings: MergeRunSettings
    source: Source
    dense: PreTrainedModel
    windows: Windows
    variant: str
    merging: MergeSettings
    healing: _Healing
    rank: int
    unfinished: Unfinished
    unfinished_refit: Unfinished

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

    def healed(self, merged: PreTrainedModel, plan: MergePlan, log: Log) -> dict[str, Refit]:
        """Name of a way to heal -> the model; as it was merged in front, and every way that was to be tried."""
        found = {_AS_MERGED.name: Refit(merged, [])}
        if not self.healing.ways:
            return found
        work = RefitWork(self.unfinished_refit, self._identity(plan), log, writes=True)
        with log.stage("heal"), self.unfinished_refit.forgotten_if_refused():
            for way in self.healing.ways:
                try:
                    healed = merges.heal_merges(
                        self.dense,
                        merged,
                        self.windows.fit,
                        way.name,
                        fit=self.healing.fit,
                        rank=self.rank,
                        behind=self.healing.behind,
                        done=work.weights.get(way.name),
                        keep=functools.partial(work.keep, way.name),
                        run=Run(progress=log.progress),
                    )
                except UnusableFit as error:
                    if self.healing.asked:
                        raise InputError(
                            f"{error} (the merges are kept: the same command with another `heal` goes on)"
                        ) from error
                    log.note(f"not a candidate: {error}")
                    continue
                found[way.name] = Refit(healed.model, work.rows.get(way.name, []))
        return found

    def _identity(self, plan: MergePlan) -> str:
        """Of all that the refits depend on, in hex digits."""
        about = [plan.to_json(), self.windows.about, self.healing.fit, self.rank, self.healing.behind]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def chosen(self, models: Mapping[str, PreTrainedModel], log: Log) -> tuple[Heal, Mapping[str, Quality]]:
        """Which of the models (by way) is the result: the one that was asked for, or the best on the windows that
        merges are chosen on where there are some, else on the report's. And what they came to on the former."""
        if not self.healing.ways:
            return _AS_MERGED, {}
        chosen_on = self.windows.heldout if self.windows.heldout is not None else self.windows.evaluation
        if self.healing.asked or chosen_on is None:
            return self.healing.ways[0], {}
        found = agreement.compare_quality({"dense": self.dense, **models}, chosen_on, noted=log.note)
        way = HEALS[decide(found)]
        if way == _AS_MERGED:
            log.note(
                f"healing does not lower the loss on {len(chosen_on)} held-out windows: the merged layers stay as they "
                "are"
            )
        return way, found if self.windows.heldout is not None else {}


def _prepare(model: GivenModel, settings: MergeRunSettings, tokenizer: Any, log: Log) -> _Job:
    """All before the first merge: checks, text, model."""
    _check(settings)
    check_output_place(settings.output, model, *(settings.text or ()), settings.heldout_text)
    unfinished, unfinished_refit = (Unfinished(settings.output, what) for what in ("merges", "refit"))
    texts = read_texts(settings.text, settings.heldout_text)
    healing = _healing(settings)
    if settings.samples < REFIT_WINDOWS and healing.refits:
        raise InputError(
            f"`samples` {settings.samples} is too few for a refit, which fits on some and chooses on others: give at "
            f"least {REFIT_WINDOWS}, or another `heal`"
        )
    source = find_model(model, settings, log, tokenizer=tokenizer)
    check_can_be_cut(source)
    check_settings(_merging(settings), source.num_layers)
    rank = rank_for(settings.rank, source.hidden_size)
    check_rank(rank, source.hidden_size, [healing.fit] if healing.patches else [])
    with log.stage("load the model"):
        tokenizer = source.tokenizer
        dense = source.load()
    # Whether they can be merged at all.
    sublayers(dense)
    variant = settings.variant or default_variant(dense, settings.layers)
    merging = _merging(settings, variant)
    if not healing.asked and not can_refit(dense):
        healing = dataclasses.replace(healing, ways=[way for way in healing.ways if way != _REFIT])
    check_output(settings.output, parameter_bytes(dense), overwrite=True)
    with log.stage("tokenise"):
        chooses = merging.runs_the_model or settings.heal == AUTO
        held = min(heldout_windows(settings.samples), _CHOICE_WINDOWS) if chooses else 0
        windows = make_windows(dense, tokenizer, texts, settings, log, heldout=held)
    for way in healing.ways:
        if way.refitted:
            check_refit(dense, windows.fit, in_front=not way.patched)
    job = _Job(model, settings, source, dense, windows, variant, merging, healing, rank, unfinished, unfinished_refit)
    _note_little_text(job, log)
    return job


def _check(settings: MergeRunSettings) -> None:
    """InputError for settings that make no sense for any model."""
    if settings.variant is not None and settings.variant not in VARIANTS:
        raise InputError(f"no variant is called {settings.variant!r}: choose one of {', '.join(VARIANTS)}")
    healing = _healing(settings)
    if settings.behind is not None and not healing.refits:
        raise InputError("`behind` is of a refit, and this way to heal has none: leave it out, or give another `heal`")
    check_settings(_merging(settings), settings.layers + 1)


def _healing(settings: MergeRunSettings) -> _Healing:
    """What `heal`, `fit` and `behind` come to; InputError where they do not go together."""
    heal, fit, behind = settings.heal, settings.fit, settings.behind
    if fit is not None:
        FITS.named(fit)
    if heal is None:
        heal = _REFIT.name if fit is None else fit
    if heal in FITS and heal not in HEALS:
        if fit not in (None, heal):
            raise InputError(f"`heal` {heal} is a fit and `fit` {fit} another one: give one of the two")
        heal, fit = "patch", heal
    if heal != AUTO and heal not in HEALS:
        known = ", ".join(dict.fromkeys([*HEALS, AUTO, *FITS]))
        raise InputError(f"`heal` {heal} is no way to heal: choose one of {known}")
    ways = [way for way in HEALS.values() if way != _AS_MERGED and heal in (way.name, AUTO)]
    if fit == "none" and any(way.patched for way in ways):
        raise InputError(f"`heal` {heal} puts a patch behind merged layers and `fit` none is none: name another fit")
    if behind is None:
        behind = 0 if heal == _REFIT.name else BEHIND
    # Where nothing was named, a refit has to show that it helps.
    asked = heal != AUTO and (settings.heal, settings.fit) != (None, None)
    return _Healing(ways, asked, fit or MERGE_FIT, behind)


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


def _note_little_text(job: _Job, log: Log) -> None:
    dense, fit_windows = job.dense, job.windows.fit
    told: list[str | None] = []
    if job.healing.refits:
        told.append(too_little_to_refit(dense, fit_windows))
    if job.healing.patches:
        instead = "no `heal`, which chooses on other text" if job.healing.asked else ""
        told.append(too_little_text([job.healing.fit], hidden_size(dense), fit_windows, instead=instead))
    for line in told:
        if line is not None:
            log.note(line)


def _whether_healing_helps(job: _Job, found: Mapping[str, Quality], tried: Mapping[str, Refit]) -> list[str]:
    """Whether healing the merged layers helps, on the report's windows, of each way that was tried."""
    lines = []
    for way in (HEALS[name] for name in tried if name != _AS_MERGED.name):
        if job.healing.row(way) in found and _MERGED in found:
            before, after = found[_MERGED].perplexity, found[job.healing.row(way)].perplexity
            verdict = "helps" if after < before else "does not help"
            told = f"Healing the merged layers ({job.healing.told(way)}) {verdict}"
            lines.append(f"{told}: perplexity {before:.2f} without, {after:.2f} with it.")
    return lines


def _healing_told(job: _Job, way: Heal, rows: Sequence[RefitRow], compared: Mapping[str, Quality]) -> dict[str, Any]:
    """For ``summary.json``: the way that was taken, if one was, what its fits came to, and what was compared."""
    found: dict[str, Any] = {}
    if way != _AS_MERGED:
        found["heal"] = way.name
    if way.patched:
        found["fit"] = job.healing.fit
    if rows:
        found["refit"] = [dataclasses.asdict(row) for row in rows]
    if compared:
        found["heal_candidates"] = {name: quality.to_dict() for name, quality in compared.items()}
    return found


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


def _report_data(
    job: _Job, plan: MergePlan, found: Mapping[str, Quality], summary: Mapping[str, Any], log: Log
) -> ReportData:
    about, result = job.windows.about, summary["result"]
    scored = min(about["samples"], _SCORING_WINDOWS)
    return ReportData(
        title=f"{title_of(job.model)}: {plan.num_layers} layers merged to {plan.layers}",
        steps=[
            f"Scored on {scored} windows of {about['length']} tokens from {about['source']}"
            + (f", chose on {about['heldout']} others." if about["heldout"] else "."),
            *(f"Made the layers {row[0]} one, at shares {row[2]} ({row[3]})." for row in merge_rows(plan)),
            *_averaged_gains(plan),
            *refit_in_words(summary.get("refit", ())),
        ],
        quality=[
            QualityRow(name, plan.num_layers if name == DENSE else plan.layers, quality)
            for name, quality in found.items()
        ],
        quality_text=judged_on(job.windows),
        dense=DENSE,
        dropped=DROPPED,
        timings=dict(log.seconds),
        usage=usage("DIR", result["loader"], patched=result["patched"]),
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
