"""CoMe on the demo model, against plain removal and LinearPatch at the same depth: ``python -m benchmarks.merging``.

Every variant is one progressive run down to the least of ``--layers``; its first merges are the run to more layers.
Plans are kept in ``--plans`` after every merge, so a run that was stopped goes on when the command is given again.
Perplexity and top-1 agreement with the dense model are on text that nothing was chosen on: other passages of the
calibration's source / another source.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.evaluation.agreement import compare_quality
from linearpatch_kernels.modeling.families import keep_layers, num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.surgery.apply import apply_plan
from linearpatch_kernels.surgery.merge_healing import heal_merges
from linearpatch_kernels.surgery.merge_plan import MergePlan, apply_merges
from linearpatch_kernels.surgery.merge_search import MergeSettings, plan_merging
from linearpatch_kernels.surgery.plan import PrunePlan
from linearpatch_kernels.surgery.scoring import choose_spans
from linearpatch_kernels.surgery.selection import fitted_joints
from linearpatch_kernels.text import cache_dir, demo_model_path, demo_text, split_windows, token_windows

ROWS: dict[str, dict[str, Any]] = {
    "CoMe (authors')": {"rule": "authors"},
    "CoMe (ours)": {},
    "CoMe-P (ours)": {"posterior": True},
    "CoMe-P, places by loss": {"posterior": True, "skip_score": "loss"},
    "CoMe-P, places by loss, every share >= 0.1": {"posterior": True, "skip_score": "loss", "least_share": 0.1},
}
FITS = ("linearpatch", "shrunk-low-rank")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[27, 24])
    arguments.add_argument("--variants", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--heldout", type=int, default=4)
    arguments.add_argument("--report", type=int, default=8, help="windows of each text that the figures are over")
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--plans", type=Path, default=cache_dir() / "benchmark-merging")
    arguments.add_argument("--heal", action="store_true", help="also patch behind the merged layers")
    options = arguments.parse_args()
    options.plans.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(demo_model_path(), device="cpu")
    windows = _windows(tokenizer, options)
    plans = {name: _plan(model, windows, name, options) for name in options.variants}
    statistics = calibrate(model, windows["fit"].split(1))
    print(f"\nSmolLM2-135M, {len(windows['fit'])} x {options.length} tokens to score, {options.heldout} to choose on")
    print("perplexity / top-1 agreement on: the calibration's source | another text")
    for layers in options.layers:
        drop = num_layers(model) - layers
        models = {"dense": model} | _removals(model, statistics, drop)
        for name, plan in plans.items():
            part = _first(plan, drop)
            models[name] = merged = apply_merges(model, part)
            for fit in FITS if options.heal else ():
                models[f"{name} + {fit} behind each"] = heal_merges(model, merged, windows["fit"], fit)
                last = heal_merges(model, merged, windows["fit"], fit, last_only=True)
                models[f"{name} + {fit} behind the last"] = last
        print(f"\n{layers} layers")
        _evaluate(model, models, windows)
        for name, plan in plans.items():
            part = _first(plan, drop)
            seconds = sum(record["seconds"] for record in part.records)
            shares = " ".join(f"{merge.span}={merge.shares[0]:.2f}" for merge in part.merges)
            print(f"  {name}: {seconds:.0f} s; merges, and the share of the first of the two: {shares}")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


def _first(plan: MergePlan, count: int) -> MergePlan:
    return dataclasses.replace(plan, merges=plan.merges[:count], records=plan.records[:count])


def _windows(tokenizer: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    shares = {"fit": options.samples, "heldout": options.heldout, "same": options.report}
    calibration = token_windows(tokenizer, demo_text("calibration"), length=options.length, count=sum(shares.values()))
    other = token_windows(tokenizer, demo_text("heldout"), length=options.length, count=options.report)
    return {**split_windows(calibration, shares), "other": other}


def _plan(model: PreTrainedModel, windows: dict[str, Tensor], name: str, options: argparse.Namespace) -> MergePlan:
    """The plan of a variant, from where an earlier call left it; every record holds the seconds of its merge."""
    settings = MergeSettings(layers=min(options.layers), **ROWS[name])
    origin = {"samples": options.samples, "heldout": options.heldout, "length": options.length}
    # Not the number of layers: a run to fewer goes on from one to more.
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key != "layers"}
    plan = MergePlan(num_layers(model), settings=kept, calibration=origin)
    file = options.plans / f"{'-'.join(map(str, [*kept.values(), *origin.values()]))}.json"
    if file.exists():
        plan = MergePlan.load(file)
    while plan.layers > settings.layers:
        begin = time.perf_counter()
        step = dataclasses.replace(settings, layers=plan.layers - 1)
        _, longer = plan_merging(model, windows["fit"], windows["heldout"], step, plan=plan)
        timed = {**longer.records[-1], "seconds": time.perf_counter() - begin}
        plan = plan.extended(longer.merges[-1], timed)
        plan.save(file)
        print(f"{name}: {plan.layers} layers, {timed['seconds']:.0f} s", flush=True)
    return plan


def _removals(model: PreTrainedModel, statistics: Any, drop: int) -> dict[str, PreTrainedModel]:
    """What prune does by default: the span of the highest cosine, removed plainly and with LinearPatch's map."""
    (span,) = choose_spans(statistics, drop, "cosine")
    patch = fitted_joints(statistics, [Span(*span)], "linearpatch")
    kept = [layer for layer in range(num_layers(model)) if layer not in range(*span)]
    return {
        f"plain removal of {span}": keep_layers(model, kept),
        f"LinearPatch at {span}": apply_plan(model, PrunePlan(num_layers(model), patch)),
    }


def _evaluate(dense: PreTrainedModel, models: dict[str, PreTrainedModel], windows: dict[str, Tensor]) -> None:
    found = {text: compare_quality(models, windows[text], dense) for text in ("same", "other")}
    for name in models:
        cells = " | ".join(
            f"{one[name].perplexity:9.2f} / {100 * (one[name].top1_agreement or 0):4.1f} %" for one in found.values()
        )
        print(f"  {name:62} {cells}", flush=True)


if __name__ == "__main__":
    main()
