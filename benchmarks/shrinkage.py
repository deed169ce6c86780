"""How far a fitted map should be followed, on the demo model: ``python -m benchmarks.shrinkage``.

The share a of I + a (P - I) for the least-squares and the low-rank map of 6 dropped layers, on windows of the text that
was calibrated on (not used for the fit) and of another text.
"""

from __future__ import annotations

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
    for text, held_out in texts.items():
        print(f"\n{text}: loss (nats), KL to the dense model (nats)")
        for name, quality in compare_candidates(model, held_out, candidates).items():
            print(f"  {name:20} {quality.loss:.4f} {quality.kl:.4f}")


if __name__ == "__main__":
    main()
