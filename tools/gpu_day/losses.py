"""The losses beside their peers: loss and gradient of the hidden states; and what a call costs the host."""

from __future__ import annotations

import cProfile
import io
import pstats
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from benchmarks.speed.cases import topk_kl
from tools.gpu_day.surroundings import DEVICE, DRY, failure, say, synchronize
from tools.gpu_day.timing import Contestant, contest

SIZES = [(4, 64, 200)] if DRY else [(2048, 576, 49152), (2048, 4096, 128256)]
EXACT = 64  # tokens whose loss is held against float64


def times() -> int:
    failed = 0
    for normalization in ("topk", "full", "tail"):
        for size in SIZES:
            try:
                _compare(size, normalization)
            except Exception as error:
                failed += 1
                say(step="failed", call=[normalization, *size], error=failure(error))
            if not DRY:
                torch.cuda.empty_cache()
    return 1 if failed else 0


def _compare(size: tuple[int, int, int], normalization: str) -> None:
    tokens, width, vocabulary = size
    with torch.device(DEVICE):
        o = topk_kl.Operands(tokens, width, vocabulary, normalization)
        what = {
            "op": f"loss, {normalization}",
            "rows": tokens,
            "d": width,
            "vocabulary": vocabulary,
            "dtype": "bfloat16",
        }
        peers = [*topk_kl.logits_peers(topk_kl.BF16, normalization)]
        peers += {"topk": [topk_kl.GATHERED[0]], "full": [topk_kl.LIGER], "tail": []}[normalization]
        builds = {"ours": topk_kl.ours}
        # The compiled forms cost a quarter of a minute each: the better one of the paper's loss, where it is quick.
        quick = normalization == "topk" and width == 576
        builds |= {
            peer.name: peer.build
            for peer in peers
            if not peer.slow_to_build or (quick and peer.name.startswith("chunked"))
        }

        def contestant(build: Any) -> Any:
            def make() -> Contestant:
                run = build(o)
                return lambda _: run()

            return make

        error = _error(o)
        moved = tokens * topk_kl.SLOTS * width * 2 * 2 if normalization == "topk" else None
        contest(
            what | {"error": error},
            {name: contestant(build) for name, build in builds.items()},
            sets=1,
            moved=moved,
            rounds=3,
        )


def host() -> int:
    """Where Python's time goes in a call of the loss."""
    with torch.device(DEVICE):
        o = topk_kl.Operands(*(SIZES[0]), "topk")
        run = topk_kl.ours(o)
        for _ in range(3):
            run()
    synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20):
        run()
    profile.disable()
    synchronize()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(15)
    print(text.getvalue())
    if not DRY:
        with torch.profiler.profile() as seen:
            for _ in range(3):
                run()
            synchronize()
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    say(step="host", done=True)
    return 0


def _error(o: topk_kl.Operands) -> str:
    """Of the loss of the first tokens."""
    loss = import_module("linearpatch_kernels.ops.topk_kl").linear_topk_kl_loss
    hidden, probs, ids = o.hidden.detach()[:EXACT], o.probs[:EXACT], o.ids[:EXACT]
    few = replace(o, tokens=len(hidden))
    logits = hidden.double() @ o.weight.double().mT
    exact = topk_kl.divergence(logits, probs.double(), ids.long(), few.normalization) / few.tokens
    part = loss(hidden, o.weight, probs, ids, normalization=few.normalization)
    return f"{abs(float(part) / float(exact) - 1):.1e}"
