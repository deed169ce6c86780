"""What a GGUF file calls things, and what it does to tensors: the table that `gguf` reads and `gguf_export` writes.

The names are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; gguf knows those of the tensors. A key
below stands behind the name of its architecture: ``llama.block_count``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from linearpatch_kernels.modeling.families import STOCK_FAMILIES, family_of
from linearpatch_kernels.modeling.gguf_tokenizer import SPECIAL

ARCHITECTURES: dict[str, str] = {}
"""What a GGUF file calls an architecture -> the family that it is read as. (It calls Mistral llama, and a Mistral whose
window covers its context is a Llama.)"""
for _name, _family in STOCK_FAMILIES.items():
    if _family.gguf is not None:
        ARCHITECTURES.setdefault(_family.gguf, _name)

SIZES: Mapping[str, str] = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}
"""Attribute of a config -> key."""
EPS = "attention.layer_norm_rms_epsilon"
KEY_SIZE, VALUE_SIZE = "attention.key_length", "attention.value_length"
WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
LOGIT_CAP = "final_logit_softcapping"

ROTATED = "rope.dimension_count"
BASE, BASE_IN_WINDOWS = "rope.freq_base", "rope.freq_base_swa"
SCALING, FACTOR, ORIGINAL = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
ATTENTION_FACTOR, YARN_ATTENTION = "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"
YARN: Mapping[str, tuple[str, float]] = {
    "beta_fast": ("rope.scaling.yarn_beta_fast", 32.0),
    "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0),
}
"""Parameter of Transformers -> key, and what it is where nobody says."""
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors by which frequencies are divided: in every text, in those longer than the original context, in others."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of the scaling whose factors the first of them holds. The file does not say these two."""

TOKENS = {f"{name}_id": key for name, key in SPECIAL.items()}
"""Attribute of a config -> what stands in ``tokenizer.ggml.<it>_token_id``."""


def yarn_attention(factor: float) -> float:
    """By what YaRN's paper multiplies queries and keys; llama.cpp does without being told."""
    return 1 + 0.1 * math.log(factor) if factor > 1 else 1.0


def places(architecture: str, config: PretrainedConfig) -> dict[str, tuple[str, Tensor]]:
    """What the file calls a tensor -> its name in Transformers, and one of its shape without memory."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    with torch.device("meta"), no_init_weights():
        twin = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, tensor in twin.state_dict().items():
        module, _, leaf = name.rpartition(".")
        found[f"{names.get_name(module)}.{leaf}"] = (name, tensor)
    return found


def from_file(name: str, tensor: Tensor, architecture: str, config: PretrainedConfig) -> Tensor:
    """A tensor of a file as Transformers has it; ``name`` is what that calls it."""
    if (heads := _rotated_heads(name, architecture, config)) is not None:
        return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor - offset if (offset := _gain_offset(name, config)) else tensor


def to_file(name: str, tensor: Tensor, architecture: str, config: PretrainedConfig) -> Tensor:
    """The inverse of `from_file`."""
    if (heads := _rotated_heads(name, architecture, config)) is not None:
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor + offset if (offset := _gain_offset(name, config)) else tensor


def _rotated_heads(name: str, architecture: str, config: PretrainedConfig) -> int | None:
    """How many heads the rows are of, where the file has them in another order; else None. In a Llama llama.cpp rotates
    neighbours, and Transformers the two halves of a head."""
    if architecture != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((count for part, count in heads.items() if f".{part}." in name), None)


def _gain_offset(name: str, config: PretrainedConfig) -> float:
    """What is added to a norm's weight to make its gain, which is what the file holds."""
    modules = family_of(config).modules
    return modules.gain_offset if modules is not None and name.endswith("norm.weight") else 0.0
