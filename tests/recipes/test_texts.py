"""The texts of a run: files, presets, several of either."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.recipes import inputs
from linearpatch_kernels.recipes.inputs import Mixture, make_windows, read_texts
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.settings import BOOLQ, MIX, PruneSettings
from tests.support.field import linearpatch, save_model, text_file, tiny
from tests.support.tiny import tiny_tokenizer

KINDS = {"prose": ["a b c d e f g h"] * 40, "code": ["x y x y x y x y"] * 40}


@pytest.fixture(autouse=True)
def demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds in place of the demo's mix, and a document of which one run of eight words is in the report's text."""
    monkeypatch.setattr(inputs, "demo_mix", lambda: {**KINDS, "shared": ["s " * 7 + "s t", "u v"]})
    monkeypatch.setattr(inputs, "MIX_SHARES", {"prose": 3, "code": 1, "shared": 2})
    monkeypatch.setattr(inputs, "demo_text", lambda name: ["s " * 9] if name == "heldout" else [f"{name} text"])


def test_the_mix_is_the_default_and_keeps_clear_of_the_report() -> None:
    texts = read_texts()
    assert texts == read_texts([Path(MIX)])
    assert isinstance(texts.calibration, Mixture)
    assert texts.calibration.texts == {**KINDS, "shared": ["u v"]}
    assert texts.report == ["s " * 9]
    assert read_texts([Path(BOOLQ)]).calibration == ["calibration text"]


def test_a_text_of_the_persons_own_for_the_report_is_kept_clear_of_too(tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    report.write_text("a b c d e f g h")
    texts = read_texts(None, report)
    assert isinstance(texts.calibration, Mixture)
    assert texts.calibration.texts["prose"] == []
    assert (texts.report, texts.report_source) == ("a b c d e f g h", "report.txt")


def test_several_texts_have_equal_shares_and_the_report_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one " * 400)
    texts = read_texts([tmp_path / "one.txt", Path(MIX)])
    assert isinstance(texts.calibration, Mixture)
    assert texts.calibration.weights == {"one.txt": 1.0, "prose": 1 / 2, "code": 1 / 6, "shared": 1 / 3}
    assert texts.report is None
    assert (texts.source, texts.report_source) == (
        "one.txt, many kinds of text",
        "unused parts of one.txt, many kinds of text",
    )


def test_windows_are_in_the_texts_shares(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in (5, 6, 7)]
    for file in files:
        file.write_text(f"{file.stem} " * 2000)
    settings = PruneSettings(output=tmp_path / "out", drop=1, samples=18, length=10)
    windows = make_windows(tiny(), tiny_tokenizer(), read_texts(files), settings, Log(None), heldout=6, report=3)
    assert windows.heldout is not None
    assert windows.evaluation is not None
    for share, each in ((windows.fit, 6), (windows.heldout, 2), (windows.evaluation, 1)):
        assert [*Counter(map(tuple, share.tolist())).values()] == [each] * 3


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(folder)
    texts = read_texts([tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"])
    assert isinstance(texts.calibration, Mixture)
    assert [*texts.calibration.texts.values()] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ([MIX, MIX], "`text` preset:mix is given twice"),
        (["preset:moby"], "`text` preset:moby is no preset: give preset:mix or preset:boolq, self, or a file"),
        ([MIX, "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_what_is_refused(text: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_texts([Path(one) for one in text])


def test_the_command_takes_several(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "dense")
    one = text_file(tmp_path, 4000)
    other = tmp_path / "other.txt"
    other.write_text(one.read_text()[::-1])
    small: tuple[Any, ...] = ("--samples", 6, "--length", 16, "--device", "cpu", "--fit", "linearpatch")
    for name, texts in (("one", [one]), ("both", [one, other])):
        given = [part for text in texts for part in ("--text", text)]
        assert linearpatch("prune", tmp_path / "dense", "--spans", "2:4", "-o", tmp_path / name, *small, *given) is None
    plans = [(tmp_path / name / "linearpatch" / "plan.json").read_text() for name in ("one", "both")]
    assert '"source": "numbers.txt"' in plans[0]
    assert '"source": "numbers.txt, other.txt"' in plans[1]


@pytest.mark.parametrize("recipe", ["prune", "merge", "sweep", "distill"])
def test_the_model_writes_a_share_of_the_text(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    save_model(tiny(), tmp_path / "dense")
    text_file(tmp_path, 4000)
    asked: list[tuple[int, int]] = []
    real = inputs.written_documents

    def watched(model: Any, tokenizer: Any, tokens: int, length: int, **named: Any) -> list[str]:
        asked.append((tokens, length))
        return real(model, tokenizer, tokens, length, **named)

    monkeypatch.setattr(inputs, "written_documents", watched)
    own: tuple[Any, ...] = ("--text", "self", "--text", tmp_path / "numbers.txt", "--length", 16, "--device", "cpu")
    given: dict[str, tuple[Any, ...]] = {
        "prune": (tmp_path / "dense", "--spans", "2:4", "--samples", 6, "--fit", "linearpatch"),
        "merge": (tmp_path / "dense", "--layers", 4, "--samples", 6, "--heal", "none"),
        "sweep": (tmp_path / "dense", "--drop", "1-2", "--fits", "none", "--samples", 6, "--windows", 2),
        "distill": (tmp_path / "cut", "--teacher", tmp_path / "dense", "--steps", 2, "--batch-size", 2, "--heldout", 2),
    }
    if recipe == "distill":
        cut = (tmp_path / "dense", "--spans", "2:4", "--samples", 6, "--fit", "linearpatch", *own[2:])
        assert linearpatch("prune", *cut, "-o", tmp_path / "cut") is None
    assert linearpatch(recipe, *given[recipe], *own, "-o", tmp_path / "out") is None
    ((tokens, length),) = asked
    assert length == 16
    # Half of all windows, and a little more, because text that is tokenised again may be shorter.
    assert tokens >= 6 / 2 * 16
    told = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".json", ".md")]
    assert any("text of the model's own, numbers.txt" in file.read_text() for file in told)
    assert [*(tmp_path / "cache" / "written").iterdir()]


def test_what_the_model_writes_alone_is_what_the_report_is_about(tmp_path: Path) -> None:
    texts = read_texts([Path("self")])
    assert (texts.report, texts.report_source) == (None, "unused parts of text of the model's own")
    assert texts.own_share() == 1
    assert texts.with_own(["x"]).calibration == ["x"]
    both = read_texts([Path("self"), Path(MIX)])
    assert both.report == ["s " * 9]
    assert both.own_share() == 1 / 2
    mixture = both.with_own(["x"]).calibration
    assert isinstance(mixture, Mixture)
    assert mixture.texts == {inputs.OWN_TEXT: ["x"], **KINDS, "shared": ["u v"]}
