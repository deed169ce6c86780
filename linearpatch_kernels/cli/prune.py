"""``linearpatch prune``: remove layers, heal the joint, save."""

from __future__ import annotations

from linearpatch_kernels.cli.console import (
    Terminal,
    candidates_table,
    check_json,
    healing_tables,
    print_result,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, Model, command
from linearpatch_kernels.settings import PruneSettings


@command
def prune(model: Model, settings: PruneSettings, json_file: JsonFile = None) -> None:
    """Remove layers from MODEL, heal the joint, write the shallower model to DIR with its plan and a report."""
    from linearpatch_kernels import recipes

    check_json(json_file, made_from=[model, *(settings.text or ()), settings.heldout_text], output=settings.output)
    result = recipes.prune(model, settings, reporter=Terminal())
    if not result.written:
        return
    write_json(json_file, result.summary)
    for table in (*candidates_table(result.plan), *healing_tables(result.summary)):
        print_table(table)
    print_result(result, "Plan" if settings.plan_only else "Model, plan")
