"""Models that read more than text: their decoder is cut and patched, and what is around it stays as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.forward import PartialRun
from linearpatch_kernels.modeling import keep_layers, load_model, patched_model
from linearpatch_kernels.modeling.families import decoder, decoder_layers, merge_tree, num_layers
from linearpatch_kernels.modeling.loading import ModelSource
from linearpatch_kernels.nn import DensePatch
from tests.modeling.test_any_decoder import ALONE
from tests.support.field import text_file
from tests.support.pages import run_program
from tests.support.tiny import tiny_tokenizer
from tools.models_reference import bypassed, tiny_decoder

KEPT = [0, 1, 4, 5, 6, 7]
WHOLE = ["gemma3", "gemma4", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe"]
IMAGE = 5


def patch() -> DensePatch:
    found = DensePatch(64)
    with torch.no_grad():
        found.weight += 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return found


def tokens() -> Tensor:
    return torch.randint(6, 128, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=WHOLE)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_decoder(request.param)


def test_all_but_the_layers_that_go_is_shared_and_the_config_is_that_of_all(model: PreTrainedModel) -> None:
    cut = keep_layers(model, KEPT)
    assert (type(cut), type(cut.config)) == (type(model), type(model.config))
    assert (cut.config.text_config.num_hidden_layers, model.config.text_config.num_hidden_layers) == (6, 8)
    assert cut.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    ours = {id(one) for one in cut.parameters()}
    gone = {id(one) for layer in (2, 3) for one in decoder_layers(model)[layer].parameters()}
    # The embeddings of Gemma 4's layers are packed.
    sliced = [one for name, one in model.named_parameters() if "per_layer" in name and ".layers." not in name][:2]
    assert {id(one) for one in model.parameters()} - ours == gone | {id(one) for one in sliced}
    assert len(ours) == sum(1 for _ in model.parameters()) - len(gone)


@torch.no_grad()
def test_parts_are_the_whole(model: PreTrainedModel) -> None:
    ids = tokens()
    whole, depth = model(ids, use_cache=False).logits, num_layers(model)
    states = PartialRun(model, "tokens", depth).states(ids, [3, depth])
    assert torch.equal(PartialRun(model, depth, "logits")(states[depth]), whole)
    if model.config.model_type != "gemma4":  # whose layers take more than the stream
        assert torch.equal(PartialRun(model, 3, "logits")(states[3]), whole)


def seeing() -> Any:
    """Gemma 3 whose tokens 5 stand for an image."""
    model: Any = tiny_decoder(
        "gemma3",
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            # As many as the decoder has.
            "num_hidden_layers": 8,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    # Which starts as zero.
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    return model


@torch.no_grad()
def test_what_is_seen_reaches_the_layers_that_stay() -> None:
    model, ids = seeing(), tokens()
    ids[0, 3:7] = IMAGE
    images = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = [
        {"input_ids": ids, "pixel_values": one, "token_type_ids": (ids == IMAGE).long(), "use_cache": False}
        for one in images
    ]
    cut = keep_layers(model, KEPT)
    patched = patched_model(cut, {2: patch()})
    assert not torch.allclose(cut(**given[0]).logits, cut(**given[1]).logits)
    with bypassed(model, [2, 3]):
        assert torch.equal(cut(**given[0]).logits, model(**given[0]).logits)
    with bypassed(model, [2, 3], patch()):
        assert torch.equal(patched(**given[0]).logits, model(**given[0]).logits)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3", "qwen3_5"])
def test_a_patched_twin_loads_where_the_package_is_not_imported(name: str, tmp_path: Path) -> None:
    patched: Any = patched_model(keep_layers(tiny_decoder(name), KEPT), {2: patch(), 6: patch()})
    assert set(patched.config.linearpatch["joints"]) == {"2", "6"}
    patched.save_pretrained(tmp_path / "made")
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        torch.save((ids, patched(ids, use_cache=False).logits), tmp_path / "made" / "logits.pt")
    for auto_class in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        (tmp_path / "alone.py").write_text(ALONE.replace("AutoModelForCausalLM", auto_class))
        printed = run_program(tmp_path / "alone.py", tmp_path / "made", HF_MODULES_CACHE=str(tmp_path / "modules"))
        assert printed.split() == ["True", "True"]
    with pytest.raises((KeyError, AttributeError, ValueError, TypeError), match="some layers are patched"):
        type(patched).stock_class.from_pretrained(tmp_path / "made")


def test_the_text_part_alone_is_a_model_of_its_own(tmp_path: Path) -> None:
    """As `AutoModelForCausalLM` loads it, without what reads images."""
    model = tiny_decoder("qwen3_5")
    model.save_pretrained(tmp_path)
    text = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    cut, whole = keep_layers(text, KEPT), keep_layers(model, KEPT)
    with torch.no_grad():
        assert torch.equal(cut(tokens(), use_cache=False).logits, whole(tokens(), use_cache=False).logits)


def test_the_command_prunes_one_and_what_is_beside_it_goes_along(tmp_path: Path) -> None:
    """Whatever head the model's type has, its directory is one of the whole model."""
    tiny_decoder("mistral3").save_pretrained(tmp_path / "dense")
    tiny_tokenizer(128).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"size": 28}')
    given: Any = {"text": text_file(tmp_path), "samples": 4, "length": 16, "drop": 2}
    for fit, kind in (("none", "Mistral3For"), ("low-rank", "LinearPatchMistral3For")):
        made = lp.prune(tmp_path / "dense", fit=fit, rank=4, output=tmp_path / fit, **given)
        assert made.written
        again, _ = load_model(tmp_path / fit, device="cpu")
        assert type(again).__name__ == f"{kind}ConditionalGeneration"
        assert num_layers(again) == 6
        assert (tmp_path / fit / "preprocessor_config.json").read_text() == '{"size": 28}'
        assert "AutoModelForImageTextToText" in (tmp_path / fit / "linearpatch" / "report" / "report.md").read_text()
    assert lp.prune(tmp_path / "none", fit="none", output=tmp_path / "again", **given).written
    assert ModelSource(tmp_path / "again").num_layers == 4
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "none")
    assert len(decoder(stock).layers) == 6


@pytest.mark.parametrize("heal", ["refit", "patch+refit"])
def test_weights_are_fitted_again_where_the_decoder_is_of_a_recorded_type(heal: str, tmp_path: Path) -> None:
    given: Any = {"text": text_file(tmp_path), "tokenizer": tiny_tokenizer(128), "samples": 8, "length": 16}
    made = lp.prune(tiny_decoder("gemma3"), drop=2, heal=heal, rank=4, output=tmp_path / "made", **given)
    quality = {name.partition(" ")[0]: found.loss for name, found in made.quality.items()}
    assert made.summary["heal"] == heal
    assert quality["healed"] != pytest.approx(quality["dropped"], rel=1e-6)
    again, _ = load_model(tmp_path / "made", device="cpu")
    assert type(again).__name__.endswith("Gemma3ForConditionalGeneration")


def test_merges_are_remembered_where_the_decoder_is(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    tiny_decoder("gemma3").save_pretrained(tmp_path / "0")
    tiny_tokenizer(128).save_pretrained(tmp_path / "0")
    for turn, layers in enumerate((6, 5)):
        lp.merge(tmp_path / str(turn), layers=layers, output=tmp_path / str(turn + 1), text=text, samples=8, length=16)
    tree = merge_tree(load_model(tmp_path / "2", device="cpu")[0])
    assert len(tree) == 5
    assert re.findall(r"\d+", str(tree)) == list("01234567")


def test_a_decoder_that_adds_what_is_seen_between_its_layers_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"'qwen3_vl' cannot be calibrated or cut: their decoder adds what they see .*visual_pos_mask"
    ):
        keep_layers(tiny_decoder("qwen3_vl"), KEPT)
