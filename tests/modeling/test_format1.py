"""Checkpoints and plans of format 1, written before a joint held a list, load and give what they gave then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.consistency import check_patches, check_plan
from linearpatch_kernels.pruning.plan import PrunePlan
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
@torch.no_grad()
def test_a_checkpoint_loads_with_the_same_patches_and_logits(family: str, name: str) -> None:
    expected = expected_of(family, name)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / family / name, dtype=torch.float32)
    matrices = {f"joint.{at}": patch.double()(torch.eye(24).double()) for at, patch in patches(model).items()}
    assert matrices.keys() == {key for key in expected if key.startswith("joint.")}
    for key, matrix in matrices.items():
        torch.testing.assert_close(matrix, expected[key])
    model.float()
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
