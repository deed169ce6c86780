"""A person's words in reports and pictures: letters, whatever markup they look like; and a report costs no result."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure

from linearpatch_kernels.cli import console
from linearpatch_kernels.evaluation import Quality
from linearpatch_kernels.files import record
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.report import page, plots, pruning
from linearpatch_kernels.report.page import CandidateRow, QualityRow, ReportData, SpanRow, draw_report, write_report
from linearpatch_kernels.report.plots import plot_depth_cosine, plot_joint_magnitudes, plot_sweep, plot_training
from linearpatch_kernels.report.tables import Table
from tests.support.field import SMALL, linearpatch, save_model, text_file, tiny

NAMES = [
    "run $a^$ v1",
    "$\\frac$",
    "50% | of $x$",
    "a `code` name",
    "``two``",
    "*stars* __under__ ~~gone~~",
    "[link](http://x.y) ![image](z)",
    "[reference][x] [x]: y",
    "[x] task",
    "<b>bold</b> <script>alert(1)</script> <!-- c -->",
    "a & b &amp; c &#36;",
    "# heading #",
    "1. one",
    "- item",
    "+ plus",
    "> quote",
    "---",
    "back\\slash \\| pipe\\",
    "http://example.org/a_b_c www.example.org",
    "_starts_ with one",
    "模型 モデル نموذج 🙂",
]
ODD = ["two\nlines", "tab\tand\rreturn", "\x1b[31mred", "not utf-8 \udcff\udc80", "x" * 250, " "]
QUALITY = Quality(20.0, 3.0, 0.1, 0.5, 0.25, 100)


def parsed(text: str) -> list[Token]:
    """Every token of a report as a reader of Markdown with tables sees it, from the outside in."""

    def inside(tokens: list[Token]) -> Iterator[Token]:
        for token in tokens:
            yield token
            yield from inside(token.children or [])

    return list(inside(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)))


def words(tokens: list[Token]) -> set[str]:
    """What a person reads, a paragraph or cell each."""
    return {
        "".join(child.content if child.type != "softbreak" else " " for child in token.children or [])
        for token in tokens
        if token.type == "inline"
    }


def report_about(name: str) -> ReportData:
    """A report with a person's words in every place."""
    return ReportData(
        title=name,
        notes=[name],
        steps=[name],
        quality=[QualityRow(name, 2, QUALITY), QualityRow(f"{name} ", 2, QUALITY)],
        quality_text=name,
        dense=name,
        dropped=f"{name} ",
        candidates=[CandidateRow("1:2", name, 1.0, 2, True)],
        spans=[SpanRow("1:2", name, None, name)],
        sweep={name: {1: 2.0}},
        tasks={name: {name: {"acc": 0.5, "n": 1}}},
        plots={"c.png": name},
        timings={name: 1.0},
        files={name: name},
        usage=f"load({json.dumps(name)})  # ```",
        sample_prompt=name,
        sample=f"{name}\n{name}\n\n{name}",
    )


@pytest.mark.parametrize("name", NAMES)
def test_words_in_a_report_are_letters(tmp_path: Path, name: str) -> None:
    """matplotlib #20266, binwalk #12: dollar signs in a model's name; here every markup that GitHub reads."""
    text = write_report(tmp_path, report_about(name)).read_text(encoding="utf-8")
    tokens = parsed(text)
    kinds = {token.type for token in tokens}
    assert not kinds & {"link_open", "html_inline", "html_block", "s_open", "code_block", "hr"}
    # Emphasis that the report makes itself: the caption below a picture, the arrow of the sample.
    assert sum(token.type in ("em_open", "strong_open") for token in tokens) == 2
    assert sum(token.type == "image" for token in tokens) == 1
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h1", "h2"}
    found = words(tokens)
    shown = " ".join(name.split())
    (image,) = (token for token in tokens if token.type == "image")
    assert image.content.replace("\\", "") == shown.replace("\\", "")
    # As title, note, step, caption, cell of every table.
    assert shown in found
    assert f"{shown} ⟶ {shown} {shown}" in found
    assert f"Measured on {shown}, 100 predicted tokens. Top-1 agreement" in " ".join(found)
    assert sum(token.type == "th_open" for token in tokens) == 6 + 2 + 3 + 4 + 5 + 2 + 2
    (fence,) = (token for token in tokens if token.type == "fence")
    assert fence.content == f"load({json.dumps(name)})  # ```\n"


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_letter_stays_out_of_a_report(tmp_path: Path, name: str) -> None:
    text = write_report(tmp_path, report_about(name)).read_text(encoding="utf-8")
    assert not any(character in text for character in "\x1b\t\r")
    assert {token.tag for token in parsed(text) if token.type == "heading_open"} <= {"h1", "h2"}
    assert sum(line.startswith("| ---") for line in text.splitlines()) == 7


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def pictures(name: str) -> dict[str, Callable[[Path], None]]:
    one = torch.ones(4)
    return {
        "cosine": lambda path: plot_depth_cosine(path, torch.eye(4), [(1, 2)], name),
        "magnitudes": lambda path: plot_joint_magnitudes(path, one, one, one, (1, 2), name),
        "sweep": lambda path: plot_sweep(path, {name: {1: 2.0, 2: 3.0}}, 1.0, name),
        "training": lambda path: plot_training(path, [1.0, 2.0], {name: {0: 1.0}}, 0, name),
    }


@pytest.mark.parametrize("name", ["run $a^$ v1", "_$x$", "模型", "not utf-8 \udcff", "two\nlines", "x" * 250])
@pytest.mark.parametrize("picture", ["cosine", "magnitudes", "sweep", "training"])
def test_words_in_a_picture_are_letters(
    tmp_path: Path, drawn: list[Figure], capfd: pytest.CaptureFixture[str], name: str, picture: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures(name)[picture](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr() == ("", "")
    axes = drawn[0].axes[0]
    texts = [axes.title, *axes.get_legend().get_texts()]
    letters = " ".join(name.encode("utf-8", "replace").decode().split())
    assert letters[:60] in "\n".join(text.get_text() for text in texts)
    assert not any(text.get_parse_math() for text in texts)


def test_a_person_s_settings_of_matplotlib(tmp_path: Path) -> None:
    """They may ask for LaTeX, which is not there and reads names its own way; afterwards they are as they were."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        plot_sweep(tmp_path / "s.png", {"50% #1_a": {1: 2.0}}, 1.0, "50% #1_a")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "s.png").exists()


@pytest.mark.parametrize("values", [[math.inf], [math.nan, math.inf], [1e300, 1e-300], [0.0], []])
def test_figures_that_are_not_finite_are_drawn_around(tmp_path: Path, values: list[float]) -> None:
    plot_sweep(tmp_path / "s.png", {"none": dict(enumerate(values))}, None)
    assert (tmp_path / "s.png").exists()


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """A shared cluster: no directory for matplotlib's settings. Nothing is said, and nothing of the user's changed."""
    code = (
        "import sys, torch\n"
        "from linearpatch_kernels.report.plots import plot_depth_cosine\n"
        "plot_depth_cosine(sys.argv[1], torch.eye(4), [(1, 2)], '模型')\n"
    )
    (tmp_path / "file").write_text("no directory")
    place = str(tmp_path / "file" / "inside")
    environment = {**os.environ, "MPLCONFIGDIR": place, "XDG_CONFIG_HOME": place, "XDG_CACHE_HOME": place}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c.png"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "c.png").exists()


def test_words_on_a_terminal_are_letters(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a directory that somebody else made, for example, which `inspect` shows."""
    console.print_table(Table(["[red]c :x:"], [["[i]r\x1b]0;r\x07"]], "[bold]t[/] \x1b[2Jt"))
    console.print_error("[bold]e \x1b[31m")
    console.Terminal().note("n\x1b[1A")
    console.problems.print("p\x9b1m")
    out, err = capsys.readouterr()
    assert out.split()[:2] == ["[bold]t[/]", "\ufffd[2Jt"]
    assert "[red]c :x:" in out
    assert "[i]r\ufffd]0;r\ufffd" in out
    assert err == "error: [bold]e \ufffd[31m\nnote: n\ufffd[1A\np\ufffd1m\n"


# --- a report costs no result ----------------------------------------------------------------------------------------


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such font\nsecond line")


def test_a_picture_that_fails_is_left_out_with_a_note() -> None:
    told: list[str] = []
    files = draw_report(ReportData("t"), {"a.png": ("A", failing), "b.png": ("B", pictures("x")["sweep"])}, told.append)
    assert sorted(files) == ["b.png", "report.md"]
    assert told == ["the picture a.png is left out: RuntimeError, no such font"]
    assert told[0] in files["report.md"].decode()
    assert "](a.png)" not in files["report.md"].decode()


def test_a_section_that_fails_is_left_out_with_a_note(tmp_path: Path) -> None:
    told: list[str] = []
    broken: Any = [QualityRow("dense", 2, None)]  # type: ignore[arg-type]  # what must not break the page
    text = write_report(tmp_path, ReportData("t", quality=broken, usage="load()"), told.append).read_text()
    assert "## Quality" not in text
    assert "load()" in text
    assert "section “Quality” of the report is left out" in told[0]
    assert told[0] in text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    save_model(tiny(), folder / "run $a^$ v1")
    text_file(folder, name="price $5^$ | list.txt")
    return folder


def arguments(place: Path, command: str, output: Path) -> list[Any]:
    what = {"prune": ["--drop", 2], "sweep": ["--drop", "1-2"], "merge": ["--layers", 5]}[command]
    small = ["--samples", 4, "--length", 16, "--device", "cpu"] if command == "merge" else SMALL
    text = place / "price $5^$ | list.txt"
    return [command, place / "run $a^$ v1", *what, "-o", output, "--text", text, *small]


def report_of(output: Path) -> str:
    (file,) = output.rglob("report.md")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["prune", "sweep", "merge"])
def test_dollar_signs_in_the_names_of_a_run(place: Path, tmp_path: Path, command: str) -> None:
    assert linearpatch(*arguments(place, command, tmp_path / "out")) is None
    found = " ".join(words(parsed(report_of(tmp_path / "out"))))
    assert "run $a^$ v1" in found
    assert "price $5^$ | list.txt" in found
    assert record(tmp_path / "out", "report").exists() == (command != "sweep")


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("prune", pruning, "plot_depth_cosine"),
        ("prune", pruning, "joint_magnitudes"),
        ("prune", pruning, "draw_report"),
        ("prune", plots, "_figure"),
        ("sweep", pruning, "plot_sweep"),
        ("sweep", pruning, "draw_report"),
        ("merge", page, "draw_report"),
        ("merge", Table, "markdown"),
    ],
)
def test_a_report_that_cannot_be_drawn_costs_no_result(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    module: Any,
    name: str,
) -> None:
    """Whatever fails, after all the work: t12 died of a title."""
    monkeypatch.setattr(module, name, failing)
    assert linearpatch(*arguments(place, command, tmp_path / "out")) is None
    said = capsys.readouterr().err
    assert "left out: RuntimeError, no such font" in said
    if command == "sweep":
        assert len(json.loads(next((tmp_path / "out").rglob("sweep.json")).read_text())["points"]) == 8
    else:
        model, _ = load_model(tmp_path / "out", device="cpu")
        assert len(model.get_decoder().layers) == (4 if command == "prune" else 5)
    if name != "draw_report":
        assert "left out: RuntimeError, no such font" in report_of(tmp_path / "out")
