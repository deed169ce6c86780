"""``linearpatch export`` from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from linearpatch_kernels.modeling.gguf_file import read_file
from linearpatch_kernels.modeling.loading import load_model
from tests.support.command import LAYERS, NO_MODEL, SMALL, Run, World, logits_at, logits_of, refusal


def test_a_stock_result_says_what_was_removed(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    stock, file, figures = tmp_path / "stock", tmp_path / "x.gguf", tmp_path / "figures.json"
    cut = ["--spans", "2:4", "--heal", "refit", "-o", stock, "--text", world.text, *SMALL]
    assert run("prune", world.model, *cut).status == 0
    for _ in range(2):  # the second time over its own files
        done = run("export", stock, "--to", "gguf", "--dtype", "f32", "-o", file, "--json", figures)
        assert done.status == 0, done.stderr
    assert f"{file}: llama, {LAYERS - 2} layers, " in done.stdout
    summary = json.loads(figures.read_text())
    assert summary["architecture"] == "llama"
    assert summary["file_bytes"] == file.stat().st_size
    metadata, _ = read_file(file)
    assert metadata["linearpatch.removed"] == "2:4"
    assert metadata["linearpatch.layers_before"] == LAYERS
    assert metadata["linearpatch.heal"] == "refit"
    assert metadata["general.name"] == f"model, {LAYERS - 2} of {LAYERS} layers"
    assert metadata["general.base_model.0.name"] == "model"
    assert "2:4" in metadata["general.description"]
    assert logits_of(load_model(file, device="cpu")[0]).allclose(logits_at(stock), atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["cache", "figures.json", "stock", "x.gguf"]


def test_a_merged_result_and_a_dense_model(
    world: World, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "cache"))
    merged, card = tmp_path / "merged", world.copy(tmp_path / "dense") / "README.md"
    card.write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    layers = ["--layers", LAYERS - 1, "--heal", "none", "--variant", "authors"]
    assert run("merge", world.model, *layers, "-o", merged, "--text", world.text, *SMALL).status == 0
    for source in (merged, card.parent):
        assert run("export", source, "--to", "gguf", "-o", tmp_path / f"{source.name}.gguf").status == 0
    metadata, _ = read_file(tmp_path / "merged.gguf")
    assert metadata["linearpatch.layers_before"] == LAYERS
    assert metadata["linearpatch.merged"].count("(") == 1
    dense, _ = read_file(tmp_path / "dense.gguf")
    assert dense["general.name"] == "dense"
    assert dense["general.license"] == "apache-2.0"
    assert dense["general.languages"] == ["en"]
    assert not [key for key in dense if key in ("linearpatch.removed", "general.base_model.count")]


@pytest.mark.usefixtures("no_weights")
def test_what_cannot_be_exported_is_one_line_with_flags(world: World, run: Run, empty: Path) -> None:
    def line(*arguments: object) -> str:
        return refusal(run("export", *arguments))

    to = ["--to", "gguf", "-o", empty / "x.gguf"]
    assert "--heal refit" in line(world.pruned, *to)
    assert "--to onnx is not known: choose one of gguf" in line(world.model, "--to", "onnx", "-o", empty / "x.onnx")
    assert "--dtype q4_0 is not known" in line(world.model, *to, "--dtype", "q4_0")
    assert NO_MODEL in line(NO_MODEL, *to)
    assert "cannot be written" in line(world.model, "--to", "gguf", "-o", empty / "missing" / "x.gguf")
    assert f"--output {world.text} exists and is no file of linearpatch's" in line(
        world.model, "--to", "gguf", "-o", world.text
    )
    assert "is the output" in line(world.model, *to, "--json", empty / "x.gguf")
