"""Which engine runs which kind of result, and how fast: ``python -m benchmarks.studies.engines``.

Of the demo model: merged, refitted (both stock), and with a patch (structured, dense). Each is made anew, with little
text, because how good it is does not matter here. Every engine loads each from its directory, writes after prompts
with temperature 0, and reads and writes for the clock: one sequence, float32, one thread (two that wait for each other
tell more of what else the machine does). In every round of an engine all results have their turn, the dense model
first, and are held against it. vLLM runs where ``make vllm`` put it, llama.cpp by a Python that has llama-cpp-python,
which ``LINEARPATCH_LLAMA_CPP`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

import linearpatch_kernels as lp
from benchmarks.record import add_option, record
from benchmarks.speed.hardware import describe
from benchmarks.speed.table import markdown
from linearpatch_kernels.demo_data import demo_model_path, demo_text
from linearpatch_kernels.evaluation.latency import compare_speed
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.text import token_windows
from tools.engines.llama_cpp import PYTHON as LLAMA_CPP
from tools.engines.llama_cpp import can_import
from tools.engines.vllm import VENV, environment_of_vllm, is_complete, plug_in
from tools.engines.writing import continued

DENSE = "dense"
PROMPTS, PROMPT, WRITTEN = 4, 32, 32
READ, NEW, REPEATS = 256, 32, 5
ROUNDS = 2
HEADER = ("engine", "result", "loads", "same tokens", "prefill", "prefill / dense", "decode", "decode / dense")


def made(root: Path) -> dict[str, Path]:
    """The dense model and the results, in a folder; what is there already stays."""
    cut: Any = {"drop": 6, "samples": 8, "length": 128}
    ways: dict[str, tuple[str, Callable[[Path], Any]]] = {
        DENSE: ("dense", lambda place: save_checkpoint(*load_model(demo_model_path(), device="cpu"), place)),
        "stock, merged": (
            "merged",
            lambda place: lp.merge("demo", layers=24, output=place, variant="come", samples=4, length=128),
        ),
        "stock, refitted": ("refitted", lambda place: lp.prune("demo", output=place, heal="refit", **cut)),
        "patched, structured": (
            "structured",
            lambda place: lp.prune("demo", output=place, fit="hadamard-low-rank", **cut),
        ),
        "patched, dense": ("dense-patch", lambda place: lp.prune("demo", output=place, fit="least-squares", **cut)),
    }
    for name, make in ways.values():
        if not (root / name).exists():
            make(root / name)
    return {kind: root / name for kind, (name, _) in ways.items()}


def prompts_of(tokenizer: Any) -> torch.Tensor:
    return token_windows(tokenizer, demo_text("heldout"), length=PROMPT, count=PROMPTS)


def written(model: PreTrainedModel, prompts: torch.Tensor, **options: Any) -> list[list[int]]:
    return list(continued(model, prompts, WRITTEN, **options)[:, prompts.shape[1] :].tolist())


class Found(NamedTuple):
    """Per round and result what `in_vllm.measured` tells, and the versions of what ran."""

    rounds: list[dict[str, Any]]
    versions: dict[str, str]


def by_transformers(results: Mapping[str, Path]) -> Found:
    """With the cache, one result after the other in every repeat."""
    models = {name: load_model(path, device="cpu") for name, path in results.items()}
    prompts = prompts_of(next(iter(models.values()))[1])
    plain = {name: model for name, (model, _) in models.items()}
    speeds = compare_speed(plain, prompt_tokens=READ, new_tokens=NEW, repeats=REPEATS)
    found = {
        name: {
            "written": written(model, prompts),
            "prefill": READ / speeds[name].prefill_tokens_per_second,
            "decode": NEW / speeds[name].decode_tokens_per_second,
        }
        for name, model in plain.items()
    }
    return Found([found], {"torch": torch.__version__, "transformers": transformers.__version__})


def asked(python: Path, script: str, job: Mapping[str, Any], root: Path, **environment: str) -> Found:
    """What a script beside this one tells in a process of another environment, asked for tokens and seconds."""
    _, tokenizer = load_model(demo_model_path(), device="cpu")
    job = {
        **job,
        "prompts": prompts_of(tokenizer).tolist(),
        "written": WRITTEN,
        "prompt_tokens": READ,
        "new_tokens": NEW,
        "repeats": REPEATS,
        "rounds": ROUNDS,
        "vocabulary": len(tokenizer),
    }
    (root / "job.json").write_text(json.dumps(job))
    run = subprocess.run(
        [python, Path(__file__).with_name(script), root / "job.json", root / "results.json"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return Found(**json.loads((root / "results.json").read_text()))


def by_vllm(results: Mapping[str, Path], *, plugged: bool, **options: Any) -> Found:
    """What vLLM makes of the results, with the plug-in or without this package."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        job = {"directories": {kind: str(path) for kind, path in results.items()}, "options": options}
        environment = environment_of_vllm(root, plug_in(root) if plugged else None)
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return asked(VENV / "bin" / "python", "in_vllm.py", job, root, **environment)


def by_llama_cpp(results: Mapping[str, Path], dtype: str) -> Found:
    """What llama.cpp makes of what `lp.export` writes."""
    refused: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root, files = Path(name), {}
        for kind, path in results.items():
            file = root / f"{path.name}.gguf"
            try:
                lp.export(path, to="gguf", output=file, dtype=dtype)
                files[kind] = str(file)
            except lp.InputError as error:
                # Without what to do instead.
                refused[kind] = {"error": str(error).partition(":")[0].replace(str(path), "this")}
        found = asked(LLAMA_CPP, "in_llama_cpp.py", {"files": files}, root, **os.environ)
    return Found([{**one, **refused} for one in found.rounds], found.versions)


ENGINES: dict[str, Callable[[Mapping[str, Path]], Found]] = {
    "Transformers, with the cache": by_transformers,
    "vLLM, compiled": lambda results: by_vllm(results, plugged=True),
    "vLLM without this package, by its Transformers backend, eager": lambda results: by_vllm(
        results, plugged=False, enforce_eager=True, model_impl="transformers", trust_remote_code=True
    ),
    "llama.cpp, f16": lambda results: by_llama_cpp(results, "f16"),
    "llama.cpp, q8_0": lambda results: by_llama_cpp(results, "q8_0"),
}


def rows_of(
    engine: str, rounds: Sequence[Mapping[str, Any]], expected: Mapping[str, Sequence[Sequence[int]]]
) -> list[list[str]]:
    """One row per result; ``expected``: the tokens that each should write."""
    rows = []
    for result, should in expected.items():
        found = [one[result] for one in rounds]
        error = next((one["error"] for one in found if "error" in one), None)
        if error is not None:
            rows.append([engine, result, f"no: {error.splitlines()[0]:.100}", *[""] * 5])
            continue
        same = torch.tensor(found[0]["written"]) == torch.tensor(should)
        speeds = []
        for what, tokens in (("prefill", READ), ("decode", NEW)):
            speeds.append(f"{tokens / statistics.median(one[what] for one in found):,.0f}")
            ratios = [one[DENSE][what] / one[result][what] for one in rounds]
            speeds.append(f"{statistics.median(ratios):.2f}")
        rows.append([engine, result, "yes", f"{int(same.sum())} of {same.numel()}", *speeds])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.engines", description=__doc__)
    parser.add_argument(
        "--models", type=Path, help="where the results are, or will be made; default: made for this run"
    )
    add_option(parser)
    options = parser.parse_args()
    if not is_complete(VENV):
        parser.error(f"there is no vLLM in {VENV}: `make vllm` installs it")
    if not can_import(LLAMA_CPP):
        parser.error("there is no llama-cpp-python: LINEARPATCH_LLAMA_CPP names a Python that has it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        results = made(options.models or Path(name))
        expected = {}
        for kind, path in results.items():
            model, tokenizer = load_model(path, device="cpu")
            expected[kind] = written(model, prompts_of(tokenizer), use_cache=False)
        rows: list[list[str]] = []
        versions: dict[str, str] = {}
        for engine, run in ENGINES.items():
            found = run(results)
            rows += rows_of(engine, found.rounds, expected)
            # vLLM has a torch and a transformers of its own.
            owner = "vLLM's " if "vllm" in found.versions else ""
            versions |= {name if name == "vllm" else owner + name: one for name, one in found.versions.items()}
            print(markdown(HEADER, rows[-len(results) :]), flush=True)
    print(describe(), versions)
    if options.json:
        note = "SmolLM2-135M, float32 where nothing else is named, one thread; tokens per second, "
        note += f"of {READ} in a prompt and of {NEW} new ones"
        record(options.json, {"engines": (HEADER, rows)}, versions=versions, note=note)


if __name__ == "__main__":
    main()
