"""``linearpatch export``: a stock model as one file that other engines read."""

from __future__ import annotations

from linearpatch_kernels.cli.console import Terminal, check_json, console, print_seconds, write_json
from linearpatch_kernels.cli.options import JsonFile, Model, command
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.settings import ExportSettings


@command
def export(model: Model, settings: ExportSettings, json_file: JsonFile = None) -> None:
    """Write MODEL, a stock result or any stock checkpoint, as one GGUF file."""
    from linearpatch_kernels import recipes

    if json_file is not None and json_file.absolute() == settings.output.absolute():
        raise InputError(f"--json {json_file} is the output: give another file")
    check_json(json_file, made_from=[model])
    result = recipes.export(model, settings, reporter=Terminal())
    write_json(json_file, result.summary)
    summary = result.summary
    console.print(
        f"{result.output}: {summary['architecture']}, {summary['layers']} layers, {summary['tensors']} tensors, "
        f"{summary['dtype']}, {summary['file_bytes'] / 1e9:.2f} GB",
        soft_wrap=True,
    )
    print_seconds(result.seconds)
