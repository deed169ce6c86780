"""llama.cpp runs exported models: its log-probabilities and greedy tokens are those of Transformers here.

In the Python that ``LINEARPATCH_LLAMA_CPP`` names, or that of an environment in the cache, which needs llama-cpp-python
and nothing else: ``python -m venv VENV && VENV/bin/pip install llama-cpp-python``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import linearpatch_kernels as lp
from linearpatch_kernels.demo_data import demo_text
from linearpatch_kernels.text import token_windows
from tests.support.gguf_models import ROPES, TOKENIZERS, byte_level, model_for, with_rope
from tests.support.tiny import FAMILY_NAMES
from tools.engines.llama_cpp import PYTHON, can_import
from tools.engines.writing import Expected, expected_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.demo,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not can_import(PYTHON),
        reason="no Python with llama-cpp-python: LINEARPATCH_LLAMA_CPP names one",
    ),
]

NEW_TOKENS = 24
# In nats, of single tokens: the largest difference that is allowed, and the mean. With f16, llama.cpp rounds what it
# multiplies, too; with q8_0 the weights are others than in Transformers, so that only the mean says something. It looks
# up Gemma's activation in a table of float16.
TOLERANCES = {"f32": (5e-4, 5e-5), "f16": (0.05, 1e-2), "q8_0": (1.5, 0.15)}
GEMMA = (0.05, 5e-3)
TEXTS = [
    "The quick brown fox doesn't jump over 12 lazy dogs, THEY'LL say.",
    "x = 12345 // 7\n\n\tif (a[i] != b->c) {\r\n}  # ok",
    "naïve Straße 漢字 हिन्दी 🙂",
    "a  b   c\n\n\n d",
    "<s>inside</s>",
]
# Where the tokenizer puts no space behind a special token llama.cpp does, which an export tells.
LESS = {"llama": 1}


class Made:
    """Files in a folder, what is asked of each, and what Transformers gives."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, Any] = {}
        self.expected: dict[str, Expected] = {}

    @torch.no_grad()
    def add(self, name: str, model: PreTrainedModel, tokenizer: Any, prompts: Tensor, dtype: str = "f32") -> None:
        file = self.root / f"{name}.gguf"
        lp.export(model, tokenizer=tokenizer, to="gguf", output=file, dtype=dtype)
        forced, self.expected[name] = expected_of(model, prompts, NEW_TOKENS)
        sequences = {"prompts": prompts.tolist(), "forced": forced.tolist(), "new_tokens": NEW_TOKENS}
        context = model.config.max_position_embeddings
        self.jobs[name] = {"file": str(file), "context": min(context, 512), "texts": TEXTS, **sequences}
        self.jobs[name]["wanted"] = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


@pytest.fixture(scope="module")
def made(demo: tuple[PreTrainedModel, Any]) -> Iterator[Made]:
    # Gigabytes, which pytest would keep for three runs.
    with tempfile.TemporaryDirectory() as name:
        made = Made(Path(name))
        prompts = token_windows(demo[1], demo_text("heldout"), length=48, count=8)
        for dtype in TOLERANCES:
            made.add(f"demo, {dtype}", *demo, prompts, dtype)
        # More than the 64 tokens behind which longrope takes its other factors.
        few = torch.randint(3, 250, (2, 70), generator=torch.Generator().manual_seed(3))
        for family in FAMILY_NAMES:
            tokenizer = TOKENIZERS[family]()
            made.add(family, model_for(family, tokenizer), tokenizer, few)
        for case, (family, rope) in ROPES.items():
            # llama-cpp-python puts numbers of its own in the place of these two.
            if "beta_fast" not in rope:
                made.add(case, with_rope(family, byte_level(), rope), byte_level(), few)
        yield made


@pytest.fixture(scope="module")
def found(made: Made) -> dict[str, Any]:
    jobs, results = made.root / "jobs.json", made.root / "results.json"
    jobs.write_text(json.dumps(made.jobs))
    apart = Path(__file__).with_name("llama_cpp_apart.py")
    run = subprocess.run([PYTHON, apart, jobs, results], capture_output=True, text=True, cwd=made.root)
    assert run.returncode == 0, run.stderr[-3000:]
    answers: dict[str, Any] = json.loads(results.read_text())
    print("llama-cpp-python", answers["version"], file=sys.stderr)
    return answers


CASES = [*(f"demo, {dtype}" for dtype in TOLERANCES), *FAMILY_NAMES, *(c for c in ROPES if c != "yarn, all")]


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_transformers_does(case: str, made: Made, found: dict[str, Any]) -> None:
    assert "error" not in found[case], found[case]["error"]
    written, logprobs, best, gaps = made.expected[case]
    most, mean = TOLERANCES[case.removeprefix("demo, ")] if case.startswith("demo, ") else TOLERANCES["f32"]
    if "gemma" in case.lower():
        most, mean = GEMMA
    difference = (torch.tensor(found[case]["logprobs"], dtype=torch.float64) - logprobs).abs()
    equal = torch.tensor(found[case]["written"]) == written
    its_best = torch.tensor(found[case]["best"])
    print(
        f"{case}: log-probabilities within {float(difference.max()):.1e}, {float(difference.mean()):.1e} in the mean; "
        f"the best token is the same at {int((its_best == best).sum())} of {best.numel()} positions; "
        f"{int(equal.sum())} of {equal.numel()} written tokens equal"
    )
    assert float(difference.max()) <= most
    assert float(difference.mean()) <= mean
    sure = gaps > 2 * most
    assert torch.equal(its_best[sure], best[sure])
    # What was written goes another way behind a tie.
    assert equal[sure[:, -NEW_TOKENS:].cumprod(dim=1).bool()].all()


@pytest.mark.parametrize("case", ["demo, f16", *FAMILY_NAMES])
def test_it_splits_texts_as_the_tokenizer_does(case: str, made: Made, found: dict[str, Any]) -> None:
    some = len(TEXTS) - LESS.get(case, 0)
    assert found[case]["tokens"][:some] == made.jobs[case]["wanted"][:some]
