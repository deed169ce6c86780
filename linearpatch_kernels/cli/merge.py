"""``linearpatch merge``: make layers one, again and again (CoMe), and save a plain model of the same architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearpatch_kernels.cli.console import (
    Terminal,
    check_json,
    healing_tables,
    print_result,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, Model, command
from linearpatch_kernels.report.tables import Table
from linearpatch_kernels.settings import MergeRunSettings

if TYPE_CHECKING:
    from linearpatch_kernels.merging.plan import MergePlan


@command
def merge(model: Model, settings: MergeRunSettings, json_file: JsonFile = None) -> None:
    """Merge layers of MODEL until N remain (CoMe), write the shallower model to DIR with its plan and a report."""
    from linearpatch_kernels import recipes

    check_json(json_file, made_from=[model, *(settings.text or ()), settings.heldout_text], output=settings.output)
    result = recipes.merge(model, settings, reporter=Terminal())
    write_json(json_file, result.summary)
    for table in (merges_table(result.plan), *healing_tables(result.summary)):
        print_table(table)
    print_result(result, "Model, plan", lines=result.healing)


def merges_table(plan: MergePlan) -> Table:
    """Every merge: which layers (of the dense model) became one, and how much each gave."""
    from linearpatch_kernels.recipes.merge import merge_rows

    title = f"Merges: {plan.num_layers} layers to {plan.layers}, in order"
    return Table(["layers made one", "at", "shares", "chosen by", "held-out loss"], merge_rows(plan), title)
