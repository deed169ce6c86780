"""Tiny random models of every family, patched ones among them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import DensePatch, DiagonalPatch, HadamardPatch, LowRankPatch, NormLinearPatch, Patch

FAMILY_NAMES = list(STOCK_FAMILIES)
VOCABULARY = 97
LAYERS = 6
WINDOW = 8

# 48 = 12 * 4 is no power of two; grouped-query attention; three full and three sliding layers where a family has both.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "query_pre_attn_scalar": 12,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 3,
}


def tiny_model(family: str, *, layers: int = LAYERS, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM, in evaluation mode."""
    stock = STOCK_FAMILIES[family]
    known = {field.name for field in dataclasses.fields(stock.config_class)}
    sizes = {name: value for name, value in {**_SIZES, **changes}.items() if name in known}
    if family == "gemma3_text":
        sizes.setdefault("sliding_window_pattern", 3)
    torch.manual_seed(seed)
    return stock.causal_lm_class(stock.config_class(num_hidden_layers=layers, **sizes)).eval()


def random_patch(kind: str, *, dim: int = 48, seed: int = 1) -> Patch:
    """A patch near the identity, with every parameter random."""
    patch = {
        "hadamard": lambda: HadamardPatch(dim, rank=4, pre_scale=True, post_scale=True),
        "low-rank": lambda: LowRankPatch(dim, 4),
        "diagonal": lambda: DiagonalPatch(dim),
        "dense": lambda: DensePatch(dim),
        "norm-linear": lambda: NormLinearPatch(dim),
        "norm-linear low-rank": lambda: NormLinearPatch(dim, 4, eps=1e-3),
        "norm-linear hadamard": lambda: NormLinearPatch(dim, 4, hadamard=True, eps=1e-5),
    }[kind]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return patch


def normed_patches() -> dict[int, list[Patch]]:
    """A norm-linear patch of every form, and one behind a linear patch, for the joints of a model of four layers."""
    first, second, third = (random_patch(f"norm-linear{form}") for form in ("", " low-rank", " hadamard"))
    return {1: [first], 2: [random_patch("low-rank"), second], 4: [third]}


def tiny_patched_model(family: str, **changes: Any) -> PreTrainedModel:
    """Layers 2 and 3 of six removed, patched there (joint 2) and behind the last layer (joint 4)."""
    cut = keep_layers(tiny_model(family, **changes), [0, 1, 4, 5])
    return patched_model(cut, {2: random_patch("hadamard"), 4: random_patch("dense")})


def tiny_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with ``size`` tokens; ``<s>`` and ``</s>`` are ids 1 and 2."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(size - 4))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
