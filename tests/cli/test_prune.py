"""``linearpatch prune`` from outside: what it writes, what it prints, and which flags it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from linearpatch_kernels.files import RECORDS
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import AUTO, FITS, fits_of
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.report.tables import number
from tests.support.command import (
    CONTEXT,
    LAYERS,
    NO_MODEL,
    SMALL,
    VOCABULARY,
    WIDTH,
    Run,
    World,
    assert_is_picture,
    gguf_file,
    logits_at,
    logits_of,
    prose,
    refusal,
    run_apart,
    tiny_llama,
)


def test_prune_writes_the_model_its_plan_and_a_report(world: World) -> None:
    plan = PrunePlan.load(world.pruned)
    assert plan.num_layers == LAYERS
    assert sum(span.length for span in plan.spans) == 2
    assert plan.calibration["samples"] == 6
    assert plan.calibration["length"] == 24
    pruned = AutoModelForCausalLM.from_pretrained(world.pruned)
    assert pruned.config.num_hidden_layers == LAYERS - 2
    assert torch.equal(logits_of(pruned), logits_of(apply_plan(tiny_llama(), plan)))
    assert not torch.allclose(logits_of(pruned), logits_at(world.model), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(world.pruned)
    assert tokenizer("Ban bara.").input_ids == AutoTokenizer.from_pretrained(world.model)("Ban bara.").input_ids
    assert sorted(path.name for path in (world.pruned / RECORDS / "report").iterdir()) == [
        "depth-cosine.png",
        "joint-magnitudes.png",
        "report.md",
    ]
    for picture in (world.pruned / RECORDS / "report").glob("*.png"):
        assert_is_picture(picture)
    report = (world.pruned / RECORDS / "report" / "report.md").read_text(encoding="utf-8")
    assert str(plan.spans[0]) in report
    assert "text.txt" in report
    assert all(f"({picture})" in report for picture in ("depth-cosine.png", "joint-magnitudes.png"))


def test_auto_keeps_a_row_of_its_table(world: World) -> None:
    plan = PrunePlan.load(world.pruned)
    assert {row["fit"] for row in plan.candidates} == {fit.name for fit in fits_of(AUTO)}
    assert [row["fit"] for row in plan.candidates if row["kept"]] == [plan.joints[0].fit]
    losses = [row["loss"] for row in plan.candidates]
    assert losses == sorted(losses)


def test_what_is_printed_is_what_was_found(world: World, run: Run, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run(
        *["prune", world.model, "--drop", 2, "--fit", "linearpatch", "-o", tmp_path / "out", "--text", world.text],
        *[*SMALL, "--json", figures],
    )
    assert done.status == 0
    assert done.errors == []
    summary = json.loads(figures.read_text())
    assert summary == json.loads((tmp_path / "out" / RECORDS / "summary.json").read_text())
    assert summary["num_layers"] == {"dense": LAYERS, "pruned": LAYERS - 2}
    assert summary["fit"] == "linearpatch"
    assert list(summary["quality"]) == ["dense", "dropped (no patch)", "LinearPatch (the paper's)"]
    for quality in summary["quality"].values():
        assert number(quality["perplexity"]) in done.stdout
        assert f"{100 * quality['top1_agreement']:.1f} %" in done.stdout
    assert str(tmp_path / "out" / RECORDS / "report" / "report.md") in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "out"]


@pytest.mark.parametrize("fit", list(FITS))
def test_every_fit(world: World, run: Run, tmp_path: Path, fit: str) -> None:
    out = tmp_path / "out"
    arguments = ["--spans", "2:4,5:6", "--fit", fit, "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, *arguments).status == 0
    plan = PrunePlan.load(out)
    assert [str(span) for span in plan.spans] == ["2:4", "5:6"]
    assert [joint.fit for joint in plan.joints] == [fit, fit]
    assert all((joint.patch is None) == (fit == "none") for joint in plan.joints)
    pruned = AutoModelForCausalLM.from_pretrained(out)
    assert set(patches(pruned)) == (set() if fit == "none" else {2, 3})
    assert torch.equal(logits_of(pruned), logits_of(apply_plan(tiny_llama(), plan)))


def test_without_a_patch_the_checkpoint_is_a_stock_one(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("prune", world.model, "--spans", "3:5", "--fit", "none", "-o", out, "--text", world.text, *SMALL)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == LAYERS - 2
    assert "auto_map" not in config
    assert "linearpatch" not in config
    assert list(out.rglob("*.py")) == []
    dense = tiny_llama()
    del dense.model.layers[3:5]
    for index, layer in enumerate(dense.model.layers):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        ids = torch.arange(1, 30).view(1, -1)
        expected = dense(ids, use_cache=False).logits
        assert torch.equal(LlamaForCausalLM.from_pretrained(out)(ids).logits, expected)


@pytest.mark.parametrize("score", ["cosine", "channel-cosine", "angular", "bi", "loss"])
def test_every_score(world: World, run: Run, tmp_path: Path, score: str) -> None:
    out = tmp_path / "out"
    arguments = ["--drop", 3, "--score", score, "--fit", "linearpatch", "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, *arguments).status == 0
    plan = PrunePlan.load(out)
    assert plan.score == score
    assert len(plan.kept_layers) == LAYERS - 3
    assert {0, LAYERS - 1} <= set(plan.kept_layers)
    assert torch.equal(logits_at(out), logits_of(apply_plan(tiny_llama(), plan)))


def test_structured_leaves_the_dense_maps_out(world: World, run: Run, tmp_path: Path) -> None:
    arguments = ["--drop", 2, "--structured", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    assert run("prune", world.model, *arguments).status == 0
    fits = {row["fit"] for row in PrunePlan.load(tmp_path / "out").candidates}
    assert fits == {fit.name for fit in fits_of(AUTO)} - {"least-squares", "shrunk-least-squares"}


def test_plan_only_writes_no_model_and_its_plan_is_the_one(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("prune", world.model, "--drop", 2, "--plan-only", "-o", out, "--text", world.text, *SMALL)
    assert done.status == 0
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors").exists()
    assert (out / RECORDS / "plan.json").read_bytes() == (world.pruned / RECORDS / "plan.json").read_bytes()
    assert (out / RECORDS / "plan.safetensors").read_bytes() == (
        world.pruned / RECORDS / "plan.safetensors"
    ).read_bytes()
    assert_is_picture(out / RECORDS / "report" / "depth-cosine.png")


def test_an_earlier_output_is_replaced_whole(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = ["prune", world.model, "--drop", 2, "-o", out, "--text", world.text, *SMALL]
    assert run(*first).status == 0
    assert run("prune", world.model, "--spans", "4:5", "--fit", "none", *first[4:]).status == 0
    assert not (out / "modeling_linearpatch.py").exists()
    assert str(PrunePlan.load(out).spans[0]) == "4:5"
    assert logits_at(out).shape[-1] == VOCABULARY
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_and_missing_parents_are_filled(world: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "and" / "deep"):
        arguments = ["--drop", 1, "--fit", "scalar", "-o", out, "--text", world.text, *SMALL]
        assert run("prune", world.model, *arguments).status == 0
        assert (out / "model.safetensors").exists()


def test_a_pruned_model_can_be_pruned_again_but_not_lost_for_that(world: World, run: Run, tmp_path: Path) -> None:
    once = AutoModelForCausalLM.from_pretrained(world.pruned)
    shutil.copytree(world.pruned, tmp_path / "once")
    arguments = ["--drop", 2, "--fit", "low-rank", "--text", world.text, *SMALL]
    assert "still needed" in refusal(run("prune", tmp_path / "once", "-o", tmp_path / "once", *arguments))
    assert run("prune", tmp_path / "once", "-o", tmp_path / "out", *arguments).status == 0
    plan = PrunePlan.load(tmp_path / "out")
    assert plan.num_layers == LAYERS - 2
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert twice.config.num_hidden_layers == LAYERS - 4
    assert torch.equal(logits_of(twice), logits_of(apply_plan(once, plan)))


def test_the_report_may_be_about_another_text(world: World, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(prose(1500, seed=2))
    out = tmp_path / "out"
    arguments = ["--drop", 2, "--fit", "none", "--heldout-text", other, "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, *arguments).status == 0
    assert "other.txt" in (out / RECORDS / "report" / "report.md").read_text()


def test_a_text_used_up_leaves_no_figures_and_says_so(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = tmp_path / "short.txt"
    short.write_text(prose(300, seed=2))
    arguments = ["--fit", "linearpatch", "--samples", 8, "--length", 24, "--rank", 4, "-o", out, "--text", short]
    done = run("prune", world.model, "--drop", 2, *arguments)
    assert done.status == 0
    assert any(line.startswith("note: the text leaves") for line in done.progress)
    assert (out / "model.safetensors").exists()
    assert "None" not in (out / RECORDS / "report" / "report.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(world: World, run: Run, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    arguments = ["--drop", 2, "--dtype", dtype, "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, *arguments).status == 0
    assert {str(tensor.dtype) for tensor in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_a_model_narrower_than_the_default_rank(world: World, run: Run, tmp_path: Path) -> None:
    flags = ["--samples", "6", "--length", "24", "--text", world.text]
    assert run("prune", world.model, "--drop", 2, "--fit", "low-rank", "-o", tmp_path / "out", *flags).status == 0
    patch = PrunePlan.load(tmp_path / "out").joints[0].patch
    assert patch is not None
    assert patch.description()[0]["rank"] == WIDTH
    refused = run("prune", world.model, "--drop", 2, "--rank", 64, "-o", tmp_path / "two", *flags)
    assert f"give --rank 1 to {WIDTH}" in refusal(refused)


def test_a_process_of_its_own_finds_the_same(world: World, tmp_path: Path) -> None:
    arguments = ["--drop", 2, "--fit", "auto", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    done = run_apart("prune", world.model, *arguments)
    assert done.status == 0, done.stderr
    assert done.errors == []
    assert torch.equal(logits_at(tmp_path / "out"), logits_at(world.pruned))


PRUNE_FLAGS = {
    "neither": ([], "--drop N, --spans"),
    "both": (["--drop", 2, "--spans", "2:4"], "--drop N, --spans"),
    "a target and a number": (["--drop", 2, "--target", "90%-size"], "--drop N, --spans"),
    "no target": (["--target", "small"], "--target small is not understood"),
    "drop 0": (["--drop", 0], "--drop"),
    "drop -1": (["--drop", -1], "--drop"),
    "drop two": (["--drop", "two"], "--drop"),
    "one number": (["--spans", "5"], "START:END"),
    "no end": (["--spans", "5:"], "START:END"),
    "no start": (["--spans", ":5"], "START:END"),
    "nothing": (["--spans", ""], "START:END"),
    "comma": (["--spans", "2:4,"], "START:END"),
    "negative": (["--spans=-1:3"], "START:END"),
    "slice": (["--spans", "1:7:2"], "START:END"),
    "words": (["--spans", "a:b"], "START:END"),
    "reversed": (["--spans", "5:3"], "5:3"),
    "empty span": (["--spans", "3:3"], "3:3"),
    "overlap": (["--spans", "3:6,1:4"], "1:4 and 3:6 overlap"),
    "twice": (["--spans", "1:4,1:4"], "overlap"),
    "touch": (["--spans", "1:4,4:5"], "write 1:5"),
    "score": (["--drop", 2, "--score", "cosin"], "cosine, channel-cosine, angular, bi"),
    "fit": (["--drop", 2, "--fit", "linear-patch"], "linearpatch"),
    "structured": (["--drop", 2, "--fit", "least-squares", "--structured"], "one of the two"),
    "rank": (["--drop", 2, "--rank", 0], "--rank"),
    "samples": (["--drop", 2, "--samples", 0], "--samples"),
    "length": (["--drop", 2, "--length", 1], "--length"),
    "batch": (["--drop", 2, "--batch-size", 0], "--batch-size"),
    "dtype": (["--drop", 2, "--dtype", "int8"], "float32, bfloat16, float16"),
    "device": (["--drop", 2, "--device", "gpu"], "cpu, cuda"),
    "absent device": (["--drop", 2, "--device", "cuda:99"], "cuda:99"),
    "unknown flag": (["--drop", 2, "--layers", 2], "--layers"),
    "stray word": (["--drop", 2, "stray"], "stray"),
    "json nowhere": (["--drop", 2, "--json", "/nowhere/figures.json"], "/nowhere"),
    "json directory": (["--drop", 2, "--json", "/"], "directory"),
}


@pytest.mark.parametrize("case", list(PRUNE_FLAGS))
def test_prune_refuses_flags_before_the_model(world: World, run: Run, empty: Path, case: str) -> None:
    flags, says = PRUNE_FLAGS[case]
    assert says in refusal(run("prune", NO_MODEL, *flags, "-o", empty / "out", "--text", world.text))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--drop", LAYERS - 1], "1 to 6"),
        (["--drop", LAYERS], "1 to 6"),
        (["--drop", 10**6], "1 to 6"),
        (["--spans", "6:9"], "6:9"),
        (["--spans", f"0:{LAYERS}"], "keep at least one"),
        (["--spans", "100:200"], "100:200"),
        (["--drop", 2, "--rank", WIDTH + 1], "1 to 48"),
        (["--drop", 2, "--length", CONTEXT + 1], str(CONTEXT)),
        (["--drop", 2, "--samples", 10**5], "too short"),
        (["--drop", 2, "--samples", 10**20], "larger than"),
        (["--drop", 2, "--score", "loss", "--fit", "none", "--rank", WIDTH + 1], "1 to 48"),
        (["--drop", 2, "--fit", "none", "--heldout-text", "short.txt"], "too short"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_what_does_not_fit_the_model_is_refused_before_the_long_work(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], says: str
) -> None:
    (tmp_path / "short.txt").write_text("Much too short.")
    monkeypatch.chdir(tmp_path)
    done = run("prune", world.model, "-o", empty / "out", "--text", world.text, *SMALL, *flags)
    assert says in refusal(done)
    assert done.progress == []


def test_a_gguf_file_tells_its_depth_before_it_is_converted(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    model = gguf_file(tmp_path / "tiny.gguf")
    line = refusal(run("prune", model, "--drop", 9, "-o", empty / "out", "--text", world.text))
    assert "9 of" in line
    assert not (tmp_path / "cache").exists()
