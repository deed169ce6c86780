"""Texts and token windows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearpatch_kernels import demo_data, fingerprints
from linearpatch_kernels import text as text_module
from linearpatch_kernels.distillation import teacher_store
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.text import (
    cache_dir,
    leading_tokens,
    mixed_windows,
    read_text,
    split_windows,
    token_windows,
    without_shared_runs,
)
from tests.support.tokenizers import WORDS, byte_tokenizer, word_tokenizer


@pytest.fixture(scope="module")
def numbered_text() -> str:
    return " ".join(WORDS)


def positions(windows: torch.Tensor) -> list[int]:
    return (windows.flatten() - 3).tolist()


def test_all_windows_are_the_text_in_order(numbered_text: str) -> None:
    windows = token_windows(word_tokenizer(), numbered_text, length=70)
    assert windows.shape == (3000 // 70, 70)
    assert windows.dtype == torch.long
    assert positions(windows) == list(range(3000 // 70 * 70))


@pytest.mark.parametrize("count", [1, 2, 7, 20, 29, 30])
def test_counted_windows_are_disjoint_spread_and_deterministic(numbered_text: str, count: int) -> None:
    windows = token_windows(word_tokenizer(), numbered_text, length=100, count=count)
    assert windows.shape == (count, 100)
    seen = positions(windows)
    assert len(set(seen)) == len(seen)
    for row in windows:
        assert (row.diff() == 1).all()
    starts = windows[:, 0] - 3
    # Evenly spread: window i begins within one window of its share of the text.
    assert (starts - torch.arange(count) * 3000 / count).abs().max() <= 100
    assert torch.equal(windows, token_windows(word_tokenizer(), numbered_text, length=100, count=count))


def test_few_windows_of_a_long_text_tokenise_only_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    long_text = " ".join(WORDS * 100)
    seen = 0
    original = text_module.token_ids

    def counting(tokenizer: object, texts: list[str], *, special: bool = False) -> list[list[int]]:
        nonlocal seen
        seen += sum(map(len, texts))
        return original(tokenizer, texts, special=special)

    monkeypatch.setattr(text_module, "token_ids", counting)
    windows = token_windows(word_tokenizer(), long_text, length=50, count=10)
    assert windows.shape == (10, 50)
    assert seen < len(long_text) / 50


def test_windows_stay_spread_where_one_stretch_is_too_poor(numbered_text: str) -> None:
    one_huge_word = "x" * 20000
    text = " ".join([*WORDS[:1500], one_huge_word, *WORDS[1500:]])
    windows = token_windows(word_tokenizer(), text, length=50, count=6)
    tokens = torch.tensor(word_tokenizer()(text)["input_ids"])
    assert torch.equal(windows, tokens[:3000].view(60, 50)[::10])


def test_documents_are_joined_by_a_blank_line() -> None:
    tokenizer = byte_tokenizer()
    documents = ["the quick brown fox", "jumps over", "the lazy dog"]
    windows = token_windows(tokenizer, documents, length=2)
    expected = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    assert windows.flatten().tolist() == expected[: len(expected) // 2 * 2]


def test_a_window_equals_the_tokens_of_its_own_characters() -> None:
    tokenizer = byte_tokenizer()
    text = "the quick brown fox jumps over the lazy dog " * 500
    windows = token_windows(tokenizer, text, length=40, count=9)
    for row in windows:
        decoded = tokenizer.decode(row, clean_up_tokenization_spaces=False)
        assert decoded in text
        again = tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"]
        assert again[:-8] == row.tolist()[: len(again) - 8]


@pytest.mark.parametrize("text", ["dog" * 5000, "敏捷的棕色狐狸跳过懒狗" * 600], ids=["one word", "Chinese"])
def test_a_text_without_spaces_has_windows_too(text: str) -> None:
    windows = token_windows(byte_tokenizer(), text, length=64, count=5)
    assert windows.shape == (5, 64)


@pytest.mark.parametrize("count", [None, 4, 12])
def test_every_window_starts_with_the_bos_that_the_tokenizer_adds(numbered_text: str, count: int | None) -> None:
    with_bos = word_tokenizer(bos=True)
    assert leading_tokens(with_bos) == [1]
    windows = token_windows(with_bos, numbered_text, length=101, count=count)
    assert (windows[:, 0] == 1).all()
    assert not (windows[:, 1:] == 1).any()
    assert torch.equal(windows[:, 1:], token_windows(word_tokenizer(), numbered_text, length=100, count=count))


def test_no_bos_where_the_tokenizer_adds_none(numbered_text: str) -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.bos_token_id == 1
    assert leading_tokens(tokenizer) == []
    assert not (token_windows(tokenizer, numbered_text, length=50) == 1).any()


@pytest.mark.parametrize(
    ("length", "count", "message"),
    [
        (100, 31, "it has 3000 tokens and 31 x 100 = 3100 are needed"),
        (3001, None, "it has 3000 tokens and 1 x 3001 = 3001 are needed"),
        (1, 1, "`length` must be at least 2"),
        (10, 0, "at least 1 is needed"),
        # Nothing as long as the count may be made of it.
        (10, 10**20, "1000000000000000000000 are needed"),
    ],
)
def test_what_is_not_there_is_refused(numbered_text: str, length: int, count: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        token_windows(word_tokenizer(), numbered_text, length=length, count=count)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", []], ids=["text", "documents"])
def test_an_empty_text_is_too_short(empty: str | list[str]) -> None:
    for count in (None, 1):
        with pytest.raises(InputError, match="it has 0 tokens"):
            token_windows(word_tokenizer(), empty, length=4, count=count)


def test_a_text_longer_than_the_context_is_no_cause_for_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):  # a command that ran before may have raised its level
        windows = token_windows(tokenizer, "the quick brown fox " * 300, length=40)
        assert windows.numel() > tokenizer.model_max_length
        assert not caplog.records
        tokenizer("the quick brown fox " * 300)
        assert caplog.records, "the tokenizer would have warned"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 9))
def test_split_windows_are_disjoint_and_in_order(sizes: list[int], spare: int) -> None:
    named = {f"set{i}": size for i, size in enumerate(sizes)}
    windows = torch.arange(sum(sizes) + spare).unsqueeze(1).expand(-1, 3)
    sets = split_windows(windows, named)
    assert {name: len(chosen) for name, chosen in sets.items()} == named
    ids = torch.cat(list(sets.values()))[:, 0]
    assert len(ids.unique()) == sum(sizes)
    for chosen in sets.values():
        assert (chosen[:, 0].diff() > 0).all()


def test_split_windows_spread_every_set_over_the_text() -> None:
    windows = torch.arange(72).unsqueeze(1).expand(-1, 4)
    sets = split_windows(windows, {"fit": 64, "heldout": 8})
    held = sets["heldout"][:, 0].double()
    assert (held - (torch.arange(8) + 0.5) * 9).abs().max() <= 2


def test_split_windows_refuses_more_than_there_are() -> None:
    with pytest.raises(InputError, match=r"9 windows are needed \(fit 8, heldout 1\) but there are 8"):
        split_windows(torch.zeros(8, 4, dtype=torch.long), {"fit": 8, "heldout": 1})


def test_read_text_reads_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\nline\n")
    assert read_text(file) == "naïve\nline\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("directory", "is a directory"),
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"GGUF\x03\x00\x00\x00", "is a binary file"),
        (b"caf\xe9", r"is not UTF-8 text \(byte 3\)"),
    ],
)
def test_read_text_refuses(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if content == "directory":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINEARPATCH_CACHE", str(tmp_path / "there"))
    assert cache_dir() == tmp_path / "there"
    monkeypatch.delenv("LINEARPATCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "linearpatch"


def test_the_names_of_0_1_0_are_where_they_were() -> None:
    for module in (demo_data, fingerprints):
        for name in text_module._MOVED[module.__name__.rpartition(".")[2]]:
            assert getattr(text_module, name) is getattr(module, name)
    assert teacher_store.fingerprint_windows is fingerprints.fingerprint_windows
    with pytest.raises(AttributeError, match="no attribute 'fingerprint'"):
        _ = text_module.fingerprint


def test_documents_that_share_a_run_of_words_with_what_is_kept_back_are_left_out() -> None:
    kept_back = ["one two three four five six seven eight nine ten"]
    shares, almost, short = (
        "x two three\nfour five six seven eight  nine y",
        "two three four five six seven eight z",
        "one two",
    )
    assert without_shared_runs([shares, almost, short], kept_back) == [almost, short]
    assert without_shared_runs([shares, almost], kept_back, words=7) == []
    assert without_shared_runs([shares], []) == [shares]


def test_windows_of_several_texts_come_in_equal_shares_and_so_do_their_sets() -> None:
    tokenizer = word_tokenizer()
    texts = {"short": " ".join(WORDS[:200]), "long": [" ".join(WORDS[1000:2000]), " ".join(WORDS[2000:])]}
    windows = mixed_windows(tokenizer, texts, length=8, count=11)
    kinds = [int(window[0]) - 3 >= 1000 for window in windows]
    assert (len(windows), sum(kinds)) == (11, 6)
    # Also where the sets' sizes fit the number of texts.
    for sizes in ({"fit": 8, "heldout": 2}, {"fit": 5, "heldout": 5}, {"fit": 6, "heldout": 2, "report": 2}):
        for name, share in split_windows(windows, sizes).items():
            assert sum(int(window[0]) - 3 < 1000 for window in share) in (len(share) // 2, -(-len(share) // 2)), name
    for kind, share in (("short", 5), ("long", 6)):
        mine = windows[[place for place, long in enumerate(kinds) if long == (kind == "long")]]
        assert torch.equal(mine, token_windows(tokenizer, texts[kind], length=8, count=share))
    weighed = mixed_windows(tokenizer, texts, length=8, count=12, weights={"short": 1, "long": 3})
    assert sum(int(window[0]) - 3 < 1000 for window in weighed) == 3
    everything = mixed_windows(tokenizer, texts, length=8)
    assert sum(int(window[0]) - 3 < 1000 for window in everything) == len(everything) / 2 == 25
    with pytest.raises(InputError, match="short: the text is too short"):
        mixed_windows(tokenizer, texts, length=8, count=100)
    with pytest.raises(InputError, match="no text"):
        mixed_windows(tokenizer, {}, length=8, count=3)
