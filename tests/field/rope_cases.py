"""Models with every kind of rotary embedding that their families have, as Transformers 5 describes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.patched import patched_model
from linearpatch_kernels.nn import DensePatch, HadamardPatch
from tests.support.field import tiny

SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 3.0, 5.0, 7.0, 9.0]
LENGTHS = {"original_max_position_embeddings": 32}


def rope(kind: str = "default", theta: float = 500.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def longrope(count: int, **more: Any) -> dict[str, Any]:
    return rope("longrope", short_factor=SHORT[:count], long_factor=LONG[:count], **LENGTHS, **more)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# Name -> (family, rope_parameters, other entries of the config)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", rope(), {}),
    "llama linear": ("llama", rope("linear", factor=4.0), {}),
    "llama dynamic": ("llama", rope("dynamic", factor=4.0), {"max_position_embeddings": 24}),
    "llama yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64), {}),
    "llama yarn with None": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=None, beta_fast=None),
        {},
    ),
    "llama3": ("llama", rope("llama3", theta=500000.0, **LLAMA3), {}),
    "llama longrope": ("llama", longrope(6), {"max_position_embeddings": 128}),
    "mistral": ("mistral", rope(), {}),
    "qwen2": ("qwen2", rope(), {}),
    "qwen2 yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=64), {}),
    "qwen3": ("qwen3", rope(theta=1e6), {}),
    "gemma3": ("gemma3_text", {"full_attention": rope(theta=3000.0), "sliding_attention": rope(theta=70.0)}, {}),
    "gemma3 linear": (
        "gemma3_text",
        {"full_attention": rope("linear", theta=3000.0, factor=8.0), "sliding_attention": rope(theta=70.0)},
        {},
    ),
    "phi3": ("phi3", rope(), {}),
    "phi3 partial": ("phi3", rope(partial_rotary_factor=0.5), {}),
    "phi3 longrope": ("phi3", longrope(6), {"max_position_embeddings": 128, **LENGTHS}),
    "phi3 longrope partial": (
        "phi3",
        longrope(3, partial_rotary_factor=0.5),
        {"max_position_embeddings": 128, **LENGTHS},
    ),
}
# What the names of before Transformers 5 cannot say: the family's code computes something else, whatever they are.
UNSAYABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3 scaled in its windows": (
        "gemma3_text",
        {"full_attention": rope(theta=3000.0), "sliding_attention": rope("linear", theta=70.0, factor=8.0)},
        {},
    ),
    "llama longrope with a factor": ("llama", longrope(6, factor=8.0), {"max_position_embeddings": 128}),
}
KINDS = ("stock", "patched")


def made(name: str, kind: str) -> PreTrainedModel:
    family, parameters, more = {**CASES, **UNSAYABLE}[name]
    cut = keep_layers(tiny(family, rope_parameters=parameters, **more), [0, 1, 4, 5])
    return cut if kind == "stock" else patched_model(cut, {2: HadamardPatch(48, 4), 4: DensePatch(48)})
