"""``linearpatch evaluate``: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearpatch_kernels.cli.console import (
    Notes,
    Reporter,
    check_json,
    figure,
    print_seconds,
    print_table,
    share,
    write_json,
)
from linearpatch_kernels.cli.inputs import find_model, in_words, num_layers_of, on_disk, title_of, windows_up_to
from linearpatch_kernels.cli.options import (
    BatchSize,
    Device,
    Dtype,
    JsonFile,
    Length,
    Model,
    TrustRemoteCode,
    given_path,
)
from linearpatch_kernels.errors import InputError


def evaluate(
    model: Model,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="Compare with this (dense) model.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text (default: the demo's held-out text).",
            show_default=False,
            parser=given_path,
        ),
    ] = None,
    length: Length = 512,
    windows: Annotated[
        int, typer.Option("--windows", metavar="N", min=0, help="At most so many windows; 0: the whole text.")
    ] = 32,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B,...", help="Zero-shot tasks, for example arc_easy,piqa.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=1, help="Only the first N questions of each task.", show_default=False
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure prefill and decode tokens/s as well.")] = False,
    json_file: JsonFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    batch_size: BatchSize = 1,
) -> None:
    """Perplexity of MODEL; with --teacher its top-1 agreement and KL; with --tasks zero-shot accuracy."""
    from linearpatch_kernels.demo_data import demo_text
    from linearpatch_kernels.evaluation.agreement import compare_quality
    from linearpatch_kernels.evaluation.latency import compare_speed, model_size
    from linearpatch_kernels.evaluation.multiple_choice import check_tasks, evaluate_tasks
    from linearpatch_kernels.evaluation.notes import left_out
    from linearpatch_kernels.fingerprints import tokenizer_difference
    from linearpatch_kernels.forward import check_windows
    from linearpatch_kernels.processes import check_alone
    from linearpatch_kernels.text import read_text

    check_alone("evaluate")
    check_json(json_file, made_from=[text, on_disk(model), on_disk(teacher)])
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if limit is not None and tasks is None:
        raise InputError("--limit is about the questions of --tasks: name some, or leave it out")
    if tasks is not None:
        check_tasks(names)
    run, notes = Reporter(), Notes()
    content: str | list[str] = demo_text("heldout") if text is None else read_text(text)
    with run.stage("load"):
        source = find_model(model, dtype, device, trust_remote_code)
        its_teacher = None if teacher is None else find_model(teacher, dtype, device, trust_remote_code)
    with run.stage("tokenise"):
        tokenizer = source.tokenizer
        difference = "" if its_teacher is None else tokenizer_difference(tokenizer, its_teacher.tokenizer)
        if difference:
            raise InputError(
                f"{model} and {teacher} have different tokenizers ({difference}): compare models of one family"
            )
        sizes = [one.config.vocab_size for one in (source, its_teacher) if one is not None]
        if len(set(sizes)) > 1:
            raise InputError(
                f"{model} and {teacher} give logits over {sizes[0]} and {sizes[1]} tokens: they need one vocabulary"
            )
        ids = windows_up_to(tokenizer, content, length, windows)
        for known in filter(None, (source, its_teacher)):
            check_windows(known, ids)
    with run.stage("load"):
        student = source.load()
        reference = None if its_teacher is None else its_teacher.load()
    name = title_of(model) if title_of(model) != "teacher" else "model"
    models = {name: student} | ({"teacher": reference} if reference is not None else {})
    with run.stage("evaluate"):
        found = compare_quality(models, ids, reference, batch_size=batch_size, progress=run)
    quality = found[name]
    scores = {}
    failure: Exception | None = None
    if names:
        with run.stage("tasks"):
            try:
                scores = evaluate_tasks(student, tokenizer, names, limit=limit, progress=run)
            except Exception as error:  # raised again once all that was measured is told
                failure = error
    speeds = {}
    if speed:
        context = min(getattr(one.config, "max_position_embeddings", 512) for one in models.values())
        with run.stage("speed"), left_out("the speed", notes):
            # No longer than the context of a small model holds, together with the 32 tokens that are decoded.
            speeds = compare_speed(models, prompt_tokens=max(1, min(256, context - 32)), progress=run)
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
    write_json(json_file, summary)
    rows = [
        [
            name,
            str(num_layers_of(one)),
            f"{model_size(one).parameters / 1e6:,.1f} M",
            figure(found[name].perplexity),
            share(found[name].top1_agreement),
            "" if found[name].kl is None else f"{found[name].kl:.3f}",
        ]
        for name, one in models.items()
    ]
    columns = ["model", "layers", "parameters", "perplexity", "top-1 agreement", "KL"]
    origin = "LAMBADA passages" if text is None else in_words(text.name)
    title = f"{len(ids)} windows of {ids.shape[1]} tokens from {origin}"
    print_table(title, columns, rows)
    if speeds:
        speed_rows = [
            [name, figure(one.prefill_tokens_per_second), figure(one.decode_tokens_per_second)]
            for name, one in speeds.items()
        ]
        print_table("Speed", ["model", "prefill tok/s", "decode tok/s"], speed_rows)
    if scores:
        task_rows = [[task, str(s["n"]), *(share(s.get(k)) for k in ("acc", "acc_norm"))] for task, s in scores.items()]
        print_table("Zero-shot accuracy", ["task", "questions", "acc", "acc_norm"], task_rows)
    print_seconds(run)
    if failure is not None:
        raise failure
