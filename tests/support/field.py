"""What the cases share: tiny models and tokenizers on disk, a text, the command in this process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.cli import app
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import Patch
from tests.support.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(3, 40)[None]
SMALL = ["--samples", "6", "--length", "16", "--rank", "4", "--device", "cpu"]


def tiny(family: str = "llama", layers: int = 6, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """`tiny_model` with more positions, and with an output matrix of its own in every family."""
    sizes = {"max_position_embeddings": 256, "tie_word_embeddings": False, **changes}
    return tiny_model(family, layers=layers, seed=seed, **sizes)


def numbers(count: int = 6000, seed: int = 3, top: int = 93) -> str:
    draw = random.Random(seed)
    return " ".join(str(min(top - 1, int(draw.expovariate(0.06)))) for _ in range(count))


def text_file(folder: Path, count: int = 6000, name: str = "numbers.txt") -> Path:
    path = folder / name
    path.write_text(numbers(count))
    return path


def save_model(model: PreTrainedModel, directory: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(directory)
    (tokenizer or tiny_tokenizer(model.config.vocab_size)).save_pretrained(directory)
    return directory


def cut(dense: PreTrainedModel, joints: Mapping[int, Patch]) -> PreTrainedModel:
    """Without its layers 2 and 3 (of six), patched at these depths of what is left."""
    return patched_model(keep_layers(dense, [0, 1, 4, 5]), dict(joints))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def linearpatch(*arguments: object) -> Exception | None:
    """The command, in this process. None where it succeeds, else what it raised."""
    try:
        app([str(argument) for argument in arguments], prog_name="linearpatch", standalone_mode=False)
    except Exception as error:
        return error
    return None


def same(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def failing(code: int, on: Callable[..., bool] = lambda *_: True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A system call that fails with this error where ``on`` says so."""

    def make(call: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any, **kwargs: Any) -> Any:
            if on(*args):
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return fails

    return make


_ISOLATED = """
import sys, importlib.abc
class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "linearpatch_kernels":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
"""


def isolated(code: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What the code prints in a process that cannot import the package; its error is the test's."""
    done = subprocess.run(
        [sys.executable, "-c", _ISOLATED + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
