"""``linearpatch demo``: the main job on a model from PyPI, from start to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearpatch_kernels.cli.console import (
    Terminal,
    candidates_table,
    check_json,
    console,
    print_quality,
    print_seconds,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.options import JsonFile, command
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.report.tables import Table
from linearpatch_kernels.settings import DemoSettings

if TYPE_CHECKING:
    from linearpatch_kernels.report.page import QualityRow


@command
def demo(settings: DemoSettings, json_file: JsonFile = None) -> None:
    """The main job on SmolLM2-135M: drop 6 of 30 layers, heal, measure on held-out text, save, reload, write on."""
    from linearpatch_kernels import recipes

    check_json(json_file, output=settings.output)
    result = recipes.demo(settings, reporter=Terminal())
    write_json(json_file, result.summary)
    for table in candidates_table(result.plan):
        print_table(table)
    print_quality(result.quality, result.quality_text)
    columns = ["model", "layers", "parameters", "prefill tok/s", "decode tok/s"]
    print_table(Table(columns, [cells for row in result.models if (cells := _speed(row))], "Speed"))
    console.print(f"Removed the layers {', '.join(map(str, result.plan.spans))} of {result.plan.num_layers}.")
    first = result.places["healed (stock)"]
    console.print(
        f"Reloaded {first}: its logits are {'' if result.same else 'NOT '}those of the model in memory.", soft_wrap=True
    )
    console.print(f"It continues “{result.prompt}” with:\n  {result.continuation.strip()}\n")
    for name, place in result.places.items():
        console.print(f"{name}: {place}", soft_wrap=True)
    print_seconds(result.seconds)
    if not result.same:
        raise InputError(
            "the reloaded model differs from the one in memory: please report this with `linearpatch doctor`"
        )


def _speed(row: QualityRow) -> list[str]:
    if row.size is None or row.speed is None:
        return []
    speeds = (row.speed.prefill_tokens_per_second, row.speed.decode_tokens_per_second)
    return [row.name, str(row.layers), f"{row.size.parameters / 1e6:.1f} M", *(f"{one:,.0f}" for one in speeds)]
