"""What calibration costs over the bare passes on the demo model: ``python -m benchmarks.studies.calibration_overhead``.

Both run the decoder (no head) over the same windows, taking turns; the figure is the median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.record import add_option, record
from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.modeling.families import decoder
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.text import token_windows

ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    options = parser.parse_args()
    model, tokenizer = load_model(demo_model_path())
    batches = token_windows(tokenizer, demo_text("calibration"), length=512, count=8).split(4)
    stack = decoder(model)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                stack(input_ids=batch, use_cache=False)

    def calibrated(spans: Sequence[Span] = ()) -> None:
        calibrate(model, batches, moments=spans)

    cases: dict[str, Callable[[], None]] = {
        "without second moments": calibrated,
        "with the moments of one span": lambda: calibrated([Span(13, 19)]),
    }
    bare()
    print(f"SmolLM2-135M, 8 windows of 512 tokens, {torch.get_num_threads()} threads, median of {ROUNDS} pairs")
    rows = []
    for name, case in cases.items():
        ratio = statistics.median(_seconds(case) / _seconds(bare) for _ in range(ROUNDS))
        rows.append((name, f"{ratio:.2f}x"))
        print(f"calibration {name}: {ratio:.2f}x the bare forward passes")
    if options.json:
        record(options.json, {"overhead": (("calibration", "over the bare forward passes"), rows)})


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
