"""A patched checkpoint: loaded three ways with the same logits, refused everywhere else."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.modeling_file import modeling_source
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from tests.support.tiny import (
    FAMILY_NAMES,
    VOCABULARY,
    normed_patches,
    tiny_model,
    tiny_patched_model,
    tiny_tokenizer,
)

# Those with "normed" have a `NormLinearPatch` of every form.
CASES = [*FAMILY_NAMES, "llama-tied", "gemma3_text-untied", "llama-normed", "gemma3_text-normed"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved patched model per case, with ids and the logits that it gave before it was saved."""
    root = tmp_path_factory.mktemp("checkpoints")
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    for case in CASES:
        family, _, what = case.partition("-")
        if what == "normed":
            model = patched_model(keep_layers(tiny_model(family), [0, 1, 4, 5]), normed_patches())
        else:
            model = tiny_patched_model(family, **({"tie_word_embeddings": what == "tied"} if what else {}))
        with torch.no_grad():
            logits = model(ids).logits
        save_checkpoint(model, tiny_tokenizer(), root / case)
        save_file({"ids": ids, "logits": logits}, root / case / "expected.safetensors")
    return {case: root / case for case in CASES}


@pytest.fixture(scope="module")
def isolated(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What tests/modeling/isolated.py finds in a process that cannot import the package, standard input closed."""
    script = Path(__file__).with_name("isolated.py")
    cache = tmp_path_factory.mktemp("hub")
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", script, *checkpoints.values()],
        cwd=cache,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line[line.index("{") :]) for line in run.stdout.splitlines() if '{"name"' in line]
    return dict(zip(checkpoints, found, strict=True))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_loads_where_the_classes_are_registered(
    checkpoints: dict[str, Path], case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    expected = load_file(checkpoints[case] / "expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(checkpoints[case], output_loading_info=True)
    assert not any(info.values()), info
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(model).__name__.startswith("LinearPatch")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    stack = AutoModel.from_pretrained(checkpoints[case])
    assert torch.equal(model.lm_head(stack(expected["ids"]).last_hidden_state), expected["logits"])
    assert AutoConfig.from_pretrained(checkpoints[case]).to_dict() == model.config.to_dict()
    mapped = AutoModelForCausalLM.from_pretrained(checkpoints[case], device_map="cpu", dtype=torch.float64)
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.float64}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_load_model_gives_it_with_its_tokenizer(checkpoints: dict[str, Path], case: str) -> None:
    expected = load_file(checkpoints[case] / "expected.safetensors")
    model, tokenizer = load_model(checkpoints[case], device="cpu")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    assert tokenizer.vocab_size == VOCABULARY


@pytest.mark.parametrize("case", CASES)
def test_it_loads_with_its_own_code_where_the_package_is_not_installed(isolated: dict[str, Any], case: str) -> None:
    found = isolated[case]
    assert found["name"].startswith("LinearPatch")
    assert found["same"]
    assert found["same_decoder"]
    assert found["narrow"] == ["torch.bfloat16"]
    assert found["config_again"]
    assert "modeling_linearpatch.py" in found["files_again"]


@pytest.mark.parametrize("case", CASES)
def test_it_does_not_load_without_either(isolated: dict[str, Any], case: str) -> None:
    assert len(isolated[case]["auto"]) == 3
    for refusal in isolated[case]["auto"]:
        assert refusal.startswith("ValueError")
        assert "trust_remote_code=True" in refusal


@pytest.mark.parametrize("case", CASES)
def test_a_stock_class_called_by_hand_says_what_to_do(isolated: dict[str, Any], case: str) -> None:
    assert len(isolated[case]["stock"]) == 6
    for refusal in isolated[case]["stock"]:
        assert refusal.startswith("KeyError")
        assert "import linearpatch_kernels.modeling" in refusal
        assert "trust_remote_code=True" in refusal


def edited(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint whose weights were changed by a function of the state dict."""
    target.mkdir()
    for name in ("config.json", "generation_config.json", "modeling_linearpatch.py"):
        (target / name).write_bytes((source / name).read_bytes())
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


SCALE = "model.layers.2.patch.0.scale"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(SCALE),
        lambda weights: weights.pop("model.layers.3.output_patch.0.weight"),
        lambda weights: weights.update({"model.layers.1.patch.0.scale": torch.ones(48)}),
    ],
    ids=["missing", "missing behind the last layer", "of another joint"],
)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_patch_weights_that_are_not_those_of_the_config(
    checkpoints: dict[str, Path], tmp_path: Path, change: Any, auto: Any
) -> None:
    with pytest.raises(InputError, match=r"the patch weights do not fit the config \((model\.)?layers\.\d\."):
        auto.from_pretrained(edited(checkpoints["llama"], tmp_path / "edited", change))


def test_patch_weights_of_another_shape(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = edited(checkpoints["llama"], tmp_path / "edited", lambda weights: weights.update({SCALE: torch.ones(47)}))
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(InputError, match="do not fit the config"):
        AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_modeling_file_needs_torch_and_transformers_only(family: str) -> None:
    source = modeling_source(STOCK_FAMILIES[family])
    tree = ast.parse(source)
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    attempts = [node for node in tree.body if isinstance(node, ast.Try)]
    assert [node.module for node in attempts[0].body] == ["linearpatch_kernels.ops.hadamard_patch"]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))
    # Only what a patched model reaches: no other family, no losses, nothing of how the file is made.
    assert not {"modeling_source", "patched_model", "TopKKLLoss", "hadamard_patch_backward_reference"} & set(defined)
    others = [other.causal_lm_class.__name__ for name, other in STOCK_FAMILIES.items() if name != family]
    assert not any(other in source for other in others)


@torch.no_grad()
def test_its_own_code_uses_the_installed_operator(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoints["llama"] / "modeling_linearpatch.py"
    spec = importlib.util.spec_from_file_location("modeling_linearpatch_of_a_test", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.hadamard_patch is hadamard_patch
    model = module.LinearPatchLlamaForCausalLM.from_pretrained(checkpoints["llama"])
    expected = load_file(checkpoints["llama"] / "expected.safetensors")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
