"""Tiny models and tokenizers of every kind that a GGUF file may hold, for exports of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.tiny import tiny_model
from tests.support.tokenizers import byte_tokenizer

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"


def byte_level(split: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Merges of an English sentence, special tokens, a chat template."""
    trained = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"]
    names = ["<s>", "</s>", "<pad>", "<tool>"]
    vocabulary = {token: i for i, token in enumerate([*names[:3], *sorted(trained["vocab"], key=trained["vocab"].get)])}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split in ("llama-bpe", "tekken")))
    parts = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated")],
    }.get(split, [])
    regex = split in ("gpt-2", "smollm")
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if split == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return named(tokenizer)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(style: str) -> PreTrainedTokenizerFast:
    """Pieces by score, every way to make one a merge, bytes for the rest: as Llama 2's, Phi-3's and Gemma's."""
    pieces = ["▁t", "he", "▁the", "qu", "ick", "qui", "▁qui", "▁quick", "wor", "ds", "words", "▁words", "▁▁", "▁a"]
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzABCDEFG.,0123456789'", "ic", "wo", "ui"})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocabulary = {token: i for i, token in enumerate(names)}
    # Gemma's scores are its numbers.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted({*names[259:]}, key=vocabulary.__getitem__)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [decoders.Strip(" ", left=1)]
    if style == "gemma":
        tokenizer.normalizer, strip = normalizers.Replace(" ", "▁"), []
    elif style == "phi3":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return named(tokenizer, unk_token="<unk>")


def named(tokenizer: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<s>", "</s>")])
    special = {"bos_token": "<s>", "eos_token": "</s>", **more}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = TEMPLATE
    return made


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": lambda: sentencepiece("llama"),
    "mistral": lambda: byte_level("gpt-2"),
    "qwen2": lambda: byte_level("qwen2"),
    "qwen3": lambda: byte_level("qwen2"),
    "gemma3_text": lambda: sentencepiece("gemma"),
    "phi3": lambda: sentencepiece("phi3"),
}


def model_for(family: str, tokenizer: Any, layers: int = 3, rows: int = 3, **changes: Any) -> PreTrainedModel:
    """With more rows than the tokenizer has tokens, as most models have; no window that llama.cpp does not know."""
    window = 8 if family == "gemma3_text" else None
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer) + rows, "sliding_window": window, "use_sliding_window": False, **ids}
    model = tiny_model(family, layers=layers, **{**sizes, **changes})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.copy_(torch.rand(parameter.shape, generator=draw))
    return model


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
HALVES = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "linear in Mistral": ("mistral", {"rope_type": "linear", "factor": 2.5}),
    "linear in Gemma": ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
    "yarn": ("qwen3", YARN),
    "yarn, all": ("qwen2", YARN | {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0}),
    "llama 3.1": ("llama", LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}),
    "llama 3.2": ("llama", LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 64}),
    "longrope": ("phi3", {"rope_type": "longrope", **HALVES, "original_max_position_embeddings": 64}),
    "part of a head": ("phi3", {"partial_rotary_factor": 0.5}),
}


def with_rope(family: str, tokenizer: Any, rope: dict[str, Any]) -> PreTrainedModel:
    plain = {"rope_type": "default", "rope_theta": 5e5}
    if family == "gemma3_text":
        both = {"full_attention": {**plain, **rope}, "sliding_attention": {**plain, "rope_theta": 1e4}}
        return model_for(family, tokenizer, rope_parameters=both)
    changes = {"partial_rotary_factor": 1.0} if family == "phi3" else {}
    original = {"original_max_position_embeddings": 64} if rope.get("rope_type") == "longrope" else {}
    return model_for(family, tokenizer, rope_parameters={**plain, **changes, **rope}, **original)
