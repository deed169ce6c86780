"""``linearpatch merge``: make layers one, again and again (CoMe), and save a plain model of the same architecture."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    TableContent,
    console,
    print_quality,
    print_seconds,
    print_table,
    problems,
    write_json,
)
from linearpatch_kernels.cli.inputs import (
    Windows,
    check_can_be_cut,
    check_places,
    find_model,
    forget,
    heldout_windows,
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
    Text,
    TrustRemoteCode,
)
from linearpatch_kernels.cli.prune import DROPPED, recorded, say_where, usage, verdict_on
from linearpatch_kernels.cli.shallower import plainly_removed
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import RECORDS, check_file
from linearpatch_kernels.merging.scores import PLACE_SCORES
from linearpatch_kernels.pruning.fits import FITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.merging.plan import MergePlan
    from linearpatch_kernels.merging.search import MergeSettings

_MERGED = "merged"
# Every merge asks anew: what to score on, and what to choose on, however many windows there are to heal on.
_SCORING_WINDOWS = 16
_CHOICE_WINDOWS = 4


def merge(
    model: Model,
    output: Output,
    layers: Annotated[
        int, typer.Option("--layers", metavar="N", min=1, help="How many layers remain.", show_default=False)
    ],
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            metavar="NAME",
            help="authors (the public code's), come (right query heads, folded norms), come-p (and the shares with the "
            "lowest held-out loss), come-loss (and the places, too), or come-block (one merge of neighbours, the loss "
            "that after its refit). Default: come-block; come-loss where that is not possible.",
            show_default=False,
        ),
    ] = None,
    skip_score: Annotated[
        str | None,
        typer.Option(
            "--skip-score",
            metavar="NAME",
            help=f"What chooses where to merge: {PLACE_SCORES.described()}. Default: the variant's.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat/--no-repeat", help="Whether a merged layer may be merged again.")
    ] = True,
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            metavar="M",
            min=2,
            help="Layers that become one at a time (default: 2; all at once for come-block).",
            show_default=False,
        ),
    ] = None,
    power: Annotated[
        float, typer.Option("--power", metavar="P", help="A layer's share goes with its influence to this power.")
    ] = 1.0,
    floor: Annotated[float, typer.Option("--floor", metavar="F", help="The largest share is at least this.")] = 0.0,
    least_share: Annotated[
        float,
        typer.Option("--least-share", metavar="S", help="A searched share is at least this (0: may be a removal)."),
    ] = 0.0,
    heal: Annotated[
        str | None,
        typer.Option(
            "--heal",
            metavar="FIT",
            help="Heal every merged layer in closed form, toward the dense model's stream there: refit (new down "
            "projections, still a plain model), or a patch behind it, by a fit of linearpatch prune: "
            f"{', '.join(FITS)}. Default: refit, where the model allows it.",
            show_default=False,
        ),
    ] = None,
    rank: Rank = None,
    text: Text = None,
    heldout_text: HeldoutText = None,
    samples: Samples = 64,
    length: Length = 512,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 4,
) -> None:
    """Merge layers of MODEL until N remain (CoMe), write the shallower model to DIR with its plan and a report."""
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.fingerprints import fingerprint_model
    from linearpatch_kernels.merging.plan import MergePlan
    from linearpatch_kernels.merging.refit import REFIT, REFIT_WINDOWS, can_refit, check_refit
    from linearpatch_kernels.merging.search import (
        VARIANTS,
        MergeSettings,
        check_settings,
        default_variant,
        plan_merging,
    )
    from linearpatch_kernels.modeling.patched import patches
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint
    from linearpatch_kernels.processes import check_alone
    from linearpatch_kernels.pruning.search import check_rank, rank_for

    check_alone("merge")
    if variant is not None and variant not in VARIANTS:
        raise InputError(f"no variant is called {variant!r}: choose one of {', '.join(VARIANTS)}")
    if heal is not None and heal not in (REFIT, *FITS):
        raise InputError(f"--heal {heal} is no way to heal: choose one of {', '.join((REFIT, *FITS))}")
    given: dict[str, Any] = {"repeat": repeat, "power": power, "floor": floor, "least_share": least_share}
    given |= {"skip_score": skip_score} if skip_score is not None else {}
    given |= {"width": width} if width is not None else {}

    def settings_of(variant: str) -> MergeSettings:
        return MergeSettings(layers, **{**VARIANTS[variant], **given})

    # Whatever the model's depth, these must make sense.
    check_settings(settings_of(variant or next(iter(VARIANTS))), layers + 1)
    reads = [on_disk(model), text, heldout_text]
    check_places(output, json_file, reads)
    unfinished = _unfinished(output)
    check_file(unfinished, f"{unfinished}, where the merges of an unfinished run are kept,", parents=True)
    run, notes = Reporter(), Notes()
    texts = read_texts(text, heldout_text)
    if samples < REFIT_WINDOWS and heal in (None, REFIT):
        raise InputError(
            f"--samples {samples} is too few for a refit, which fits on some and chooses on others: give at least "
            f"{REFIT_WINDOWS}, or another --heal"
        )
    source = find_model(model, dtype, device, trust_remote_code)
    check_can_be_cut(source)
    check_settings(settings_of(variant or next(iter(VARIANTS))), source.num_layers)
    rank = rank_for(rank, source.hidden_size)
    check_rank(rank, source.hidden_size, [heal] if heal is not None and heal != REFIT else [])
    with run.stage("load the model"):
        tokenizer = source.tokenizer
        dense = source.load()
    variant = variant or default_variant(dense, layers)
    asked = heal
    heal = heal or (REFIT if can_refit(dense) else "none")
    settings = settings_of(variant)
    check_output(output, parameter_bytes(dense), overwrite=True)
    with run.stage("tokenise"):
        held = min(heldout_windows(samples), _CHOICE_WINDOWS) if settings.runs_the_model else 0
        windows = make_windows(dense, tokenizer, texts, samples=samples, heldout=held, length=length)
    if heal == REFIT:
        check_refit(dense, windows.fit)
    _note_little_text(heal, dense, windows, notes)
    start = MergePlan(
        num_layers_of(dense),
        model=fingerprint_model(dense),
        settings=dataclasses.asdict(settings) | {"variant": variant},
        calibration=windows.about,
    )
    earlier = _resumed(unfinished, start)
    with run.stage("merge"):
        try:
            merged, plan = plan_merging(
                dense,
                windows.fit[:_SCORING_WINDOWS],
                windows.heldout,
                settings,
                plan=earlier,
                keep=lambda plan: _keep(unfinished, plan),
                batch_size=batch_size,
                progress=run,
            )
        except InputError:
            # Not killed but refused: the same merges would be refused again.
            forget(unfinished)
            raise
    models = {_MERGED: merged}
    if heal != "none":
        with run.stage("heal"):
            models[_healed(heal)] = _heal(dense, merged, windows, heal, rank)
    row = _healed(heal) if heal != "none" else _MERGED
    if asked is None and heal != "none" and not _helps(models, row, windows, notes):
        row = _MERGED
    result = models[row]
    found: dict[str, Quality] = {}
    with left_out("the comparison on held-out text", notes):
        found = _compare(dense, models, settings, windows, run, notes)
    help_told = _told_help(found, heal)
    verdict = verdict_on(found, row, {DROPPED: "plain removal", _MERGED: "without healing"}, windows, notes)
    report: dict[str, bytes] = {}
    with left_out("the report", notes):
        told = [*verdict, *notes.all]
        report = _report(model, plan, found, windows, run, help_told, told, notes, patched=bool(patches(result)))
    summary = _summarise(plan, found, run) | {"notes": [*notes.all, *verdict]}
    summary |= {"heal": heal} if row != _MERGED else {}
    files = recorded(plan.files(), summary, report)
    with run.stage("save"):
        save_checkpoint(result, tokenizer, output, overwrite=True, extra_files=files, companions=source.companions)
    forget(unfinished)
    write_json(json_file, summary)
    print_table(*merges_table(plan))
    print_quality(found, windows.evaluation_source)
    for line in help_told:
        console.print(line, soft_wrap=True)
    print_seconds(run)
    say_where("Model, plan", output)
    for line in verdict:
        console.print(line, soft_wrap=True)


def merges_table(plan: MergePlan) -> TableContent:
    """Every merge: which layers (of the dense model) became one, and how much each gave."""
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
    title = f"Merges: {plan.num_layers} layers to {plan.layers}, in order"
    return title, ["layers made one", "at", "shares", "chosen by", "held-out loss"], rows


def written(node: Any) -> str:
    """A node of a merge tree: ``[2, [3, 4]]`` -> ``(2 (3 4))``."""
    return f"({' '.join(map(written, node))})" if isinstance(node, list) else str(node)


def _healed(fit: str) -> str:
    return "merged, refitted" if fit == "refit" else f"merged, {fit} patches"


def _note_little_text(heal: str, dense: PreTrainedModel, windows: Windows, notes: Notes) -> None:
    from linearpatch_kernels.merging.refit import REFIT, too_little_to_refit
    from linearpatch_kernels.modeling.families import hidden_size
    from linearpatch_kernels.pruning.fits import too_little_text

    if heal == REFIT:
        told = too_little_to_refit(dense, windows.fit)
    else:
        told = too_little_text(
            [heal], hidden_size(dense), windows.fit, instead="no --heal, which chooses on other text"
        )
    if told is not None:
        notes(told)


def _heal(dense: PreTrainedModel, merged: PreTrainedModel, windows: Windows, heal: str, rank: int) -> PreTrainedModel:
    from linearpatch_kernels.merging.refit import REFIT, heal_merges, refit_merges
    from linearpatch_kernels.pruning.fits import UnusableFit

    if heal == REFIT:
        return refit_merges(dense, merged, windows.fit)
    try:
        return heal_merges(dense, merged, windows.fit, heal, rank=rank)
    except UnusableFit as error:
        raise InputError(f"{error} (the merges are kept: the same command with another --heal goes on)") from error


def _helps(models: Mapping[str, PreTrainedModel], healed: str, windows: Windows, notes: Notes) -> bool:
    """Whether healing that nobody asked for lowers the loss, on the windows that merges are chosen on where there are
    some, else on the report's."""
    from linearpatch_kernels.merging.refit import lowers_the_loss

    chosen_on = windows.heldout if windows.heldout is not None else windows.evaluation
    if chosen_on is None or lowers_the_loss(models[_MERGED], models[healed], chosen_on):
        return True
    notes(f"healing does not lower the loss on {len(chosen_on)} held-out windows: the merged layers stay as they are")
    return False


def _told_help(found: Mapping[str, Quality], fit: str) -> list[str]:
    """Whether healing the merged layers helps, on the report's windows."""
    if _healed(fit) not in found:
        return []
    before, after = found[_MERGED].perplexity, found[_healed(fit)].perplexity
    verdict = "helps" if after < before else "does not help"
    return [f"Healing the merged layers ({fit}) {verdict}: perplexity {before:.2f} without, {after:.2f} with it."]


def _compare(
    dense: PreTrainedModel,
    results: Mapping[str, PreTrainedModel],
    settings: MergeSettings,
    windows: Windows,
    run: Reporter,
    notes: Notes,
) -> dict[str, Quality]:
    """Quality on the report's windows: dense, as many layers plainly removed, merged."""
    from linearpatch_kernels.evaluation.agreement import compare_quality
    from linearpatch_kernels.evaluation.notes import left_out

    if windows.evaluation is None:
        return {}
    models = {"dense": dense}
    with run.stage("evaluate"):
        with left_out(DROPPED, notes):
            models[DROPPED] = plainly_removed(dense, windows.fit, settings.layers)
        return compare_quality(models | dict(results), windows.evaluation, dense, noted=notes, progress=run)


def _report(
    model: str,
    plan: MergePlan,
    found: Mapping[str, Quality],
    windows: Windows,
    run: Reporter,
    help_told: Sequence[str],
    told: Sequence[str],
    notes: Notes,
    *,
    patched: bool,
) -> dict[str, bytes]:
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData, draw_report

    about = windows.about
    scored = min(about["samples"], _SCORING_WINDOWS)
    data = ReportData(
        title=f"{title_of(model)}: {plan.num_layers} layers merged to {plan.layers}",
        notes=told,
        steps=[
            f"Scored on {scored} windows of {about['length']} tokens from {about['source']}"
            + (f", chose on {about['heldout']} others." if about["heldout"] else "."),
            *(f"Made the layers {row[0]} one, at shares {row[2]} ({row[3]})." for row in merges_table(plan)[2]),
            *_said_gain_errors(plan),
            *help_told,
        ],
        quality=[
            QualityRow(name, plan.num_layers if name == "dense" else plan.layers, quality)
            for name, quality in found.items()
        ],
        quality_text=f"{len(windows.evaluation)} windows of {windows.evaluation_source}"
        if windows.evaluation is not None
        else "",
        dense="dense",
        dropped=DROPPED,
        timings=dict(run.seconds),
        usage=usage("DIR", patched=patched),
        files={
            f"{RECORDS}/merge.json": "every merge: layers, shares, the units that were kept, what chose them",
            f"{RECORDS}/summary.json": "the figures above",
            f"{RECORDS}/report/report.md": "this report",
        },
    )
    return draw_report(data, {}, notes)


def _said_gain_errors(plan: MergePlan) -> Sequence[str]:
    """What was averaged because it cannot fold, and how far off that is at the worst."""
    worst: dict[str, float] = {}
    for record in plan.records:
        for path, error in record["gain_errors"].items():
            worst[path] = max(worst.get(path, 0.0), error)
    said = ", ".join(f"{path} {100 * error:.1f} %" for path, error in worst.items())
    return [f"Averaged norm gains; farthest from a source layer's own: {said}."] if said else []


def _summarise(plan: MergePlan, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
    return {
        "num_layers": {"dense": plan.num_layers, "merged": plan.layers},
        "settings": dict(plan.settings),
        "tree": plan.tree,
        "shares": [list(merge.shares) for merge in plan.merges],
        "quality": {name: quality.to_dict() for name, quality in found.items()},
        "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
    }


def _unfinished(output: Path) -> Path:
    """Where the merges of a run are kept until it is done."""
    target = output.resolve()
    return target.with_name(f".{target.name}.merges")


def _keep(file: Path, plan: MergePlan) -> None:
    """Save what a killed run goes on from; where there is no room or directory for it, do without."""
    with contextlib.suppress(InputError):
        plan.keep(file)


def _resumed(file: Path, start: MergePlan) -> MergePlan:
    """What a killed run into the same directory had decided for the same model, text and settings, if anything."""
    from linearpatch_kernels.files import left_by_us
    from linearpatch_kernels.merging.plan import MergePlan

    if not left_by_us(file):
        return start
    try:
        plan = MergePlan.resume(file, "it is made again")
    except InputError as error:
        problems.print(f"note: {error}", soft_wrap=True)
        return start
    if not plan.belongs_to(start):
        return start
    problems.print(f"going on from {len(plan.merges)} merges of a run that did not finish")
    return plan
