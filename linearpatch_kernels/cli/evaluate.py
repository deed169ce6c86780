"""``linearpatch evaluate``: how good a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearpatch_kernels.cli.console import (
    Terminal,
    check_json,
    print_seconds,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, Model, command
from linearpatch_kernels.report.tables import Table, number, percent
from linearpatch_kernels.settings import EvaluateSettings

if TYPE_CHECKING:
    from linearpatch_kernels.recipes import Evaluation


@command
def evaluate(model: Model, settings: EvaluateSettings, json_file: JsonFile = None) -> None:
    """Perplexity of MODEL; with --teacher its top-1 agreement and KL; with --tasks zero-shot accuracy."""
    from linearpatch_kernels import recipes

    check_json(json_file, made_from=[settings.text, model, settings.teacher])
    failure: Exception | None = None
    try:
        result = recipes.evaluate(model, settings, reporter=Terminal())
    except recipes.TasksFailed as error:  # what failed is raised once all that was measured is told
        result, failure = error.evaluation, error.cause
    write_json(json_file, result.summary)
    _print(result)
    if failure is not None:
        raise failure


def _print(result: Evaluation) -> None:
    rows = [
        [
            row.name,
            str(row.layers),
            f"{row.size.parameters / 1e6:,.1f} M" if row.size is not None else "",
            number(row.quality.perplexity),
            percent(row.quality.top1_agreement),
            "" if row.quality.kl is None else f"{row.quality.kl:.3f}",
        ]
        for row in result.models
    ]
    print_table(Table(["model", "layers", "parameters", "perplexity", "top-1 agreement", "KL"], rows, result.text))
    speeds = {row.name: row.speed for row in result.models if row.speed is not None}
    if speeds:
        speed_rows = [
            [name, number(one.prefill_tokens_per_second), number(one.decode_tokens_per_second)]
            for name, one in speeds.items()
        ]
        print_table(Table(["model", "prefill tok/s", "decode tok/s"], speed_rows, "Speed"))
    if result.tasks:
        task_rows = [
            [task, str(scores["n"]), *(percent(scores.get(kind)) for kind in ("acc", "acc_norm"))]
            for task, scores in result.tasks.items()
        ]
        print_table(Table(["task", "questions", "acc", "acc_norm"], task_rows, "Zero-shot accuracy"))
    print_seconds(result.seconds)
