"""``linearpatch evaluate`` from outside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.command import (
    CONTEXT,
    NO_MODEL,
    VOCABULARY,
    Run,
    World,
    prose,
    refusal,
    tiny_llama,
    trained_tokenizer,
    with_nan,
)


def test_evaluate_against_a_teacher(world: World, run: Run, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--teacher", world.model, "--text", world.text, "--length", 24, "--windows", 10, "--json", figures]
    done = run("evaluate", world.pruned, *arguments)
    assert done.status == 0
    assert done.errors == []
    summary = json.loads(figures.read_text())
    assert summary["tasks"] == {}
    assert summary["windows"] == 10
    assert 0 < summary["top1_agreement"] < 1
    assert summary["kl"] > 0
    assert f"{100 * summary['top1_agreement']:.1f} %" in done.stdout
    alone = run("evaluate", world.model, "--text", world.text, "--length", 24, "--windows", 10, "--json", "-")
    dense = json.loads(alone.stdout)
    assert dense["perplexity"] == pytest.approx(summary["teacher_perplexity"], rel=1e-6)
    assert dense["top1_agreement"] is None
    assert dense["tasks"] == {}


def test_evaluate_compares_a_model_with_itself(world: World, run: Run) -> None:
    arguments = ["--teacher", world.model, "--text", world.text, "--length", 24, "--windows", 3, "--json", "-"]
    summary = json.loads(run("evaluate", world.model, *arguments).stdout)
    assert summary["top1_agreement"] == 1
    assert summary["kl"] == pytest.approx(0, abs=1e-6)


def test_evaluate_takes_the_whole_text_where_asked(world: World, run: Run) -> None:
    some = json.loads(run("evaluate", world.model, "--text", world.text, "--length", 24, "--json", "-").stdout)
    arguments = ["--text", world.text, "--length", 24, "--windows", 0, "--batch-size", 16, "--json", "-"]
    whole = json.loads(run("evaluate", world.model, *arguments).stdout)
    assert some["windows"] == 32
    tokens = len(AutoTokenizer.from_pretrained(world.model)(world.text.read_text(), verbose=False).input_ids)
    assert whole["windows"] == tokens // 24
    assert whole["tokens"] == whole["windows"] * 23


def test_evaluate_measures_speed(world: World, run: Run) -> None:
    arguments = ["--text", world.text, "--length", 24, "--windows", 2, "--speed", "--json", "-"]
    summary = json.loads(run("evaluate", world.pruned, *arguments).stdout)
    assert len(summary["speed"]) == 1
    assert all(one["decode_tokens_per_second"] > 0 for one in summary["speed"].values())


@pytest.mark.demo
def test_evaluate_asks_questions(world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--text", world.text, "--length", 24, "--windows", 2, "--tasks", "copa", "--limit", 4]
    done = run("evaluate", world.pruned, *arguments, "--json", "-")
    assert done.status == 0
    summary = json.loads(done.stdout)
    assert summary["tasks"]["copa"]["n"] == 4
    assert summary["tasks"]["copa"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    assert "Zero-shot accuracy" in done.stderr
    assert [line for line in done.progress if line.startswith("copa")] == ["copa: 8/8"]
    assert run("evaluate", world.pruned, *arguments).errors == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--windows", -1], "--windows"),
        (["--length", 1], "--length"),
        (["--limit", 0], "--limit"),
        (["--limit", 5], "--tasks"),
        (["--tasks", ","], "task"),
        (["--json", "/nowhere/figures.json"], "/nowhere"),
        (["--json", "/dev"], "directory"),
        (["--device", "gpu"], "cpu, cuda"),
        (["--dtype", "int8"], "float32"),
    ],
)
def test_evaluate_refuses_flags_before_the_model(world: World, run: Run, flags: list[object], says: str) -> None:
    assert says in refusal(run("evaluate", NO_MODEL, *flags, "--text", world.text))


@pytest.mark.usefixtures("no_weights")
def test_evaluate_refuses_what_does_not_fit(world: World, run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Ban bara.")
    assert "too short" in refusal(run("evaluate", world.model, "--text", short, "--length", 24))
    long = run("evaluate", world.model, "--text", world.text, "--length", CONTEXT + 1)
    assert str(CONTEXT) in refusal(long)
    assert long.progress == []


@pytest.mark.usefixtures("no_weights")
def test_a_teacher_of_another_family_is_refused(world: World, run: Run, tmp_path: Path) -> None:
    arguments = ["--text", world.text, "--length", 24]
    tiny_llama(300, seed=1).save_pretrained(tmp_path / "other tokenizer")
    trained_tokenizer(prose(500, seed=3), 300).save_pretrained(tmp_path / "other tokenizer")
    line = refusal(run("evaluate", world.model, "--teacher", tmp_path / "other tokenizer", *arguments))
    assert "tokenizer" in line
    tiny_llama(VOCABULARY + 16, seed=1).save_pretrained(tmp_path / "more rows")
    for file in world.model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "more rows")
    done = run("evaluate", world.model, "--teacher", tmp_path / "more rows", *arguments)
    assert "vocabular" in refusal(done)
    assert done.progress == []
    assert "does not exist" in refusal(run("evaluate", world.model, "--teacher", NO_MODEL, *arguments))


def test_evaluate_notices_a_nan(world: World, run: Run, tmp_path: Path) -> None:
    model = with_nan("model.layers.4.mlp.down_proj.weight")(world, tmp_path / "given")
    assert "not finite" in refusal(run("evaluate", model, "--text", world.text, "--length", 24))
