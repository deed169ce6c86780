"""Is it there, and is it right: every kernel against float64, by the project's own random cases."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from tools.gpu_day.surroundings import BACKEND, DEVICE, DRY, clocks, failure, relative_error, say, synchronize

FIRST = (4096, 5120, 576, 2048, 3072, 8192)
SMALL = (64, 576) if DRY else (128, 576, 640, 1300, 2048, 4096, 5120, 7168, 8192, 11264, 16384)
SECONDS = 60.0
ROWS = (1, 131, 132, 133, 1057)


def hello() -> int:
    """The extension loads, has machine code for this GPU, and makes a right row."""
    import linearpatch_kernels as lp
    from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
    from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference

    backends = {name: str(state) for name, state in lp.backends().items()}
    say(step="hello", torch=torch.__version__, cuda=torch.version.cuda, backends=backends)
    if not DRY:
        say(step="device", properties=str(torch.cuda.get_device_properties(0)), clocks=clocks())
        extension = Path(lp.__file__).with_name("_C.abi3.so")
        listed = subprocess.run(["cuobjdump", "--list-elf", extension], capture_output=True, text=True, check=False)
        say(
            step="machine code",
            files=sorted({line.split(".")[-2] for line in listed.stdout.splitlines() if "." in line}),
        )
    x, scale = torch.randn(33, 4096, device=DEVICE).bfloat16(), torch.rand(4096, device=DEVICE) + 0.5
    error = relative_error(hadamard_patch(x, scale), hadamard_patch_reference(x.double(), scale.double()))
    say(step="first call", error=error)
    return 0 if error < 1e-2 and (DRY or lp.backends()[BACKEND] is True) else 1


def _wrong(cases: Iterable[tuple[str, Callable[[], list[str]]]], seconds: float) -> tuple[int, int]:
    """How many were tried in the time there is, and how many lines of what was wrong they gave."""
    begin, calls, wrong = time.monotonic(), 0, 0
    for name, case in cases:
        if time.monotonic() - begin > seconds:
            break
        try:
            lines = case()
        except Exception as error:
            lines = [f"{name}: {failure(error)}"]
        calls, wrong = calls + 1, wrong + len(lines)
        if lines:
            say(step="wrong", backend=BACKEND, case=name, lines=lines)
    return calls, wrong


def check(part: int = 0, parts: int = 1) -> int:
    from tests.support import cpu_cases, topk_kl_cases

    chance = random.Random(part)
    torch.manual_seed(part)
    listed = [*cpu_cases.LISTED, 64, 96, 300, 1300, *cpu_cases.WIDE]
    widths = [64, 576] if DRY else [*FIRST, *(d for d in listed if d not in FIRST)]
    sizes = topk_kl_cases.SIZES._replace(d=(8, 32, 64, 160, 576, 33), softcap=(0.0,))
    if DRY:
        sizes = topk_kl_cases.SIZES._replace(n=(1, 7), d=(8, 33), v=(17, 64), k=(2, 5), softcap=(0.0,))
    patches = [
        (f"d {d} {dtype}", lambda d=d, dtype=dtype: cpu_cases.one_case(d, dtype, chance))
        for d in widths[part::parts]
        for dtype in cpu_cases.DTYPES
    ]
    losses = [("losses", lambda: topk_kl_cases.one_case(chance, sizes))] * (4 if DRY else 160 // parts)
    with torch.device(DEVICE):
        patched = _wrong(patches, SECONDS * 0.7)
        rows = _wrong(((f"rows {n}", lambda n=n: row_counts(n)) for n in ROWS), SECONDS * 0.1)
        lost = _wrong(losses, SECONDS * 0.2)
    calls, wrong = zip(patched, rows, lost, strict=True)
    say(step="checked", backend=BACKEND, part=part, calls=calls, of=[len(patches), len(ROWS), len(losses)], wrong=wrong)
    if not DRY:
        kernels_that_ran()
    return 1 if sum(wrong) else 0


def row_counts(rows: int) -> list[str]:
    """About the number of multiprocessors the host changes its mind on how rows are dealt out."""
    from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
    from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference

    lines = []
    for d in SMALL[:2] if DRY else (576, 4096, 5120):
        x, scale = torch.randn(rows, d).bfloat16(), torch.rand(d) + 0.5
        exact = hadamard_patch_reference(x.double(), scale.double())
        allowed = 2 * relative_error(hadamard_patch_reference(x, scale), exact) + 1e-6
        out = torch.full_like(x, torch.nan)
        hadamard_patch(x, scale, out=out)
        if not (error := relative_error(out, exact)) <= allowed:
            lines.append(f"{rows} rows of {d}: off by {error:.2e}, allowed {allowed:.2e}")
    return lines


def small_calls() -> None:
    """Every kernel once or more, on few rows: for the sanitizer's tools."""
    from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
    from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss  # defines the losses' operators

    ops = torch.ops.linearpatch
    with torch.device(DEVICE):
        for d in SMALL:
            for dtype in (torch.bfloat16, torch.float32):
                x, s = torch.randn(5, d).to(dtype), torch.rand(d) + 0.5
                hadamard_patch(x, s)
                hadamard_patch(x, s, pre_scale=s, post_scale=s, down=torch.randn(d, 3), up=torch.randn(3, d))
                add_patch_rms_norm(x, x, s, s, 1e-5)
                ops.hadamard_patch_backward(x, x, s, s, s, None, None, 0b1111)
        for normalization in ("topk", "full", "tail"):
            h = torch.randn(5, 64).bfloat16().requires_grad_()
            w = torch.randn(3000, 64).bfloat16().requires_grad_()
            probs, ids = torch.full((5, 7), 0.1), torch.randint(0, 3000, (5, 7))
            linear_topk_kl_loss(h, w, probs, ids, bias=torch.randn(3000), normalization=normalization).backward()
            logits = (h @ w.mT).detach().requires_grad_()
            from linearpatch_kernels.ops.topk_kl import topk_kl_loss

            topk_kl_loss(logits, probs, ids, normalization=normalization).backward()
    synchronize()
    say(step="small", backend=BACKEND, done=True)


def kernels_that_ran() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        small_calls()
    ours = ("linearpatch", "hadamard", "_kernel")
    names = sorted({event.key for event in seen.key_averages() if any(name in event.key for name in ours)})
    say(step="kernels that ran", backend=BACKEND, names=[name[:90] for name in names])


if __name__ == "__main__":
    sys.exit(check())
