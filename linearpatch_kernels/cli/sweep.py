"""``linearpatch sweep``: quality against depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linearpatch_kernels.cli.console import (
    Terminal,
    check_json,
    console,
    print_seconds,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, Model, command
from linearpatch_kernels.report.tables import Table, number
from linearpatch_kernels.settings import SweepSettings


@command
def sweep(model: Model, settings: SweepSettings, json_file: JsonFile = None) -> None:
    """Quality against depth: every number of dropped layers with every fit, from one calibration; table and plot."""
    from linearpatch_kernels import recipes

    check_json(json_file, made_from=[model, *(settings.text or ()), settings.heldout_text], output=settings.output)
    result = recipes.sweep(model, settings, reporter=Terminal())
    write_json(json_file, result.summary)
    print_table(sweep_table(result.summary))
    print_seconds(result.seconds)
    console.print(f"Table, plot and figures: {result.output}", soft_wrap=True)


def sweep_table(summary: Mapping[str, Any]) -> Table:
    """The content of ``sweep.json`` as a table: a row per number of dropped layers, a column per fit."""
    points = {(point["drop"], point["fit"]): point for point in summary["points"]}
    fits = list(dict.fromkeys(fit for _, fit in points))
    rows = []
    for drop in dict.fromkeys(drop for drop, _ in points):
        # Some fits may have been left out at some depths.
        there = {fit: points[drop, fit] for fit in fits if (drop, fit) in points}
        spans = next(iter(there.values()))["spans"]
        cells = [number(there[fit]["perplexity"]) if fit in there else "" for fit in fits]
        rows.append([str(drop), ",".join(spans), *cells])
    title = f"Perplexity on {summary['text']} (dense: {number(summary['dense']['perplexity'])})"
    return Table(["dropped", "span", *map(str, fits)], rows, title)
