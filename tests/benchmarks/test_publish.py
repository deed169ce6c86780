"""The pages hold what the results say, and a result says where it comes from."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.publish import pages
from benchmarks.publish.pages import ROOT, block, published
from benchmarks.publish.results import RESULTS, Table, load

# Written by tools with a form of their own.
OWN_FORM = ("gpu-", "matrix")
NAMES = [file.stem for file in sorted(RESULTS.glob("*.json")) if not file.stem.startswith(OWN_FORM)]
_RESULTS = ("cpu", "distillation", "gpu", "healing", "merging", "pruning")
PAGES = ["README.md", "docs/engines/README.md", *(f"docs/results/{name}.md" for name in _RESULTS)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_results_say(name: str) -> None:
    page = ROOT / name
    assert pages.pages()[page] == page.read_text(encoding="utf-8"), "run `python -m benchmarks publish`"


def test_every_page_with_a_block_is_known() -> None:
    assert sorted(pages.pages()) == sorted(ROOT / name for name in PAGES)


def test_a_figure_that_was_changed_by_hand_is_put_right() -> None:
    text = (ROOT / "docs" / "results" / "pruning.md").read_text(encoding="utf-8")
    changed = text.replace("3.3714", "3.1", 1)
    assert changed != text
    assert published(changed) == text


def test_a_mark_without_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="to here"):
        published("<!-- published: shrinkage -->\nfigures\n")


def test_a_block_without_a_result_is_refused() -> None:
    with pytest.raises(FileNotFoundError):
        published("<!-- published: nothing-of-the-kind -->\n<!-- to here -->\n")


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_where_it_comes_from(name: str) -> None:
    result = load(name)
    assert result.tables or result.printed
    origin = result.origin()
    assert f"`{result.command}`" in origin
    assert f"commit {result.commit}" in origin
    assert all(re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", commit) for commit in result.commit.split(" and "))


def test_a_result_that_does_not_say_it_is_refused(tmp_path: Path) -> None:
    content = {"command": "make x", "machine": "one", "tables": {"t": {"columns": ["a", "b"], "rows": [["1"]]}}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="commit"):
        load("x", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(content | {"commit": "abc1234"}))
    with pytest.raises(ValueError, match="cells"):
        load("x", tmp_path)


def test_a_row_of_another_commit_shows_it() -> None:
    rows = [["old", "1", "abc1234"], ["new", "2"]]
    lines = pages.shown(Table(["what", "figure"], rows), "def5678").splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])] == [
        ["what", "figure", "commit"],
        ["old", "1", "abc1234"],
        ["new", "2", "def5678"],
    ]
    assert "commit" not in pages.shown(Table(["what", "figure"], [["new", "2"]]), "def5678")


def test_the_matrix_is_published_as_its_tool_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "numpy": "2.3.5"}
    corner = {"versions": versions, "passed": 4321, "failed": 0, "skipped": 7, "commit": "0123456789ab-dirty"}
    monkeypatch.setattr(pages, "measured", lambda _: {"corners": [corner]})
    cells = [cell.strip() for cell in block("matrix").splitlines()[2].split("|")[1:-1]]
    assert cells == [*versions.values(), "4,321", "0", "7", "0123456-dirty"]


def test_what_a_study_records_can_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("benchmarks.studies.shrinkage"))
    monkeypatch.setattr(sys, "argv", ["shrinkage.py", "--drop", "6", "--json", "x.json"])
    record.record(tmp_path / "x.json", {"loss": (("fit", "loss"), [("none", "3.7")])}, note="made up")
    result = load("x", tmp_path)
    assert result.command == "python -m benchmarks.studies.shrinkage --drop 6"
    assert result.commit == record.commit()
    assert result.date is not None
    assert "| none | 3.7  |" in pages.shown(result.table(), result.commit)
    assert "cores, torch" not in result.origin()
    assert "Note: made up." in result.origin()


def test_to_publish_nothing_but_python_is_needed() -> None:
    command = [sys.executable, "-S", "-m", "benchmarks", "publish", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_benchmark_imports_from_the_tests() -> None:
    files = [*(ROOT / "benchmarks").rglob("*.py")]
    assert files
    assert [file for file in files if re.search(r"^\s*(from|import) tests\b", file.read_text(), re.MULTILINE)] == []


@pytest.mark.parametrize(
    "name", ["calibration_overhead", "demo_model", "distillation", "memory", "merging", "shrinkage"]
)
def test_the_commands_that_0_1_0_named_are_found(name: str) -> None:
    found = importlib.util.find_spec(f"benchmarks.{name}")
    assert found is not None
    assert Path(found.origin or "").is_relative_to(ROOT / "benchmarks")
