"""``linearpatch distill``: train what heals the joint against the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from linearpatch_kernels.cli.console import (
    Terminal,
    check_json,
    print_result,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, command
from linearpatch_kernels.report.tables import Table
from linearpatch_kernels.settings import DistillSettings, given_path


@command
def distill(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="What prune, merge or distill wrote.", show_default=False, parser=given_path
        ),
    ],
    settings: DistillSettings,
    json_file: JsonFile = None,
) -> None:
    """Train DIR's patch, or its merged layers one by one, against the dense model it was made from; write the result
    like prune's or merge's. Killed or interrupted: the same command goes on."""
    from linearpatch_kernels import recipes

    reads: list[Path | str | None] = [
        directory,
        settings.teacher,
        *(settings.text or ()),
        settings.heldout_text,
        settings.store,
    ]
    check_json(json_file, made_from=reads, output=settings.output)
    result = recipes.distill(directory, settings, reporter=Terminal())
    if not result.written:
        return
    write_json(json_file, result.summary)
    print_result(result, "Model, plan", tables=[distillation_table(result.about)], lines=_costs(result.about))


def distillation_table(about: Mapping[str, Any]) -> Table:
    """A run in a few rows."""
    from linearpatch_kernels.report.steps import distillation_rows

    return Table(["what", "value"], distillation_rows(about), "Distillation")


def _costs(about: Mapping[str, Any]) -> list[str]:
    """What the step back from a dense patch costs, if it was made."""
    costs = about["structured"]
    if not costs:
        return []
    lost = costs["heldout_after"] - costs["heldout_before"]
    return [
        f"Hadamard + rank {costs['rank']} instead of the dense patch costs {lost:+.4f} nats of held-out KL "
        f"({costs['heldout_before']:.4f} before, {costs['heldout_after']:.4f} after)."
    ]
