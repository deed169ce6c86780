"""A recipe does from Python what its command does: the same files, checks and resumption, and messages that name
arguments where the command names flags."""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels import InputError
from linearpatch_kernels.cli.flags import SETTINGS, in_flags
from linearpatch_kernels.files import MARKER
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.recipes import PruneSettings, Quiet, TasksFailed
from linearpatch_kernels.settings import fields_of
from tests.support.field import linearpatch, save_model, text_file, tiny
from tests.support.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"samples": 6, "length": 16, "rank": 4, "device": "cpu"}
# What the time of a run gets into.
TIMED = re.compile(r"report\.md|summary\.json|sweep\.json|log\.jsonl|" + re.escape(MARKER))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the model pruned."""
    folder = tmp_path_factory.mktemp("recipes")
    save_model(tiny(), folder / "dense")
    text_file(folder, 5000)
    lp.prune(folder / "dense", output=folder / "pruned", spans="2:4", fit="low-rank", text=numbers(folder), **SMALL)
    return folder


def numbers(folder: Path) -> Path:
    return folder / "numbers.txt"


def flags(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("dense", {"drop": 2, "fit": "auto", **SMALL}),
    "merge": ("dense", {"layers": 4, **SMALL}),
    "sweep": ("dense", {"drop": "1-2", "fits": "none,low-rank", "windows": 2, **SMALL}),
    "distill": ("pruned", {"steps": 4, "length": 16, "heldout": 2, "top_k": 8, "device": "cpu"}),
}


@pytest.mark.parametrize("name", CASES)
def test_python_writes_what_the_command_writes(name: str, place: Path, tmp_path: Path) -> None:
    source, settings = CASES[name]
    settings = settings | {"text": numbers(place)} | ({"teacher": place / "dense"} if name == "distill" else {})
    recipe = getattr(lp.recipes, name)
    with warnings.catch_warnings(action="ignore"):
        result = recipe(place / source, output=tmp_path / "python", **settings)
    assert linearpatch(name, place / source, "-o", tmp_path / "command", *flags(settings)) is None
    python, command = content(tmp_path / "python"), content(tmp_path / "command")
    assert python == command
    assert len(python) > (2 if name == "sweep" else 6)
    assert result.output == tmp_path / "python"
    summary = "sweep.json" if name == "sweep" else "linearpatch/summary.json"
    # As JSON has it.
    assert json.loads((tmp_path / "python" / summary).read_text()) == json.loads(json.dumps(result.summary))


def content(directory: Path) -> dict[str, Any]:
    """File -> what it holds: its bytes, or its words where it tells how long things took."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = file.relative_to(directory).as_posix()
        if not TIMED.fullmatch(file.name):
            found[name] = file.read_bytes()
        elif file.name == MARKER:
            found[name] = sorted(json.loads(file.read_text())["files"])
        elif file.suffix == ".md":
            found[name] = re.sub(r"Training: \d+ s", "", file.read_text().split("\n## Time")[0])
        else:
            found[name] = [untimed(json.loads(line)) for line in json_texts(file)]
    return found


def json_texts(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if not re.search("second", key)}
    return value


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What a caller would see of a change: weights, modes, hooks, what is trained, what stands on the modules."""
    parts = {
        name: (part.training, len(part._forward_pre_hooks), len(part._forward_hooks), sorted(vars(part)), id(part))
        for name, part in model.named_modules()
    }
    weights = {
        name: (id(one), one.requires_grad, one.grad, one.detach().numpy().tobytes())
        for name, one in model.named_parameters()
    }
    described = [json.dumps(one.to_dict(), default=str) for one in (model.config, model.generation_config)]
    return {"parts": parts, "weights": weights, "described": described}


@pytest.fixture(scope="module")
def dropping(place: Path) -> Path:
    """A model that computes otherwise in training, with terms in its directory."""
    folder = save_model(tiny(attention_dropout=0.5), place / "dropping")
    (folder / "LICENSE").write_text("terms")
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("prune", {"drop": 2, "fit": "auto"}),
        ("prune", {"spans": "2:4", "heal": "refit"}),
        ("merge", {"layers": 4}),
        ("sweep", {"drop": "1-2", "fits": "none,low-rank", "windows": 2}),
    ],
    ids=["prune", "refit", "merge", "sweep"],
)
def test_a_loaded_model_gives_what_its_directory_gives(
    name: str, settings: dict[str, Any], dropping: Path, place: Path, tmp_path: Path
) -> None:
    settings = {**SMALL, **settings, "text": numbers(place)}
    del settings["device"]
    recipe = getattr(lp, name)
    model, tokenizer = load_model(dropping, device="cpu")
    # In every mode that somebody may have left it in.
    model.train()
    model.model.layers[1].eval()
    before = state(model)
    with warnings.catch_warnings(action="ignore"):
        recipe(dropping, output=tmp_path / "named", device="cpu", **settings)
        recipe(model, tokenizer=tokenizer, output=tmp_path / "loaded", **settings)
    found = content(tmp_path / "loaded")
    assert found == content(tmp_path / "named")
    assert name == "sweep" or found["LICENSE"] == b"terms"
    assert state(model) == before


def test_a_loaded_model_is_measured(dropping: Path, place: Path) -> None:
    settings: dict[str, Any] = {"text": numbers(place), "length": 16, "windows": 4, "teacher": place / "dense"}
    model, tokenizer = load_model(dropping, device="cpu")
    before = state(model.train())
    measured = lp.evaluate(model, tokenizer=tokenizer, **settings)
    assert measured.summary == lp.evaluate(dropping, device="cpu", **settings).summary
    assert [row.name for row in measured.models] == ["dropping", "teacher"]
    assert state(model) == before


def test_a_model_made_in_memory_is_pruned(place: Path, tmp_path: Path) -> None:
    """It has no directory: neither a name nor companions."""
    model, tokenizer = tiny(), load_model(place / "dense", device="cpu")[1]
    with warnings.catch_warnings(action="ignore"):
        lp.prune(
            model,
            tokenizer=tokenizer,
            output=tmp_path / "out",
            spans="2:4",
            fit="low-rank",
            text=numbers(place),
            **{name: value for name, value in SMALL.items() if name != "device"},
        )
    report = (tmp_path / "out" / "linearpatch" / "report" / "report.md").read_text()
    assert report.startswith("# LlamaForCausalLM: 6 layers to 4\n")
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (place / "pruned" / weights).read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokenizer": None}, "`tokenizer` is missing: give the model's tokenizer with the LlamaForCausalLM"),
        ({"tokenizer": "dense"}, "`tokenizer` is a str: give the model's tokenizer with the LlamaForCausalLM"),
        ({"tokenizer": tiny_tokenizer(99)}, "has 99 tokens and the model 97 embeddings: it belongs to another model"),
        ({"dtype": "bfloat16"}, "`dtype` says how a model is to be loaded, and this one is loaded: leave it out"),
        ({"device": "cpu"}, "`device` says how a model is to be loaded, and this one is loaded: leave it out"),
        ({"model": tiny().model}, "a LlamaModel gives no logits over tokens: give the LlamaForCausalLM"),
        ({"model": torch.nn.Linear(2, 2)}, "a Linear is no model of Transformers: merge or unload the wrapper first"),
        ({"model": "dense"}, "`tokenizer` goes with a loaded model, and dense has its own: leave it out"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_what_a_loaded_model_needs(given: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    what = {"model": tiny(), "tokenizer": tiny_tokenizer(97), **given}
    model, output = what.pop("model"), tmp_path / "out"
    for recipe, settings in ((lp.prune, {"drop": 2}), (lp.merge, {"layers": 4}), (lp.sweep, {"drop": 1})):
        with pytest.raises(InputError, match=re.escape(words)):
            recipe(model, text=numbers(place), output=output, **settings, **what)
    with pytest.raises(InputError, match=re.escape(words)):
        lp.evaluate(model, text=numbers(place), **what)
    assert not output.exists()


def test_a_loaded_model_that_cannot_be_cut_is_refused_before_any_pass(place: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(place / "dense", device="cpu")
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    model.hf_quantizer = object()
    common: dict[str, Any] = {"tokenizer": tokenizer, "text": numbers(place)}
    with pytest.raises(InputError, match="quantised model cannot be cut"):
        lp.prune(model, output=tmp_path / "out", drop=2, **common)


def test_a_loaded_model_is_not_replaced_on_the_disk(place: Path) -> None:
    model, tokenizer = load_model(place / "pruned", device="cpu")
    with pytest.raises(InputError, match="pruned, which is still needed"):
        lp.prune(model, tokenizer=tokenizer, output=place / "pruned", drop=1, text=numbers(place))


def test_settings_as_an_object_and_by_name(place: Path, tmp_path: Path) -> None:
    settings = PruneSettings(output=tmp_path / "object", spans="2:4", fit="none", text=numbers(place), **SMALL)
    with warnings.catch_warnings(action="ignore"):
        lp.prune(place / "dense", settings)
        lp.prune(place / "dense", settings, output=tmp_path / "named", spans=[lp.Span(2, 4)])
    assert content(tmp_path / "object") == content(tmp_path / "named")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"outptu": "x"}, "did you mean 'output'"),
        ({"output": "x", "heldout": "y"}, "did you mean 'heldout_text'"),
        ({"output": "x", "zzzzzz": "y"}, "PruneSettings has no 'zzzzzz'"),
        ({"drop": 2}, "output"),
    ],
)
def test_a_name_that_is_wrong(named: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        lp.prune("nowhere", **named)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"samples": 0}, "`samples` must be at least 1, not 0"),
        ({"samples": 1 << 64}, "`samples` .* is larger than it can be"),
        ({"samples": 2.5}, "`samples` must be of the type int, not 2.5"),
        ({"plan_only": 1}, "`plan_only` must be of the type bool, not 1"),
        ({"output": " "}, "a path that was given is empty"),
        ({"score": None}, "`score` must be of the type str, not None"),
    ],
)
def test_a_value_that_makes_no_sense(named: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        lp.prune("nowhere", **{"output": "x", "drop": 2, **named})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("prune", {}, "one of `drop` N, `spans` START:END and `target` RATIO"),
        ("prune", {"drop": 2, "fit": "least-squares", "structured": True}, "`structured` leaves dense maps out"),
        ("prune", {"drop": 2, "dtype": "int8"}, "`dtype` int8 is not known"),
        ("merge", {"layers": 4, "heal": "magic"}, "`heal` magic is no way to heal"),
        ("merge", {"layers": 4, "samples": 1}, "`samples` 1 is too few for a refit"),
        ("sweep", {"drop": "3-1"}, "`drop` 3-1 is an empty range"),
        ("distill", {"teacher": "dense", "loss": "topk", "top_k": 1}, "a larger `top_k`, or another `loss`"),
        ("distill", {"teacher": "dense", "learning_rate": 0.0}, "`learning_rate` must be positive"),
        ("distill", {"teacher": "dense", "layer_error": "odd"}, "`layer_error` odd is not known"),
    ],
)
def test_python_reads_arguments_and_the_command_flags(
    name: str, settings: dict[str, Any], words: str, place: Path, tmp_path: Path
) -> None:
    settings = settings | {"text": numbers(place)}
    source = place / ("pruned" if name == "distill" else "dense")
    with pytest.raises(InputError) as error:
        getattr(lp.recipes, name)(source, output=tmp_path / "out", **settings)
    assert words in str(error.value)
    assert "--" not in str(error.value)
    given = [part for part in flags(settings) if part != "True"]
    refused = linearpatch(name, source, "-o", tmp_path / "out", *given)
    assert isinstance(refused, InputError)
    assert str(refused) == in_flags(str(error.value))
    assert "--" in str(refused)
    assert "`" not in str(refused)


def test_a_name_has_one_flag() -> None:
    named = {(field.name, field.flags[0]) for settings in SETTINGS for field in fields_of(settings)}
    assert len({name for name, _ in named}) == len(named)


def test_no_message_below_the_command_names_a_flag() -> None:
    """But those of other tools: a plug-in speaks to who started its engine, with the engine's flags."""
    package = ROOT / "linearpatch_kernels"
    found = []
    for file in sorted(package.rglob("*.py")):
        if {"cli", "engines"} & set(file.relative_to(package).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                words = ast.unparse(node)
                if re.search(r"(?<![\w-])--[a-z]", words) and not re.search("pip install|llama-gguf-split", words):
                    found.append(f"{file.name}:{node.lineno}")
    assert found == []


def test_a_recipe_is_quiet_and_its_notes_are_warnings(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    with pytest.warns(UserWarning, match="windows of 16 tokens are little text for low-rank .*`samples`"):
        lp.prune(
            place / "dense", output=tmp_path / "out", drop=2, fit="low-rank", text=numbers(place), **SMALL | {"rank": 2}
        )
    assert capfd.readouterr() == ("", "")


class _Killed(Exception):
    pass


class _Killer(Quiet):
    """Kills the run at the beginning of this work, and keeps what is mentioned."""

    def __init__(self, at: str = "") -> None:
        self.mentioned: list[str] = []
        self.seen: list[str] = []
        self._at = at

    def progress(self, description: str, done: int, total: int, detail: str = "") -> None:
        self.seen.append(description)
        if description == self._at:
            raise _Killed

    def note(self, note: str) -> None:
        pass

    def mention(self, line: str) -> None:
        self.mentioned.append(line)


def test_a_killed_sweep_goes_on_from_its_calibration(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**CASES["sweep"][1], "text": numbers(place), "output": tmp_path / "out"}
    with pytest.raises(_Killed):
        lp.sweep(place / "dense", reporter=_Killer("evaluating the sweep"), **settings)
    again = _Killer()
    result = lp.sweep(place / "dense", reporter=again, **settings)
    assert again.mentioned == ["going on from the calibration of a sweep that did not finish"]
    assert "calibrating" not in again.seen
    assert [point.drop for point in result.points] == [1, 1, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_measured_when_the_tasks_fail(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> object:
        raise InputError("no questions")

    module = sys.modules["linearpatch_kernels.recipes.evaluate"]
    monkeypatch.setattr(module, "evaluate_tasks", fails)
    monkeypatch.setattr(module, "check_tasks", lambda _: None)
    with pytest.raises(TasksFailed, match="no questions") as error:
        lp.evaluate(place / "pruned", text=numbers(place), length=16, windows=4, device="cpu", tasks=["piqa"])
    measured = lp.evaluate(place / "pruned", text=numbers(place), length=16, windows=4, device="cpu")
    assert error.value.evaluation.summary == measured.summary
    assert measured.summary["windows"] == 4
