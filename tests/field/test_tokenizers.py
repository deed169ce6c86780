"""What a tokenizer does is asked of it, whatever is written beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.fingerprints import fingerprint_tokenizer, same_tokenizer, tokenizer_difference
from linearpatch_kernels.text import leading_tokens, token_windows
from tests.support.field import linearpatch, numbers, save_model, text_file, tiny
from tests.support.tiny import VOCABULARY, tiny_tokenizer

# --- what stands before a text ---------------------------------------------------------------------------------------


def framed(front: list[str], back: list[str] = [], bos: str | None = "<s>") -> PreTrainedTokenizerFast:  # noqa: B006 - only read
    """A tokenizer that puts tokens in front of a text and behind it, with one that it calls its BOS."""
    made = tiny_tokenizer()
    if front or back:
        ids = {token: made.convert_tokens_to_ids(token) for token in [*front, *back]}
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*front, "$A", *back]), special_tokens=list(ids.items())
        )
    made.bos_token = bos
    return made


@pytest.mark.parametrize(
    ("front", "back", "bos"),
    [
        (["<s>"], [], "<s>"),
        ([], [], "<s>"),
        (["<s>"], [], None),
        (["<s>"], [], "9"),
        (["90", "<s>"], [], "<s>"),
        (["90", "91"], [], None),
        (["<s>", "90"], [], "<s>"),
        (["<s>", "90", "91"], [], "<s>"),
        (["<s>"], ["</s>"], "<s>"),
        ([], ["</s>"], "<s>"),
        ([], ["90", "</s>"], None),
        (["90"], ["90"], "90"),
        (["<unk>"], ["</s>"], "<s>"),
    ],
    ids=str,
)
def test_windows_begin_as_texts_do(tmp_path: Path, front: list[str], back: list[str], bos: str | None) -> None:
    """Windows began with `bos_token_id` or nothing: perplexities of models whose texts begin otherwise meant nothing
    (lm-evaluation-harness #1586, #1588, #3333). What the tokenizer puts behind a text is no part of a window."""
    framed(front, back, bos).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    first = made("5 6 7")["input_ids"]
    wanted = [made.convert_tokens_to_ids(token) for token in front]
    assert first == [*wanted, 9, 10, 11, *(made.convert_tokens_to_ids(token) for token in back)]
    assert leading_tokens(made) == wanted
    for count in (None, 2):
        windows = token_windows(made, numbers(200), length=16, count=count)
        assert (windows[:, : len(front)] == windows.new_tensor(wanted)).all()
        body = windows[:, len(front) :].tolist()
        assert body[0] == made(numbers(200), add_special_tokens=False)["input_ids"][: 16 - len(front)]


def test_a_window_without_room_for_a_text_is_refused() -> None:
    made = framed(["<s>", "90"])
    assert token_windows(made, numbers(200), length=3).shape[1] == 3
    with pytest.raises(InputError, match="`length` must be at least 3"):
        token_windows(made, numbers(200), length=2)


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    class Odd:
        def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, 9, 8] if add_special_tokens else [5, 6] for _ in texts]}

    with pytest.raises(InputError, match="windows cannot begin"):
        leading_tokens(Odd())


# --- which two are one -----------------------------------------------------------------------------------------------


def padded_by(token: str) -> Callable[[PreTrainedTokenizerFast], Any]:
    return lambda tokenizer: setattr(tokenizer, "pad_token", token)


SAME: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "pads with a word": padded_by("92"),
    "pads with another word": padded_by("5"),
    "pads with the end": padded_by("</s>"),
    "pads with a new token": lambda made: made.add_special_tokens({"pad_token": "<|pad|>"}),
    "another end": lambda made: setattr(made, "eos_token", "91"),
    "more special tokens": lambda made: made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<x>"]}),
    "pads on the left": lambda made: setattr(made, "padding_side", "left"),
    "a chat template": lambda made: setattr(made, "chat_template", "{{ messages }}"),
    "a longest text": lambda made: setattr(made, "model_max_length", 17),
    "an end behind a text": lambda made: setattr(
        made.backend_tokenizer, "post_processor", TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    ),
}


@pytest.mark.parametrize("case", list(SAME))
def test_what_is_written_beside_makes_no_other_tokenizer(tmp_path: Path, case: str) -> None:
    """trl #6457, trl #3028, torchtune #2119, LMOps #331."""
    changed = tiny_tokenizer()
    SAME[case](changed)
    changed.save_pretrained(tmp_path)
    for tokenizer in (changed, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer_difference(tiny_tokenizer(), tokenizer) == ""
        assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(tiny_tokenizer())


def swapped() -> PreTrainedTokenizerFast:
    words = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    names = [word for word, _ in words]
    names[40], names[41] = names[41], names[40]
    return from_words(names)


def from_words(names: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def splitting_digits() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return made


def with_a_plain_token() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.add_tokens([AddedToken("12", normalized=False), AddedToken("the", normalized=False)])
    return made


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny_tokenizer(VOCABULARY + 7), "other vocabulary: 97 and 104 tokens"),
        (swapped, "other vocabulary: the id of '36' is 40 and 41"),
        (lambda: framed(["<s>"]), "a text begins with other tokens: [] and [1]"),
        (splitting_digits, "other ids for 'Naïve 3.14"),
        (with_a_plain_token, "other vocabulary: 97 and 98 tokens"),
    ],
    ids=["size", "order", "begin", "split", "added"],
)
def test_what_computes_otherwise_is_another_tokenizer_and_said(make: Callable[[], Any], says: str) -> None:
    other = make()
    assert says in tokenizer_difference(tiny_tokenizer(), other)
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tiny_tokenizer())
    assert not same_tokenizer(fingerprint_tokenizer(other), fingerprint_tokenizer(tiny_tokenizer()))


def test_special_tokens_count_alike_inside_and_beside_the_vocabulary() -> None:
    """Files of one tokenizer differ in that: a GGUF lists all tokens in one vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())

    def byte_level(words: list[str]) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made = PreTrainedTokenizerFast(tokenizer_object=backend)
        made.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": ["<|end|>"]})
        return made

    inside, beside = byte_level([*alphabet, "<|begin|>", "<|end|>"]), byte_level(alphabet)
    assert inside.get_vocab() == beside.get_vocab()
    assert tokenizer_difference(inside, beside) == ""


def test_a_teacher_with_another_pad_token_is_no_other_model(tmp_path: Path) -> None:
    """Refused with "different tokenizers" (trl #6457, trl #3028)."""
    text = text_file(tmp_path)
    save_model(tiny(layers=3), tmp_path / "dense")
    again, added = tiny_tokenizer(), tiny_tokenizer()
    again.pad_token = "92"
    added.add_special_tokens({"pad_token": "<|pad|>"})
    dense = tiny(layers=3)
    dense.config.pad_token_id = 96
    common = ["--text", text, "--length", "16", "--device", "cpu"]
    cut = ["prune", tmp_path / "dense", "--drop", "1", "--fit", "scalar", "-o", tmp_path / "out", "--samples", "4"]
    assert linearpatch(*cut, *common) is None
    for name, tokenizer in (("again", again), ("added", added)):
        save_model(dense, tmp_path / name, tokenizer)
        assert (
            linearpatch("evaluate", tmp_path / "out", "--teacher", tmp_path / name, "--windows", "4", *common) is None
        )
        run = ["distill", tmp_path / "out", "--teacher", tmp_path / name, "-o", tmp_path / f"to-{name}"]
        assert linearpatch(*run, "--steps", "1", "--heldout", "2", *common) is None
    save_model(tiny(layers=3), tmp_path / "swapped", swapped())
    save_model(tiny(layers=3, vocab_size=104), tmp_path / "wide", tiny_tokenizer())
    save_model(tiny(layers=3, seed=1), tmp_path / "other")
    for name, says in (("swapped", "the id of '36' is 40 and 41"), ("wide", "vocabulary")):
        error = linearpatch("evaluate", tmp_path / "out", "--teacher", tmp_path / name, *common)
        assert isinstance(error, InputError)
        assert says in str(error)
    run = ["distill", tmp_path / "out", "--teacher", tmp_path / "other", "-o", tmp_path / "to-other"]
    error = linearpatch(*run, "--steps", "1", "--heldout", "2", *common)
    assert isinstance(error, InputError)
    assert "another model than this teacher (other weights)" in str(error)
