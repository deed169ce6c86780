"""The tokenizer that a GGUF file describes: its vocabulary, how it splits a text, and what it puts around one.

Read as llama.cpp reads it (src/llama-vocab.cpp), and built from the parts of ``tokenizers``: what Transformers builds
of the same metadata differs from release to release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# What llama.cpp calls the ways to split a text, of those that these families have: as GPT-2 does ("default" says: not
# known), ...
_GPT2_SPLITS = {
    "default",
    "gpt-2",
    "phi-2",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "exaone4",
    "mpt",
    "olmo",
    "jais",
    "trillion",
}
# ... the same with every digit alone, ...
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# ... and by an expression, put together from these parts.
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_OR_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACE = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_CAPITALS, _SMALLS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (f"{_LEAD}{_CAPITALS}*{_SMALLS}+", f"{_LEAD}{_CAPITALS}+{_SMALLS}*")
_EXPRESSIONS = {
    name: "|".join(parts)
    for names, parts in (
        (
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe",
            (_SHORT_FORMS, rf"{_LEAD}\p{{L}}+", r"\p{N}{1,3}", _SIGNS, *_SPACE),
        ),
        (
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez",
            (_SHORT_FORMS, rf"{_LEAD}\p{{L}}+", r"\p{N}", _SIGNS, *_SPACE),
        ),
        (
            "qwen35",
            (_SHORT_FORMS, rf"{_LEAD}[\p{{L}}\p{{M}}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", *_SPACE),
        ),
        ("tekken", (*_CASED, r"\p{N}", _SIGNS_OR_SLASHES, *_SPACE)),
        (
            "gpt-4o llama4 kanana2 talkie minimax-m2",
            (*(f"{word}{_SHORT_FORMS}?" for word in _CASED), r"\p{N}{1,3}", _SIGNS_OR_SLASHES, *_SPACE),
        ),
    )
    for name in names.split()
}
# Where a word of the vocabulary is one token without merges, and a BOS stands in front unless it is denied.
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}

# How the file marks a token: special, or to be found whole in every text; and those that nothing here asks for.
CONTROL, USER_DEFINED = 3, 4
NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
_SPACE_MARK = "▁"
PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class _Vocabulary:
    """The part of the metadata that is about the tokenizer, without its prefix."""

    said: Mapping[str, Any]
    architecture: str

    @property
    def kind(self) -> str:
        return str(self.said.get("model"))

    @property
    def split(self) -> str:
        return str(self.said.get("pre", "default"))

    @property
    def tokens(self) -> list[str]:
        return list(self.said["tokens"])

    def special(self, key: str) -> str | None:
        number = self.said.get(f"{key}_token_id")
        if number is None:
            return None
        if not 0 <= number < len(self.tokens):
            raise ValueError(f"its {key} token is number {number} of {len(self.tokens)}")
        return self.tokens[number]

    def marked(self, mark: int) -> list[str]:
        marks = self.said.get("token_type")
        return [token for token, one in zip(self.tokens, marks, strict=True) if one == mark] if marks else []


def unknown_split(metadata: Mapping[str, Any]) -> str | None:
    """The name of the way to split a text, where it is one that is not known here."""
    vocabulary = _vocabulary(metadata)
    known = {*_GPT2_SPLITS, *_DIGIT_SPLITS, *_EXPRESSIONS}
    return vocabulary.split if vocabulary.kind == "gpt2" and vocabulary.split not in known else None


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of the file's metadata.

    Raises:
        ValueError, KeyError: there is none, or none of these kinds: byte-level BPE, SentencePiece.
    """
    vocabulary = _vocabulary(metadata)
    if vocabulary.kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif vocabulary.kind == "llama" and vocabulary.architecture == "gemma3":
        tokenizer = _gemma(vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    else:
        raise ValueError(f"its kind is {vocabulary.kind!r}, and not gpt2 or llama")
    tokenizer.add_special_tokens([_added(token, special=True) for token in vocabulary.marked(CONTROL)])
    # Gemma's runs of spaces are not added: marked, they are in the vocabulary, and the merges find them.
    known = tokenizer.get_vocab()
    whole = [token for token in vocabulary.marked(USER_DEFINED) if token in known]
    tokenizer.add_tokens([_added(token, special=False) for token in whole])
    special = {name: vocabulary.special(key) for name, key in SPECIAL.items()}
    # Without a word of the file: what llama.cpp does.
    begins = special["bos_token"] is not None and (vocabulary.kind == "llama" or vocabulary.split in WHOLE_WORDS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get(TEMPLATE),
        add_bos_token=bool(vocabulary.said.get("add_bos_token", begins)),
        add_eos_token=bool(vocabulary.said.get("add_eos_token", False)),
        **special,
    )


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    said = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    return _Vocabulary(said, str(metadata["general.architecture"]))


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    spelling = _spelling_of_bytes()
    alphabet = {*spelling.values()}
    whole = {*vocabulary.marked(CONTROL), *vocabulary.marked(USER_DEFINED)}

    def spelled(token: str) -> str:
        """Some converters write tokens as they read, which no text leads to once its bytes are spelled."""
        return token if token in whole or alphabet.issuperset(token) else "".join(spelling[b] for b in token.encode())

    tokens = [spelled(token) for token in vocabulary.tokens]
    merges = [_pair(merge) for merge in vocabulary.said["merges"]]
    ignore = vocabulary.split in WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocab=_numbered(tokens), merges=merges, ignore_merges=ignore))
    tokenizer.pre_tokenizer = splitter(vocabulary.split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def splitter(split: str) -> pre_tokenizers.Sequence:
    """What splits a text as llama.cpp does where the file names this way, and spells the parts in bytes."""
    expression = _EXPRESSIONS.get(split)
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)]
    if expression is not None:
        parts.insert(0, pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    elif split in _DIGIT_SPLITS:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence(parts)


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    prefixed = vocabulary.said.get("add_space_prefix", True)
    tokenizer = _byte_fallback(vocabulary, vocabulary.tokens, vocabulary.said.get("scores"))
    if vocabulary.architecture == "phi3" and prefixed:
        # Phi-3's prefix stands in front of a text that begins with a space, too.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE_MARK), normalizers.Replace(" ", _SPACE_MARK)]
        )
    else:
        scheme = "first" if prefixed else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE_MARK, prepend_scheme=scheme, split=False)
    parts = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", left=1)] if prefixed else [])])
    return tokenizer


def _gemma(vocabulary: _Vocabulary) -> Tokenizer:
    """Spaces are marked before anything else, those of the vocabulary, too; its order is that of the merges, which its
    scores are not."""
    tokens = [token.replace(" ", _SPACE_MARK) if token.isspace() else token for token in vocabulary.tokens]
    tokenizer = _byte_fallback(vocabulary, tokens, [-number for number in range(len(tokens))])
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE_MARK)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _byte_fallback(vocabulary: _Vocabulary, tokens: Sequence[str], scores: Sequence[float] | None) -> Tokenizer:
    """BPE that spells in bytes what the vocabulary lacks; without merges, the best score merges first."""
    merges = vocabulary.said.get("merges")
    if merges is not None:
        pairs = [_pair(merge) for merge in merges]
    elif scores is not None:
        pairs = _pairs_by_score(tokens, scores)
    else:
        raise ValueError("it has neither merges nor scores")
    unknown = vocabulary.special("unknown")
    return Tokenizer(
        models.BPE(vocab=_numbered(tokens), merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )


def _pairs_by_score(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, the best score first; of one score, those with the longer left part."""
    known = {*tokens}
    ways = [
        (score, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    ways.sort(key=lambda way: (way[0], len(way[1]), len(way[2])), reverse=True)
    return [(left, right) for _, left, right in ways]


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _spelling_of_bytes() -> dict[int, str]:
    """How byte-level vocabularies write the 256 bytes: as Latin-1 reads those it can print, the rest from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + number) for number, byte in enumerate(rest)}
