"""``linearpatch inspect``: what a directory holds."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearpatch_kernels.cli.console import (
    candidates_table,
    check_json,
    console,
    healing_tables,
    print_table,
    write_json,
)
from linearpatch_kernels.cli.distill import distillation_table
from linearpatch_kernels.cli.flags import in_flags
from linearpatch_kernels.cli.merge import merges_table
from linearpatch_kernels.cli.options import JsonFile
from linearpatch_kernels.cli.sweep import sweep_table
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import read_json, record
from linearpatch_kernels.report.tables import Table, number, percent
from linearpatch_kernels.settings import given_path

if TYPE_CHECKING:
    from linearpatch_kernels.report.card import Section

_CURE = "write the directory again"


def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="What prune, merge, distill or sweep wrote, or any model directory.",
            show_default=False,
            parser=given_path,
        ),
    ],
    json_file: JsonFile = None,
) -> None:
    """Show what a directory holds: how it was made and of what, layers, joints, patches, what chose them, how good they
    were, how to load it. Loads no weights."""
    check_json(json_file)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give one that linearpatch wrote, or a model directory")
    found = _contents(directory)
    for section in found.card:
        _print_section(section)
    for table in found.tables:
        print_table(table)
    if found.calibration:
        console.print("Calibrated on " + ", ".join(f"{key} {value}" for key, value in found.calibration.items()))
    write_json(json_file, found.summary)


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a directory holds.

    Attributes:
        summary: goes to JSON.
        card: what the model card says, in sentences; tables: figures beside it.
        calibration: what the patches were calibrated on.
    """

    summary: Mapping[str, Any]
    card: Sequence[Section]
    tables: Sequence[Table]
    calibration: Mapping[str, Any]


def _print_section(section: Section) -> None:
    """All of it but its table: there is a larger one of the same figures."""
    console.print(section.heading, style="bold")
    for line in section.lines:
        console.print(f"  {in_flags(line)}", soft_wrap=True)
    for about, _, content in section.blocks:
        console.print(f"  {about}")
        console.print(textwrap.indent(content, "    "), soft_wrap=True)
    console.print()


def _contents(directory: Path) -> _Contents:
    """What is in it.

    A file that parses may still be another than its name says: then any of the tables cannot be made.
    """
    from linearpatch_kernels.files import reading
    from linearpatch_kernels.merging.consistency import check_merges
    from linearpatch_kernels.merging.plan import MERGE_FILE, MergePlan
    from linearpatch_kernels.pruning.consistency import check_plan
    from linearpatch_kernels.pruning.plan import PrunePlan
    from linearpatch_kernels.report.card import sections

    config = _read(directory / "config.json")
    sweep = _read(directory / "sweep.json")
    plan = PrunePlan.load(directory) if record(directory, "plan.json").exists() else None
    merge_file = record(directory, MERGE_FILE)
    merges = MergePlan.load(merge_file) if merge_file.exists() else None
    if plan is None and sweep is None and (config is None or "model_type" not in config):
        raise InputError(
            f"{directory} holds no plan.json, no sweep.json and no model's config.json: give a directory that "
            "linearpatch wrote, or a model directory"
        )
    summary: dict[str, Any] = {}
    tables: list[Table] = []
    card: list[Section] = []
    if config is not None:
        with reading(directory / "config.json", _CURE):
            if merges is not None:
                check_merges(merges, config, directory)
            if plan is not None:
                check_plan(plan, config, directory)
            summary["model"] = _model(directory, config)
        rows = [[key.replace("_", " "), str(one)] for key, one in summary["model"].items()]
        tables.append(Table(["what", "value"], rows, "Model"))
    if merges is not None:
        summary["merges"] = merges.to_json()
        with reading(merge_file, _CURE):
            tables.append(merges_table(merges))
    if plan is not None:
        summary["plan"] = plan.to_json()
        with reading(record(directory, "plan.json"), _CURE):
            tables += [_joints_table(plan), *candidates_table(plan)]
    if plan is not None or merges is not None:
        figures = record(directory, "summary.json")
        about = _read(figures) or {}
        summary["quality"] = about.get("quality", {})
        told = ("base", "text", "heal", "heal_candidates", "refit", "result")
        summary |= {name: about[name] for name in told if name in about}
        with reading(figures, _CURE):
            card = sections(about, loads=config is not None)
            tables += healing_tables(about)
            tables += _quality_table(summary["quality"])
            if "distillation" in about:
                summary["distillation"] = about["distillation"]
                tables.append(distillation_table(about["distillation"]))
    if sweep is not None:
        summary["sweep"] = sweep
        with reading(directory / "sweep.json", _CURE):
            tables.append(sweep_table(sweep))
    made = plan or merges
    return _Contents(summary, card, tables, made.calibration if made is not None else {})


def _read(file: Path) -> dict[str, Any] | None:
    return read_json(file, _CURE) if file.exists() else None


def _model(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    from linearpatch_kernels.modeling.config_forms import of_decoder, written_sizes
    from linearpatch_kernels.report.steps import written

    weights = [file for file in directory.iterdir() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.name)]
    tree = of_decoder(config).get("linearpatch_merge_tree")
    layers, width = written_sizes(config)
    about = {
        "model_type": config.get("model_type"),
        "num_layers": layers,
        "hidden_size": width,
        "patched_layers": sorted(map(int, (config.get("linearpatch") or {}).get("joints", {}))),
        "weight_bytes": sum(file.stat().st_size for file in weights),
    }
    pattern = _pattern(config)
    if pattern is not None:
        about["layer_pattern"] = pattern
    return about if tree is None else about | {"merge_tree": " ".join(map(written, tree))}


def _pattern(config: Mapping[str, Any]) -> str | None:
    """How the kinds of layers repeat, or that they do not; None where they are of one kind or not known."""
    from linearpatch_kernels.modeling.families import family_of
    from linearpatch_kernels.modeling.patterns import IRREGULAR, pattern_in

    if not isinstance(config.get("num_hidden_layers"), int):
        return None
    try:
        named = family_of(str(config["model_type"])).per_layer
    except InputError:
        named = None
    pattern = pattern_in(SimpleNamespace(**config), named)
    if pattern.period == 1:
        return None
    return str(pattern) if pattern.period is not None else f"{pattern} ({IRREGULAR})"


def _joints_table(plan: Any) -> Table:
    from linearpatch_kernels.report.pruning import describe_patch

    at = {joint.span: position for position, joint in plan.joint_positions().items()}
    return Table(
        ["removed", "enters", "chosen by", "patch"],
        [[str(joint.span), str(at[joint.span]), plan.score, describe_patch(joint)] for joint in plan.joints],
        f"Joints: layers removed of {plan.num_layers}, and the layer that the stream enters now",
    )


def _quality_table(quality: Mapping[str, Any]) -> list[Table]:
    rows = [[name, number(one["perplexity"]), percent(one["top1_agreement"])] for name, one in quality.items()]
    return [Table(["model", "perplexity", "top-1 agreement"], rows, "Quality when it was made")] if rows else []
