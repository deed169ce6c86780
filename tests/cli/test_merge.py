"""``linearpatch merge`` from outside."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.merging.plan import MergePlan, apply_merges
from linearpatch_kernels.modeling.patched import patches
from tests.support.command import LAYERS, SMALL, WIDTH, Run, World, logits_of, prose, refusal, run_apart, tree

MERGE = [argument for argument in SMALL if argument not in ("--rank", "4")]
PLAINLY = [*MERGE, "--heal", "none"]


@pytest.mark.parametrize("variant", ["authors", "come", "come-p", "come-loss", "come-block"])
def test_merge_writes_a_plain_model_its_plan_and_a_report(variant: str, world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--layers", LAYERS - 2, "-o", out, "--text", world.text, "--variant", variant, *PLAINLY]
    done = run("merge", world.model, *arguments, "--json", tmp_path / "figures.json")
    assert (done.status, done.errors) == (0, [])
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "out"]
    # A plain checkpoint of the stock class, without any code of ours.
    merged = LlamaForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert not list(out.glob("*.py"))
    assert len(merged.model.layers) == LAYERS - 2
    plan = MergePlan.load(out / RECORDS / "merge.json")
    again = apply_merges(AutoModelForCausalLM.from_pretrained(world.model), plan)
    assert torch.equal(logits_of(merged), logits_of(again))
    assert merged.config.linearpatch_merge_tree == plan.tree
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["quality"]) == {"dense", "dropped (no patch)", "merged"}
    assert figures == json.loads((out / RECORDS / "summary.json").read_text())
    for merge in plan.merges:
        written = " / ".join(f"{share:.2f}" for share in merge.shares)
        assert written in done.stdout
        assert written in (out / RECORDS / "report" / "report.md").read_text()
    shown = run("inspect", out)
    assert shown.status == 0
    assert "(" in shown.stdout.split("merge tree")[1].splitlines()[0]
    assert "held-out loss" in shown.stdout
    summary = json.loads(run("inspect", out, "--json", "-").stdout)
    assert summary["merges"]["tree"] == plan.tree


def test_the_flags_reach_the_merges(world: World, run: Run, tmp_path: Path) -> None:
    common = ["--text", world.text, "--variant", "come", *MERGE]
    assert run("merge", world.model, "--layers", 4, "-o", tmp_path / "a", "--no-repeat", *common).status == 0
    nodes = MergePlan.load(tmp_path / "a" / RECORDS / "merge.json").tree
    assert all(len(node) == 2 for node in nodes)
    assert run("merge", world.model, "--layers", 4, "-o", tmp_path / "b", "--width", 3, *common).status == 0
    assert [m.span.length for m in MergePlan.load(tmp_path / "b" / RECORDS / "merge.json").merges] == [3, 3]
    steep = ["--power", 40, "--floor", 0.99, "--skip-score", "bi"]
    assert run("merge", world.model, "--layers", 7, "-o", tmp_path / "c", *steep, *common).status == 0
    plan = MergePlan.load(tmp_path / "c" / RECORDS / "merge.json")
    assert max(plan.merges[0].shares) >= 0.99 - 1e-9
    assert plan.records[0]["score"] == "bi"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "3", "--variant", "best"], "no variant"),
        (["--layers", "3", "--skip-score", "best"], "no skip score"),
        (["--layers", "3", "--heal", "best"], "is no way to heal"),
        (["--layers", "3", "--samples", "3"], "--samples 3 is too few for a refit"),
        (["--layers", "0"], "--layers"),
        ([], "--layers"),
        (["--layers", "3", "--least-share", "0.7"], "least share"),
        (["--layers", "3", "--json", "/nowhere/x.json"], "--json"),
    ],
)
def test_what_is_refused_before_the_model_is_looked_at(
    arguments: list[str], complaint: str, run: Run, tmp_path: Path
) -> None:
    done = run("merge", "/nowhere/model", "-o", tmp_path / "out", *arguments)
    assert complaint in refusal(done)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "8"], "give 1 to 7"),
        (["--layers", "7", "--samples", "100000"], "text"),
        (["--layers", "7", "--samples", "3"], "at least 4"),
        (["--layers", "2", "--no-repeat", "--variant", "come"], "without merging a merged layer again"),
    ],
)
def test_what_the_model_or_the_text_refuses(
    arguments: list[str], complaint: str, world: World, run: Run, tmp_path: Path
) -> None:
    before = tree(world.model)
    done = run("merge", world.model, "-o", tmp_path / "out", "--text", world.text, *MERGE, *arguments)
    assert complaint in refusal(done)
    assert os.listdir(tmp_path) == []
    assert tree(world.model) == before


KILLED = """
import os, signal
from linearpatch_kernels.healing import merge_search
decided, merge_layers = [], merge_search.merge_layers
def killed(model, merge):
    decided.append(merge)
    if len(decided) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return merge_layers(model, merge)
merge_search.merge_layers = killed
"""


def test_a_killed_merge_goes_on_where_it_was(world: World, run: Run, tmp_path: Path) -> None:
    def arguments(out: str, text: Path = world.text) -> list[Any]:
        flags = ["--layers", 4, "-o", tmp_path / out, "--text", text, "--variant", "come", *MERGE]
        return ["merge", world.model, *flags]

    assert run(*arguments("expected")).status == 0
    assert run_apart(*arguments("out"), program=KILLED).status == -signal.SIGKILL
    assert len(MergePlan.load(tmp_path / ".out.merges").merges) == 2
    other = tmp_path / "other.txt"
    other.write_text(prose(3000, seed=9))
    (tmp_path / ".foreign.merges").write_bytes((tmp_path / ".out.merges").read_bytes())
    foreign = run(*arguments("foreign", other))
    assert foreign.status == 0
    assert not any("going on" in line for line in foreign.progress)
    resumed = run(*arguments("out"))
    assert (resumed.status, resumed.errors) == (0, [])
    assert any("going on from 2 merges" in line for line in resumed.progress)
    assert resumed.stdout.split("Time:")[0] == run(*arguments("expected")).stdout.split("Time:")[0]
    for name in (f"{RECORDS}/merge.json", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected", "foreign", "other.txt", "out"]


def test_a_refitted_block_is_the_default(world: World, run: Run, tmp_path: Path) -> None:
    flags = ["--layers", LAYERS - 3, "--text", world.text, *MERGE]
    assert run("merge", world.model, "-o", tmp_path / "out", *flags).status == 0
    told = ["--variant", "come-block", "--heal", "refit"]
    assert run("merge", world.model, "-o", tmp_path / "told", *flags, *told).status == 0
    plans = [MergePlan.load(tmp_path / name / RECORDS / "merge.json") for name in ("out", "told")]
    assert plans[0] == plans[1]
    assert [merge.span.length for merge in plans[0].merges] == [4]
    states = [LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "told")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_refitted_layers_stay_a_plain_model(world: World, run: Run, tmp_path: Path) -> None:
    flags = ["--layers", LAYERS - 2, "--text", world.text, "--variant", "come", *MERGE]
    done = run("merge", world.model, "-o", tmp_path / "out", *flags, "--heal", "refit")
    assert (done.status, done.errors) == (0, [])
    assert "Healing the merged layers (refit) " in done.stdout
    assert run("merge", world.model, "-o", tmp_path / "plain", *flags, "--heal", "none").status == 0
    states = [LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("plain", "out")]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    tree_ = MergePlan.load(tmp_path / "out" / RECORDS / "merge.json").tree
    possible = {f"model.layers.{at}.mlp.down_proj.weight" for at, node in enumerate(tree_) if isinstance(node, list)}
    assert changed <= possible
    assert not list((tmp_path / "out").glob("*.py"))


def test_patches_behind_the_merged_layers(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--layers", LAYERS - 2, "--text", world.text, "--variant", "come", *MERGE]
    done = run("merge", world.model, "-o", out, *flags, "--heal", "low-rank", "--rank", 4)
    assert (done.status, done.errors) == (0, [])
    quality = json.loads((out / RECORDS / "summary.json").read_text())["quality"]
    assert list(quality) == ["dense", "dropped (no patch)", "merged", "merged, low-rank patches"]
    before, after = (quality[name]["perplexity"] for name in ("merged", "merged, low-rank patches"))
    verdict = "helps" if after < before else "does not help"
    line = f"(low-rank) {verdict}: perplexity {before:.2f} without, {after:.2f} with it"
    assert line in done.stdout
    assert line in (out / RECORDS / "report" / "report.md").read_text()
    healed = AutoModelForCausalLM.from_pretrained(out)
    tree_ = healed.config.linearpatch_merge_tree
    assert sorted(patches(healed)) == [layer + 1 for layer, node in enumerate(tree_) if isinstance(node, list)]
    # Without the patches it is what merge gives without the flag.
    assert run("merge", world.model, "-o", tmp_path / "plain", *flags, "--heal", "none").status == 0
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(tensor, healed.state_dict()[name]) for name, tensor in plain.items())
    assert "is no way to heal" in refusal(run("merge", world.model, "-o", tmp_path / "x", *flags, "--heal", "best"))


@pytest.mark.usefixtures("no_weights")
def test_merge_refuses_what_does_not_fit_the_model(world: World, run: Run, empty: Path) -> None:
    for layers in (LAYERS, LAYERS + 1):
        line = refusal(run("merge", world.model, "--layers", layers, "-o", empty / "out", "--text", world.text))
        assert f"{LAYERS} layers" in line
    arguments = ["--layers", LAYERS - 1, "-o", empty / "out", "--text", world.text]
    assert "1 to 48" in refusal(run("merge", world.model, *arguments, "--heal", "low-rank", "--rank", WIDTH + 1))
    assert "power" in refusal(run("merge", world.model, *arguments, "--power", "nan"))
