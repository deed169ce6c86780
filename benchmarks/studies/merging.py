"""CoMe on the demo model, beside plain removal and patches: ``python -m benchmarks.studies.merging``.

Every variant is one progressive run down to the least of ``--layers``; its first merges are the run to more layers
(but for ``CoMe, one block``, one merge for every depth). ``+ refit`` is `healing.merges.refit_merges`,
``+ patches`` a low-rank patch behind every merged layer, ``+ distilled`` hierarchical distillation of the refitted
model, with the same windows for every row. Whatever is finished (a merge, a row) is kept in ``--work``: a run that was
stopped goes on when the command is given again, and what is there is only printed. ``--groups`` tells instead what
layers made one lack, ``--behind 0 1 3`` what it adds to refit so many layers behind a merged block, too.
Perplexity and top-1 agreement with the dense model are on text that nothing was chosen on: other passages of the
calibration's source / another source.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.record import Rows, add_option, commit, record
from benchmarks.speed.hardware import describe
from benchmarks.speed.memory import peak_memory
from benchmarks.speed.table import markdown
from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.distillation.hierarchical import HierarchySettings, distill_merged, stream_error
from linearpatch_kernels.distillation.settings import TrainingSettings
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.evaluation.agreement import Quality, QualityMeter
from linearpatch_kernels.forward import PartialRun, model_logits, residual_stream
from linearpatch_kernels.healing.merge_search import plan_merging
from linearpatch_kernels.healing.merges import CandidateRefits, heal_merges, patch_merges, refit_merges
from linearpatch_kernels.merging.merge import choose_units, merge_layers
from linearpatch_kernels.merging.plan import MergePlan, apply_merges
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.merging.settings import MergeSettings
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.pruning.scores import choose_spans
from linearpatch_kernels.pruning.search import plan_pruning
from linearpatch_kernels.pruning.selection import fitted_joints
from linearpatch_kernels.text import cache_dir, split_windows, token_windows
from linearpatch_kernels.torch_state import evaluation_mode

VARIANTS: dict[str, dict[str, Any]] = {
    "CoMe (authors')": {"rule": "authors"},
    "CoMe (ours)": {},
    "CoMe-P (ours)": {"posterior": True},
    "CoMe-P, places by loss": {"posterior": True, "skip_score": "loss"},
    "CoMe-P, places by loss, every share >= 0.1": {"posterior": True, "skip_score": "loss", "least_share": 0.1},
    "CoMe, one block": {"posterior": True, "skip_score": "refit", "width": None},
}
GROUPS = {4: (2,), 12: (2, 3, 5, 7, 10), 23: (2,)}
"""First layer -> how many are made one, of ``--groups``."""

BLOCK, SHARE = Span(12, 19), 0.75
"""The one block of ``--behind`` and the share of its first layer: what ``CoMe, one block`` takes at 24 layers."""

FIRST = ("dense", "plain removal", "LinearPatch", "our best patch")
DISTILLED = " + distilled"
AFTERWARDS = ("", " + refit", " + patches", DISTILLED)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, nargs="+", default=[24, 27, 21])
    arguments.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    arguments.add_argument("--rows", nargs="*", metavar="NAME", help="these alone, as the table names them")
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--heldout", type=int, default=4)
    arguments.add_argument("--report", type=int, default=12, help="windows of each text that the figures are over")
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--steps", type=int, default=32, help="of distillation, one window each")
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    arguments.add_argument("--work", type=Path, default=cache_dir() / "benchmark-merging")
    arguments.add_argument("--print-only", action="store_true", help="the rows that are there, without computing any")
    arguments.add_argument("--time", action="store_true", help="make rows that are there again, for their cost alone")
    arguments.add_argument("--costs", action="store_true", help="memory of scoring and time of a merge instead")
    arguments.add_argument("--groups", action="store_true", help="what layers made one lack to the stream instead")
    arguments.add_argument("--behind", type=int, nargs="+", metavar="N", help="refits of one block instead")
    add_option(arguments)
    options = arguments.parse_args()
    study = Study(options)
    if options.groups:
        tables = study.print_groups()
    elif options.costs:
        tables = study.print_costs()
    elif options.behind is not None:
        tables = study.print_behind(options.behind)
    else:
        # The quick ones of every depth first.
        order = [(layers, name) for layers in options.layers for name in study.names]
        order.sort(key=lambda row: row[1].endswith(DISTILLED))
        tables = study.print_table({row: study.row(*row) for row in order})
    if options.json:
        record(options.json, tables)


class Study:
    """The demo model, the windows, and what was computed of them so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        keys = ("samples", "heldout", "report", "length")
        self.place: Path = options.work / "-".join(str(getattr(options, key)) for key in keys)
        self.place.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = load_model(demo_model_path(), device="cpu")
        self.windows = _windows(self.tokenizer, options)
        made = [name + more for name in options.variants for more in AFTERWARDS]
        self.names = [name for name in (*FIRST, *made) if not options.rows or name in options.rows]

    def row(self, layers: int, name: str) -> dict[str, Any] | None:
        """Figures of one row, from its file if it was made before."""
        told = f" {self.options.steps} {self.options.learning_rate}" if name.endswith(DISTILLED) else ""
        file = self.place / f"{layers}-{''.join(c if c.isalnum() else '_' for c in name + told)}.json"
        there: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if not there and self.options.print_only:
            return None
        if not there or self.options.time:
            begin = time.perf_counter()
            _forget_peak()
            model, about = self._made(layers, name)
            # Of what it takes to make the model; evaluating it is not counted, nor is what another row has made.
            about = there | {"seconds": time.perf_counter() - begin, "peak": _peak(), **about}
            if not there:
                about["commit"] = commit()
                about |= self._row_of(model)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(about))
            os.replace(temporary, file)
            print(f"{layers} layers, {name}: {about['same'][0]:.1f} / {about['other'][0]:.1f}", flush=True)
            there = json.loads(file.read_text())
        return there

    def print_table(self, rows: dict[tuple[int, str], dict[str, Any] | None]) -> dict[str, Rows]:
        options = self.options
        print(f"\nSmolLM2-135M, {describe()['cpu']}")
        print(
            f"{options.samples} x {options.length} tokens to score and fit, {options.heldout} to choose on, "
            f"{options.steps} to distil; {options.report} windows of each text in every figure"
        )
        cost_of = options.layers[0]
        print(f"perplexity and agreement on the calibration's source / another text, costs at {cost_of} layers")
        depths = sorted(options.layers, reverse=True)
        heads = [head for layers in depths for head in (f"{layers} layers", "agreement")]
        header = ("", *heads, "seconds", "memory", "commits")
        table = []
        for name in self.names:
            there = {layers: rows[layers, name] for layers in depths}
            if any(there.values()):
                cells = [cell for row in there.values() for cell in _figures(row)]
                commits = sorted({row.get("commit", "not kept") for row in there.values() if row})
                table.append((name, *cells, *_costs(there[cost_of]), ", ".join(commits)))
        print(f"\n{markdown(header, table)}\n")
        shares = []
        for name in options.variants:
            # A progressive run holds those to more layers.
            for layers in depths if VARIANTS[name].get("width", 2) is None else depths[-1:]:
                row = rows.get((layers, name))
                if row is not None:
                    shares.append((f"{layers} layers, {name}", row["shares"]))
        places = ("", "merges in order and share of the first layer"), shares
        print(markdown(*places))
        return {"rows": (header, table), "places": places}

    def print_groups(self) -> dict[str, Rows]:
        """How far the stream behind one layer in the place of several is from the dense model's, on held-out windows.

        The mean over the tokens of |x - y|^2 / |y|^2: with the first of them alone; merged with the last (4 to 1);
        either refitted; and the first with a dense map behind it.
        """
        fit, heldout = self.windows["fit"], self.windows["heldout"]
        spans = [Span(start, start + width) for start in GROUPS for width in GROUPS[start]]
        refitted = CandidateRefits(self.model, self.model, fit, {span: span.end for span in spans})
        header = (
            "layers made one",
            "the first",
            "refitted",
            "4 to 1 with the last",
            "refitted",
            "the first, a dense map",
        )
        table = []
        scores = score_layers(self.model, fit)
        for span in spans:
            between = [0.0] * (span.length - 2)
            first, mixed = (
                merge_layers(self.model, choose_units(scores, span, [share, *between, 1 - share])) for share in (1, 0.8)
            )
            models = [first, refitted(first, span), mixed, refitted(mixed, span)]
            models.append(patch_merges(self.model, first, fit, "least-squares"))
            errors = [self._stream_error(model, span, heldout) for model in models]
            table.append((str(span), *(f"{error:.3f}" for error in errors)))
        print(markdown(header, table))
        return {"groups": (header, table)}

    def print_behind(self, counts: Sequence[int]) -> dict[str, Rows]:
        """`BLOCK` made one and healed: by a refit of it and of layers behind it, and by a patch with and without these.

        It heals on the windows to score on and those to distil on.
        """
        windows = torch.cat([self.windows["fit"], self.windows["distil"][: self.options.steps]])
        shares = [SHARE, *[0.0] * (BLOCK.length - 2), 1 - SHARE]
        scores = score_layers(self.model, self.windows["fit"])
        merged = merge_layers(self.model, choose_units(scores, BLOCK, shares))
        heals = [("none", 0), *(("refit", count) for count in counts), ("patch", 0)]
        heals += [("patch+refit", count) for count in counts if count]
        header = ("heal", "behind", "perplexity", "agreement", "seconds")
        table = [("dense", "", *_figures(self._row_of(self.model)), "")]
        print(" | ".join(table[0]), flush=True)
        for heal, behind in heals:
            begin = time.perf_counter()
            model = heal_merges(self.model, merged, windows, heal, fit="shrunk-least-squares", behind=behind).model
            seconds = time.perf_counter() - begin
            table.append((heal, str(behind), *_figures(self._row_of(model)), f"{seconds:.0f}"))
            print(" | ".join(table[-1]), flush=True)
        told = f"layers {BLOCK} made one, {len(windows)} windows of {windows.shape[1]} tokens to heal on"
        print(f"\nSmolLM2-135M, {told}, {self.options.report} windows of each text in every figure\n")
        print(markdown(header, table))
        return {"behind": (header, table)}

    def _row_of(self, model: PreTrainedModel) -> dict[str, Any]:
        found = {text: self._quality(model, text) for text in ("same", "other")}
        return {text: [one.perplexity, one.top1_agreement] for text, one in found.items()}

    @torch.no_grad()
    def _stream_error(self, model: PreTrainedModel, span: Span, windows: Tensor) -> float:
        behind = span.start + 1
        errors = []
        for window in windows.split(1):
            wanted = residual_stream(self.model, window, [span.end])[span.end]
            found = PartialRun(model, "tokens", behind)(window)
            if behind in patches(model):
                found = patches(model)[behind](found)
            errors.append(stream_error(found, wanted, "relative"))
        return float(torch.stack(errors).mean())

    def print_costs(self) -> dict[str, Rows]:
        """Memory of a scoring pass beside that of bare passes, and the time of one merge."""
        window = token_windows(self.tokenizer, demo_text("calibration"), length=512, count=1)
        decoder = PartialRun(self.model, "tokens", num_layers(self.model))

        def without_head() -> None:
            with torch.no_grad(), evaluation_mode(self.model):
                decoder(window)

        runs: dict[str, Callable[[], object]] = {
            "scoring": lambda: score_layers(self.model, window),
            "the decoder's pass": without_head,
            "the model's pass": lambda: model_logits(self.model, window),
        }
        score_layers(self.model, window)  # what is allocated once stays out of all
        found = {name: min(peak_memory(run) for _ in range(3)) for name, run in runs.items()}
        rows = [
            (f"memory of {name}, one window of {window.shape[1]} tokens", f"{growth / 2**20:.1f} MB")
            for name, growth in found.items()
        ]
        scores = score_layers(self.model, window)
        begin = time.perf_counter()
        merge_layers(self.model, choose_units(scores, Span(13, 15), (0.5, 0.5)))
        rows.append(("one pair merged, the scores given", f"{time.perf_counter() - begin:.2f} s"))
        header = ("what, beyond the model", "figure")
        print(markdown(header, rows))
        return {"costs": (header, rows)}

    def _quality(self, model: PreTrainedModel, text: str) -> Quality:
        """Against the dense model's logits, which are on disk from the first row on."""
        file = self.place / f"logits-{text}.safetensors"
        meter = QualityMeter()
        with evaluation_mode(model):
            if not file.exists():
                logits = {str(i): model_logits(self.model, w)[0] for i, w in enumerate(self.windows[text].split(1))}
                save_file(logits, file.with_suffix(".tmp"))
                os.replace(file.with_suffix(".tmp"), file)
            with safe_open(file, framework="pt") as kept:
                for i, window in enumerate(self.windows[text].split(1)):
                    meter.update(model_logits(model, window), window, kept.get_tensor(str(i)).unsqueeze(0))
        return meter.result()

    def _made(self, layers: int, name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        if name in FIRST:
            return self._unmerged(layers, name), {}
        variant = max((one for one in VARIANTS if name.startswith(one)), key=len)
        plan = self._plan(variant, layers)
        merged = apply_merges(self.model, plan)
        merging = sum(record["seconds"] for record in plan.records)
        begin = time.perf_counter()
        about: dict[str, Any] = {}
        afterwards = name.removeprefix(variant)
        if afterwards == " + patches":
            merged = patch_merges(self.model, merged, self.windows["fit"], "shrunk-low-rank")
        elif afterwards in (" + refit", DISTILLED):
            merged = refit_merges(self.model, merged, self.windows["fit"]).model
        if afterwards == DISTILLED:
            about["groups"] = self._distil(merged, layers, variant)
        about["seconds"] = merging + time.perf_counter() - begin
        about["shares"] = ", ".join(f"{merge.span} {merge.shares[0]:.2f}" for merge in plan.merges)
        if not afterwards:
            about["peak"] = max((record["peak"] for record in plan.records if "peak" in record), default=None)
        return merged, about

    def _unmerged(self, layers: int, name: str) -> PreTrainedModel:
        """What prune does by default: the span of the highest cosine; plainly, with LinearPatch's map, or the best."""
        drop = num_layers(self.model) - layers
        if name == "dense":
            return self.model
        if name == "our best patch":
            found = plan_pruning(self.model, self.windows["fit"], self.windows["heldout"], drop=drop)
            return apply_plan(self.model, found.plan)
        statistics = calibrate(self.model, self.windows["fit"].split(1))
        (span,) = choose_spans(statistics, drop, "cosine")
        if name == "LinearPatch":
            patch = fitted_joints(statistics, [Span(*span)], "linearpatch")
            return apply_plan(self.model, PrunePlan(num_layers(self.model), patch))
        return keep_layers(self.model, [layer for layer in range(num_layers(self.model)) if layer not in range(*span)])

    def _distil(self, merged: PreTrainedModel, layers: int, variant: str) -> dict[str, Any]:
        options = self.options
        training, heldout = range(options.steps), range(options.steps, len(self.windows["distil"]))
        run = distill_merged(
            merged,
            self._store(),
            training=training,
            heldout=heldout,
            settings=TrainingSettings(
                steps=len(training), train="merged", learning_rate=options.learning_rate, evaluate_every=8
            ),
            hierarchy=HierarchySettings(),
            directory=self.place
            / f"run-{layers}-{list(VARIANTS).index(variant)}-{options.steps}-{options.learning_rate}",
            checkpoint_seconds=20.0,
            on_step=lambda what, step: (
                print(f"  {what}: {step.done}/{step.steps} {step.loss:.3f}", flush=True) if step.done % 8 == 0 else None
            ),
        )
        return {"seconds": run.together.seconds, "curve": [dict(point) for point in run.together.curve]}

    def _store(self) -> TeacherStore:
        """With the states of all depths, so that one serves every row."""
        depths = range(num_layers(self.model) + 1)
        return write_teacher_store(
            self.model, self.windows["distil"], self.place / f"store-{self.options.steps}", depths=depths
        )

    def _plan(self, name: str, layers: int) -> MergePlan:
        """The plan of a variant down to ``layers``; every record holds the seconds and the peak memory of its merge."""
        settings = MergeSettings(layers=layers, **VARIANTS[name])
        # Not the number of layers: a run to fewer goes on from one to more.
        kept = dataclasses.asdict(settings)
        if settings.width is not None:
            del kept["layers"]
        file = self.place / f"plan-{'-'.join(map(str, kept.values()))}.json"
        plan = MergePlan.load(file) if file.exists() else MergePlan(num_layers(self.model), settings=kept)
        while plan.layers > layers:
            begin = time.perf_counter()
            _forget_peak()
            step = dataclasses.replace(settings, layers=plan.layers - 1) if settings.width is not None else settings
            _, longer = plan_merging(self.model, self.windows["fit"], self.windows["heldout"], step, plan=plan)
            timed = {**longer.records[-1], "seconds": time.perf_counter() - begin, "peak": _peak()}
            plan = plan.extended(longer.merges[-1], timed)
            plan.save(file)
            print(f"  {name}: {plan.layers} layers, {timed['seconds']:.0f} s", flush=True)
        count = num_layers(self.model) - layers if settings.width is not None else 1
        return dataclasses.replace(plan, merges=plan.merges[:count], records=plan.records[:count])


def _figures(row: dict[str, Any] | None) -> tuple[str, str]:
    """Perplexities and agreements; empty for a row that was not made."""
    if row is None:
        return "", ""
    agreement = " / ".join(f"{100 * row[text][1]:.0f}" for text in ("same", "other"))
    return " / ".join(f"{row[text][0]:.1f}" for text in ("same", "other")), f"{agreement} %"


def _costs(row: dict[str, Any] | None) -> tuple[str, str]:
    if row is None or row["peak"] is None:
        return "", ""
    return f"{row['seconds']:.0f}", f"{row['peak'] / 2**30:.2f} GB"


def _windows(tokenizer: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    """What was scored on is followed in the text by what is distilled on, so nothing of it is near the report's."""
    shares = {"fit": options.samples, "heldout": options.heldout, "same": options.report}
    length, more = options.length, math.ceil(options.steps / options.samples)
    text = token_windows(tokenizer, demo_text("calibration"), length=(1 + more) * length, count=sum(shares.values()))
    parts = split_windows(text, shares)
    windows = {name: part[:, :length] for name, part in parts.items()}
    training = parts["fit"][:, length:].reshape(-1, length)[: options.steps]
    windows["distil"] = torch.cat([training, parts["heldout"][:, length : 2 * length]])
    windows["other"] = token_windows(tokenizer, demo_text("heldout"), length=length, count=options.report)
    return windows


def _forget_peak() -> None:
    """The peak of resident memory starts again from what is in use now (Linux)."""
    gc.collect()
    # What was freed is otherwise kept for reuse, and what reuses it would not show.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes, since `_forget_peak`."""
    return next(_sizes("VmHWM"))


def _sizes(name: str) -> Iterator[int]:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            yield int(line.split()[1]) << 10


if __name__ == "__main__":
    main()
