"""GGUF files: all that they say taken over, or refused by name; and their conversion to checkpoints.

Nothing of it is left to Transformers, whose readers leave out much of the metadata (head sizes, the scaling of rotary
embeddings, windows, caps, how text is split) and change with every release. It is read as llama.cpp reads it
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp, src/models); gguf unpacks the weights. A key of
the architecture or a tensor that nobody reads might change what the model computes: it is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import read_json, reading, said, write_whole
from linearpatch_kernels.modeling import gguf_layout as layout
from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.modeling.gguf_file import MAGIC, StoredTensor, read_file
from linearpatch_kernels.modeling.gguf_layout import ARCHITECTURES, FREQUENCIES, LONG, SHORT
from linearpatch_kernels.modeling.gguf_tokenizer import build_tokenizer, unknown_split
from linearpatch_kernels.modeling.saving import check_output, save_checkpoint
from linearpatch_kernels.modeling.weights import refuse_missing
from linearpatch_kernels.text import cache_dir

_INSTEAD = "use the model's safetensors"
_ENDS = 1 << 20
_WHOLE = 64 << 20
# Of the conversion below. A checkpoint of another version is made again.
_VERSION = 5
_SEAL = "conversion.json"

# Keys of an architecture that change nothing that these families compute of a text, whatever they say, ...
_HARMLESS = {"rope.scaling.finetuned", "attention.layer_norm_epsilon", "pooling_type", "use_parallel_residual"}
_OF_IMAGES = ("mm.", "vision.")
# ... and what others say where they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# Tables of rotary frequencies in old files, which llama.cpp passes over, too.
_TABLES = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


class GGUFFile:
    """A GGUF file, and the checkpoint that it was or will be converted to.

    Args:
        mention: called with a line before the file is converted.

    Attributes:
        layers: how many the header names; None where the file has been converted, and the checkpoint's config tells.

    Raises:
        InputError: damaged, one part of several, or of a model that cannot be taken over whole.
    """

    def __init__(self, path: Path, mention: Callable[[str], None] = lambda _: None) -> None:
        self.path, self._mention = path, mention
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise InputError(f"{path} is not a GGUF file: give a model directory, a .gguf file, or a hub id")
        self._checkpoint = cache_dir() / "gguf" / f"{path.stem[:100]}-{_name_of(path)}"
        self.layers: int | None = None
        if not _is_sound(self._checkpoint):
            self._header = _read_header(path)
            self._config = config_of(self._header)
            check_tensors(self._header, self._config)
            self.layers = int(self._config.num_hidden_layers)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself, by key."""
        return _read_header(self.path).metadata if self.layers is None else self._header.metadata

    @functools.cached_property
    def converted(self) -> Path:
        """The checkpoint; made now, if it is not there or not as it was made."""
        if self.layers is None:
            return self._checkpoint
        with _in_turn(self._checkpoint.parent):
            if not _is_sound(self._checkpoint):
                shutil.rmtree(self._checkpoint, ignore_errors=True)
                try:
                    check_output(self._checkpoint, self._header.float32_bytes)
                    self._mention(
                        f"converting {self.path.name}, once: {self._header.float32_bytes / 1e9:.1f} GB in "
                        f"{self._checkpoint}"
                    )
                    _convert(self._header, self._config, self._checkpoint)
                except InputError as error:
                    raise InputError(f"{error} (LINEARPATCH_CACHE names the place for converted models)") from error
        return self._checkpoint


# --- what the file says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """Metadata; the tensors by name; the values of those that scale frequencies."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    factors: Mapping[str, list[float]]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def blocks(self) -> int:
        """How many layers there are tensors of."""
        return 1 + max((int(n) for name in self.tensors for n in re.findall(r"^blk\.([0-9]+)\.", name)), default=-1)

    @property
    def float32_bytes(self) -> int:
        return sum(4 * math.prod(tensor.shape) for tensor in self.tensors.values())


def _read_header(path: Path) -> Header:
    try:
        metadata, tensors = read_file(path)
        _check_kind(path, metadata)
        scaling = tensors.keys() & {FREQUENCIES, LONG, SHORT}
        factors = {name: tensors[name].read().flatten().tolist() for name in scaling}
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is damaged or cut short ({said(error)}): download it again (or join its parts, if it is one)"
        ) from error
    return Header(path, metadata, tensors, factors)


def _check_kind(path: Path, metadata: Mapping[str, Any]) -> None:
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        number = metadata.get("split.no", 0) + 1
        raise InputError(
            f"{path} is part {number} of {parts} of a model{_other_parts(path, number, parts)}: join them with "
            "llama-gguf-split --merge FIRST-PART OUT.gguf, and give OUT.gguf"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model" or "adapter.type" in metadata:
        raise InputError(f"{path} holds no model ({kind}): give the .gguf file of the model")
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{path} holds a model of architecture {architecture!r}, which is not supported: use one of "
            f"{', '.join(ARCHITECTURES)} (llama is Mistral's, too)"
        )


def _other_parts(path: Path, number: int, parts: int) -> str:
    """The names of the other parts, where the file is called as llama.cpp calls them."""
    mine = f"-{number:05}-of-{parts:05}"
    if mine not in path.name:
        return ""
    others = [path.name.replace(mine, f"-{i:05}-of-{parts:05}") for i in range(1, min(parts, 100) + 1) if i != number]
    return f" ({others[0]}{', ...' if len(others) > 1 else ''} is the rest)"


class _Keys:
    """The keys of the file's architecture, each taken by whom it is for; at the end nothing may be left."""

    def __init__(self, header: Header) -> None:
        self._path, self._prefix = header.path, f"{header.architecture}."
        found = header.metadata.items()
        self._left = {key.removeprefix(self._prefix): value for key, value in found if key.startswith(self._prefix)}

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if isinstance(value, list) and key != layout.WINDOW_PATTERN:
            # One value a layer; they are one where all are the same.
            if len({*map(str, value)}) != 1:
                self.refuse(key, value, "differs from layer to layer")
            value = value[0]
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if value is None:
            raise InputError(f"{self._path} does not say its {self._prefix}{key}: download it again, or {_INSTEAD}")
        if type(value) is not int or not 1 <= value < 1 << 40:
            self.refuse(key, value, "is no size")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if value is None:
            raise InputError(f"{self._path} does not say its {self._prefix}{key}: download it again, or {_INSTEAD}")
        if not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(key, value, "is no number")
        # What was written as 1e-5 and stored in 32 bits is read as 1e-5.
        return float(str(np.float32(value)))

    def refuse(
        self, key: str, value: Any, why: str = "may change what the model computes, and is not read"
    ) -> NoReturn:
        raise InputError(f"{self._path}: {self._prefix}{key} = {str(value)[:60]} {why}: {_INSTEAD}")

    def refuse_rest(self) -> None:
        for key, value in self._left.items():
            harmless = key in _HARMLESS or key.startswith(_OF_IMAGES)
            if not harmless and value not in _NEUTRAL.get(key, ()):
                self.refuse(key, value)


def config_of(header: Header) -> PretrainedConfig:
    """The config of the family with all that the metadata says; what llama.cpp takes where it says nothing."""
    keys, metadata, architecture = _Keys(header), header.metadata, header.architecture
    sizes = {
        name: keys.size(key) for name, key in layout.SIZES.items() if name not in ("num_key_value_heads", "vocab_size")
    }
    layers, hidden, heads = (sizes[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if header.blocks != layers:
        raise InputError(f"{header.path} says it has {layers} layers and holds {header.blocks}: download it again")
    context = sizes["max_position_embeddings"]
    # The first key sets the default of the second; Transformers needs llama's to undo a permutation.
    kv_heads = keys.size(layout.SIZES["num_key_value_heads"], None if architecture == "llama" else heads)
    head = keys.size(layout.KEY_SIZE, hidden // heads)
    if (value := keys.size(layout.VALUE_SIZE, head)) != head:
        keys.refuse(layout.VALUE_SIZE, value, f"is not the {head} of its keys")
    entries: dict[str, Any] = {
        **sizes,
        "num_key_value_heads": kv_heads,
        "vocab_size": keys.size(layout.SIZES["vocab_size"], _tokens_in(header)),
        "rms_norm_eps": keys.number(layout.EPS),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    # The padding token that a class has by default need not be in this vocabulary.
    said_ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in layout.TOKENS.items()}
    entries |= {name: token for name, token in said_ids.items() if token is not None or name == "pad_token_id"}
    if architecture in ("llama", "qwen3", "gemma3"):
        entries |= {"head_dim": head, "attention_bias": "blk.0.attn_q.bias" in header.tensors}
    elif head * heads != hidden:
        keys.refuse(layout.KEY_SIZE, head, f"is not the {hidden} of the width shared out to {heads} heads")
    if architecture == "llama":
        entries["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    rotary = keys.size(layout.ROTATED, head)
    if rotary != head and architecture != "phi3":
        keys.refuse(layout.ROTATED, rotary, f"is not the {head} of its heads")
    rope = _rope(keys, header, head, context)
    if architecture == "gemma3":
        entries |= _gemma3(keys, rope, layers, hidden // heads, head)
    elif architecture == "phi3":
        entries |= _phi3(keys, rope, rotary / head, context)
    else:
        entries["rope_parameters"] = rope
    ordinary = 1 / math.sqrt(head)
    scale = keys.number("attention.scale", 0)
    if scale and not math.isclose(scale, ordinary, rel_tol=1e-5):
        keys.refuse("attention.scale", scale, f"is not the {ordinary:.6g} of {head} dimensions")
    if (window := keys.take(layout.WINDOW, 0)) and not (type(window) is int and window >= context):
        keys.refuse(layout.WINDOW, window)
    keys.refuse_rest()
    with reading(header.path, _INSTEAD):
        return STOCK_FAMILIES[ARCHITECTURES[architecture]].config_class(**entries)


def _tokens_in(header: Header) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _gemma3(keys: _Keys, rope: dict[str, Any], layers: int, share: int, head: int) -> dict[str, Any]:
    """Layers that see a window have their own base, unscaled; scores are scaled by the head's size, or (27B) by the
    width's share."""
    pattern = keys.take(layout.WINDOW_PATTERN, 6)
    if isinstance(pattern, list) and len(pattern) == layers:
        windowed = [bool(one) for one in pattern]
    elif type(pattern) is int and pattern > 0:
        windowed = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        keys.refuse(layout.WINDOW_PATTERN, pattern, "is no pattern")
    scale = keys.number("attention.scale", 0) or (1 / math.sqrt(share if layers == 62 else head))
    cap = keys.number(layout.LOGIT_CAP, 0)
    return {
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.number(layout.BASE_IN_WINDOWS, 10_000.0),
            },
        },
        "layer_types": ["sliding_attention" if one else "full_attention" for one in windowed],
        "sliding_window": keys.size(layout.WINDOW),
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": cap or None,
    }


def _phi3(keys: _Keys, rope: dict[str, Any], rotary: float, context: int) -> dict[str, Any]:
    """A part of each head is rotated; a window of 0 is none."""
    window = keys.take(layout.WINDOW, 0)
    original = rope.pop("original_max_position_embeddings", context)
    return {
        "rope_parameters": {**rope, "partial_rotary_factor": rotary},
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }


# --- rotary embeddings -----------------------------------------------------------------------------------------------


def _rope(keys: _Keys, header: Header, head: int, context: int) -> dict[str, Any]:
    """`rope_parameters` of a model (of its layers without a window).

    llama.cpp scales by a factor without a type, too, and a tensor of factors stands beside any type.
    """
    theta = keys.number(layout.BASE, 10_000.0)
    factor = keys.number(layout.FACTOR, 0) or keys.number("rope.scale_linear", 0) or 1.0
    kind = keys.take(layout.SCALING, "linear")
    original = keys.size(layout.ORIGINAL, context)
    plain = {"rope_type": "default", "rope_theta": theta}
    longrope = {LONG, SHORT} & header.factors.keys()
    if longrope or kind == "longrope":
        alone = factor == 1 and FREQUENCIES not in header.factors
        if header.architecture != "phi3" or len(longrope) < 2 or not alone:
            keys.refuse(layout.SCALING, kind, "does not go with the tensors rope_factors_* here")
        scaling: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": header.factors[LONG],
            "short_factor": header.factors[SHORT],
            "original_max_position_embeddings": original,
        }
        if attention := keys.number(layout.ATTENTION_FACTOR, 0):
            scaling["attention_factor"] = attention
        return plain | scaling
    if FREQUENCIES in header.factors:
        if factor != 1 and kind != "none":
            keys.refuse(layout.FACTOR, factor, f"scales beside the tensor {FREQUENCIES}")
        return plain | _llama3(header, theta, head, original)
    if factor == 1 or kind == "none":
        return plain
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or header.architecture in ("gemma3", "phi3"):
        keys.refuse(layout.SCALING, kind, "cannot be taken over")
    return plain | _yarn(keys, factor, original)


def _yarn(keys: _Keys, factor: float, original: int) -> dict[str, Any]:
    if (mixed := keys.number("rope.scaling.yarn_ext_factor", 1)) not in (1, -1):
        keys.refuse("rope.scaling.yarn_ext_factor", mixed, "cannot be taken over")
    # llama.cpp multiplies what the paper prescribes by both.
    attention = keys.number(layout.YARN_ATTENTION, 1) * keys.number(layout.ATTENTION_FACTOR, 1)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * layout.yarn_attention(factor),
        **{name: keys.number(key, default) for name, (key, default) in layout.YARN.items()},
    }


def _llama3(header: Header, theta: float, head: int, original: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 whose factors the tensor holds; InputError where it is another one."""
    factors = torch.tensor(header.factors[FREQUENCIES], dtype=torch.float64)
    if bool((factors == 1).all()):
        return {}
    plain = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    for length in dict.fromkeys((original, 8192)):
        if len(factors) != len(plain):
            break
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            **layout.LLAMA3,
            "original_max_position_embeddings": length,
        }
        config = STOCK_FAMILIES["llama"].config_class(head_dim=head, rope_parameters={"rope_theta": theta, **scaling})
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
        if torch.allclose(plain / scaled.double(), factors, rtol=1e-4):
            return scaling
    raise InputError(
        f"{header.path} scales its rotary frequencies by the tensor {FREQUENCIES}, in another way than Llama 3.1: "
        f"{_INSTEAD}"
    )


# --- tensors ---------------------------------------------------------------------------------------------------------


def check_tensors(header: Header, config: PretrainedConfig) -> None:
    """Whether the tensors are those of the config's model, no more and no less, in its shapes; nothing is allocated."""
    path, stored = header.path, {name: tensor.shape for name, tensor in header.tensors.items()}
    embedding = (config.vocab_size, config.hidden_size)
    if stored.get("token_embd.weight") != embedding:
        raise InputError(
            f"{path} says its embedding is {[*embedding]} and holds {[*stored.get('token_embd.weight', ())]}: download "
            "it again"
        )
    expected = {name: tuple(tensor.shape) for name, (_, tensor) in layout.places(header.architecture, config).items()}
    read = {LONG, SHORT, FREQUENCIES} & header.factors.keys()
    unread = sorted(name for name in stored.keys() - expected.keys() - read if not _TABLES.fullmatch(name))
    if unread:
        raise InputError(
            f"{path} holds {len(unread)} tensors that have no place in a {config.model_type} of Transformers, "
            f"{unread[0]} for one: {_INSTEAD}"
        )
    tied = {"output.weight"} if config.tie_word_embeddings else set()
    refuse_missing(str(path), expected.keys() - stored.keys() - tied)
    for name in sorted(expected.keys() & stored.keys()):
        if stored[name] != expected[name]:
            raise InputError(
                f"{path}: {name} is {[*stored[name]]} and by its metadata {[*expected[name]]}: download it again, or "
                f"{_INSTEAD}"
            )


# --- conversion ------------------------------------------------------------------------------------------------------


def _convert(header: Header, config: PretrainedConfig, target: Path) -> None:
    with reading(header.path, _INSTEAD):
        model, tokenizer = _model(header, config), _tokenizer(header)
    save_checkpoint(model, tokenizer, target)
    files = {file.relative_to(target).as_posix(): _digest(file) for file in target.rglob("*") if file.is_file()}
    write_whole(target / _SEAL, json.dumps({"converter": _converter(), "files": files}).encode())


@torch.no_grad()
def _model(header: Header, config: PretrainedConfig) -> PreTrainedModel:
    """The model with the file's weights in float32."""
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = model.state_dict()
    for stored_name, (name, _) in layout.places(header.architecture, config).items():
        if stored_name in header.tensors:
            stored = header.tensors[stored_name].read()
            weights[name].copy_(layout.from_file(name, stored, header.architecture, config))
    model.tie_weights()
    return model.eval()


def _tokenizer(header: Header) -> Any:
    if (split := unknown_split(header.metadata)) is not None:
        raise InputError(f"{header.path}: its tokenizer splits text as {split!r}, which is not known here: {_INSTEAD}")
    try:
        return build_tokenizer(header.metadata)
    except Exception as error:
        raise InputError(f"{header.path} has no tokenizer that can be loaded: {said(error)}") from error


# --- the cache -------------------------------------------------------------------------------------------------------


def _name_of(path: Path) -> str:
    """16 hex digits of a GGUF file: its size, its time and both its ends."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, stat.st_size - _ENDS))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _converter() -> str:
    return f"{_VERSION}, transformers {transformers.__version__}"


def _is_sound(checkpoint: Path) -> bool:
    """Whether this version made the checkpoint, and every file of it is as it was written (of one of more than 64 MB:
    its size and both its ends)."""
    try:
        seal = read_json(checkpoint / _SEAL, "")
        return seal["converter"] == _converter() and all(
            _digest(checkpoint / name) == digest for name, digest in seal["files"].items()
        )
    except Exception:
        # Whatever is there instead, it is not what was written.
        return False


def _digest(file: Path) -> str:
    size = file.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        if size <= _WHOLE:
            state.update(content.read())
        else:
            state.update(content.read(_ENDS))
            content.seek(-_ENDS, os.SEEK_END)
            state.update(content.read())
    return state.hexdigest()


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One conversion at a time, as far as the file system locks; who comes second finds it done."""
    descriptor = None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
