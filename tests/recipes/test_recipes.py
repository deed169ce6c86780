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

import linearpatch_kernels as lp
from linearpatch_kernels import InputError
from linearpatch_kernels.cli.flags import SETTINGS, in_flags
from linearpatch_kernels.files import MARKER
from linearpatch_kernels.recipes import PruneSettings, Quiet, TasksFailed
from linearpatch_kernels.settings import fields_of
from tests.support.field import linearpatch, save_model, text_file, tiny

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
        ("prune", {}, "either `drop` N or `spans` START:END"),
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
    """But those of other tools."""
    package = ROOT / "linearpatch_kernels"
    found = []
    for file in sorted(package.rglob("*.py")):
        if "cli" in file.relative_to(package).parts:
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
