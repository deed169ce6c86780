"""``linearpatch inspect``: what a directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearpatch_kernels.cli.console import check_json, console, print_candidates, print_table, read_json, write_json
from linearpatch_kernels.cli.options import JsonFile
from linearpatch_kernels.errors import InputError


def inspect(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What prune or sweep wrote, or any model directory.", show_default=False),
    ],
    json_file: JsonFile = None,
) -> None:
    """Show what a directory holds: layers, joints, patches, what chose them, how good they were. Loads no weights."""
    from linearpatch_kernels.surgery.plan import PrunePlan
    from linearpatch_kernels.surgery.reporting import describe_patch

    check_json(json_file)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory: give one that linearpatch wrote, or a model directory")
    plan = PrunePlan.load(directory) if (directory / "plan.json").exists() else None
    config = read_json(directory / "config.json") if (directory / "config.json").exists() else None
    if plan is None and config is None:
        raise InputError(
            f"{directory} holds neither a plan.json nor a config.json: give a directory that linearpatch wrote"
        )
    summary: dict[str, Any] = {}
    if config is not None:
        patched = (config.get("linearpatch") or {}).get("joints", {})
        weights = sum(
            file.stat().st_size for file in directory.glob("*.safetensors") if file.name != "plan.safetensors"
        )
        summary["model"] = {
            "model_type": config.get("model_type"),
            "num_layers": config.get("num_hidden_layers"),
            "hidden_size": config.get("hidden_size"),
            "patched_layers": sorted(map(int, patched)),
            "weight_bytes": weights,
        }
        rows = [[key.replace("_", " "), str(value)] for key, value in summary["model"].items()]
        print_table("Model", ["what", "value"], rows)
    if plan is not None:
        summary["plan"] = plan.to_json()
        at = {joint.span: position for position, joint in plan.joint_positions().items()}
        rows = [[str(j.span), str(at[j.span]), plan.score, describe_patch(j)] for j in plan.joints]
        title = f"Joints: layers removed of {plan.num_layers}, and the layer that the stream enters now"
        print_table(title, ["removed", "enters", "chosen by", "patch"], rows)
        print_candidates(plan)
        if plan.calibration:
            console.print("Calibrated on " + ", ".join(f"{k} {v}" for k, v in plan.calibration.items()))
    if (directory / "summary.json").exists():
        summary["quality"] = read_json(directory / "summary.json").get("quality", {})
        rows = [
            [name, f"{q['perplexity']:.2f}", f"{100 * (q['top1_agreement'] or 0):.1f} %"]
            for name, q in summary["quality"].items()
        ]
        print_table("Quality when it was made", ["model", "perplexity", "top-1 agreement"], rows)
    write_json(json_file, summary)
