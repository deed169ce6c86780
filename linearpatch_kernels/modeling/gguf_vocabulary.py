"""A tokenizer of Transformers as a GGUF file describes it: the inverse of `gguf_tokenizer`.

A file does not hold how text is split, but the name of a way that llama.cpp knows. Which one it is is found out by
trying: every description is read back, and taken if it splits texts as the tokenizer does.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling import gguf_tokenizer as reading
from linearpatch_kernels.modeling.gguf_tokenizer import PREFIX, SPECIAL, TEMPLATE, build_tokenizer

# One name of every way to split that the reader knows, of those that llama.cpp knows, too.
_SPLITS = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "qwen35", "tekken", "gpt-4o")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# What tells the ways apart: words, cases, contractions, numbers, signs, slashes, white space, marks, scripts, bytes.
_TEXTS = (
    "The quick brown fox doesn't jump over 12 lazy dogs, THEY'LL say.",
    "I'Ve fooBar HTTPServer camelCaseWords ABCdef iPhone",
    "1 12 123 1234 12345 3.14159 2,000,000 x86_64 0xFF",
    "if (a[i] != b->c) {\n\treturn a/b // c;\n\n\n}\r\n",
    "path/to/file.txt://\n##!!?? ... --- ===\n",
    "one  two   three    four\n\n  five\t\tsix",
    "naïve façade Straße ÅÄÖ ½ ² ٣٤ 四五",
    "漢字かな交じり文 한국어 текст हिन्दी ไทย عربى",
    "🙂👩\u200d👩\u200d👧 \u00a0\u2003 \ufeff\u0000",
)
# Texts of which llama.cpp and Transformers may differ without much harm; that is told.
_BORDERS = (" a text that begins with a space", "one that ends with one ", "  two", "\n a line")
_VOCABULARY_SAMPLES = 512


@dataclass(frozen=True)
class Description:
    """What the metadata of a file says of a tokenizer, and what it cannot say."""

    metadata: Mapping[str, Any]
    notes: tuple[str, ...]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, architecture: str, rows: int) -> Description:
    """The description of a tokenizer in a file of this architecture whose embedding has so many rows.

    Raises:
        InputError: there is none that llama.cpp would read as this tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__} without a tokenizer.json: GGUF needs one")
    state = json.loads(backend.to_str())
    kind = state["model"].get("type")
    if kind != "BPE" or not state["model"]["merges"]:
        kind = f"{kind}{'' if kind != 'BPE' else ' without merges'}"
        raise InputError(
            f"the tokenizer is of the kind {kind}, and a GGUF file of {architecture} has byte-level or SentencePiece "
            "BPE: export a model with one of these"
        )
    normalised = "NFC" in json.dumps(state["normalizer"])
    samples = [unicodedata.normalize("NFC", text) if normalised else text for text in _samples(tokenizer)]
    failed: str | None = None
    for metadata in _candidates(tokenizer, state, architecture, rows):
        built = build_tokenizer(metadata)
        text = _difference(built, tokenizer, samples)
        if text is None:
            return Description(
                {key: value for key, value in metadata.items() if key != "general.architecture"},
                tuple(_notes(built, tokenizer, normalised, metadata)),
            )
        failed = failed or text
    raise InputError(
        f"the tokenizer splits {failed!r} in none of the ways that this package knows of llama.cpp: export a model "
        "with another tokenizer"
    )


def _candidates(tokenizer: Any, state: Mapping[str, Any], architecture: str, rows: int) -> Iterator[dict[str, Any]]:
    """Every description that the tokenizer could have, the likeliest first."""
    model = state["model"]
    spelled = bool(model.get("byte_fallback"))
    tokens = _tokens(tokenizer, rows)
    said: dict[str, Any] = {
        "model": "llama" if spelled else "gpt2",
        "tokens": tokens,
        "token_type": _marks(tokenizer, tokens, spelled),
        **_special(tokenizer, rows),
        **_put_around(tokenizer),
    }
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if spelled:
        said["scores"] = _scores(tokens, pairs)
        ways = [{"pre": "default", "add_space_prefix": prefixed} for prefixed in (True, False)]
        if architecture == "gemma3":
            ways = ways[1:]
    else:
        said["merges"] = [f"{left} {right}" for left, right in pairs]
        ways = [{"pre": name} for name in _by_likeness(state)]
    template = _template(tokenizer)
    for way in ways:
        metadata = {"general.architecture": architecture}
        metadata |= {f"{PREFIX}{key}": value for key, value in {**said, **way}.items() if value is not None}
        yield metadata | ({TEMPLATE: template} if template else {})


def _by_likeness(state: Mapping[str, Any]) -> list[str]:
    """The ways to split, those first that are made of what the tokenizer is made of."""
    parts, whole = _parts(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))

    def unlike(name: str) -> tuple[bool, bool]:
        its, its_whole = json.loads(reading.splitter(name).__getstate__()), name in reading.WHOLE_WORDS
        return _parts(its) != parts, its_whole != whole

    return sorted(_SPLITS, key=unlike)


def _parts(state: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """What a pre-tokenizer does, in its order, without what changes no token."""
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [part for one in state["pretokenizers"] for part in _parts(one)]
    return [tuple(str(state.get(key)) for key in ("type", "pattern", "behavior", "individual_digits", "use_regex"))]


def _tokens(tokenizer: Any, rows: int) -> list[str]:
    """A token for every row of the embedding. (Gemma 3 has one more than rows, for images.)"""
    known = tokenizer.get_vocab()
    tokens = [""] * rows
    for token, number in known.items():
        if number < rows:
            tokens[number] = token
    for number, token in enumerate(tokens):
        if not token:
            name = f"[PAD{number}]"
            tokens[number] = name if name not in known else f"[PAD{number} of {rows}]"
    return tokens


def _marks(tokenizer: Any, tokens: Sequence[str], spelled: bool) -> list[int]:
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder

    def mark(number: int, token: str) -> int:
        if number in added:
            return reading.CONTROL if added[number].special else reading.USER_DEFINED
        if token not in known:
            return reading.UNUSED
        if spelled and token == tokenizer.unk_token:
            return reading.UNKNOWN
        return reading.BYTE if spelled and _BYTE.fullmatch(token) else reading.NORMAL

    return [mark(number, token) for number, token in enumerate(tokens)]


def _special(tokenizer: Any, rows: int) -> dict[str, int]:
    """The numbers of the special tokens that the tokenizer names."""
    numbers = {key: getattr(tokenizer, f"{name}_id") for name, key in SPECIAL.items()}
    return {f"{key}_token_id": number for key, number in numbers.items() if number is not None and number < rows}


def _put_around(tokenizer: Any) -> dict[str, bool]:
    """Whether a BOS token stands in front of a text, and an EOS token behind it."""
    text = "a"
    plain = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text)
    for begins in (False, True):
        for ends in (False, True):
            front = [tokenizer.bos_token_id] if begins else []
            if [*front, *plain, *([tokenizer.eos_token_id] if ends else [])] == whole:
                return {"add_bos_token": begins, "add_eos_token": ends}
    raise InputError(
        "the tokenizer puts other tokens around a text than BOS and EOS, which a GGUF file cannot say: export a model "
        "with another tokenizer"
    )


def _scores(tokens: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """The best score merges first: that of a token falls with its place among the merges, those that no merge makes
    have the least."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def _template(tokenizer: Any) -> str | None:
    """The chat template; of several, the default."""
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def _samples(tokenizer: Any) -> list[str]:
    """Texts with what tells the ways to split apart, with special tokens, and with tokens of the whole vocabulary."""
    rows = len(tokenizer)
    numbers = range(0, rows, max(1, rows // _VOCABULARY_SAMPLES))
    words = [tokenizer.decode([number], clean_up_tokenization_spaces=False).strip() for number in numbers]
    special = [str(token) for token in tokenizer.all_special_tokens]
    written = [f"{token}word{token}{token}other{token}" for token in special]
    return [*_TEXTS, *written, *(word for word in words if word and "\ufffd" not in word)]


def _difference(built: Any, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """The first text that the two split otherwise."""
    return next((text for text in texts if _split(built, text) != _split(tokenizer, text)), None)


def _split(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _notes(built: Any, tokenizer: Any, normalised: bool, metadata: Mapping[str, Any]) -> Iterator[str]:
    special = [f"{token} word {token} {token}" for token in map(str, tokenizer.all_special_tokens)]
    for texts, what in ((_BORDERS, "at the ends of a text"), (special, "around special tokens")):
        if (text := _difference(built, tokenizer, texts)) is not None:
            yield f"spaces {what} are read otherwise from the GGUF file than by the tokenizer ({text!r}, for one)"
    if metadata.get(f"{PREFIX}add_space_prefix") and any(
        _split(tokenizer, f"{token}word") != _split(tokenizer, token) + _split(tokenizer, "word")
        for token in map(str, tokenizer.all_special_tokens)
    ):
        yield "llama.cpp puts a space in front of what follows a special token, which the tokenizer does not"
    if normalised:
        yield "the tokenizer composes letters (NFC), which llama.cpp does not: normalise text with decomposed ones"
    if tokenizer.eos_token_id is None:
        yield "the tokenizer names no EOS token, in whose place llama.cpp takes one that it guesses"
