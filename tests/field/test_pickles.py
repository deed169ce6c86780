"""Patched models in pickles: ``torch.save`` of the whole model, and sending one to a spawned process.

What was found: "Can't pickle ... LinearPatchLlamaDecoderLayer: attribute lookup failed", where the stock model pickles
(LLM-Pruner #94, #3; pruna #696). A pickle names a class by its module and its name in it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import STOCK_FAMILIES, family_of
from linearpatch_kernels.modeling.modeling_file import modeling_source
from linearpatch_kernels.modeling.patched import PATCHED_CLASSES, patched_model, twin_of
from linearpatch_kernels.modeling.views import partial_decoder, suffix_model
from linearpatch_kernels.nn import HadamardPatch, LowRankPatch
from tests.support.field import IDS, tiny

LOADING = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[2])
"""


def patched(family: str) -> PreTrainedModel:
    return patched_model(keep_layers(tiny(family), [0, 1, 4, 5]), {2: HadamardPatch(48, 4), 4: LowRankPatch(48, 2)})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_everything_of_a_patched_family_pickles(family: str) -> None:
    model = patched(family)
    decoder = type(model.model)(model.config)
    views = (partial_decoder(model, 1, 3), suffix_model(model, 2))
    for one in (model, model.config, model.model, decoder, decoder.layers[2], *views):
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(copy.deepcopy(one)) is type(one)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))
    again = pickle.loads(pickle.dumps(model.config))
    assert again == model.config
    assert again.linearpatch == model.config.linearpatch
    for made in (*PATCHED_CLASSES[family], type(model.model.layers[2])):
        assert pickle.loads(pickle.dumps(made)) is made
        assert getattr(sys.modules[made.__module__], made.__qualname__) is made


def test_no_twin_takes_the_name_of_another() -> None:
    """InternLM3 is a ``LlamaForCausalLM`` with another config, GPT-SW3 is GPT-2 in everything."""
    made = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with contextlib.suppress(InputError):  # more than text
            made[name] = twin_of(family_of(name))
    for name, twin in made.items():
        assert [pickle.loads(pickle.dumps(one)) for one in twin] == [*twin], name
    assert made["gpt-sw3"] == made["gpt2"]
    assert len(made) > 2 * len(STOCK_FAMILIES)


def test_a_pickled_model_loads_in_a_process_that_has_not_imported_the_package(tmp_path: Path) -> None:
    model = patched("llama")
    torch.save(model, tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOADING, tmp_path / "model.pt", tmp_path / "logits.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


def test_a_pickled_model_keeps_what_was_bound_to_its_modules() -> None:
    model = patched("llama")
    module = model.model.layers[1].mlp
    module.forward = type(module).forward.__get__(module)
    again = pickle.loads(pickle.dumps(model))
    assert again.model.layers[1].mlp.forward.__self__ is again.model.layers[1].mlp


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a checkpoint's own code, where the package is not used."""
    file = tmp_path / "modeling_linearpatch.py"
    file.write_text(modeling_source(STOCK_FAMILIES["qwen2"]))
    spec = importlib.util.spec_from_file_location("modeling_linearpatch_to_pickle", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_models_of_a_checkpoints_own_code_pickle(own_code: Any) -> None:
    model = own_code.LinearPatchQwen2ForCausalLM(own_code.LinearPatchQwen2Config(**patched("qwen2").config.to_dict()))
    stream = io.BytesIO()
    torch.save(model.eval(), stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert type(again).__module__ == own_code.__name__
    assert torch.equal(logits(again), logits(model))


def test_models_of_a_checkpoints_own_code_are_cut_and_patched(own_code: Any) -> None:
    """Their classes are others than the package's, and compute the same."""
    model = own_code.LinearPatchQwen2ForCausalLM(own_code.LinearPatchQwen2Config(**patched("qwen2").config.to_dict()))
    model.load_state_dict(patched("qwen2").state_dict())
    expected = logits(model.eval())
    assert torch.equal(logits(keep_layers(model, range(4))), expected)
    made = patched_model(model, {1: LowRankPatch(48, 2), 2: LowRankPatch(48, 2)})
    assert type(made) is PATCHED_CLASSES["qwen2"][2]
    torch.testing.assert_close(logits(made), expected)
