"""What the cases share: tiny models and tokenizers on disk, a text, the command in this process."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearpatch_kernels.cli import app
from linearpatch_kernels.modeling.families import keep_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import Patch

VOCABULARY = 97
IDS = torch.arange(3, 40)[None]
SMALL = ["--samples", "6", "--length", "16", "--rank", "4", "--device", "cpu"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 3,
    "tie_word_embeddings": False,
}
_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma3_text": "Gemma3Text",
}


def tiny(family: str = "llama", layers: int = 6, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM in evaluation mode."""
    config_class = getattr(transformers, _CLASSES[family] + "Config")
    model_class = getattr(transformers, _CLASSES[family].removesuffix("Text") + "ForCausalLM")
    known = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in {**_SIZES, **changes}.items() if name in known}
    if family == "gemma3_text":
        sizes.setdefault("sliding_window_pattern", 3)
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(num_hidden_layers=layers, **sizes)).eval()
    return model


def word_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word a number; ``<pad>``, ``<s>``, ``</s>`` and ``<unk>`` are the ids 0 to 3."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(size - 4))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def numbers(count: int = 6000, seed: int = 3, top: int = 93) -> str:
    draw = random.Random(seed)
    return " ".join(str(min(top - 1, int(draw.expovariate(0.06)))) for _ in range(count))


def text_file(folder: Path, count: int = 6000, name: str = "numbers.txt") -> Path:
    path = folder / name
    path.write_text(numbers(count))
    return path


def save_model(model: PreTrainedModel, directory: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(directory)
    (tokenizer or word_tokenizer(model.config.vocab_size)).save_pretrained(directory)
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
