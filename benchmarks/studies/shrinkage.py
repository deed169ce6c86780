"""How far a fitted map should be followed, on the demo model: ``python -m benchmarks.studies.shrinkage``.

The share a of I + a (P - I) for the least-squares and the low-rank map of 6 dropped layers, on windows of the text that
was calibrated on (not used for the fit) and of another text.
"""

from __future__ import annotations

import argparse

from benchmarks.record import add_option, record
from benchmarks.speed.table import markdown
from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.pruning.closed_forms import least_squares, low_rank, shrunk
from linearpatch_kernels.pruning.fits import DEFAULT_RANK
from linearpatch_kernels.pruning.plan import Joint
from linearpatch_kernels.pruning.selection import compare_candidates
from linearpatch_kernels.text import split_windows, token_windows

SPAN = Span(13, 19)
SHARES = (1.0, 0.85, 0.75, 0.6, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser)
    options = parser.parse_args()
    model, tokenizer = load_model(demo_model_path())
    windows = split_windows(
        token_windows(tokenizer, demo_text("calibration"), length=512, count=72), {"fit": 64, "heldout": 8}
    )
    statistics = calibrate(model, windows["fit"].split(4), moments=[SPAN])
    candidates = {"none": (Joint(SPAN),)}
    for name, fit in (("least-squares", least_squares), ("low-rank", low_rank)):
        for share in SHARES:
            candidates[f"{name} {share}"] = (Joint(SPAN, shrunk(fit(statistics.at(SPAN), DEFAULT_RANK), share), name),)
    texts = {
        "calibration text, held out": windows["heldout"],
        "another text": token_windows(tokenizer, demo_text("heldout"), length=512, count=8),
    }
    header = ("fit", "loss, nats", "KL to the dense model, nats")
    tables = {}
    for text, held_out in texts.items():
        found = compare_candidates(model, held_out, candidates)
        rows = [(name, f"{quality.loss:.4f}", f"{quality.kl:.4f}") for name, quality in found.items()]
        tables[text] = header, rows
        print(f"\n{text}\n\n{markdown(header, rows)}")
    if options.json:
        record(options.json, tables)


if __name__ == "__main__":
    main()
