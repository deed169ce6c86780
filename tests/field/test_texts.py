"""Texts as they come: marks, line ends, encodings, pipes, devices."""

from __future__ import annotations

import gzip
import os
import threading
from pathlib import Path

import pytest

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.text import read_text
from tests.support.field import numbers

PLAIN = numbers(300).replace(" ", "\n", 5)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r", 2).replace("\n", "\r\n", 2).encode(),
    ],
    ids=["mark", "Windows", "old Mac", "all"],
)
def test_the_line_ends_of_every_system_are_one(tmp_path: Path, content: bytes) -> None:
    """A lone carriage return stayed, and became a token of its own."""
    (tmp_path / "text").write_bytes(content)
    assert read_text(tmp_path / "text") == PLAIN


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c", "\ufeff", "\n\r\n"])
def test_other_characters_stay(tmp_path: Path, end: str) -> None:
    """What Unicode calls a line end besides is a character that somebody put there."""
    (tmp_path / "text").write_bytes(f"one{end}two".encode())
    assert read_text(tmp_path / "text") == f"one{end}two".replace("\r\n", "\n")


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode("utf-16"),
        PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-16-be"),
        PLAIN.encode("utf-32"),
        ("é " + PLAIN).encode("latin-1"),
        gzip.compress(PLAIN.encode()),
        b"",
        b" \r\n\t ",
        b"\xed\xa0\x80 text",
        b"\xef\xbb\xbf",
        b"cut short \xe2\x82",
    ],
    ids=["16", "16 le", "16 be", "32", "latin", "packed", "empty", "white", "surrogate", "mark alone", "half a letter"],
)
def test_what_is_no_utf8_text_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match="text") as caught:
        read_text(tmp_path / "text")
    assert "\n" not in str(caught.value)


def test_a_pipe_is_a_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(PLAIN.replace("\n", "\r").encode()))
    writer.start()
    assert read_text(tmp_path / "pipe") == PLAIN
    writer.join()


def test_a_device_without_end_is_no_text() -> None:
    with pytest.raises(InputError, match="binary"):
        read_text("/dev/zero")


def test_a_home_that_is_nobodys_is_told() -> None:
    with pytest.raises(InputError, match="nobody-of-this-name"):
        read_text("~nobody-of-this-name/text")
