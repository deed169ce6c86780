"""vLLM's Transformers backend loads results: the log-probabilities and greedy tokens are those of Transformers here.

In an environment of its own, without this package: a checkpoint alone is what people serve. ``make vllm`` makes it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.demo_data import demo_text
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.nn import DiagonalPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.text import cache_dir, token_windows

REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
VENV = Path(os.environ.get("LINEARPATCH_VLLM") or cache_dir() / "vllm")


def is_complete(venv: Path) -> bool:
    """The last step of ``make vllm`` is a copy of what it installed."""
    installed = venv / REQUIREMENTS.name
    return installed.is_file() and installed.read_bytes() == REQUIREMENTS.read_bytes()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.demo,
    pytest.mark.timeout(1500),  # an import of vLLM takes up to 85 s, a compiled model minutes
    pytest.mark.skipif(not is_complete(VENV), reason="no environment with this vLLM: `make vllm` makes it (1.9 GB)"),
]

# Float32 on both sides, by other kernels: what was seen is below 1e-4 nats.
TOLERANCE = 5e-4
NEW_TOKENS = 24
SPAN, LONG_SPAN = Span(13, 19), Span(5, 29)
FITS = {"stock": "none", "hadamard": "hadamard-low-rank", "low-rank": "low-rank", "dense": "least-squares"}
# Few layers, because it is compiled: two patches at one joint, and one behind the last layer.
SHORT = "chain"


class Expected(NamedTuple):
    """Of Transformers. Per sequence and position but the first: the log-probability, the best token, and by how much
    it is better than the second."""

    written: Tensor
    logprobs: Tensor
    best: Tensor
    gaps: Tensor


@torch.no_grad()
def expected_of(model: PreTrainedModel, prompts: Tensor) -> tuple[Tensor, Expected]:
    """The sequences to force, which are the prompts with what the model writes after them, and what is expected."""
    sequences = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
    )
    logprobs = model(sequences).logits.log_softmax(dim=-1)[:, :-1]
    first, second = logprobs.topk(2).values.unbind(dim=-1)
    tokens = logprobs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
    written = sequences[:, prompts.shape[1] :]
    return sequences, Expected(written, tokens, logprobs.argmax(dim=-1), first - second)


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a checkpoint after a function of its config and its weights."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("config.json", "model.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    config, weights = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    change(config, weights)
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def scaled(_config: Any, weights: Any) -> None:
    weights["model.layers.5.patch.1.scale"].mul_(1.02)


def without_a_scale(_config: Any, weights: Any) -> None:
    del weights["model.layers.5.patch.1.scale"]


def without_all_patches(_config: Any, weights: Any) -> None:
    for name in [name for name in weights if "patch." in name]:
        del weights[name]


def called_stock(config: Any, _weights: Any) -> None:
    config.update(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
    del config["auto_map"], config["linearpatch"]


FAULTS = {change.__name__: change for change in (scaled, without_a_scale, without_all_patches, called_stock)}


def models(dense: PreTrainedModel, tokenizer: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    windows = token_windows(tokenizer, demo_text("calibration"), length=256, count=4)
    statistics = calibrate(dense, windows.split(1), moments=[SPAN, LONG_SPAN])

    def cut(span: Span, fit: str) -> PreTrainedModel:
        return apply_plan(dense, PrunePlan(30, (Joint(span, fit_patch(statistics.at(span), fit), fit),)))

    for name, fit in FITS.items():
        yield name, cut(SPAN, fit)
    short = cut(LONG_SPAN, "hadamard-low-rank")
    scales = torch.rand(2, 576, generator=torch.Generator().manual_seed(7)) + 0.5
    more = {joint: DiagonalPatch(576) for joint in (5, 6)}
    for patch, scale in zip(more.values(), scales, strict=True):
        patch.load_state_dict({"scale": scale})
    yield SHORT, patched_model(short, more)


@pytest.fixture(scope="module")
def results(demo: tuple[PreTrainedModel, Any]) -> Iterator[tuple[dict[str, Expected], dict[str, Any]]]:
    """What Transformers gives here, and what vLLM gave there, in one process for all."""
    prompts = token_windows(demo[1], demo_text("heldout"), length=48, count=3)
    expected: dict[str, Expected] = {}
    jobs: dict[str, Any] = {}
    # Gigabytes, which pytest would keep for three runs.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for case, model in models(*demo):
            forced, expected[case] = expected_of(model, prompts)
            save_checkpoint(model, demo[1], root / case)
            sequences = {"prompts": prompts.tolist(), "forced": forced.tolist(), "new_tokens": NEW_TOKENS}
            jobs[case] = {"directory": str(root / case), "compiled": case == SHORT, **sequences}
        for fault, change in FAULTS.items():
            directory = changed(root / SHORT, root / fault, change)
            jobs[fault] = {**jobs[SHORT], "directory": str(directory), "compiled": False}
        yield expected, asked_of_vllm(jobs, root)


def asked_of_vllm(jobs: dict[str, Any], root: Path) -> dict[str, Any]:
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(root / "vllm-cache"),
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    apart = Path(__file__).with_name("vllm_apart.py")
    run = subprocess.run(
        [VENV / "bin" / "python", "-I", apart, root / "jobs.json", root / "results.json"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    print({name: found[name] for name in ("versions", "seconds", "peak memory, GB")})
    return found


def largest_difference(found: dict[str, Any], expected: Expected) -> float:
    return float((torch.tensor(found["logprobs"]) - expected.logprobs).abs().max())


def test_the_checkpoint_is_alone(results: Any) -> None:
    found = results[1]
    assert not found["package is installed"]
    assert f"vllm-cpu=={found['versions']['vllm']}\n" in REQUIREMENTS.read_text()


@pytest.mark.parametrize("case", [*FITS, SHORT])
def test_it_is_the_model_of_transformers(results: Any, case: str) -> None:
    expected, found = results[0][case], results[1][case]
    assert "error" not in found, found["error"]
    difference = largest_difference(found, expected)
    sure = expected.gaps > 2 * TOLERANCE
    print(f"{case}: log-probabilities within {difference:.1e}, {int(sure.sum())} of {sure.numel()} tokens are sure")
    assert difference <= TOLERANCE
    assert sure.float().mean() > 0.9
    assert torch.equal(torch.tensor(found["best"])[sure], expected.best[sure])
    # What was written goes another way behind a tie.
    sure_so_far = sure[:, -NEW_TOKENS:].cumprod(dim=1).bool()
    assert torch.equal(torch.tensor(found["written"])[sure_so_far], expected.written[sure_so_far])


def test_the_patch_matters(results: Any) -> None:
    """A patch whose scale is 2 % larger is another model; so is one without a patch."""
    expected, found = results
    difference = largest_difference(found["scaled"], expected[SHORT])
    print(f"scaled: log-probabilities differ by up to {difference:.2f}")
    assert difference > 20 * TOLERANCE
    assert found["scaled"]["best"] != expected[SHORT].best.tolist()
    for case in ("hadamard", "low-rank", "dense"):
        assert found[case]["written"] != found["stock"]["written"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("without_a_scale", "were not initialized from checkpoint.*layers.5.patch.1.scale"),
        ("without_all_patches", "were not initialized from checkpoint.*patch"),
        ("called_stock", r"no module or parameter named '.*layers\.5\.(output_)?patch'"),
    ],
    ids=["without_a_scale", "without_all_patches", "called_stock"],
)
def test_a_model_that_lacks_its_patch_is_refused(results: Any, fault: str, message: str) -> None:
    """Neither memory that nothing was loaded into, nor the stock model."""
    found = results[1][fault]
    assert set(found) == {"error"}
    assert re.search(message, found["error"])
