"""The model card: front matter that the hub's library reads, and sentences that say what the summary says, no more."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from linearpatch_kernels.evaluation.agreement import Quality
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.merging.scores import PLACE_SCORES
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES
from linearpatch_kernels.report.card import model_card, sections, usage
from linearpatch_kernels.report.steps import sources, steps

BASE = {
    "name": "owner/name",
    "repository": "owner/name",
    "license": "apache-2.0",
    "languages": ["en", "de"],
    "terms": ["LICENSE", "NOTICE.md"],
}
TEXT = {
    "source": "many kinds of text, mine.txt",
    "shares": {"stories": 0.25, "mine.txt": 0.75},
    "samples": 128,
    "heldout": 16,
    "length": 512,
}


def quality(loss: float) -> dict[str, Any]:
    return Quality(2.718281828**loss, loss, 0.1, 0.5, 0.25, 4000).to_dict()


def result(row: str, *, patched: bool) -> dict[str, Any]:
    measured_on = "16 windows of LAMBADA passages"
    loader = "AutoModelForCausalLM"
    return {"row": row, "measured_on": measured_on, "loader": loader, "patched": patched, "version": "9.8.7"}


def pruned(heal: str, fit: str, row: str, *, patched: bool) -> dict[str, Any]:
    return {
        "base": BASE,
        "text": TEXT,
        "spans": ["13:19", "24:25"],
        "num_layers": {"dense": 30, "pruned": 23},
        "fit": fit,
        "score": "cosine",
        "quality": {"dense": quality(3.0), "dropped (no patch)": quality(4.0), row: quality(3.25)},
        "heal": heal,
        "result": result(row, patched=patched),
    }


PATCHED = pruned("patch", "hadamard-low-rank", "healed (hadamard-low-rank)", patched=True)
STOCK = pruned("refit", "none", "healed (refit)", patched=False) | {
    "refit": [
        {"layer": 12, "part": "mlp", "projections": ["down_proj"], "why": "", "absorbed": 7},
        {"layer": 13, "part": "mlp", "projections": [], "why": "experts", "absorbed": 0},
    ]
}
MERGED = {
    "base": BASE,
    "text": TEXT,
    "num_layers": {"dense": 6, "merged": 3},
    "settings": {"variant": "come-loss", "skip_score": "sleb"},
    "tree": [0, [1, [2, 3]], [4, 5]],
    "quality": {"dense": quality(3.0), "dropped (no patch)": quality(4.0), "merged": quality(3.5)},
    "result": result("merged", patched=False),
}
DISTILLED = PATCHED | {
    "fit": "hadamard-low-rank, distilled",
    "quality": {"dense": quality(3.0), "dropped (no patch)": quality(4.0), "distilled": quality(3.1)},
    "result": result("distilled", patched=True),
    "distillation": {
        "train": "patch",
        "parameters": 1234,
        "loss": "topk",
        "top_k": 64,
        "text": "mine.txt",
        "shares": {},
        "training_windows": 40,
        "heldout_windows": 8,
        "length": 256,
        "steps": 100,
        "steps_made": 90,
        "best_step": 80,
        "curve": [{"step": 0, "tail": 0.5}, {"step": 80, "tail": 0.25}],
        "training_seconds": 77.0,
        "structured": {},
    },
}


def front_matter(summary: dict[str, Any]) -> dict[str, Any]:
    """As the hub's library reads it."""
    return ModelCard(model_card(summary)).data.to_dict()


def test_the_front_matter_says_what_the_base_says() -> None:
    assert front_matter(STOCK) == {
        "base_model": "owner/name",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["linearpatch-kernels", "layer-pruning"],
    }
    assert front_matter(MERGED)["tags"] == ["linearpatch-kernels", "layer-merging"]
    assert front_matter(DISTILLED)["tags"] == ["linearpatch-kernels", "layer-pruning", "distillation"]


def test_a_base_that_says_nothing_is_said_nothing_of() -> None:
    card = model_card(STOCK | {"base": {"name": "my model"}})
    found = ModelCard(card).data.to_dict()
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "It says nothing of its licence" in card
    assert "# my model: 30 layers to 23" in card


def test_a_licence_of_its_own_name() -> None:
    licence = {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
    found = front_matter(STOCK | {"base": {"name": "m", **licence}})
    assert found | licence == found


def test_what_is_no_identifier_is_said_in_words_alone() -> None:
    """The hub refuses a card with another licence than those it knows the identifiers of."""
    card = model_card(STOCK | {"base": {"name": "m", "license": "Our Terms, v. 2"}})
    assert "license" not in ModelCard(card).data.to_dict()
    assert "Its licence, as it says itself: Our Terms, v. 2." in card


def test_foreign_words_are_letters() -> None:
    """Neither the front matter nor the page reads markup in a name."""
    base = {"name": "a|b_*c*\n---\nlicense: mit", "languages": ["en\n- tag"], "license_name": "x: [y"}
    card = model_card(STOCK | {"base": base, "notes": ["# no heading"]})
    found = ModelCard(card).data.to_dict()
    assert found["license_name"] == "x: [y"
    assert "license" not in found
    assert "\\*c\\*" in card
    assert "- \\# no heading" in card


def test_a_patched_result() -> None:
    card = model_card(PATCHED)
    fit = FITS["hadamard-low-rank"]
    for words in (
        "Removed the layers 13:19, 24:25, 7 of 30 (half-open: 13:19 are the layers 13 to 18).",
        f"Chose them by cosine: {SCORES['cosine'].about}.",
        f"Healed by patch: {HEALS['patch'].about}.",
        f"The map is hadamard-low-rank ({fit.about}, {fit.form}).",
        "Calibrated on 128 windows of 512 tokens from many kinds of text, mine.txt (shares asked for: stories 25 %, "
        "mine.txt 75 %); 16 others to choose on.",
        "import linearpatch_kernels.modeling",
        "trust_remote_code=True",
        "--model-impl transformers --trust-remote-code",
        "Its terms lie here as they lay there: LICENSE, NOTICE.md.",
        "Made by linearpatch-kernels 9.8.7.",
        "LinearPatch, arXiv 2505.24680, eq. 3",
    ):
        assert words in card
    assert "stock model" not in card
    assert "CoMe" not in card


def test_the_figures_of_the_report() -> None:
    (section,) = [section for section in sections(PATCHED) if section.heading == "Quality"]
    assert section.table is not None
    assert section.table.columns == ["model", "perplexity", "top-1 agreement", "KL (nats)", "won back"]
    names = [row[0] for row in section.table.rows]
    assert names == ["the base", "as many layers plainly removed", "this model"]
    assert [row[-1] for row in section.table.rows] == ["", "", "75.0 %"]
    assert [row[1] for row in section.table.rows] == ["20.09", "54.6", "25.79"]
    assert section.lines == [
        "Perplexity 25.79 on 16 windows of LAMBADA passages (the base 20.09, as many layers plainly removed 54.6).",
        "Of the log-perplexity that plain removal loses, it wins back 75.0 %.",
        "It has the likeliest token of the base at 50.0 % of the predicted positions; KL(base || model) is 0.250 nats.",
    ]


@pytest.mark.parametrize("missing", ["everything", "this model", "plain removal", "what is finite", "the teacher"])
def test_no_figure_is_said_that_was_not_measured(missing: str) -> None:
    found = {name: dict(one) for name, one in PATCHED["quality"].items()}
    own = PATCHED["result"]["row"]
    if missing == "everything":
        found = {}
    elif missing == "this model":
        del found[own]
    elif missing == "plain removal":
        del found["dropped (no patch)"]
    elif missing == "what is finite":
        found["dropped (no patch)"] |= {"loss": math.inf, "perplexity": None}
    else:
        found[own] |= {"top1_agreement": None, "kl": None}
    card = model_card(PATCHED | {"quality": found})
    assert ("## Quality" in card) == (missing not in ("everything", "this model"))
    assert ("wins back" in card) == (missing == "the teacher")
    assert ("likeliest token of the base" in card) == (missing in ("plain removal", "what is finite"))
    assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", card))


def test_a_stock_result() -> None:
    card = model_card(STOCK)
    for words in (
        f"Healed by refit: {HEALS['refit'].about}.",
        "Fitted 1 projection of the layer 12 again.",
        "Layer 12 took over 7 neurons of removed layers.",
        "Left alone: experts.",
        "This is a stock model",
    ):
        assert words in card
    assert "import linearpatch_kernels" not in card
    assert "trust" not in card
    assert "The map is" not in card


def test_plain_removal_is_not_called_healed() -> None:
    summary = pruned("none", "none", "dropped (no patch)", patched=False)
    assert len(summary["quality"]) == 2
    card = model_card(summary)
    assert "Not healed: plain removal." in card
    assert "wins back" not in card
    assert "plainly removed" not in card


def test_a_merged_result() -> None:
    card = model_card(MERGED)
    for words in (
        "# owner/name: 6 layers to 3",
        "Merged (1 (2 3)), (4 5), in parentheses the layers that became one (variant come-loss): 6 layers to 3.",
        f"Chose the places by sleb: {PLACE_SCORES['sleb'].about}.",
        "Not healed in closed form.",
        "merging layers: CoMe, arXiv 2510.15304",
    ):
        assert words in card
    assert "LinearPatch," not in card
    healed = "\n".join(steps(MERGED | {"heal": "patch", "fit": "shrunk-least-squares"}))
    assert f"The map is shrunk-least-squares ({FITS['shrunk-least-squares'].about}, " in healed
    assert "Not healed" not in healed


def test_a_distilled_result() -> None:
    told = steps(DISTILLED)
    assert told[-5:] == [
        "Distilled, with the base as the teacher (patch: 1,234 parameters).",
        "Loss: topk over the teacher's 64 likeliest tokens.",
        "Text: 40 windows of 256 tokens from mine.txt.",
        "Steps: 90 of 100, the best is 80.",
        "Held-out KL: 0.5000 before, 0.2500 after.",
    ]
    assert any("Healed by patch" in line for line in told)
    assert any("The map is hadamard-low-rank, distilled (hadamard-low-rank: " in line for line in told)
    used = "the loss over the teacher's likeliest tokens: LinearPatch, arXiv 2505.24680, section 3.3"
    assert used in sources(DISTILLED)
    assert used not in sources(PATCHED)


@pytest.mark.parametrize(
    "summary", [PATCHED, STOCK, MERGED, DISTILLED], ids=["patched", "stock", "merged", "distilled"]
)
def test_the_python_in_a_card_runs(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the directory, which is none of the reader's."""
    blocks = [
        content for section in sections(summary) for _, language, content in section.blocks if language == "python"
    ]
    assert len(blocks) == 1 + summary["result"]["patched"]
    opened: list[tuple[str, bool]] = []
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(
            f"transformers.{name}.from_pretrained",
            lambda place, trust_remote_code=False: opened.append((place, trust_remote_code)),
        )
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
    assert {place for place, _ in opened} == {"DIR"}
    assert any(trusted for _, trusted in opened) == summary["result"]["patched"]


def test_the_name_in_the_python_is_a_string() -> None:
    assert 'from_pretrained("a \\"b\\" \\\\n")' in usage('a "b" \\n', "AutoModelForCausalLM", patched=False)


def test_a_summary_of_0_1_0_says_less_and_fails_nowhere() -> None:
    """It knew neither base nor text, and not which row its result was."""
    old = {name: PATCHED[name] for name in ("spans", "num_layers", "fit", "score", "quality")}
    headings = [section.heading for section in sections(old)]
    assert headings == ["What was done"]
    assert sections({}) == []


def test_the_card_names_a_page_that_is_there() -> None:
    assert "docs/engines/README.md" in model_card(STOCK)
    assert (Path(__file__).parents[2] / "docs" / "engines" / "README.md").is_file()
