"""Outputs read by Transformers 4, which most serving images have (vllm #44158, #42624, lmdeploy #4304).

What was found: Transformers 4.57 read a stock output with the default rotary base, silently, and advised of a patched
one to pass ``trust_remote_code=True``, which had been passed.

Needs TRANSFORMERS_4, a directory made by ``pip install --no-deps --target DIR transformers==4.57.1 tokenizers==0.22.1
huggingface_hub==0.36.0``. What can be told without it is in test_config_forms.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.modeling.modeling_file import modeling_source
from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.field.rope_cases import CASES, KINDS, UNSAYABLE, made
from tests.support.field import IDS, same
from tests.support.tiny import tiny_tokenizer

OLDER = os.environ.get("TRANSFORMERS_4", "")
with_older = pytest.mark.skipif(
    not Path(OLDER, "transformers").is_dir(),
    reason="TRANSFORMERS_4 names no directory with Transformers 4.57 (test_older_transformers.py says how to make one)",
)
NAMES = [(name, kind) for name in [*CASES, *UNSAYABLE] for kind in KINDS]


def place(root: Path, name: str, kind: str) -> Path:
    return root / f"{name}-{kind}".replace(" ", "_")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, saved with the logits that it gives here, and read there; what was found is in found.json."""
    root = tmp_path_factory.mktemp("older")
    for name, kind in NAMES:
        model = made(name, kind)
        directory = place(root, name, kind)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
        save_checkpoint(model, tokenizer, directory)
        with torch.no_grad():
            logits = model(IDS).logits.contiguous()
        save_file({"ids": IDS, "logits": logits}, directory / "expected.safetensors")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("older_transformers.py"), *(place(root, *one) for one in NAMES)],
        env={**os.environ, "PYTHONPATH": OLDER, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (root / "found.json").write_text(run.stdout.strip().splitlines()[-1])
    return root


@with_older
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_it_is_the_same_model_there_or_none(root: Path, name: str, kind: str) -> None:
    directory = place(root, name, kind)
    found = json.loads((root / "found.json").read_text())
    assert found["version"].startswith("4.")
    assert found["tokens"][directory.name] == [9, 97, 10]
    outcome = found["outcomes"][directory.name]
    if name in CASES:
        assert outcome == "same"
        # What it wrote is read here.
        expected = load_file(directory / "expected.safetensors")
        again = AutoModelForCausalLM.from_pretrained(directory.with_name(directory.name + "-again"))
        with torch.no_grad():
            assert same(again(expected["ids"]).logits, expected["logits"])
    elif kind == "patched":
        assert outcome.startswith("InputError: transformers < 5 cannot compute this model's rope_parameters")
    else:  # its own classes have no words for it, and stop
        assert outcome.startswith("TypeError")


@pytest.mark.parametrize("version", ["4.56.2", "4.49.0.dev0", "3.0"])
@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_a_version_that_is_too_old_is_told_so(family: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is imported, which may not be there."""

    def run() -> None:
        module = types.ModuleType("modeling_linearpatch_of_a_version")
        module.__file__ = __file__
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(modeling_source(STOCK_FAMILIES[family]), "modeling_linearpatch.py", "exec"), vars(module))

    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs Python >= 3\.11 and transformers >= 4\.57, not .* and {version}"):
        run()
    for enough in ("4.57.0", "5.23.0", "5.24.0.dev0", "6.0.0rc1"):
        monkeypatch.setattr(transformers, "__version__", enough)
        run()
