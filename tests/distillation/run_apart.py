"""Store and training of a tiny model in processes of their own.

``work DIR OUT``: once, also under torchrun. ``scarce DIR OUT``: with one held-out window for all processes.
``merged DIR OUT``: the same of a merged model, layer by layer. ``calibrate OUT``: the statistics, also under torchrun.
``kill DIR SEED KILLS``: again and again, killed at random moments.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from linearpatch_kernels.calibration import Span, calibrate, collect_moments
from linearpatch_kernels.distillation.hierarchical import HierarchySettings, distill_merged, stream_depths
from linearpatch_kernels.distillation.teacher_store import write_teacher_store
from linearpatch_kernels.distillation.trainer import Step, TrainingSettings, distill
from linearpatch_kernels.merging.merge import choose_units, merge_layers
from linearpatch_kernels.merging.sensitivity import score_layers
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.processes import launched_processes
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.tiny import VOCABULARY, random_patch, tiny_model

SETTINGS = TrainingSettings(steps=20, train="patch+norms", windows_per_step=4, learning_rate=3e-3, clip=0.0)


def work(place: Path, heldout: int = 4) -> dict[str, Any]:
    """Everything, from the tokens on: the trained student, its first gradient, and the held-out curve."""
    processes = launched_processes()
    dense = tiny_model("llama")
    windows = torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(0))
    store = write_teacher_store(
        dense, windows, place / "store", top_k=10, depths=[2], shard_windows=1, processes=processes
    )
    student = apply_plan(dense, PrunePlan(6, (Joint(Span(2, 4), random_patch("dense"), "test"),)))
    gradients: list[torch.Tensor] = []

    def remember(step: Step) -> None:
        if step.done == 1:
            gradients.append(patches(student)[2][0].weight.grad.clone())

    run = distill(
        student,
        store,
        joint=2,
        training=range(20),
        heldout=range(20, 20 + heldout),
        settings=SETTINGS,
        directory=place / "run",
        checkpoint_seconds=0,
        processes=processes,
        on_step=remember,
    )
    return {"student": student, "gradients": gradients, "run": run, "first": processes.first}


def calibrated(file: Path) -> None:
    """Eleven windows, so that two processes have shares of different sizes."""
    processes = launched_processes()
    windows = torch.randint(3, VOCABULARY, (11, 20), generator=torch.Generator().manual_seed(0))
    model, spans = tiny_model("llama"), [Span(2, 4)]
    found = calibrate(model, windows.split(1), moments=spans, normed=True, ranks=processes)
    later = collect_moments(model, windows.split(1), spans, ranks=processes)
    assert torch.equal(later[spans[0]].xy, found.moments[spans[0]].xy)
    found.save(file.with_suffix(f".{processes.rank}"), fingerprint="test")


def work_merged(place: Path) -> dict[str, torch.Tensor]:
    """Three groups on their own, then together: what every group ended with, the curve, and the trained weights."""
    processes = launched_processes()
    dense = tiny_model("llama", layers=8)
    windows = torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(0))
    student, scores = dense, score_layers(dense, windows[:2])
    for start in (6, 3, 1):
        student = merge_layers(student, choose_units(scores, Span(start, start + 2), (0.5, 0.5)))
    hierarchy = HierarchySettings(group_steps=6)
    depths = stream_depths(student, hierarchy)
    store = write_teacher_store(dense, windows, place / "store", top_k=10, depths=depths, processes=processes)
    run = distill_merged(
        student,
        store,
        training=range(20),
        heldout=range(20, 24),
        settings=dataclasses.replace(SETTINGS, train="merged"),
        hierarchy=hierarchy,
        directory=place / "run",
        checkpoint_seconds=0,
        processes=processes,
    )
    found = {f"group-{layer}": torch.tensor([one.before, one.after]) for layer, one in run.alone.items()}
    found["start"] = torch.tensor([run.together.heldout(0, "layers"), run.together.heldout(0)], dtype=torch.float64)
    found["curve"] = torch.tensor([point["tail"] for point in run.together.curve])
    return found if processes.first else {}


def digest(place: Path, student: Any) -> str:
    """Of the store's files and the trained weights."""
    state = hashlib.sha256(save({name: tensor.contiguous() for name, tensor in student.state_dict().items()}))
    for file in sorted((place / "store").iterdir()):
        state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()


def child(place: Path) -> int:
    """`work` in a process of its own, from the imports on; its digest goes to ``place/digest``."""
    process = os.fork()
    if process == 0:
        (place / "digest").write_text(digest(place, work(place)["student"]))
        os._exit(0)
    return process


def kill(root: Path, seed: int, kills: int) -> None:
    draw = random.Random(seed)
    reference = root / "reference"
    reference.mkdir()
    begin = time.monotonic()
    os.waitpid(child(reference), 0)
    whole = time.monotonic() - begin
    wanted = (reference / "digest").read_text()
    killed = {"store": 0, "training": 0}
    finished = 0
    # On a busy machine the moments fall differently: go on until both halves had their kills and two runs ended.
    while not (enough := sum(killed.values()) >= kills and min(killed.values()) >= 2) or finished < 2:
        place = root / f"run-{finished}"
        place.mkdir(exist_ok=True)
        process = child(place)
        if not enough:
            time.sleep(draw.uniform(0, whole))
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):
            killed["training" if (place / "store" / "index.json").exists() else "store"] += 1
            continue
        assert status == 0, f"{place} failed after {killed}"
        assert (place / "digest").read_text() == wanted, f"{place}: another result after {killed}"
        finished += 1
    print(json.dumps({"finished": finished, **killed}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1] == "calibrate":
        calibrated(Path(sys.argv[2]))
    elif sys.argv[1] == "merged":
        found = work_merged(Path(sys.argv[2]))
        if found:
            save_file(found, sys.argv[3])
    else:
        result = work(Path(sys.argv[2]), heldout=1 if sys.argv[1] == "scarce" else 4)
        if result["first"]:
            curve = torch.tensor([point["tail"] for point in result["run"].curve])
            save_file({"gradient": result["gradients"][0], "curve": curve}, sys.argv[3])
