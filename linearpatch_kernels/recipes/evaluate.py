"""How good a model is: perplexity, agreement with a teacher, zero-shot accuracy, speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.demo_data import demo_text
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation import agreement
from linearpatch_kernels.evaluation.latency import Speed, compare_speed, model_size
from linearpatch_kernels.evaluation.multiple_choice import check_tasks, evaluate_tasks
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.fingerprints import tokenizer_difference
from linearpatch_kernels.forward import check_windows, model_device
from linearpatch_kernels.modeling.families import num_layers, text_config
from linearpatch_kernels.modeling.loading import Source
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.recipes.inputs import (
    GivenModel,
    ModelName,
    find_model,
    in_words,
    names_in,
    title_of,
    windows_up_to,
)
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.report.page import QualityRow
from linearpatch_kernels.settings import EvaluateSettings
from linearpatch_kernels.text import read_text

_TEACHER = "teacher"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        summary: all figures, as ``--json`` writes them.
        models: the model, and the teacher where there is one: layers, size, quality, speed.
        tasks: task -> scores of the model.
        text: what the quality was measured on, in words.
        seconds: stage -> seconds.
    """

    summary: Mapping[str, Any]
    models: tuple[QualityRow, ...]
    tasks: Mapping[str, Mapping[str, float | int]]
    text: str
    seconds: Mapping[str, float]


class TasksFailed(Exception):
    """The zero-shot tasks could not be measured; ``evaluation`` has all that could, the cause says why."""

    def __init__(self, cause: Exception, evaluation: Evaluation) -> None:
        super().__init__(f"the tasks could not be measured: {cause}")
        self.cause, self.evaluation = cause, evaluation


def evaluate(
    model: GivenModel,
    settings: EvaluateSettings | None = None,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **named: Any,
) -> Evaluation:
    """Perplexity of a model; with a ``teacher`` its top-1 agreement and KL; with ``tasks`` zero-shot accuracy::

        lp.evaluate("DIR", teacher="demo", speed=True).summary["perplexity"]

    Args:
        model, settings, tokenizer, reporter, named: as of `prune`; a teacher goes to where a loaded model is.

    Raises:
        InputError: a model, a text or a value that cannot be worked with.
        TasksFailed: all but the tasks was measured.
    """
    settings = EvaluateSettings.of(settings, named)
    check_alone("evaluate")
    log = Log(reporter)
    tasks = _checked_tasks(settings)
    text = demo_text("heldout") if settings.text is None else read_text(settings.text)
    with log.stage("load"):
        source = find_model(model, settings, log, tokenizer=tokenizer)
        if isinstance(model, PreTrainedModel):
            settings = dataclasses.replace(settings, device=str(model_device(model)))
        teacher = None if settings.teacher is None else find_model(settings.teacher, settings, log)
    with log.stage("tokenise"):
        named_model = source.name if isinstance(model, PreTrainedModel) else model
        _check_pair(named_model, source, settings.teacher, teacher)
        windows = windows_up_to(source.tokenizer, text, settings.length, settings.windows)
        for known in filter(None, (source, teacher)):
            check_windows(known, windows)
    name = title_of(model) if title_of(model) != _TEACHER else "model"
    with log.stage("load"):
        models = {name: source.load()} | ({_TEACHER: teacher.load()} if teacher is not None else {})
    with log.stage("evaluate"):
        found = agreement.compare_quality(
            models, windows, models.get(_TEACHER), batch_size=settings.batch_size, progress=log.progress
        )
    scores: Mapping[str, Mapping[str, float | int]] = {}
    failure: Exception | None = None
    if tasks:
        with log.stage("tasks"):
            try:
                scores = evaluate_tasks(
                    models[name], source.tokenizer, tasks, limit=settings.limit, progress=log.progress
                )
            except Exception as error:  # raised again once all else is measured
                failure = error
    speeds = _speeds(models, log) if settings.speed else {}
    rows = tuple(
        QualityRow(row, num_layers(one), found[row], model_size(one), speeds.get(row)) for row, one in models.items()
    )
    origin = "LAMBADA passages" if settings.text is None else in_words(settings.text.name)
    evaluation = Evaluation(
        summary=_summarise(rows, scores, windows),
        models=rows,
        tasks=scores,
        text=f"{len(windows)} windows of {windows.shape[1]} tokens from {origin}",
        seconds=log.seconds,
    )
    if failure is not None:
        raise TasksFailed(failure, evaluation) from failure
    return evaluation


def _checked_tasks(settings: EvaluateSettings) -> list[str]:
    """The tasks that were named; InputError for unknown ones."""
    if settings.tasks is None:
        if settings.limit is not None:
            raise InputError("`limit` is about the questions of `tasks`: name some, or leave it out")
        return []
    names = [name for name in names_in(settings.tasks) if name]
    check_tasks(names)
    return names


def _check_pair(model: ModelName, source: Source, teacher_name: str | None, teacher: Source | None) -> None:
    """InputError where the logits of the two cannot be compared."""
    if teacher is None:
        return
    difference = tokenizer_difference(source.tokenizer, teacher.tokenizer)
    if difference:
        raise InputError(
            f"{model} and {teacher_name} have different tokenizers ({difference}): compare models of one family"
        )
    ours, its = (text_config(one.config).vocab_size for one in (source, teacher))
    if ours != its:
        raise InputError(
            f"{model} and {teacher_name} give logits over {ours} and {its} tokens: they need one vocabulary"
        )


def _speeds(models: Mapping[str, PreTrainedModel], log: Log) -> Mapping[str, Speed]:
    speeds: Mapping[str, Speed] = {}
    context = min(getattr(text_config(one.config), "max_position_embeddings", 512) for one in models.values())
    with log.stage("speed"), left_out("the speed", log.note):
        # No longer than the context of a small model holds, together with the 32 tokens that are decoded.
        speeds = compare_speed(models, prompt_tokens=max(1, min(256, context - 32)), progress=log.progress)
    return speeds


def _summarise(
    rows: tuple[QualityRow, ...], scores: Mapping[str, Mapping[str, float | int]], windows: Tensor
) -> dict[str, Any]:
    first, *others = rows
    assert first.size is not None
    summary = first.quality.to_dict() | {
        "tasks": scores,
        "windows": len(windows),
        "length": windows.shape[1],
        "parameters": first.size.parameters,
        "bytes": first.size.bytes,
    }
    if others:
        summary["teacher_perplexity"] = others[0].quality.perplexity
    speeds = {row.name: row.speed.to_dict() for row in rows if row.speed is not None}
    return summary | ({"speed": speeds} if speeds else {})
