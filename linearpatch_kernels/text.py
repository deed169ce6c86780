"""Where text comes from, and how it becomes windows of tokens.

Everything downstream (calibration, distillation, evaluation) takes the ``[count, length]`` LongTensor of
:func:`token_windows` and nothing else, so that what is a sample is decided in one place.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import expanded, reading

# Long enough that a cut costs nothing, short enough that a tokenizer's memory stays small.
_PIECE_CHARACTERS = 1 << 16
# The last tokens of a cut-off string can differ from those of the whole string, so a window never uses them.
_MARGIN_TOKENS = 8
# Read of a text at a time.
_READ_BYTES = 1 << 24
# Of a share: sums of ninths are not whole numbers.
_ROUNDING = 1e-9
_TEXT_CURE = "give a UTF-8 text file"


def cache_dir() -> Path:
    """The directory for what is expensive to make again: ``$LINEARPATCH_CACHE``, else ``~/.cache/linearpatch``.

    It is not created here.
    """
    named = os.environ.get("LINEARPATCH_CACHE")
    if named:
        return expanded(named)
    try:
        return Path.home() / ".cache" / "linearpatch"
    except RuntimeError as error:
        raise InputError("there is no home directory to keep converted models in: set LINEARPATCH_CACHE") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file or pipe: a byte-order mark in front goes, and every line ends in ``\\n``.

    The line ends of Unix, Windows and old Macs (``\\n``, ``\\r\\n``, ``\\r``) are one thing, written by three systems.
    What Unicode calls a line end besides (U+2028, U+2029, NEL, form feed, vertical tab) is a character that somebody
    put there: it stays.

    Raises:
        InputError: missing, a directory, not readable, not UTF-8 text, or nothing but white space.
    """
    with reading(path, _TEXT_CURE):
        file = Path(path).expanduser()
        if file.is_dir():
            raise InputError(f"{file} is a directory: give one UTF-8 text file")
        if not file.exists():
            raise InputError(f"{file} does not exist: {_TEXT_CURE}")
        raw = _bytes_of_text(file)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, or give another file"
            ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InputError(f"{file} is empty: give a UTF-8 text file with some prose in it")
    return text


def _bytes_of_text(file: Path) -> bytes:
    """All bytes of the file, read no further than to the first that no text has: a device may have no end."""
    parts = []
    with open(file, "rb") as stream:
        while part := stream.read(_READ_BYTES):
            if b"\0" in part:
                raise InputError(f"{file} is a binary file, or text of another encoding (UTF-16, UTF-32): {_TEXT_CURE}")
            parts.append(part)
    return b"".join(parts)


# Sentences in which tokenizers differ: accents, digits, white space, code, scripts, compatibility forms.
PROBES = (
    "Naïve 3.14 — test\n\n\tdéjà-vu: the Quick brown fox's 日本語 🙂  end",
    "def area(r):\n    return 3.14159 * r**2  # for 1234567 calls\r\n\t\treturn None\n\n\n",
    " They're all here; we'll see (it's 10:45)…   and DON'T   ",
    "Übergrößenträger, Ελληνικά, русский язык, العربية, हिन्दी, 한국어, ไทย",
    "ＡＢＣ ﬁ ½ ① e\u0301 \u00a0x\u200by",
    "0 1 2 3 12 45 678 90210",
    "a",
)


def leading_tokens(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts in front of a text: a BOS (Llama, Gemma), none (SmolLM2, Qwen), any.

    The tokenizer is asked, whatever its ``bos_token`` says: what stands before the tokens of a probing sentence when it
    is tokenised as a text. What it puts behind a text is not part of it.

    Raises:
        InputError: a text has other tokens as soon as something stands around it.
    """
    ambiguous: list[int] | None = None
    for probe in PROBES:
        plain, whole = (token_ids(tokenizer, [probe], special=special)[0] for special in (False, True))
        places = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        if plain and len(places) == 1:
            return whole[: places[0]]
        if places and ambiguous is None:
            ambiguous = whole[: places[0]]
    if ambiguous is None:
        raise InputError(
            "the tokenizer gives a text other tokens when it puts special tokens around it, so windows cannot begin as "
            "a text does: give a model with another tokenizer"
        )
    return ambiguous


def token_windows(tokenizer: Any, text: str | Sequence[str], *, length: int, count: int | None = None) -> Tensor:
    """Non-overlapping windows of tokens, in the order of the text: LongTensor ``[count, length]``.

    Documents are joined by a blank line and tokenised without special tokens; what the tokenizer puts in front of a
    text by itself (`leading_tokens`) every window starts with, too (it counts among the ``length`` tokens; a Llama or
    Gemma without its BOS has a meaningless perplexity).

    With ``count``, the text is cut into ``count`` stretches of equal size (at a space near the cut) and each gives its
    first tokens: the windows are spread evenly, and no more than about two windows' worth of characters is tokenised
    per window, however long the text. Only if a stretch is too short for that, and always without ``count``, the whole
    text is tokenised, in pieces of at most 65,536 characters, and its consecutive windows are taken: every one, or
    ``count`` of them at even distances. Same input, same windows.

    Windows of one call never overlap. For a calibration and a held-out set from one text make one call and share its
    result out with :func:`split_windows`.

    Args:
        tokenizer: a Transformers tokenizer.
        text: one text, or documents.
        length: tokens per window, at least 2.
        count: how many windows; None: as many as there are.

    Raises:
        InputError: the text is too short (the message says how many tokens it has), or ``length`` or ``count`` is too
            small.
    """
    if length < 2:
        raise InputError(f"a window of {length} tokens predicts nothing: `length` must be at least 2")
    if count is not None and count < 1:
        raise InputError(f"{count} windows were asked for: at least 1 is needed")
    joined = text if isinstance(text, str) else "\n\n".join(text)
    start = leading_tokens(tokenizer)
    if length <= len(start):
        raise InputError(
            f"a window of {length} tokens holds only the {len(start)} that the tokenizer puts in front of a text: "
            f"`length` must be at least {len(start) + 1}"
        )
    bodies = _spread_bodies(tokenizer, joined, length - len(start), count) if count is not None else None
    if bodies is None:
        bodies = _consecutive_bodies(tokenizer, joined, length - len(start), count)
    windows = torch.tensor(bodies, dtype=torch.long, device="cpu")
    return torch.cat([torch.tensor(start, dtype=torch.long, device="cpu").expand(len(windows), -1), windows], dim=1)


def mixed_windows(
    tokenizer: Any,
    texts: Mapping[str, str | Sequence[str]],
    *,
    length: int,
    count: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """Windows of several texts in shares: LongTensor ``[count, length]``.

    `token_windows` of each text, one text behind the other: as `split_windows` spreads its sets over all of them, every
    set has its share of every text. (Interleaved windows would fall into step with the turns of the sets.)

    Args:
        texts: by name, in their order.
        count: how many windows of all texts together; None: as many as the text that is used up first allows.
        weights: what the shares are in proportion to, by name; None: equal ones.

    Raises:
        InputError: no text; one is too short for its share (it is named); or what `token_windows` raises.
    """
    if not texts:
        raise InputError("there is no text: give at least one")
    parts = [1.0 if weights is None else weights[name] for name in texts]
    ends = [end / sum(parts) for end in itertools.accumulate(parts)]
    bounds = None if count is None else [0, *(math.floor(count * end + _ROUNDING) for end in ends)]
    shares = [None] * len(texts) if bounds is None else [end - start for start, end in itertools.pairwise(bounds)]
    found = []
    for (name, text), share in zip(texts.items(), shares, strict=True):
        if share != 0:
            try:
                found.append(token_windows(tokenizer, text, length=length, count=share))
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
    if count is None:
        of_one = min(len(windows) / part for windows, part in zip(found, parts, strict=True))
        takes = [max(1, math.floor(of_one * part + _ROUNDING)) for part in parts]
        found = [
            windows[[len(windows) * j // take for j in range(take)]] for windows, take in zip(found, takes, strict=True)
        ]
    return torch.cat(found)


def split_windows(windows: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Share windows out to named, disjoint sets, each spread over the whole text.

    ``split_windows(token_windows(..., count=72), {"fit": 64, "heldout": 8})``: every set of s windows takes the windows
    nearest to the positions (j + 1/2) / s of the text, in turns; what is left over is not used. Deterministic.

    Args:
        windows: ``[count, length]``, from one call of :func:`token_windows`.
        sizes: windows per set.

    Returns:
        The sets, ``[size, length]`` each, in the order of the text.

    Raises:
        InputError: more windows asked for than there are.
    """
    wanted = sum(sizes.values())
    if wanted > len(windows) or min(sizes.values(), default=0) < 0:
        raise InputError(f"{wanted} windows are needed ({_listed(sizes)}) but there are {len(windows)}: give more text")
    shares: list[tuple[str | None, int]] = [*sizes.items(), (None, len(windows) - wanted)]
    turns = sorted(((2 * j + 1) / (2 * size), k) for k, (_, size) in enumerate(shares) for j in range(size))
    owner = torch.tensor([k for _, k in turns], dtype=torch.long, device="cpu")
    return {name: windows[owner == k] for k, name in enumerate(sizes)}


def some_windows(windows: Tensor, count: int) -> Tensor:
    """``count`` windows at even distances, or all where there are no more: [min(W, count), T]."""
    return windows if len(windows) <= count else windows[[len(windows) * i // count for i in range(count)]]


def without_shared_runs(documents: Sequence[str], kept_back: Sequence[str], words: int = 8) -> list[str]:
    """The documents that have no run of so many words in common with any text that is kept back.

    Words are what white space separates. For calibration and training on what evaluation must not have been seen in.
    """

    def runs(text: str) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[i : i + words]) for i in range(len(found) - words + 1)}

    seen: set[tuple[str, ...]] = set().union(*map(runs, kept_back))
    return [document for document in documents if seen.isdisjoint(runs(document))]


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _spread_bodies(tokenizer: Any, text: str, body: int, count: int) -> list[list[int]] | None:
    """The first ``body`` tokens of each of ``count`` stretches, or None if one of them is too short."""
    if len(text) < 2 * body * count:
        return None
    cuts = [_word_start(text, len(text) * i // count) for i in range(count)] + [len(text)]
    stretches = list(itertools.pairwise(cuts))
    if min(stop - start for start, stop in stretches) < 2 * body:
        return None
    found: dict[int, list[int]] = {}
    characters = 6 * body
    while len(found) < count:
        missing = [i for i in range(count) if i not in found]
        heads = [text[stretches[i][0] : min(stretches[i][0] + characters, stretches[i][1])] for i in missing]
        for i, head, ids in zip(missing, heads, token_ids(tokenizer, heads), strict=True):
            whole = len(head) == stretches[i][1] - stretches[i][0]
            if len(ids) >= body + _MARGIN_TOKENS or (whole and len(ids) >= body):
                found[i] = ids[:body]
            elif whole:
                return None
        characters *= 2
    return [found[i] for i in range(count)]


def _consecutive_bodies(tokenizer: Any, text: str, body: int, count: int | None) -> list[list[int]]:
    # One at a time: what a tokenizer keeps beside the ids is many times as large.
    stream = [token for piece in _pieces(text) for ids in token_ids(tokenizer, [piece]) for token in ids]
    total = len(stream) // body
    needed = count if count is not None else 1
    if total < needed:
        raise InputError(
            f"the text is too short: it has {len(stream)} tokens and {needed} x {body} = {needed * body} are needed; "
            "give a longer text, or fewer or shorter windows (`length`)"
        )
    chosen = range(total) if count is None else [total * i // count for i in range(count)]
    return [stream[k * body : (k + 1) * body] for k in chosen]


def _word_start(text: str, position: int) -> int:
    """The start of the word after the next white space, if one is near (there may be none in Chinese), else here."""
    if position == 0:
        return 0
    for i in range(position, min(position + 200, len(text))):
        if text[i - 1].isspace() and not text[i].isspace():
            return i
    return position


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = min(start + _PIECE_CHARACTERS, len(text))
        if stop < len(text):
            # The space stays with the word after it, as byte-level tokenizers have it.
            space = text.rfind(" ", start + _PIECE_CHARACTERS // 2, stop)
            stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop


def token_ids(tokenizer: Any, texts: list[str], *, special: bool = False, **options: Any) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is what is wanted here, not a mistake to warn about.
    encoded = tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, truncation=False, verbose=False, **options
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


# Where 0.1.0 had what lies in rooms of its own today.
_MOVED = {
    "demo_data": ("demo_model_path", "demo_text", "installed_package_dir"),
    "fingerprints": (
        "fingerprint_model",
        "fingerprint_text",
        "fingerprint_tokenizer",
        "model_difference",
        "same_tokenizer",
        "tokenizer_difference",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MOVED.items():
        if name in names:
            return getattr(importlib.import_module(f"linearpatch_kernels.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
