"""Nothing of a person's is lost to an output, a working directory, a store or a file of figures.

Reports: androguard #768, scilpy #55 and PhaMer #5 (outputs that took with them what people had put beside them).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.pruning.plan import PrunePlan
from tests.support.field import SMALL, linearpatch, save_model, text_file, tiny

QUICK = ["--steps", "2", "--heldout", "2", "--length", "16", "--top-k", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a pruned one and a text; no test changes them."""
    home = tmp_path_factory.mktemp("home")
    save_model(tiny(), home / "dense")
    text_file(home)
    arguments = ["--spans", "2:4", "--fit", "linearpatch", "--text", home / "numbers.txt", *SMALL]
    assert linearpatch("prune", home / "dense", "-o", home / "pruned", *arguments) is None
    return home


def command(verb: str, home: Path, out: Path) -> list[object]:
    text = ["--text", home / "numbers.txt"]
    return {
        "prune": ["prune", home / "dense", "--drop", "2", "--fit", "none", "-o", out, *text, *SMALL],
        "plan": ["prune", home / "dense", "--drop", "2", "--fit", "none", "--plan-only", "-o", out, *text, *SMALL],
        "sweep": ["sweep", home / "dense", "--drop", "1-2", "-o", out, *text, *SMALL],
        "merge": [
            "merge",
            home / "dense",
            "--layers",
            "5",
            "-o",
            out,
            *text,
            "--samples",
            "4",
            *SMALL[2:4],
            *SMALL[6:],
        ],
        "distill": ["distill", home / "pruned", "--teacher", home / "dense", "-o", out, *text, *QUICK],
    }[verb]


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(error: Exception | None, says: str) -> None:
    assert isinstance(error, InputError), error
    assert says in str(error)


VERBS = ("prune", "plan", "sweep", "merge", "distill")


@pytest.mark.parametrize("verb", VERBS)
def test_what_was_put_into_an_output_is_a_reason_to_refuse(home: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # an output as it was written is replaced
        assert linearpatch(*command(verb, home, out)) is None
    (out / "model-Q8_0.gguf").write_text("hours of quantising")
    (out / "notes").mkdir()
    (out / "notes" / "results.json").write_text("{}")
    before = files(tmp_path)
    refused(linearpatch(*command(verb, home, out)), "model-Q8_0.gguf, notes/results.json")
    assert files(tmp_path) == before


def test_weights_that_were_trained_in_place_are_a_persons(home: Path, tmp_path: Path) -> None:
    """The name is on our list, and what it holds is not what we wrote."""
    assert linearpatch(*command("prune", home, tmp_path / "out")) is None
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(linearpatch(*command("prune", home, tmp_path / "out")), "model.safetensors")
    assert weights.read_bytes() == content


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--text", "--heldout-text"])
def test_a_text_inside_the_output(home: Path, tmp_path: Path, verb: str, flag: str) -> None:
    out = tmp_path / "out"
    assert linearpatch(*command(verb, home, out)) is None
    shutil.copy(home / "numbers.txt", out / "mine.txt")
    before = files(tmp_path)
    refused(linearpatch(*command(verb, home, out), flag, out / "mine.txt"), "mine.txt")
    assert files(tmp_path) == before


def test_a_model_is_not_replaced_by_what_is_made_of_it(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "pruned", tmp_path / "pruned")
    before = files(tmp_path)
    text = ["--text", home / "numbers.txt"]
    for arguments in (
        ["prune", tmp_path / "pruned", "--drop", "1", "--fit", "none", *text, *SMALL],
        ["sweep", tmp_path / "pruned", "--drop", "1", *text, *SMALL],
        ["distill", tmp_path / "pruned", "--teacher", home / "dense", *text, *QUICK],
        ["distill", home / "pruned", "--teacher", tmp_path / "pruned", *text, *QUICK],
    ):
        refused(linearpatch(*arguments, "-o", tmp_path / "pruned"), "still needed")
    assert files(tmp_path) == before


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(home: Path) -> list[object]:
    return [
        "evaluate",
        home / "dense",
        "--text",
        home / "numbers.txt",
        "--length",
        "16",
        "--windows",
        "2",
        "--device",
        "cpu",
    ]


@pytest.mark.parametrize("name", ["numbers.txt", "dense/config.json", "dense/tokenizer.json", "notes.md", "link.json"])
def test_figures_take_the_place_of_nothing_but_figures(
    home: Path, tmp_path: Path, evaluate: list[object], name: str
) -> None:
    shutil.copytree(home, tmp_path / "w", dirs_exist_ok=True)
    (tmp_path / "w" / "notes.md").write_text("mine")
    (tmp_path / "w" / "link.json").symlink_to("notes.md")
    before = files(tmp_path)
    arguments = [str(argument).replace(str(home), str(tmp_path / "w")) for argument in evaluate]
    refused(
        linearpatch(*arguments, "--json", tmp_path / "w" / name),
        "no file of linearpatch's" if name != "numbers.txt" else "reads",
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize("verb", [*VERBS, "evaluate", "inspect", "doctor"])
def test_figures_are_written_again_over_those_of_the_same_command(
    home: Path, tmp_path: Path, evaluate: list[object], verb: str
) -> None:
    lone = {"evaluate": evaluate, "inspect": ["inspect", home / "pruned"], "doctor": ["doctor"]}
    arguments = lone.get(verb) or command(verb, home, tmp_path / "out")
    (tmp_path / "f.json").touch()
    for _ in range(2):
        assert linearpatch(*arguments, "--json", tmp_path / "f.json") is None
    assert json.loads((tmp_path / "f.json").read_text())


def test_figures_do_not_go_into_the_output(home: Path, tmp_path: Path) -> None:
    arguments = command("prune", home, tmp_path / "out")
    for name in ("out/config.json", "out/figures.json", "out"):
        refused(linearpatch(*arguments, "--json", tmp_path / name), "inside the output")
    assert linearpatch(*arguments) is None
    refused(linearpatch(*arguments, "--json", tmp_path / "out" / "config.json"), "inside the output")


def test_a_device_that_takes_nothing_is_told_of_up_front(home: Path, tmp_path: Path) -> None:
    refused(
        linearpatch(*command("prune", home, tmp_path / "out"), "--json", "/dev/full"), "/dev/full cannot be written"
    )
    assert os.listdir(tmp_path) == []


# --- unfinished work -------------------------------------------------------------------------------------------------


def test_files_in_a_working_directory_stay(home: Path, tmp_path: Path) -> None:
    for part, name in (("run", "thesis.txt"), ("store", "shard-1.safetensors"), ("run", ".important.tmp")):
        (tmp_path / "out.work" / part).mkdir(parents=True)
        (tmp_path / "out.work" / part / name).write_text("mine")
        refused(linearpatch(*command("distill", home, tmp_path / "out")), name)
        assert (tmp_path / "out.work" / part / name).read_text() == "mine"
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.work")


def test_a_store_that_was_named_is_kept(home: Path, tmp_path: Path) -> None:
    """Also where the working directory of a run lies around it, or another run would have kept its own there."""
    inside, elsewhere = tmp_path / "a.work" / "store", tmp_path / "elsewhere"
    assert linearpatch(*command("distill", home, tmp_path / "a"), "--store", inside) is None
    before = files(inside)
    assert "index.json" in before
    assert linearpatch(*command("distill", home, tmp_path / "a"), "--store", elsewhere) is None
    assert files(inside) == before
    # The very place of a run's own store: used, and not removed.
    assert linearpatch(*command("distill", home, tmp_path / "a")) is None
    assert files(inside) == before
    assert sorted(os.listdir(tmp_path / "a.work")) == ["store"]


def test_a_store_that_the_run_itself_would_remove_is_refused(home: Path, tmp_path: Path) -> None:
    for place in ("out/store", "out.work/run", "out.work/run/store"):
        error = linearpatch(*command("distill", home, tmp_path / "out"), "--store", tmp_path / place)
        refused(error, "which this run replaces")
    assert os.listdir(tmp_path) == []


def test_the_cache_is_no_place_for_an_output(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a converted model lies, a run would replace what the file itself is loaded from."""
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    refused(linearpatch(*command("prune", home, tmp_path / "cache" / "gguf" / "tiny-0123")), "in the cache")


def test_a_store_begins_in_an_empty_directory_only(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hid").mkdir()
    (tmp_path / "hid" / ".important.tmp").write_text("mine")
    refused(
        linearpatch(*command("distill", home, tmp_path / "out"), "--store", tmp_path / "hid"), "is not a teacher store"
    )
    assert files(tmp_path) == {"hid/.important.tmp": b"mine"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert linearpatch(*command("distill", home, tmp_path / "out"), "--store", "") is not None
    assert os.listdir(tmp_path / "here") == []


@pytest.mark.parametrize(("verb", "name"), [("sweep", ".out.statistics"), ("merge", ".out.merges")])
@pytest.mark.parametrize("content", ["mine", None])
def test_what_has_the_name_of_unfinished_work(
    home: Path, tmp_path: Path, verb: str, name: str, content: str | None
) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    refused(linearpatch(*command(verb, home, tmp_path / "out")), name)
    assert os.listdir(tmp_path) == [name]
    assert content is None or (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    "name", [".out.linearpatch-mine", ".out.linearpatch-" + "0" * 32, ".out.json.tmp", ".figures.json.tmp"]
)
def test_what_has_the_name_of_a_draft_stays(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_text("mine")
    for _ in range(2):
        arguments = command("prune", home, tmp_path / "out")
        assert linearpatch(*arguments, "--json", tmp_path / "figures.json") is None
    assert (tmp_path / name / "x").read_text() == "mine"


def test_a_plan_of_somebody_is_not_overwritten(home: Path, tmp_path: Path) -> None:
    plan = PrunePlan.load(home / "pruned")
    (tmp_path / "plan.json").write_text('{"terraform_version": "1.5"}')
    with pytest.raises(InputError, match=r"plan\.json"):
        plan.save(tmp_path)
    assert files(tmp_path) == {"plan.json": b'{"terraform_version": "1.5"}'}
    for _ in range(2):
        plan.save(tmp_path / "new")
    assert sorted(files(tmp_path / "new")) == ["plan.json", "plan.safetensors"]
