"""Healing in closed form, side by side: ``python -m benchmarks.studies.healing --text mix --windows 128``.

SmolLM2-135M without the span: as it is, with a patch at the joint, refitted (stock), and both. Every row says how much
of the loss that plain removal costs is won back on three texts: BoolQ passages (12 windows, those of
`benchmarks.studies.distillation`), LAMBADA (12 windows) and the manual of Python (12 windows), of which the last two
are never calibrated on. ``--json FILE`` keeps the table as a result.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import add_option, record
from benchmarks.speed.table import markdown
from benchmarks.studies.distillation import FIT, HELDOUT, LENGTH, REPORT
from linearpatch_kernels.calibration import calibrate
from linearpatch_kernels.demo_data import demo_mix, demo_model_path, demo_text
from linearpatch_kernels.evaluation.agreement import compare_quality, healed_share
from linearpatch_kernels.healing.refit import RefitSettings, refit, steps_of_cut
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.selection import fitted_joints
from linearpatch_kernels.span import Span
from linearpatch_kernels.text import split_windows, token_windows, without_shared_runs

# As `benchmarks.studies.distillation` shares the first text out: its tables and these have the same report windows.
_SHARES = {"fit": FIT, "training": 100, "heldout": HELDOUT, "report": REPORT}
METHODS = ("patch", "stock", "patch+stock")


def third_text() -> list[str]:
    """The topics of Python's language reference, as the interpreter carries them."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def reports(tokenizer: Any) -> dict[str, Tensor]:
    boolq = token_windows(tokenizer, demo_text("calibration"), length=LENGTH, count=sum(_SHARES.values()))
    return {
        "BoolQ": split_windows(boolq, _SHARES)["report"],
        "LAMBADA": token_windows(tokenizer, demo_text("heldout"), length=LENGTH, count=REPORT),
        "manual": token_windows(tokenizer, third_text(), length=LENGTH, count=REPORT),
    }


def calibration(tokenizer: Any, text: str, count: int, kept_back: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Windows to fit on and windows held out: of BoolQ alone, or in equal shares of every kind of the mix."""
    if text == "boolq":
        windows = token_windows(tokenizer, demo_text("calibration"), length=LENGTH, count=sum(_SHARES.values()))
        found = split_windows(windows, _SHARES)
        return torch.cat([found["fit"], found["training"]])[:count], found["heldout"]
    fit, held = [], []
    kinds = {kind: without_shared_runs(documents, kept_back) for kind, documents in demo_mix().items()}
    for index, documents in enumerate(kinds.values()):
        mine = count * (index + 1) // len(kinds) - count * index // len(kinds)
        sets = split_windows(
            token_windows(tokenizer, documents, length=LENGTH, count=mine + 1), {"fit": mine, "held": 1}
        )
        fit.append(sets["fit"])
        held.append(sets["held"])
    return torch.cat(fit), torch.cat(held)


def healed(
    dense: PreTrainedModel, spans: Sequence[Span], method: str, fit: Tensor, held: Tensor, settings: RefitSettings
) -> PreTrainedModel:
    joints = tuple(Joint(span, None) for span in spans)
    if "patch" in method:
        joints = fitted_joints(calibrate(dense, fit.split(4), moments=spans), spans, "shrunk-least-squares")
    plan = PrunePlan(num_layers(dense), joints)
    student = apply_plan(dense, plan)
    if "stock" not in method:
        return student
    steps = steps_of_cut(plan.kept_layers, num_layers(dense), settings.behind, in_front="patch" not in method)
    result = refit(dense, student, steps, fit, held, settings=settings)
    for row in result.rows:
        print(f"    {row.layer:3} {row.part:17} ridge {row.ridge}: {row.before:.4f} -> {row.after:.4f}", flush=True)
    return result.model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--spans", default="13:19")
    arguments.add_argument("--text", choices=("boolq", "mix"), default="mix")
    arguments.add_argument("--windows", type=int, default=128)
    arguments.add_argument("--methods", default=",".join(METHODS))
    arguments.add_argument("--behind", type=int, default=3)
    arguments.add_argument("--shrinkage", type=float, default=0.75)
    add_option(arguments)
    options = arguments.parse_args()
    dense, tokenizer = load_model(demo_model_path(), device="cpu")
    spans = [Span.parse(span) for span in options.spans.split(",")]
    texts = reports(tokenizer)
    kept_back = [tokenizer.decode(window) for windows in texts.values() for window in windows]
    fit, held = calibration(tokenizer, options.text, options.windows, kept_back)
    print(
        f"{options.spans}, {options.text}: {len(fit)} windows to fit on, {len(held)} held out, of {LENGTH}", flush=True
    )
    dropped = apply_plan(dense, PrunePlan(num_layers(dense), tuple(Joint(span, None) for span in spans)))
    plain = {"dense": dense, "dropped": dropped}
    base = {name: compare_quality(plain, windows) for name, windows in texts.items()}
    settings = RefitSettings(behind=options.behind, shrinkage=options.shrinkage)
    rows: list[list[str]] = []
    for method in options.methods.split(","):
        begin, cpu = time.perf_counter(), time.process_time()
        model = healed(dense, spans, method, fit, held, settings)
        row = [method]
        took = f"{time.perf_counter() - begin:.0f} s", f"{time.process_time() - cpu:.0f} s"
        for name, windows in texts.items():
            quality = compare_quality({"it": model}, windows, dense)["it"]
            share = healed_share(base[name]["dense"], base[name]["dropped"], quality)
            row += [f"{quality.perplexity:.2f}", f"{share:.1%}", f"{quality.top1_agreement:.1%}"]
        rows.append([*row, *took])
        print(" | ".join(rows[-1]), flush=True)
    columns = ["healed by", *(f"{name}{what}" for name in texts for what in ("", ", healed", ", agreement"))]
    columns += ["time", "CPU time"]
    print(f"\n{markdown(columns, rows)}")
    if options.json:
        about = {"spans": options.spans, "text": options.text, "windows": len(fit), "heldout": len(held)}
        record(options.json, {"healing": (columns, rows)}, about=about)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
