"""The tokenizer of an output is that of its input, whatever class the input's files name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.loading import load_model
from linearpatch_kernels.modeling.saving import save_checkpoint
from linearpatch_kernels.nn import LowRankPatch
from tests.support.field import SMALL, cut, isolated, linearpatch, save_model, text_file, tiny
from tests.support.tiny import tiny_tokenizer

TEXT = "Naïve 3.14 — the Quick\n\n\tbrown fox's 12345 日本語 🙂  end\r\ndef f(x):\n    return x"
CLASSES = {
    "llama": ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizer"],
    "mistral": ["LlamaTokenizerFast", "PreTrainedTokenizerFast"],
    "qwen2": ["Qwen2Tokenizer", "PreTrainedTokenizerFast"],
    "qwen3": ["Qwen2Tokenizer"],
    "phi3": ["LlamaTokenizerFast", "GPT2Tokenizer"],
    "gemma3_text": ["GemmaTokenizerFast", "PreTrainedTokenizerFast"],
}
PAIRS = [(family, name) for family, names in CLASSES.items() for name in names]


def write_byte_level(folder: Path, tokenizer_class: str) -> None:
    """A byte-level BPE with its own splitting of lines and digits, whose config names this class."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([TEXT * 4, "the fox and the quick brown return of the end " * 20], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Family and class -> a folder with a model ``dense`` and its cuts ``stock`` and ``patched``."""
    places = {}
    for family, name in PAIRS:
        folder = tmp_path_factory.mktemp(f"{family}-{name}")
        tiny(family, vocab_size=400).save_pretrained(folder / "dense")
        write_byte_level(folder / "dense", name)
        dense, tokenizer = load_model(folder / "dense", device="cpu")
        save_checkpoint(keep_layers(dense, [0, 1, 4, 5]), tokenizer, folder / "stock")
        save_checkpoint(cut(dense, {2: LowRankPatch(48, 2)}), tokenizer, folder / "patched")
        places[family, name] = folder
    return places


def ids_of(directory: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    return ids


@pytest.mark.parametrize("output", ["stock", "patched"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_it_gives_the_same_ids(made: dict[tuple[str, str], Path], pair: tuple[str, str], output: str) -> None:
    """A file that names a class was read with that class's own rules, and written with them: transformers #44462,
    #44463."""
    folder = made[pair]
    wanted = ids_of(folder / "dense")
    assert len(wanted) > 20
    assert ids_of(folder / output) == wanted


_ALONE = """
import json
from transformers import AutoTokenizer
tokenizers = [AutoTokenizer.from_pretrained(place, trust_remote_code=True) for place in sys.argv[2:]]
print(json.dumps([tokenizer(sys.argv[1])["input_ids"] for tokenizer in tokenizers]))
"""


@pytest.mark.slow
def test_it_gives_the_same_ids_without_this_package(made: dict[tuple[str, str], Path]) -> None:
    """The config beside it is a patched model's own, of a class that only its code file knows: as above."""
    outputs = ("dense", "stock", "patched")
    directories = [folder / output for folder in made.values() for output in outputs]
    found = json.loads(isolated(_ALONE, TEXT, *directories).splitlines()[-1])
    assert len(found) == len(PAIRS) * len(outputs)
    for i, pair in enumerate(made):
        dense, stock, patched = found[3 * i : 3 * i + 3]
        assert stock == dense == patched, pair


@pytest.mark.parametrize("fit", ["none", "linearpatch"])
def test_what_is_written_beside_the_vocabulary_comes_along(fit: str, tmp_path: Path) -> None:
    """Added tokens, the side of the padding, the chat template: a cut by the command keeps them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["12 34"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = "{% for m in messages %}<tool> {{ m['content'] }} {% endfor %}"
    dense = save_model(tiny(vocab_size=len(tokenizer)), tmp_path / "dense", tokenizer)
    about = json.loads((dense / "tokenizer_config.json").read_text())
    sides = {"padding_side": "left", "truncation_side": "left", "model_max_length": 77}
    (dense / "tokenizer_config.json").write_text(json.dumps(about | sides))
    flags = ["--spans", "2:4", "--fit", fit, "--text", text_file(tmp_path), *SMALL]
    assert linearpatch("prune", dense, "-o", tmp_path / "out", *flags) is None
    source, found = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("dense", "out"))
    text = "5 12 34 <tool> 7 12"
    assert found(text)["input_ids"] == source(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert {name: getattr(found, name) for name in sides} == sides
    chat = [{"role": "user", "content": "8 9"}]
    assert found.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert found(["5", "6 7 8"], padding=True)["input_ids"][0][0] == found.pad_token_id
