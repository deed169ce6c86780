"""What the patch costs inside a model: ``python -m benchmarks.studies.demo_model``.

SmolLM2-135M without its layers 13 to 18, float32: with the operator at the joint, with the dense matrix of the same
map, and with nothing there. Prefill and decode take turns. A patch's share of a decode step is the time inside its
forward, between two clock readings within generation, so with whatever the rest of the step left in the caches (little:
a step reads all weights); beside it stands the time of the same call repeated alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.record import add_option, record
from benchmarks.speed.hardware import describe
from benchmarks.speed.table import markdown
from linearpatch_kernels.calibration import Span
from linearpatch_kernels.demo_data import demo_model_path
from linearpatch_kernels.evaluation.latency import compare_speed
from linearpatch_kernels.modeling.families import hidden_size, num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.nn import DensePatch, HadamardPatch, Patch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan

SPAN = Span(13, 19)
PROMPT, NEW, REPEATS = 256, 16, 7


def variants(model: PreTrainedModel, span: Span) -> dict[str, PreTrainedModel]:
    """The model without the span: with the operator, with the dense product of the same map, with nothing."""
    operator = HadamardPatch(hidden_size(model))
    nn.init.uniform_(operator.scale, 0.9, 1.1)
    maps: dict[str, Patch | None] = {
        "hadamard_patch": operator,
        "dense product": DensePatch.from_dense(operator.to_dense()),
        "no patch": None,
    }
    plans = {name: PrunePlan(num_layers(model), (Joint(span, patch),)) for name, patch in maps.items()}
    return {name: apply_plan(model, plan) for name, plan in plans.items()}


@contextmanager
def timed(patch: nn.Module) -> Iterator[list[float]]:
    """Seconds of every call of the patch on a single row."""
    seconds: list[float] = []
    forward = patch.forward

    def run(x: Tensor) -> Tensor:
        begin = time.perf_counter()
        y: Tensor = forward(x)
        end = time.perf_counter()
        if x.numel() == x.shape[-1]:
            seconds.append(end - begin)
        return y

    patch.forward = run
    try:
        yield seconds
    finally:
        patch.forward = forward


def alone(patch: nn.Module, width: int) -> float:
    """Seconds of a call on one row that only such calls surround."""
    x = torch.randn(1, 1, width)
    with torch.no_grad(), timed(patch) as seconds:
        for _ in range(1000):
            patch(x)
    return statistics.median(seconds)


def rows(models: Mapping[str, PreTrainedModel], prompt: int, new: int, repeats: int) -> list[tuple[str, ...]]:
    """Tokens a second of every model, and what its patch takes of a decode step."""
    speeds = compare_speed(models, prompt_tokens=prompt, new_tokens=new, repeats=repeats)
    table: list[tuple[str, ...]] = []
    for name, model in models.items():
        prefill, decode = speeds[name].prefill_tokens_per_second, speeds[name].decode_tokens_per_second
        row = (name, f"{prefill:.0f}", f"{decode:.1f}", f"{1e3 / decode:.1f} ms")
        (patch,) = patches(model).values() or (None,)
        if patch is None:
            table.append((*row, "", "", ""))
            continue
        with timed(patch) as seconds:
            compare_speed({name: model}, prompt_tokens=prompt, new_tokens=new, repeats=repeats // 2)
        inside, by_itself = statistics.median(seconds), alone(patch, hidden_size(model))
        table.append((*row, f"{inside * 1e6:.1f} µs", f"{inside * decode:.2%}", f"{by_itself * 1e6:.1f} µs"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    options = parser.parse_args()
    models = variants(load_model(demo_model_path(), device="cpu")[0], SPAN)
    print(f"SmolLM2-135M without layers {SPAN}, float32, prompt {PROMPT}, {NEW} new tokens, median of {REPEATS}")
    print(f"{describe()['cpu']}, our kernels {describe()['kernel instruction set'] or 'none: plain PyTorch'}")
    header = (
        "at the joint",
        "prefill tokens/s",
        "decode tokens/s",
        "decode step",
        "patch in a step",
        "share",
        "patch alone",
    )
    tables = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"{threads} thread{'s' * (threads > 1)}"
        tables[name] = header, rows(models, PROMPT, NEW, REPEATS)
        print(f"\n{name}\n\n{markdown(*tables[name])}")
    if options.json:
        record(options.json, tables)


if __name__ == "__main__":
    main()
