"""What the command's tests share: a model and a text on disk, the command, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import linearpatch_kernels.modeling  # noqa: F401 - registers the patched classes
from linearpatch_kernels.cli import main
from linearpatch_kernels.files import RECORDS
from tests.support import gguf_files
from tests.support.tiny import tiny_model

LAYERS, WIDTH, VOCABULARY, CONTEXT = 8, 48, 384, 64
PACKAGE_ROOT = Path(__file__).parent.parent.parent
# What `--samples 6 --length 24` with the fit auto needs is 6 + 4 + 16 windows.
SMALL = ["--samples", "6", "--length", "24", "--rank", "4"]
COMMANDS = ("prune", "merge", "distill", "evaluate", "sweep", "export", "inspect", "doctor", "demo")
PROGRESS = re.compile(r"(note: .+|going on from .+|healing by .+|[a-z][a-z, ]*: \d+/\d+)")
NO_MODEL = "/nowhere/model"


def prose(words: int, seed: int) -> str:
    """Made-up sentences in which a word says something about the next one."""
    lexicon = [first + middle + last for first in "bdfgklmnrst" for middle in "aeiou" for last in ("n", "ra", "lo", "")]
    draw = random.Random(seed)
    at, sentence, sentences = 0, [], []
    for _ in range(words):
        at = (3 * at + draw.randrange(7)) % len(lexicon)
        sentence.append(lexicon[at])
        if len(sentence) > 4 and draw.random() < 0.2:
            sentences.append(" ".join(sentence).capitalize() + ".")
            sentence = []
    return " ".join(sentences)


def trained_tokenizer(text: str, size: int, length: int = CONTEXT) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=length)


def tiny_llama(vocabulary: int = VOCABULARY, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": CONTEXT, "initializer_range": 0.2}
    return tiny_model("llama", layers=layers, seed=seed, **sizes, **tokens)


@dataclasses.dataclass(frozen=True)
class World:
    """Directories and files that every test may read and none may change."""

    root: Path
    text: Path
    model: Path
    pruned: Path

    def copy(self, to: Path) -> Path:
        """A copy of the model that a test may break."""
        return Path(shutil.copytree(self.model, to))


@dataclasses.dataclass(frozen=True)
class Outcome:
    status: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that are not progress."""
        return [line for line in self.stderr.splitlines() if not PROGRESS.fullmatch(line)]

    @property
    def progress(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if PROGRESS.fullmatch(line)]


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["linearpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


Run = Callable[..., Outcome]


def run_apart(*arguments: object, program: str = "", **environment: str) -> Outcome:
    """The same in a process of its own with standard input closed; ``program`` runs before the command."""
    code = f"{program}\nfrom linearpatch_kernels.cli import main\nmain()"
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


def refusal(outcome: Outcome) -> str:
    """The one line that a refused command prints, without ``error: ``."""
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert len(outcome.errors) == 1, outcome.stderr
    line = outcome.errors[0]
    assert line.startswith("error: ")
    # That is how a mistake of the program looks, not one of the person.
    assert "--debug" not in line, line
    assert len(line) > len("error: ") + 15
    return line.removeprefix("error: ")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


def logits_at(directory: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(directory))


def assert_is_picture(file: Path) -> None:
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def changed_plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[World, Path], None]:
    def build(world: World, place: Path) -> None:
        shutil.copytree(world.pruned, place)
        plan = json.loads((place / RECORDS / "plan.json").read_text())
        (place / RECORDS / "plan.json").write_text(json.dumps(change(plan)))

    return build


def with_nan(name: str) -> Callable[[World, Path], Path]:
    def build(world: World, place: Path) -> Path:
        world.copy(place)
        tensors = load_file(place / "model.safetensors")
        tensors[name][3, 5] = torch.nan
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return place

    return build


def gguf_file(place: Path, architecture: str = "llama") -> Path:
    place.parent.mkdir(exist_ok=True)
    return gguf_files.write(place, tiny_llama(32, layers=2), architecture=architecture)
