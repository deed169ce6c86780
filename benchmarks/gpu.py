"""All that is to be known from a machine with a GPU, in one command: ``make gpu``, or ``python benchmarks/gpu.py``.

For each GPU backend that is there (cuda, triton), in a process of its own: the operators on random calls over all
listed widths and dtypes against float64, then times of the forward, its gradients and the norm beside their peers, by
the runner of all benchmarks (`interleaved`): cuBLAS by the dense matrix, fast-hadamard-transform in three passes,
torch.compile of the reference, and a copy as the bound. Then the same of the distillation losses, beside the paper's
lines, chunks of them compiled, gathered rows, and Liger. Writes one JSON and one Markdown file; the JSON is what is
worth sending.

``--dry`` runs all of it without a GPU, on a few rows, Triton's kernels by the interpreter. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - after the path is set
from torch import Tensor  # noqa: E402 - after the path is set

from benchmarks.interleaved import FULL, QUICK, contest  # noqa: E402 - after the path is set
from benchmarks.registry import Case, Peer, Run  # noqa: E402 - after the path is set
from benchmarks.table import markdown as table_of  # noqa: E402 - after the path is set

BACKENDS = ("cuda", "triton")


# --- one backend, in a process where it is forced --------------------------------------------------------------------


def check(device: str, widths: Sequence[int]) -> dict[str, Any]:
    """Random calls of all operators, held to float64 by the rule that the CPU kernels are held to."""
    from tests.ops.cpu_cases import DTYPES, one_case

    chance, wrong = random.Random(0), []
    torch.manual_seed(0)
    with torch.device(device):
        for d in widths:
            for dtype in DTYPES:
                wrong += one_case(d, dtype, chance)
    return {"calls": len(widths) * len(DTYPES), "wrong": wrong}


Operands = tuple[Tensor, Tensor, Tensor]


def dense(operands: Operands) -> Run:
    x, scale, out = operands
    matrix = torch.ops.linearpatch.hadamard_patch_reference(
        torch.eye(x.shape[-1], device=x.device), scale, None, None, None, None
    ).to(x.dtype)
    return lambda: torch.mm(x, matrix, out=out)


def three_passes(operands: Operands) -> Run:
    x, scale, _ = operands
    transform = import_module("fast_hadamard_transform").hadamard_transform
    weight, factor = scale.to(x.dtype), x.shape[-1] ** -0.5
    return lambda: transform(transform(x, scale=factor) * weight, scale=factor)


def compiled(operands: Operands) -> Run:
    from linearpatch_kernels.ops.hadamard_patch.reference import hadamard_patch_reference

    x, scale, _ = operands
    call = torch.compile(
        hadamard_patch_reference, backend="eager" if x.device.type == "cpu" else "inductor", dynamic=False
    )
    return lambda: call(x, scale)


def patch(operands: Operands) -> Run:
    from linearpatch_kernels.ops.hadamard_patch import hadamard_patch

    x, scale, out = operands
    return lambda: hadamard_patch(x, scale, out=out)


def backward(operands: Operands) -> Run:
    x, scale, _ = operands
    grad, call = torch.randn_like(x), torch.ops.linearpatch.hadamard_patch_backward.default
    return lambda: call(grad, x, scale, None, None, None, None, 0b11)[:2]


def norm(operands: Operands) -> Run:
    from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm

    x, scale, _ = operands
    weight, residual = torch.ones_like(scale), torch.randn_like(x)
    return lambda: add_patch_rms_norm(x, residual, scale, weight, 1e-5)


def copy(operands: Operands) -> Run:
    x, _, out = operands
    return lambda: out.copy_(x)


# What computes the same y; then a copy, which no kernel can beat, and our other operators.
PEERS = (
    Peer("mm by the dense matrix", dense),
    Peer("fast-hadamard-transform, three passes", three_passes, "fast-hadamard-transform", "fast_hadamard_transform"),
    Peer("torch.compile of the reference", compiled),
    Peer("copy", copy, floor=True, same_result=False),
    Peer("backward, dx and dscale", backward, floor=True, same_result=False),
    Peer("add_patch_rms_norm", norm, floor=True, same_result=False),
)


def measure(device: str, rows: int, d: int, dtype: torch.dtype, *, dry: bool) -> dict[str, Any]:
    """Median seconds of ours and of every peer, by the runner of all benchmarks; or why a peer has none."""

    def operands() -> Operands:
        x = torch.randn(rows, d, device=device).to(dtype)
        return x, torch.rand(d, device=device) + 0.5, torch.empty_like(x)

    case = Case(
        "GPU",
        f"{rows} x {d} {dtype}",
        operands,
        patch,
        PEERS,
        device=device,
        tolerance=1e-4 if dtype == torch.float32 else 0.03,
    )
    figures = timed(case, dry)
    per_second = 2 * rows * d * dtype.itemsize / figures["seconds"]["ours"]
    return {"rows": rows, "d": d, "dtype": str(dtype).removeprefix("torch."), "bytes_per_second": per_second, **figures}


def timed(case: Case, dry: bool) -> dict[str, Any]:
    """Median seconds of ours and of every peer, those of every round, and why a peer has none."""
    seconds: list[float] = []
    with contest(case, torch.get_num_threads(), QUICK if dry else FULL) as match:
        for _ in range(match.rounds):
            match.peers_take_turns()
            seconds.append(match.ours.seconds() / match.ours.calls)
    by_round = {"ours": seconds, **match.seconds}
    medians = {name: statistics.median(values) for name, values in by_round.items()}
    return {"seconds": medians, "rounds": by_round, "missing": match.skipped}


# --- the losses ------------------------------------------------------------------------------------------------------

NORMALIZATIONS = ("topk", "full", "tail")


def check_losses(device: str, calls: int, *, dry: bool) -> dict[str, Any]:
    """As `check`; the interpreter takes a millisecond a program, so that dry calls are small."""
    from tests.ops.topk_kl_cases import SIZES, one_case

    chance, wrong = random.Random(0), []
    small = SIZES._replace(n=(1, 7), d=(8, 33), v=(17, 64), k=(2, 5), softcap=(0.0,))
    torch.manual_seed(0)
    with torch.device(device):
        for _ in range(calls):
            wrong += one_case(chance, small if dry else SIZES)
    return {"calls": calls, "wrong": wrong}


def measure_losses(
    device: str, tokens: int, d: int, vocabulary: int, normalization: str, *, dry: bool
) -> dict[str, Any]:
    """Loss and gradient of the hidden states in bf16, as `timed`; the head's products are not upcast on a GPU."""
    from benchmarks import topk_kl

    def operands() -> topk_kl.Operands:
        with torch.device(device):
            made = topk_kl.Operands(tokens, d, vocabulary, normalization)
            assert all(one.device.type == torch.device(device).type for one in (made.hidden, made.weight, *made.slots))
        return made

    peers = topk_kl.logits_peers(topk_kl.BF16, normalization)
    peers += {"topk": (topk_kl.GATHERED[0],), "full": (topk_kl.LIGER,), "tail": ()}[normalization]
    name = f"{normalization} {tokens} x {d} of {vocabulary}"
    case = Case(
        "GPU", name, operands, topk_kl.ours, peers, device=device, context=torch.enable_grad, tolerance=5e-2
    )  # fmt: skip
    return {"case": name, **timed(case, dry)}


def work(backend: str, dry: bool) -> dict[str, Any]:
    from tests.ops.cpu_cases import LISTED

    device = "cpu" if dry else "cuda"
    widths = [64, 576] if dry else LISTED
    shapes = [(2, 512)] if dry else [(n, d) for d in (576, 2048, 3072, 4096, 5120, 8192) for n in (1, 512, 16384)]
    dtypes = [torch.bfloat16] if dry else [torch.bfloat16, torch.float32]
    checked = check(device, widths)
    measured = [measure(device, n, d, dtype, dry=dry) for n, d in shapes for dtype in dtypes]
    sizes = [(2, 64, 200)] if dry else [(2048, 576, 49152), (2048, 4096, 128256)]
    losses = {
        "checked": check_losses(device, 6 if dry else 200, dry=dry),
        "measured": [measure_losses(device, *size, each, dry=dry) for size in sizes for each in NORMALIZATIONS],
    }
    return {"backend": backend, "checked": checked, "measured": measured, "losses": losses}


# --- all of them -----------------------------------------------------------------------------------------------------


def machine(dry: bool) -> dict[str, Any]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except Exception:  # whatever is wrong with its metadata, it is not to be named
            return None

    packages = ("torch", "triton", "fast-hadamard-transform", "linearpatch-kernels")
    properties = None if dry else torch.cuda.get_device_properties(0)
    return {
        "dry": dry,
        "gpu": None if properties is None else str(properties),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in packages},
    }


def in_own_process(backend: str, dry: bool) -> dict[str, Any]:
    variables = os.environ | {"LINEARPATCH_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    variables |= {"TRITON_INTERPRET": "1"} if dry else {}
    command = [sys.executable, "-W", "ignore", __file__, "--only", backend, *["--dry"] * dry]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"backend": backend, "failed": done.stderr.strip()[-4000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(report: dict[str, Any]) -> str:
    """One table a backend: microseconds, and how many times longer each peer takes."""
    of = report["machine"]
    lines = ["# linearpatch-kernels on a GPU", "", f"{of['gpu'] or 'no GPU: a dry run, whose times mean nothing'}", ""]
    lines += [", ".join(f"{name} {number}" for name, number in of["versions"].items() if number)]
    for result in report["backends"]:
        lines += ["", f"## {result['backend']}", ""]
        if "failed" in result:
            lines += ["```", result["failed"], "```"]
            continue
        checked = result["checked"]
        lines += [f"{checked['calls']} random calls against float64, {len(checked['wrong'])} wrong."]
        lines += [*(f"- {line}" for line in checked["wrong"]), ""]
        names = list(dict.fromkeys(name for row in result["measured"] for name in row["seconds"] if name != "ours"))
        head = ["rows", "d", "dtype", "ours, µs", "GB/s", *(f"{name} / ours" for name in names)]
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in result["measured"]:
            ours, seconds = row["seconds"]["ours"], row["seconds"]
            cells = [str(row["rows"]), str(row["d"]), row["dtype"], f"{ours * 1e6:.1f}"]
            cells += [f"{row['bytes_per_second'] / 1e9:.0f}"]
            cells += [f"{seconds[name] / ours:.2f}" if name in seconds else "" for name in names]
            lines += [f"| {' | '.join(cells)} |"]
        why = {name: reason for row in result["measured"] for name, reason in row["missing"].items()}
        lines += ["", *(f"- {name} is missing: {reason}" for name, reason in why.items())]
        lines += losses_markdown(result["losses"])
    return "\n".join(lines) + "\n"


def losses_markdown(losses: dict[str, Any]) -> list[str]:
    checked = losses["checked"]
    lines = ["", f"Losses: {checked['calls']} random calls against float64, {len(checked['wrong'])} wrong."]
    lines += [*(f"- {line}" for line in checked["wrong"]), ""]
    rows = []
    for row in losses["measured"]:
        ours = row["seconds"]["ours"]
        rows.append((row["case"], "ours", f"{ours * 1e6:.1f} µs", ""))
        for name, seconds in row["seconds"].items():
            rows += [(row["case"], name, f"{seconds * 1e6:.1f} µs", f"{seconds / ours:.2f}")] * (name != "ours")
        rows += [(row["case"], name, reason, "") for name, reason in row["missing"].items()]
    return [*lines, table_of(("loss and dhidden", "by", "time", "over ours"), rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="without a GPU: a few rows on the CPU")
    parser.add_argument("--json", type=Path, default=Path(".benchmarks/gpu.json"), help="default: %(default)s")
    parser.add_argument("--only", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(work(options.only, options.dry)))
        return 0
    if not options.dry and not torch.cuda.is_available():
        print("torch finds no GPU here: run it on a machine that has one, or with --dry", file=sys.stderr)
        return 2
    page = options.json.with_suffix(".md")
    for file, begins in ((options.json, '{\n "machine": '), (page, "# linearpatch-kernels on a GPU\n")):
        if options.json == page or (file.exists() and not file.read_text(errors="replace").startswith(begins)):
            print(f"{file} is not a report of this benchmark: give another --json, FILE.json", file=sys.stderr)
            return 2
    there = ("triton",) if options.dry else BACKENDS
    backends = [in_own_process(backend, options.dry) for backend in there]
    report: dict[str, Any] = {"machine": machine(options.dry), "backends": backends}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    page.write_text(markdown(report))
    print(markdown(report))
    print(f"written: {options.json} (send this one) and {page}")
    done = [one for one in backends if "checked" in one]
    checked = [each["checked"] for one in done for each in (one, one["losses"])]
    return 1 if not checked or any(one["wrong"] for one in checked) else 0


if __name__ == "__main__":
    sys.exit(main())
