"""What stands beside the weights of a result: its card, the terms of its base, and the files that other tools read."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import linearpatch_kernels as lp
from linearpatch_kernels import InputError
from linearpatch_kernels.cli.flags import in_flags
from linearpatch_kernels.files import MARKER
from linearpatch_kernels.modeling.loading import LoadedModel, ModelSource, load_model
from linearpatch_kernels.modeling.origin import Origin
from linearpatch_kernels.recipes.inputs import read_texts
from linearpatch_kernels.report.card import model_card, sections
from tests.support import gguf_files
from tests.support.field import linearpatch, save_model, text_file, tiny

SMALL: dict[str, Any] = {"samples": 6, "length": 16, "rank": 4, "device": "cpu"}
CARD = """---
license: other
license_name: our-terms
license_link: LICENSE
language:
- en
- de
base_model: owner/name
---
# Dense

license: mit
"""
CARRIED = {
    "LICENSE": b"terms\r\nof \xff bytes",
    "NOTICE.txt": b"notice",
    "USE_POLICY.md": b"policy",
    "tokenizer.model": b"\x00pieces",
    "chat_template.jinja": b"{{ messages[0]['content'] }}",
}
STOCK, PATCHED, MERGED, DISTILLED = "stock", "patched", "merged", "distilled"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with terms, and results of every kind."""
    folder = tmp_path_factory.mktemp("cards")
    dense = tiny()
    dense.generation_config.temperature, dense.generation_config.do_sample = 0.375, True
    save_model(dense, folder / "dense")
    for name, content in {**CARRIED, "README.md": CARD.encode()}.items():
        (folder / "dense" / name).write_bytes(content)
    text_file(folder, 5000)
    text_file(folder, 4000, "more.txt")
    texts = {"text": [folder / "numbers.txt", folder / "more.txt"]}
    with warnings.catch_warnings(action="ignore"):
        lp.prune(folder / "dense", output=folder / PATCHED, spans="2:4", fit="hadamard-low-rank", **texts, **SMALL)
        lp.prune(folder / "dense", output=folder / STOCK, drop=2, heal="refit", **texts, **SMALL)
        lp.merge(folder / "dense", output=folder / MERGED, layers=4, **texts, **SMALL)
        distil(folder, PATCHED, folder / DISTILLED)
    return folder


def distil(place: Path, source: str, output: Path) -> None:
    settings: dict[str, Any] = {"steps": 2, "length": 16, "heldout": 2, "top_k": 8, "device": "cpu"}
    text = place / "numbers.txt"
    lp.recipes.distill(place / source, teacher=str(place / "dense"), output=output, text=[text], **settings)


def summary_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "linearpatch" / "summary.json").read_text())
    return found


@pytest.mark.parametrize("kind", [STOCK, PATCHED, MERGED, DISTILLED])
def test_a_result_has_a_card_and_the_company_of_its_base(kind: str, place: Path) -> None:
    result = place / kind
    found = ModelCard.load(result / "README.md").data.to_dict()
    assert found["license"] == "other"
    assert (found["license_name"], found["license_link"]) == ("our-terms", "LICENSE")
    assert (found["language"], found["base_model"]) == (["en", "de"], "owner/name")
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
    for name, content in CARRIED.items():
        assert (result / name).read_bytes() == content, name
    settings = [json.loads((one / "generation_config.json").read_text()) for one in (result, place / "dense")]
    assert [one["temperature"] for one in settings] == [0.375, 0.375]
    assert AutoTokenizer.from_pretrained(result).chat_template == CARRIED["chat_template.jinja"].decode()
    listed = json.loads((result / MARKER).read_text())["files"]
    assert {"README.md", "generation_config.json", "tokenizer.json", *CARRIED} <= listed.keys()


@pytest.mark.parametrize("kind", [STOCK, PATCHED, MERGED, DISTILLED])
def test_the_card_says_what_the_summary_says(kind: str, place: Path) -> None:
    card, summary = (place / kind / "README.md").read_text(), summary_of(place / kind)
    assert card == model_card(summary)
    assert "# dense: 6 layers to 4" in card
    assert "Its terms lie here as they lay there: LICENSE, NOTICE.txt, USE\\_POLICY.md." in card
    assert "numbers.txt 50 %, more.txt 50 %" in card
    assert summary["result"]["row"] in summary["quality"]
    assert summary["result"]["patched"] == (kind in (PATCHED, DISTILLED)) == ("trust_remote_code=True" in card)
    assert str(place) not in card
    assert ("Distilled, with the base as the teacher" in card) == (kind == DISTILLED)
    if kind == DISTILLED:
        assert "Healed by patch" in card


def test_what_was_distilled_is_distilled_again(place: Path, tmp_path: Path) -> None:
    """And everything is carried along once more; the base stays the first model."""
    with warnings.catch_warnings(action="ignore"):
        distil(place, DISTILLED, tmp_path / "again")
    assert summary_of(tmp_path / "again")["base"] == summary_of(place / PATCHED)["base"]
    for name, content in CARRIED.items():
        assert (tmp_path / "again" / name).read_bytes() == content, name


def test_a_base_whose_summary_says_nothing_is_the_teacher(place: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(place / PATCHED, tmp_path / "old"))
    (old / "linearpatch" / "summary.json").write_text("{")
    (old / "LICENSE").unlink()
    with warnings.catch_warnings(action="ignore"):
        distil(place, str(old), tmp_path / "new")
    base = summary_of(tmp_path / "new")["base"]
    # What is carried along is what lay beside the student.
    assert (base["name"], base["license"], base["terms"]) == ("dense", "other", ["NOTICE.txt", "USE_POLICY.md"])
    assert not (tmp_path / "new" / "LICENSE").exists()


def test_a_result_is_written_again_and_a_card_that_somebody_edited_is_not_replaced(place: Path, tmp_path: Path) -> None:
    def run() -> None:
        given: dict[str, Any] = {"spans": "2:4", "fit": "scalar", "text": [place / "numbers.txt"], **SMALL}
        lp.prune(place / "dense", output=tmp_path / "out", **given)

    with warnings.catch_warnings(action="ignore"):
        run()
        first = (tmp_path / "out" / "README.md").read_bytes()
        run()
        assert (tmp_path / "out" / "README.md").read_bytes() == first
        with open(tmp_path / "out" / "README.md", "a") as card:
            card.write("mine")
        with pytest.raises(InputError, match=r"README\.md"):
            run()
    assert (tmp_path / "out" / "README.md").read_bytes() == first + b"mine"


def test_a_card_of_somebody_else_is_not_replaced(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(InputError, match="not an output of linearpatch"):
        lp.prune(place / "dense", output=tmp_path / "out", drop=2, text=[place / "numbers.txt"], **SMALL)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_plan_alone_is_no_model_and_has_no_card(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"spans": "2:4", "fit": "scalar", "plan_only": True, "text": [place / "numbers.txt"]}
    with warnings.catch_warnings(action="ignore"):
        lp.prune(place / "dense", output=tmp_path / "plan", **given, **SMALL)
    assert not (tmp_path / "plan" / "README.md").exists()
    assert linearpatch("inspect", tmp_path / "plan") is None
    shown = capfd.readouterr().out
    assert "Removed the layers 2:4, 2 of 6" in shown
    assert "from_pretrained" not in shown


def test_a_card_that_cannot_be_made_stops_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> str:
        raise ZeroDivisionError("no card")

    monkeypatch.setattr("linearpatch_kernels.recipes.outputs.model_card", fails)
    with pytest.warns(UserWarning, match="the model card is left out: ZeroDivisionError, no card"):
        lp.prune(
            place / "dense", output=tmp_path / "out", spans="2:4", fit="scalar", text=[place / "numbers.txt"], **SMALL
        )
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_result_of_a_gguf_says_what_its_metadata_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    keys = {
        "general.name": "Tiny One",
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "general.base_model.count": 1,
        "general.base_model.0.repo_url": "https://huggingface.co/owner/tiny",
    }
    model = gguf_files.write(tmp_path / "tiny.gguf", tiny(), keys=keys)
    for output in ("first", "again"):  # the second finds it converted
        with warnings.catch_warnings(action="ignore"):
            lp.prune(model, output=tmp_path / output, spans="2:4", fit="scalar", text=[place / "numbers.txt"], **SMALL)
        card = ModelCard.load(tmp_path / output / "README.md")
        assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["en"], "owner/tiny")
        assert "Its file calls it “Tiny One”." in card.text
        assert not (tmp_path / output / "LICENSE").exists()


def test_the_parts_of_the_demo_have_cards(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model and text in the place of the demo's."""
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    model = gguf_files.write(tmp_path / "tiny.gguf", tiny(), keys={"general.license": "mit"})
    monkeypatch.setattr("linearpatch_kernels.recipes.inputs.demo_model_path", lambda: model)
    prune = sys.modules["linearpatch_kernels.recipes.prune"]
    monkeypatch.setattr(prune, "read_texts", lambda *_: read_texts([place / "numbers.txt"]))
    with warnings.catch_warnings(action="ignore"):
        lp.recipes.demo(output=tmp_path / "demo", drop=2, samples=8, length=16)
    for part in ("stock", "patched", "structured"):
        card = (tmp_path / "demo" / part / "README.md").read_text()
        summary = summary_of(tmp_path / "demo" / part)
        assert card == model_card(summary)
        assert ("This is a stock model" in card) == (part == "stock") == (not summary["result"]["patched"])
        assert "license: mit" in card
        assert "Perplexity " in card
        assert "Healed by " in card


@pytest.mark.parametrize("kind", [STOCK, PATCHED, MERGED, DISTILLED])
def test_inspect_says_the_same_in_sentences(kind: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert linearpatch("inspect", place / kind) is None
    shown, error = capfd.readouterr()
    assert error == ""
    lines = [line.strip() for line in shown.splitlines()]
    for section in sections(summary_of(place / kind)):
        assert section.heading in lines
        assert {in_flags(line) for line in section.lines} <= set(lines)
        for _, _, content in section.blocks:
            assert {line.strip() for line in content.splitlines()} <= set(lines)
    assert linearpatch("inspect", place / kind, "--json", "-") is None
    told = json.loads(capfd.readouterr().out)
    assert told["base"]["license"] == "other"
    assert told["result"]["row"] in told["quality"]


def test_a_loaded_model_has_the_card_of_its_directory(place: Path) -> None:
    model, tokenizer = load_model(place / "dense", device="cpu")
    origins = [LoadedModel(model, tokenizer).origin, ModelSource(place / "dense", device="cpu").origin]
    assert origins[0] == origins[1]
    assert origins[0].license_name == "our-terms"
    model.name_or_path = ""
    assert LoadedModel(model, tokenizer).origin == Origin()
