"""``linearpatch distill`` from outside: what it writes, what it prints, how it goes on, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearpatch_kernels.distillation.teacher_store import TeacherStore
from linearpatch_kernels.distillation.trainer import heldout_losses
from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.plan import PrunePlan
from tests.support.command import (
    LAYERS,
    PACKAGE_ROOT,
    SMALL,
    Run,
    World,
    assert_is_picture,
    call,
    logits_at,
    refusal,
    run_apart,
    tiny_llama,
    trained_tokenizer,
    tree,
)

# Enough text for 24 training windows, 4 held out and the report's 16.
QUICK = ["--steps", "24", "--length", "24", "--top-k", "20", "--heldout", "4", "--learning-rate", "2e-3"]
HELDOUT = range(24, 28)


def arguments(world: World, output: Path, *more: object, source: Path | None = None) -> list[object]:
    place = world.pruned if source is None else source
    text = [] if "--text" in more else ["--text", world.text]
    return ["distill", place, "--teacher", world.model, "-o", output, *text, *QUICK, *more]


@pytest.fixture(scope="session")
def plain(world: World) -> Path:
    """Two layers removed and nothing in their place."""
    place = world.root / "plain"
    flags = ["--spans", "3:5", "--fit", "none", "--text", world.text, *SMALL]
    assert call("prune", world.model, "-o", place, *flags) == 0
    return place


@pytest.fixture(scope="session")
def distilled(world: World) -> Path:
    place = world.root / "distilled"
    assert call(*arguments(world, place)) == 0
    return place


def summary(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / RECORDS / "summary.json").read_text())
    return content


def heldout(directory: Path) -> tuple[float, float]:
    """The held-out KL before and after."""
    about = summary(directory)["distillation"]
    curve = {int(point["step"]): point["tail"] for point in about["curve"]}
    return curve[0], curve[about["best_step"]]


def test_the_result_is_a_patched_checkpoint_that_is_better(world: World, distilled: Path) -> None:
    before, after = heldout(distilled)
    assert after < before
    quality = summary(distilled)["quality"]
    assert list(quality) == ["dense", "dropped (no patch)", "before distillation", "distilled"]
    assert quality["distilled"]["kl"] < quality["before distillation"]["kl"]
    assert not list(distilled.parent.glob("distilled.work*"))
    pruned, plan = PrunePlan.load(world.pruned), PrunePlan.load(distilled)
    assert plan.spans == pruned.spans
    assert plan.joints[0].fit == f"{pruned.joints[0].fit}, distilled"
    model = AutoModelForCausalLM.from_pretrained(distilled)
    patch = next(iter(patches(model).values()))
    for name, tensor in plan.joints[0].patch.state_dict().items():
        assert torch.equal(tensor, patch.state_dict()[name])
        assert not torch.equal(tensor, pruned.joints[0].patch.state_dict()[name])
    # Nothing but the patch has changed.
    weights = [load_file(place / "model.safetensors") for place in (world.pruned, distilled)]
    differing = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert differing
    assert all(".patch." in name for name in differing)


def test_the_report(distilled: Path) -> None:
    report = (distilled / RECORDS / "report" / "report.md").read_text()
    assert "Held-out KL: " in report
    assert "24 of 24" in report
    assert_is_picture(distilled / RECORDS / "report" / "distillation.png")
    lines = [json.loads(line) for line in (distilled / RECORDS / "report" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))


def test_what_is_printed(world: World, run: Run, tmp_path: Path) -> None:
    told = run(*arguments(world, tmp_path / "out", "--json", "-", "--structured", 3, "--patch", "dense"))
    assert told.status == 0
    content = json.loads(told.stdout)
    about = content["distillation"]
    assert about["parameters"] == 48 * 48
    lost = about["structured"]["heldout_after"] - about["structured"]["heldout_before"]
    assert f"Hadamard + rank 3 instead of the dense patch costs {lost:+.4f} nats of held-out KL" in told.stderr
    assert lost > 0
    assert "distilled, structured" in content["quality"]
    last = [line for line in told.stderr.splitlines() if line.startswith("distilling: 24/24")]
    assert len(last) == 1
    assert "tokens/s" in last[0]
    assert "0:00 left" in last[0]
    patch = PrunePlan.load(tmp_path / "out").joints[0].patch
    assert patch is not None
    assert patch.description() == [{"kind": "hadamard", "dim": 48, "rank": 3, "pre_scale": False, "post_scale": False}]
    assert logits_at(tmp_path / "out").isfinite().all()


def test_inspect_shows_it(run: Run, distilled: Path) -> None:
    told = run("inspect", distilled, "--json", "-")
    assert json.loads(told.stdout)["distillation"]["steps"] == 24
    assert "Distillation" in told.stderr
    assert "held-out KL" in told.stderr
    assert "distilled" in told.stderr


@pytest.mark.parametrize("what", ["patch+norms", "lora", "suffix"])
def test_more_freedom_learns_more(world: World, run: Run, tmp_path: Path, distilled: Path, what: str) -> None:
    assert run(*arguments(world, tmp_path / "out", "--train", what, "--lora-rank", 4)).status == 0
    assert heldout(tmp_path / "out")[1] < heldout(distilled)[1]
    assert not any("lora" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("loss", ["topk", "full"])
def test_every_loss(world: World, run: Run, tmp_path: Path, loss: str) -> None:
    assert run(*arguments(world, tmp_path / "out", "--loss", loss)).status == 0
    curve = summary(tmp_path / "out")["distillation"]["curve"]
    assert curve[-1][loss] < curve[0][loss]


def test_the_next_tokens_are_told_of(world: World, run: Run, tmp_path: Path) -> None:
    assert run(*arguments(world, tmp_path / "out", "--label-weight", "0.3")).status == 0
    assert (
        "likeliest tokens, 30% the text's own next tokens"
        in (tmp_path / "out" / RECORDS / "report" / "report.md").read_text()
    )
    assert summary(tmp_path / "out")["distillation"]["label_weight"] == 0.3


@pytest.mark.parametrize("form", ["scale", "scales", "low-rank", "dense"])
def test_a_plain_removal_gets_a_patch(world: World, run: Run, tmp_path: Path, plain: Path, form: str) -> None:
    flags = ["--patch", form, "--rank", 4, "--learning-rate", "5e-3"]
    assert run(*arguments(world, tmp_path / "out", *flags, source=plain)).status == 0
    before, after = heldout(tmp_path / "out")
    assert after < before
    joint = PrunePlan.load(tmp_path / "out").joints[0]
    assert joint.fit == f"none, {form}, distilled"
    assert joint.patch is not None


def test_a_distilled_model_can_be_distilled_again_but_not_lost_for_that(
    world: World, run: Run, tmp_path: Path, distilled: Path
) -> None:
    assert "still needed" in refusal(run(*arguments(world, distilled, source=distilled)))
    assert run(*arguments(world, tmp_path / "again", source=distilled)).status == 0
    assert heldout(tmp_path / "again")[1] < heldout(distilled)[1]


def test_a_model_that_was_pruned_twice(world: World, run: Run, tmp_path: Path) -> None:
    """The stream passes the new patch, then the old one; the new plan is about the new one."""
    flags = ["--fit", "diagonal", "--text", world.text, *SMALL]
    assert run("prune", world.model, "--spans", "3:5", "-o", tmp_path / "once", *flags).status == 0
    assert run("prune", tmp_path / "once", "--spans", "2:3", "-o", tmp_path / "twice", *flags).status == 0
    command = ["distill", tmp_path / "twice", "--teacher", tmp_path / "once", "-o", tmp_path / "out", *QUICK]
    assert run(*command, "--text", world.text).status == 0
    before, after = heldout(tmp_path / "out")
    assert after < before
    chains = [list(patches(AutoModelForCausalLM.from_pretrained(tmp_path / place))[2]) for place in ("twice", "out")]
    patch = PrunePlan.load(tmp_path / "out").joints[0].patch
    assert patch is not None
    for old, new in zip(*chains, strict=True):
        assert not torch.equal(old.to_dense(), new.to_dense())
    assert torch.equal(patch.to_dense(), chains[1][0].to_dense())
    said = refusal(run(*command, "--text", world.text, "--patch", "dense"))
    assert "at layer 2 the patch stands with that of an earlier cut: give --patch keep" in said


def test_a_store_serves_several_runs(world: World, run: Run, tmp_path: Path, distilled: Path) -> None:
    store = tmp_path / "store"
    assert run(*arguments(world, tmp_path / "one", "--store", store)).status == 0
    # What the saved model is worth on the held-out windows is what was told.
    again = heldout_losses(
        AutoModelForCausalLM.from_pretrained(tmp_path / "one"),
        TeacherStore.open(store),
        PrunePlan.load(tmp_path / "one").spans[0].start,
        HELDOUT,
    )
    assert again["tail"] == pytest.approx(heldout(tmp_path / "one")[1], rel=1e-5)
    before = tree(store)
    shard = store / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    told = run(*arguments(world, tmp_path / "two", "--store", store, "--loss", "topk"))
    assert told.status == 0
    assert "note: shard-00000.safetensors of the teacher store was damaged and has been written again" in told.stderr
    assert tree(store) == before
    assert torch.equal(logits_at(tmp_path / "one"), logits_at(distilled))
    assert not torch.equal(logits_at(tmp_path / "two"), logits_at(distilled))
    said = refusal(run(*arguments(world, tmp_path / "three", "--store", store, "--length", 32)))
    assert "is a teacher store of" in said
    assert not (tmp_path / "three").exists()


def test_states_of_the_joint_may_be_kept(world: World, run: Run, tmp_path: Path, distilled: Path) -> None:
    assert run(*arguments(world, tmp_path / "out", "--store-states", "--store", tmp_path / "store")).status == 0
    start = PrunePlan.load(world.pruned).spans[0].start
    assert f"state.{start}" in load_file(tmp_path / "store" / "shard-00000.safetensors")
    assert heldout(tmp_path / "out")[1] == pytest.approx(heldout(distilled)[1], rel=0.05)


KILLED = """
import os, signal
from linearpatch_kernels.distillation import trainer
save = trainer._Run._save
def save_and_die(self):
    save(self)
    if self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer._Run._save = save_and_die
whole = trainer.distill
trainer.distill = lambda *a, **k: whole(*a, **k, checkpoint_seconds=0)
"""


def test_a_killed_run_goes_on_and_ends_the_same(world: World, tmp_path: Path, distilled: Path) -> None:
    command = arguments(world, tmp_path / "out")
    assert run_apart(*command, program=KILLED.format(step=9)).status == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["out.work"]
    assert (tmp_path / "out.work" / "run" / "state.safetensors").exists()
    told = run_apart(*command)
    assert told.status == 0, told.stderr
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert tree(tmp_path / "out")["model.safetensors"] == tree(distilled)["model.safetensors"]
    lines = (tmp_path / "out" / RECORDS / "report" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))


def test_a_run_of_other_flags_does_not_go_on(world: World, run: Run, tmp_path: Path) -> None:
    command = arguments(world, tmp_path / "out")
    assert run_apart(*command, program=KILLED.format(step=3)).status == -signal.SIGKILL
    said = refusal(run(*command, "--seed", 1))
    assert "unfinished run of other settings (seed 0 there)" in said
    assert run(*command).status == 0


def test_a_short_text_is_used_again_and_says_so(world: World, run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(world.text.read_text()[:1500])
    told = run(*arguments(world, tmp_path / "out", "--text", short))
    assert told.status == 0
    assert "windows to train on for 24, so they are used again" in told.stderr
    short.write_text(world.text.read_text()[:200])
    said = refusal(run(*arguments(world, tmp_path / "two", "--text", short)))
    assert "give a longer text" in said


CASES: dict[str, tuple[list[object], str]] = {
    "train": (["--train", "everything"], "choose one of patch, patch+norms, lora"),
    "loss": (["--loss", "mse"], "choose one of tail, topk, full"),
    "patch": (["--patch", "square"], "choose one of keep, scale"),
    "precision": (["--precision", "int8"], "choose one of float32, bfloat16"),
    "rate": (["--learning-rate", "0"], "--learning-rate must be positive"),
    "labels": (["--label-weight", "1.5"], "--label-weight must be between 0 and 1, not 1.5"),
    "steps": (["--steps", "0"], "--steps"),
    "one-token": (["--top-k", "1", "--loss", "topk"], "there is nothing to learn"),
    "top-k": (["--top-k", "400"], "--top-k 400 is not between 1 and the vocabulary's 384"),
    "rank": (["--patch", "low-rank", "--rank", "49"], "--rank 49 is not between 1 and the model's width 48"),
    "structured": (["--patch", "scale", "--structured", "4"], "--structured is for dense patches"),
    "structured-rank": (["--patch", "dense", "--structured", "49"], "more than the model's width"),
    "length": (["--length", "65"], "exceed the model's 64 positions"),
    "text": (["--text", "nothing.txt"], "does not exist"),
    "json": (["--json", "/"], "is a directory"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(world: World, run: Run, tmp_path: Path, case: str) -> None:
    flags, says = CASES[case]
    assert says in refusal(run(*arguments(world, tmp_path / "out", *flags)))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_one_process_for_a_teacher_on_all_devices(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearpatch_kernels.processes.launched_processes", lambda: Processes(rank=0, count=2))
    flags = ["--teacher-device-map", "auto", "--batch-size", "2"]
    assert "start only one" in refusal(run(*arguments(world, tmp_path / "out", *flags)))


def test_what_is_still_needed_is_not_replaced(world: World, run: Run, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(world.pruned, tmp_path / "teacher"))
    before = tree(tmp_path)
    flags = ["--text", world.text, *QUICK]
    said = refusal(run("distill", world.pruned, "--teacher", teacher, "-o", teacher, *flags))
    assert "teacher, which is still needed: give another directory" in said
    inside = refusal(run(*arguments(world, tmp_path / "out", "--store", tmp_path / "out" / "store")))
    assert "which this run replaces: give another --store" in inside
    assert tree(tmp_path) == before


def test_what_others_keep_beside_the_output_stays(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output in a home directory that the shell left to us, and a note in what looks like a folder of ours."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes.txt").write_text("mine")
    command = arguments(world, Path("~/out"))
    assert run(*command).status == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "out.work"]
    assert os.listdir(tmp_path / "out.work") == ["notes.txt"]


def test_wrong_models_are_refused(world: World, run: Run, tmp_path: Path, plain: Path) -> None:
    def says(source: Path, teacher: Path, *more: object) -> str:
        flags = ["--teacher", teacher, "-o", tmp_path / "out", "--text", world.text, *QUICK, *more]
        return refusal(run("distill", source, *flags))

    assert "holds no plan" in says(world.model, world.model)
    assert "is not a directory" in says(tmp_path / "nothing", world.model)
    assert f"made from a model of {LAYERS} layers" in says(world.pruned, world.pruned)
    other = world.copy(tmp_path / "other")
    tiny_llama(seed=3).save_pretrained(other)
    assert "was made from another model" in says(world.pruned, other)
    trained_tokenizer(world.text.read_text()[:5000], 380).save_pretrained(
        shutil.copytree(world.model, tmp_path / "tok")
    )
    assert "different tokenizers" in says(world.pruned, tmp_path / "tok")
    assert "no patch to train: make one with --patch" in says(plain, world.model, "--train", "patch")
    assert sorted(os.listdir(tmp_path)) == ["other", "tok"]


def test_a_disk_that_is_too_small_is_told_up_front(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    # Enough for the model (0.03 GB beside the weights), not for the store.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000_000))
    monkeypatch.setattr(
        "linearpatch_kernels.distillation.teacher_store.shutil.disk_usage", lambda _: usage._replace(free=9)
    )
    said = refusal(run(*arguments(world, tmp_path / "out")))
    assert "GB free: make room" in said
    assert os.listdir(tmp_path) == []


def in_processes(place: Path, count: int, command: list[object]) -> str:
    """What the command writes to standard error, run by so many processes of torchrun."""
    program = place / "linearpatch"
    program.write_text("from linearpatch_kernels.cli import main\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"] if count > 1 else []
    finished = subprocess.run(
        [sys.executable, *launcher, program, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stderr


@pytest.mark.slow
def test_two_processes_do_the_same(world: World, tmp_path: Path) -> None:
    for count, name in ((1, "one"), (2, "two")):
        told = in_processes(tmp_path, count, arguments(world, tmp_path / name, "--batch-size", 2, "--steps", 10))
        assert told.count("distilling: 10/10") == 1
    one, two = (summary(tmp_path / name)["distillation"]["curve"] for name in ("one", "two"))
    assert [point["tail"] for point in two] == pytest.approx([point["tail"] for point in one], rel=1e-3)
    torch.testing.assert_close(logits_at(tmp_path / "two"), logits_at(tmp_path / "one"), rtol=1e-3, atol=1e-3)
    assert sorted(os.listdir(tmp_path)) == ["linearpatch", "one", "two"]


@pytest.mark.slow
def test_two_processes_prune_as_one(world: World, tmp_path: Path) -> None:
    flags = ["--drop", 2, "--fit", "least-squares", "--text", world.text, "--batch-size", 1, *SMALL]
    for count, name in ((1, "one"), (2, "two")):
        told = in_processes(tmp_path, count, ["prune", world.model, "-o", tmp_path / name, *flags])
        assert told.count("evaluating: 16/16") == 1
    one, two = (PrunePlan.load(tmp_path / name) for name in ("one", "two"))
    assert two.spans == one.spans
    torch.testing.assert_close(two.joints[0].patch[0].weight, one.joints[0].patch[0].weight, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_accelerate_places(world: World, run: Run, tmp_path: Path, distilled: Path) -> None:
    assert run(*arguments(world, tmp_path / "out", "--teacher-device-map", "auto")).status == 0
    assert torch.equal(logits_at(tmp_path / "out"), logits_at(distilled))
    assert "no device map is called 'all'" in refusal(
        run(*arguments(world, tmp_path / "no", "--teacher-device-map", "all"))
    )


@pytest.fixture(scope="session")
def merged(world: World) -> Path:
    """Two layers fewer."""
    place = world.root / "merged"
    flags = [flag for flag in SMALL if flag not in ("--rank", "4")]
    layers = ["--layers", LAYERS - 2, "--variant", "come", "--no-repeat"]
    assert call("merge", world.model, "-o", place, *layers, "--text", world.text, *flags) == 0
    return place


def test_merged_layers_are_distilled_layer_by_layer(world: World, run: Run, merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(*arguments(world, out, "--group-steps", 6, "--layer-weight", 2, source=merged))
    assert done.status == 0
    assert os.listdir(tmp_path) == ["out"]
    before, after = heldout(out)
    assert after < before
    about = summary(out)
    assert about["distillation"]["train"] == "merged"
    assert about["hierarchy"] == {"weight": 2.0, "error": "relative", "group_steps": 6}
    assert len(about["groups"]) == 2
    assert all(group["after"] < group["before"] for group in about["groups"].values())
    assert about["quality"]["distilled"]["kl"] < about["quality"]["before distillation"]["kl"]
    # A plain checkpoint as before, in which the merged layers alone have changed.
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    weights = [load_file(place / "model.safetensors") for place in (merged, out)]
    differing = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    tree = about["tree"]
    layers = [f"model.layers.{layer}." for layer, node in enumerate(tree) if isinstance(node, list)]
    assert differing
    assert all(any(name.startswith(layer) for layer in layers) for name in differing)
    assert (out / RECORDS / "merge.json").read_bytes() == (merged / RECORDS / "merge.json").read_bytes()
    assert sum(line.startswith("distilling layer ") for line in done.stderr.splitlines()) == 2
    # And once more from there, on norms alone.
    again = run(*arguments(world, tmp_path / "again", "--train", "patch+norms", source=out))
    assert again.status == 0


def test_a_teacher_that_was_merged_itself_is_refused(world: World, run: Run, merged: Path, tmp_path: Path) -> None:
    """Its layers have other numbers than those that the merged layers are told to stand for."""
    flags = [flag for flag in SMALL if flag not in ("--rank", "4")]
    deeper = ["--layers", LAYERS - 3, "--variant", "come", "--text", world.text, *flags]
    assert call("merge", merged, "-o", tmp_path / "twice", *deeper) == 0
    command = ["distill", tmp_path / "twice", "--teacher", merged, "-o", tmp_path / "out", "--text", world.text]
    assert "merge the first model in one go" in refusal(run(*command, *QUICK))


def test_what_is_refused_for_merged_layers(world: World, run: Run, merged: Path, tmp_path: Path) -> None:
    def says(*flags: object, source: Path = merged) -> str:
        return refusal(run(*arguments(world, tmp_path / "out", *flags, source=source)))

    assert "for pruned models" in says("--patch", "dense")
    assert "for pruned models" in says("--structured", 4)
    assert "no patch to train" in says("--train", "patch")
    assert "--layer-error" in says("--layer-error", "cosine")
    assert "has no merged layers" in says("--group-steps", 3, source=world.pruned)
    assert "no merged layer to train" in says("--train", "merged", source=world.pruned)
