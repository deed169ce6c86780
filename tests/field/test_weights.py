"""The weights of an output are those of its input, also where the config says less than the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
from tests.support.field import SMALL, linearpatch, logits, same, save_model, text_file, tiny


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config says that the head is the embedding, in ``dense``, with a head of its own: what merging an
    adapter into a tied model leaves."""
    place: Path = tmp_path_factory.mktemp(request.param)
    dense = tiny(request.param, tie_word_embeddings=True)
    torch.manual_seed(5)
    dense.lm_head = nn.Linear(48, 97, bias=False)
    nn.init.normal_(dense.lm_head.weight, std=0.3)
    save_model(dense, place / "dense")
    with safe_open(place / "dense" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), dense.lm_head.weight)
    loaded, _ = load_model(place / "dense", device="cpu")
    assert same(logits(loaded), logits(dense))
    text_file(place)
    return place


@pytest.mark.parametrize("fit", ["none", "linearpatch", "low-rank"])
def test_a_head_of_its_own_under_a_tied_config_is_kept_by_a_cut(folder: Path, fit: str) -> None:
    """It was tied to the embedding again by what read or wrote it: transformers #45127."""
    dense, _ = load_model(folder / "dense", device="cpu")
    flags = ["--spans", "2:4", "--fit", fit, "--text", folder / "numbers.txt", *SMALL]
    assert linearpatch("prune", folder / "dense", "-o", folder / fit, *flags) is None
    found, _ = load_model(folder / fit, device="cpu")
    assert torch.equal(found.lm_head.weight, dense.lm_head.weight)
    assert same(logits(found), logits(apply_plan(dense, PrunePlan.load(folder / fit))))
    if fit == "none":
        assert same(logits(found), logits(keep_layers(dense, [0, 1, 4, 5])))


def test_a_head_of_its_own_under_a_tied_config_is_kept_by_merging_and_distilling(folder: Path) -> None:
    """As above; a distilled output is made of a loaded output."""
    dense, _ = load_model(folder / "dense", device="cpu")
    text = ["--text", folder / "numbers.txt", "--length", 16, "--device", "cpu"]
    assert linearpatch("merge", folder / "dense", "--layers", 4, "-o", folder / "merged", "--samples", 4, *text) is None
    training = ["--teacher", folder / "dense", "--steps", 2, "--heldout", 2, *text]
    assert linearpatch("distill", folder / "merged", "-o", folder / "distilled", *training) is None
    for name in ("merged", "distilled"):
        found, _ = load_model(folder / name, device="cpu")
        assert torch.equal(found.lm_head.weight, dense.lm_head.weight), name
        assert torch.equal(found.model.embed_tokens.weight, dense.model.embed_tokens.weight), name
