"""What tells texts, windows, tokenizers and models apart: by what they compute, not by where they lie.

A fingerprint is written into plans, statistics and teacher stores, and compared when they are used again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linearpatch_kernels.text import PROBES, leading_tokens, token_ids
from linearpatch_kernels.torch_internals import accelerate_hook


def fingerprint_text(text: str | Sequence[str]) -> str:
    """16 hex digits that change with every character and every document boundary of a text."""
    documents = [text] if isinstance(text, str) else text
    return _digest(part for document in documents for part in (str(len(document)).encode(), document.encode()))


def fingerprint_windows(windows: Tensor) -> str:
    """16 hex digits of token ids [W, T]."""
    state = hashlib.sha256(json.dumps([*windows.shape]).encode())
    state.update(windows.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """What a tokenizer computes, as two groups of hex digits: its vocabulary, and the ids of some probing sentences.

    Two tokenizers that agree on both give the same windows. What is written beside does not count: which token pads,
    special tokens that no text holds, what stands behind a text. Saving and loading keeps it. `tokenizer_difference`
    says in words in what two differ.
    """
    vocabulary, front, ids = _computed_by(tokenizer)
    return f"{_digest([_json(sorted(vocabulary.items()))])[:8]}-{_digest([_json([front, ids])])}"


def tokenizer_difference(one: Any, other: Any) -> str:
    """In what two tokenizers differ, in words; "" where both give the same windows."""
    (vocabulary, front, ids), (vocabulary_2, front_2, ids_2) = _computed_by(one), _computed_by(other)
    if len(vocabulary) != len(vocabulary_2):
        return f"other vocabulary: {len(vocabulary)} and {len(vocabulary_2)} tokens"
    if vocabulary != vocabulary_2:
        token = min(token for token, _ in vocabulary.items() ^ vocabulary_2.items())
        places = " and ".join(str(words.get(token, "not there")) for words in (vocabulary, vocabulary_2))
        return f"other vocabulary: the id of {token!r} is {places}"
    if front != front_2:
        return f"a text begins with other tokens: {front} and {front_2}"
    for probe, mine, theirs in zip(PROBES, ids, ids_2, strict=True):
        if mine != theirs:
            return f"other ids for {probe[:30].strip()!r}..."
    return ""


def _computed_by(tokenizer: Any) -> tuple[dict[str, int], list[int], list[list[int]]]:
    """The vocabulary that texts are made of, the tokens in front of a text, and the ids of the probes."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        base = {token: i for token, i in tokenizer.get_vocab().items() if i not in added or i < tokenizer.vocab_size}
    else:
        base = backend.get_vocab(with_added_tokens=False)
    # A special token is part of the vocabulary for some files and stands beside it for others: it counts where its
    # letters alone would give it.
    special = [(token.content, i) for i, token in added.items() if token.special and token.content in base]
    spelt = token_ids(tokenizer, [token for token, _ in special], split_special_tokens=True)
    beside = {token for (token, i), ids in zip(special, spelt, strict=True) if ids != [i]}
    vocabulary = {token: i for token, i in base.items() if token not in beside}
    vocabulary |= {token.content: i for i, token in added.items() if not token.special}
    ids = token_ids(tokenizer, list(PROBES), split_special_tokens=True)
    return vocabulary, leading_tokens(tokenizer), ids


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one tokenizer. What version 0.1 wrote cannot be compared with today's:
    whoever asks has the ids of the windows themselves to compare."""
    return one == other or bool(one and other and _is_old(one) != _is_old(other))


def _is_old(fingerprint: str) -> bool:
    """Whether version 0.1 wrote it: one group of digits, over what is written beside, too."""
    return "-" not in fingerprint


# What a config says beside what the model computes: where it came from, which tokens are special, how it is called,
# how it was initialised, whether two weights are one.
_BESIDE_CONFIG = {
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "pretraining_tp",
    "tie_word_embeddings",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "linearpatch_merge_tree",
    # Of Qwen; what they make of the layers stands in `layer_types` and `sliding_window`.
    "use_sliding_window",
    "max_window_layers",
}
_STOCK_PACKAGES = ("transformers", "linearpatch_kernels")
_BESIDE_CONFIG_0_1 = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"}
_MODEL_PARTS = ("layers or sizes", "`dtype`", "weights", "config (rope, norms, attention, patches)")


def fingerprint_model(model: nn.Module) -> str:
    """What a model computes, as four groups of hex digits: the names and shapes of its tensors, their dtypes, their
    values, and the part of its config that computes.

    Every value is read once and added to a sum for its row, so that a single changed weight shows. Saving and loading
    keeps the fingerprint. `model_difference` says in words in what a model differs from one.
    """
    tensors = _known_tensors(model)
    shapes = _digest([f"{known} {tuple(tensor.shape)}".encode() for known, _, tensor in tensors])
    dtypes = _digest([f"{known} {tensor.dtype}".encode() for known, _, tensor in tensors])
    values = _digest(_values(model, name, tensor) + _row_sums(model, name, tensor) for _, name, tensor in tensors)
    config = getattr(model, "config", None)
    computing = "" if config is None else _json(_computing(config)).decode()
    return f"{shapes[:8]}-{dtypes[:4]}-{values}-{_digest([computing.encode()])[:8]}"


def model_difference(fingerprint: str, model: nn.Module) -> str:
    """In what a model differs from that of a fingerprint (of any version), in words; "" where it is the same."""
    if _is_old(fingerprint):
        return "" if fingerprint == _fingerprint_0_1(model) else "other weights, config or `dtype`"
    there, here = fingerprint.split("-"), fingerprint_model(model).split("-")
    if len(there) != len(here):
        return "a fingerprint of another version"
    return next((f"other {part}" for part, a, b in zip(_MODEL_PARTS, there, here, strict=True) if a != b), "")


_FIRST_PATCH = re.compile(r"(?P<chain>.*\.(?:output_)?patch\.)0(?P<rest>\..+)")


def _known_tensors(model: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Of every tensor: the name that counts, by which they are sorted, its name in the model, and the tensor.

    The only patch of a joint counts under the name without its number, which it had up to format 1 of a checkpoint:
    what was fingerprinted then is known again.
    """
    state = model.state_dict()
    known = []
    for name, tensor in state.items():
        found = _FIRST_PATCH.fullmatch(name)
        alone = found is not None and not any(other.startswith(f"{found['chain']}1.") for other in state)
        known.append((f"{found['chain'][:-1]}{found['rest']}" if found and alone else name, name, tensor))
    return sorted(known, key=lambda one: one[0])


def _computing(config: Any) -> dict[str, Any]:
    """The entries of a config that its model computes with: those its class declares, but for the known others.

    What a stock class does not declare (a version of the tool that wrote the file, say) its model does not read.
    """
    entries: dict[str, Any] = config.to_dict()
    if dataclasses.is_dataclass(config) and type(config).__module__.partition(".")[0] in _STOCK_PACKAGES:
        declared = {field.name for field in dataclasses.fields(config)}
        entries = {name: value for name, value in entries.items() if name in declared}
    entries |= {
        name: _computing(getattr(config, name)) for name in getattr(config, "sub_configs", ()) if entries.get(name)
    }
    entries = {k: _same_numbers(v) for k, v in entries.items() if k not in _BESIDE_CONFIG and not k.startswith("_")}
    patches = entries.get("linearpatch")
    if isinstance(patches, dict):
        joints = (patches.get("joints") or {}).items()
        entries["linearpatch"] = {k: v if isinstance(v, list) else [v] for k, v in joints}
    return entries


def _same_numbers(value: Any) -> Any:
    """The value with every number a float: 10000 and 10000.0 are one."""
    if isinstance(value, dict):
        return {str(name): _same_numbers(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_same_numbers(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _fingerprint_0_1(model: nn.Module) -> str:
    """As version 0.1 wrote it into plans and teacher stores."""

    def parts() -> Iterator[bytes]:
        config = getattr(model, "config", None)
        if config is not None:
            kept = {k: v for k, v in config.to_dict().items() if k not in _BESIDE_CONFIG_0_1 and not k.startswith("_")}
            if isinstance(kept.get("linearpatch"), dict):
                kept["linearpatch"] = _as_format_1(kept["linearpatch"])
            yield _json(kept)
        for known, name, tensor in _known_tensors(model):
            yield f"{known} {tuple(tensor.shape)} {tensor.dtype}".encode()
            if tensor.device.type != "meta" or _brought(model, name) is not None:
                yield _values(model, name, tensor)

    return _digest(parts())


def _as_format_1(patches: dict[str, Any]) -> dict[str, Any]:
    """The config's record of joints as version 0.1 wrote it: without a format, one patch without a list."""
    joints = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in (patches.get("joints") or {}).items()}
    return {name: value for name, value in patches.items() if name != "format"} | {"joints": joints}


# As integers, whose sums are the same in every order.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _row_sums(model: nn.Module, name: str, tensor: Tensor) -> bytes:
    """The sums over the last dimension of a tensor's bits, taken as integers, modulo 2^64."""
    there = _brought(model, name) if tensor.device.type == "meta" else tensor
    if there is None or there.is_complex() or not there.numel():
        return b""
    there = there.detach().contiguous()
    # Eight bytes at a time where a row has so many, whatever the dtype.
    whole = there.dim() > 0 and there.shape[-1] * there.element_size() % 8 == 0
    bits = there.view(torch.int64 if whole else _BITS[there.element_size()])
    sums = bits.sum(-1, dtype=torch.int64) if bits.dim() > 1 else bits.to(torch.int64)
    content: bytes = sums.to("cpu").numpy().tobytes()
    return content


def _values(model: nn.Module, name: str, tensor: Tensor) -> bytes:
    """32 strided values of a tensor in float64; none where nothing holds it."""
    there = _brought(model, name) if tensor.device.type == "meta" else tensor
    if there is None:
        return b""
    step = max(1, there.numel() // 32)
    content: bytes = there.detach().flatten()[::step][:32].to("cpu", torch.float64).numpy().tobytes()
    return content


def _brought(model: nn.Module, name: str) -> Tensor | None:
    """A tensor that accelerate keeps off its module (``device_map``) and brings for a call; None: it has no values."""
    path, _, leaf = name.rpartition(".")
    kept = getattr(accelerate_hook(model.get_submodule(path)), "weights_map", None)
    return None if kept is None else kept[leaf]


def _json(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:16]
