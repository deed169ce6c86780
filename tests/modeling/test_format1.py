"""Checkpoints and plans of format 1, written before a joint held a list, load and give what they gave then."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.fingerprints import _fingerprint_0_1, fingerprint_model, model_difference
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patched_model, patches
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.consistency import check_patches, check_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.span import Span
from tests.fixtures.format1.make import FOLDER
from tests.support.tiny import FAMILY_NAMES

each_family = pytest.mark.parametrize("family", FAMILY_NAMES)
each_checkpoint = pytest.mark.parametrize("name", ["once", "twice"])
# Across processors; the logits are of size 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def expected_of(family: str, name: str) -> dict[str, Tensor]:
    """What `tests.fixtures.format1.make` recorded of a checkpoint."""
    tensors = load_file(FOLDER / family / "expected.safetensors")
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


@each_family
@each_checkpoint
@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_a_checkpoint_loads_with_the_same_patches_and_logits(family: str, name: str) -> None:
    expected = expected_of(family, name)
    model, info = AutoModelForCausalLM.from_pretrained(
        FOLDER / family / name, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.linearpatch["format"] == 2
    matrices = {f"joint.{at}": chain.to_dense() for at, chain in patches(model).items()}
    assert matrices.keys() == {key for key in expected if key.startswith("joint.")}
    for key, matrix in matrices.items():
        torch.testing.assert_close(matrix, expected[key])
    torch.testing.assert_close(model(expected["ids"], use_cache=False).logits, expected["logits"], **CLOSE)


@each_family
@each_checkpoint
def test_a_plan_loads_with_the_same_patches_and_belongs_to_its_checkpoint(family: str, name: str) -> None:
    directory = FOLDER / family / name
    plan = PrunePlan.load(directory)
    expected = {key: tensor for key, tensor in expected_of(family, name).items() if key.startswith("plan.")}
    assert {f"plan.{span}" for span in plan.spans} == expected.keys()
    for joint in plan.joints:
        assert joint.patch is not None
        torch.testing.assert_close(joint.patch.to_dense(), expected[f"plan.{joint.span}"])
    model, tokenizer = load_model(directory, device="cpu")
    assert tokenizer is not None
    check_plan(plan, model.config.to_dict(), directory)
    check_patches(plan, model, Path(directory))


@each_family
@each_checkpoint
@torch.no_grad()
def test_it_is_saved_in_format_2(family: str, name: str, tmp_path: Path) -> None:
    """Under the present names, whatever names it was loaded with, by ``save_pretrained`` and by `save_checkpoint`."""
    expected = expected_of(family, name)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / family / name)
    model.save_pretrained(tmp_path / "plain")
    save_checkpoint(model, None, tmp_path / "checked")
    for place in ("plain", "checked"):
        names = {one for one in load_file(tmp_path / place / "model.safetensors") if "patch." in one}
        assert names == {one for one in model.state_dict() if "patch." in one}
        record = json.loads((tmp_path / place / "config.json").read_text())["linearpatch"]
        assert record["format"] == 2
        assert {type(chain) for chain in record["joints"].values()} == {list}
        again = AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=torch.float32)
        torch.testing.assert_close(again(expected["ids"], use_cache=False).logits, expected["logits"], **CLOSE)


@pytest.fixture
def class_of_format_1(family: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The causal LM in the modeling file that format 1 wrote."""
    spec = importlib.util.spec_from_file_location(
        "modeling_of_format_1", FOLDER / family / "once" / "modeling_linearpatch.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    config = json.loads((FOLDER / family / "once" / "config.json").read_text())
    return getattr(module, config["architectures"][0])


@each_family
@torch.no_grad()
def test_its_own_code_loads_it_beside_this_version(family: str, class_of_format_1: Any) -> None:
    model = class_of_format_1.from_pretrained(FOLDER / family / "once", dtype=torch.float32)
    expected = expected_of(family, "once")
    torch.testing.assert_close(model(expected["ids"], use_cache=False).logits, expected["logits"], **CLOSE)


@pytest.mark.parametrize("family", ["llama"])
def test_a_model_of_its_own_code_is_not_cut_again(class_of_format_1: Any) -> None:
    model = class_of_format_1.from_pretrained(FOLDER / "llama" / "once")
    plan = PrunePlan(4, (Joint(Span(1, 2)),))
    for step in (lambda: apply_plan(model, plan), lambda: patched_model(model, {})):
        with pytest.raises(InputError, match="load it without trust_remote_code"):
            step()


@each_family
def test_code_of_format_1_refuses_format_2(family: str, class_of_format_1: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(FOLDER / family / "once").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the patch weights do not fit the config"):
        class_of_format_1.from_pretrained(tmp_path)


@each_family
@each_checkpoint
def test_what_was_fingerprinted_then_is_known_again(family: str, name: str) -> None:
    this_version, version_0_1 = json.loads((FOLDER / family / "fingerprints.json").read_text())[name]
    model = AutoModelForCausalLM.from_pretrained(FOLDER / family / name)
    # The last group is of the config, whose entries are those of a version of Transformers.
    assert fingerprint_model(model).split("-")[:3] == this_version.split("-")[:3]
    made_with = json.loads((FOLDER / family / name / "config.json").read_text())["transformers_version"]
    if transformers.__version__ == made_with:
        assert model_difference(this_version, model) == ""
        assert _fingerprint_0_1(model) == version_0_1
