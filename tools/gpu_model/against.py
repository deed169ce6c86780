"""What the static model says of calls that were measured: ``python benchmarks/gpu_static.py --against FILE``.

A call takes what an empty kernel takes, what its blocks take before their first row and after their last, and the
largest of the model's terms for as many turns as its blocks take; or the time of the measured copy of as many bytes, if
that is longer. The kernels are today's, the times those of the file's newest call: what has changed since is named. The
backward was measured with the sum of its parts, which is a kernel of its own and is not modelled.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_model.machines import MACHINES, Measured, device_of, machine_of, measured
from tools.gpu_model.model import cuda_turns, row_of_turns
from tools.gpu_model.tables import aligned

OPERATORS = {"patch": "hadamard_patch_forward", "norm": "add_patch_rms_norm", "backward": "hadamard_patch_backward"}
TERMS = ("copy", "issue", "fp", "lsu", "matrix", "latency")


@dataclass(frozen=True)
class Prediction:
    """Microseconds. ``terms`` are those of all turns, and the copy."""

    case: tuple[str, str, str]
    terms: dict[str, float]
    predicted: float
    measured: float

    @property
    def largest(self) -> str:
        return max(self.terms, key=self.terms.__getitem__)


def predictions(found: Measured, device: str | None) -> Iterator[Prediction | str]:
    """One for each case in CUDA of the newest call, or why there is none.

    Raises:
        ValueError: the model has no figures for the device.
    """
    arch = next((arch for arch, machine in MACHINES.items() if machine.device == device), None)
    if arch is None:
        raise ValueError(f"{device} is not a machine of the model")
    machine = machine_of(arch)
    for case in found.cases:
        op, rows, d, dtype = (case[name] for name in ("op", "rows", "d", "dtype"))
        name = (op, f"{rows} x {d}", dtype)
        try:
            turns = cuda_turns(OPERATORS[op], arch, dtype, d, rows)
        except ValueError as error:  # machine code that `warp` cannot follow
            yield f"{', '.join(name)}: {error}"
            continue
        cycles = row_of_turns(OPERATORS[op], arch, dtype, d, turns).cycles or {}
        plan = turns.plan
        waves = -(-plan.blocks * plan.diagonal_blocks // (machine.multiprocessors * turns.resident))
        number = -(-rows // (plan.blocks * plan.rows_together))
        together = waves * number * turns.resident * plan.rows_together  # rows that a multiprocessor has time for
        terms = {unit: value * together / machine.clock * 1e6 for unit, value in cycles.items() if unit != "dram"}
        around = found.empty * 1e6 + waves * turns.around / machine.clock * 1e6
        copy = case["times"]["copy"]["us"]
        predicted = max(copy, around + max(terms.values()))
        yield Prediction(name, {"copy": copy, **terms}, predicted, case["times"]["ours"]["us"])


def changed_since(commit: str) -> list[str] | None:
    """Sources of the kernels that are not as they were then; None where git does not know."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "diff", "--name-only", commit, "--", "csrc/common", "csrc/hadamard_patch"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.split() if ran.returncode == 0 else None


def table(found: list[Prediction]) -> str:
    lines = [("operator", "rows x d", "dtype", *TERMS, "predicted", "measured", "measured / predicted", "largest")]
    for one in found:
        figures = (*(one.terms[term] for term in TERMS), one.predicted, one.measured)
        ratio = f"{one.measured / one.predicted:.2f}"
        lines.append((*one.case, *(f"{value:.1f}" for value in figures), ratio, one.largest))
    return aligned(lines)


def report(file: Path) -> str:
    """
    Raises:
        ValueError: the file has no such calls, or is of a device that the model does not have.
    """
    call = measured(file)
    if call is None:
        raise ValueError(f"{file} has no times of the patch in CUDA")
    found = list(predictions(call, device_of(file)))
    known = [one for one in found if isinstance(one, Prediction)]
    text = [f"Microseconds of a call, commit {call.commit} measured, the kernels as they are predicted:"]
    text += [table(known), *(f"No prediction for {one}" for one in found if isinstance(one, str))]
    ratios = [one.measured / one.predicted for one in known]
    text.append(f"Measured over predicted: {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} cases.")
    changed = changed_since(call.commit)
    text.append(
        f"Changed since it was measured: {'not known' if changed is None else ', '.join(changed) or 'nothing'}."
    )
    return "\n".join(text)
