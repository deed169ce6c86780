"""Writes tiny GGUF files for the cases, as llama.cpp's converter writes those of the families that a GGUF may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3", "phi3": "phi3"}


def letters(count: int) -> list[str]:
    """A byte-level vocabulary of ``count`` tokens: printable characters, and one merge."""
    return [*(chr(ord("!") + i) for i in range(count - 1)), "ab"]


def write(
    path: Path,
    model: PreTrainedModel,
    tokens: Sequence[str] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    only: Callable[[str], bool] | None = None,
    split: tuple[int, int, int] | None = None,
    scaling: tuple[str, float] | None = None,
    keys: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> Path:
    """The model as a GGUF in float32.

    Args:
        tokens: of a byte-level vocabulary.
        extra: more tensors; only: which of the model's; split: (number, count, tensors of all).
        scaling: type and factor of the rotary embeddings' scaling.
        keys: more metadata, and what to write for a key instead (None: nothing).
        architecture: to write instead of the model's.
    """
    config = model.config
    name = architecture or ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(path), name)
    metadata = _metadata(model, name, tokens or letters(config.vocab_size))
    if scaling:
        metadata |= {f"{name}.rope.scaling.type": scaling[0], f"{name}.rope.scaling.factor": float(scaling[1])}
    if split:
        metadata |= dict(zip(("split.no", "split.count", "split.tensors.count"), split, strict=True))
    for key, value in {**metadata, **(keys or {})}.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(
        next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == ARCHITECTURES[config.model_type]),
        config.num_hidden_layers,
    )
    for full_name, tensor in model.state_dict().items():
        if (only is None or only(full_name)) and not (full_name == "lm_head.weight" and config.tie_word_embeddings):
            module, _, leaf = full_name.rpartition(".")
            writer.add_tensor(f"{names.get_name(module)}.{leaf}", _as_llama_cpp_has_it(full_name, tensor, config))
    for full_name, array in (extra or {}).items():
        writer.add_tensor(full_name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(model: PreTrainedModel, name: str, tokens: Sequence[str]) -> dict[str, Any]:
    config = model.config
    rope, head = config.rope_parameters, model.get_decoder().layers[0].self_attn.head_dim
    metadata = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        f"{name}.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if name == "llama":
        metadata[f"{name}.rope.dimension_count"] = head
    elif name != "phi3":
        metadata |= {f"{name}.attention.key_length": head, f"{name}.attention.value_length": head}
    else:
        metadata[f"{name}.rope.dimension_count"] = int(head * rope["partial_rotary_factor"])
    if name in ("gemma3", "phi3") and config.sliding_window:
        metadata[f"{name}.attention.sliding_window"] = config.sliding_window
    if name == "gemma3":
        windowed = [kind == "sliding_attention" for kind in config.layer_types]
        metadata[f"{name}.attention.sliding_window_pattern"] = windowed
    return metadata


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    if value is None or key == "general.architecture":
        return
    for kind, add in kinds:
        if isinstance(value, kind):
            add(key, value)
            return
    writer.add_array(key, value)


def _as_llama_cpp_has_it(name: str, tensor: torch.Tensor, config: Any) -> np.ndarray:
    tensor = tensor.detach().float()
    if config.model_type == "llama":
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        tensor = tensor + 1
    return np.ascontiguousarray(tensor.numpy())
