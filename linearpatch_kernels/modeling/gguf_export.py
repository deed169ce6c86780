"""A stock model as a GGUF file: the inverse of `gguf`, by the same table (`gguf_layout`).

What the file will say is put together before any weight is loaded, and read back by the package's own reader: a model
that would be read as another one is refused by the name of what the file cannot say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import appearing, check_room, remove_unfinished
from linearpatch_kernels.modeling import gguf_layout as layout
from linearpatch_kernels.modeling.families import PATCHED_PREFIX, STOCK_FAMILIES, family_of
from linearpatch_kernels.modeling.gguf import Header, check_tensors, config_of
from linearpatch_kernels.modeling.gguf_file import StoredTensor, read_file
from linearpatch_kernels.modeling.gguf_tokenizer import PREFIX
from linearpatch_kernels.modeling.gguf_vocabulary import describe_tokenizer
from linearpatch_kernels.torch_state import own_state

DTYPES: Mapping[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Of the matrices -> gguf's name of it. Vectors stay in float32: llama.cpp computes norms and biases in it alone."""

OURS = "linearpatch."
"""How the keys begin that say what this package did."""
VERSION = f"{OURS}version"
"""The key by which a file is known as this package's; who describes one says it."""
_BYTES = f"{OURS}tensor_bytes"

# What stands in a config and changes nothing that a model computes of a text, or is compared otherwise.
_NOT_COMPUTED = {
    *("initializer_range", "use_cache", "pretraining_tp", "max_window_layers", "use_sliding_window"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "sliding_window_pattern", "_sliding_window_pattern"),
    *("model_type", "rope_parameters", "sliding_window", "original_max_position_embeddings", *layout.TOKENS),
}
# Types of rotary embeddings. (A dynamic one begins as one that is not scaled, which reading back would not tell.)
_ROPES = ("default", "linear", "yarn", "llama3", "longrope")
_CLOSE = 1e-5
# llama.cpp takes spaces behind special tokens away in a model with one of these in its name, and looks these tokens up
# then: without them it does not load the file.
_PHI3_NAMES, _PHI3_TOKENS = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
# Of the head of the file beside its vocabulary.
_HEAD_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Description:
    """All that a file will say of a model, and the tensors that it will hold.

    Attributes:
        metadata: by key; tensors: by the file's name, name in Transformers and shape.
        kinds: what each of them will be stored as, by gguf's name.
        factors: tensors that the model has none of: they scale rotary frequencies.
        notes: what the file cannot say, or llama.cpp does not do.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    kinds: Mapping[str, str]
    factors: Mapping[str, list[float]]
    notes: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by the file's name."""
        shapes = {name: shape for name, (_, shape) in self.tensors.items()}
        return shapes | {name: (len(values),) for name, values in self.factors.items()}

    @property
    def tensor_bytes(self) -> int:
        """What all tensors take."""
        shapes = self.shapes
        return sum(math.prod(_bytes_shape(shapes[name], kind)) for name, kind in self.kinds.items())


def check_stock(name: str, config: PretrainedConfig, *, quantised: bool) -> str:
    """The architecture of a GGUF file that can hold the model.

    Raises:
        InputError: a patched or quantised model, or one of another architecture.
    """
    model_type = str(config.model_type)
    if model_type.startswith(PATCHED_PREFIX):
        raise InputError(
            f"{name} is a patched model, which llama.cpp cannot run: prune or merge again with `heal` refit, which "
            "makes a stock model, and export that"
        )
    if quantised:
        raise InputError(f"{name} is quantised: export the full-precision model, and say `dtype` q8_0")
    architecture = family_of(config).gguf if model_type in STOCK_FAMILIES else None
    if architecture is None:
        known = ", ".join(name for name, family in STOCK_FAMILIES.items() if family.gguf is not None)
        raise InputError(f"{name} is a {model_type}, which cannot be exported to GGUF: give one of {known}")
    return architecture


@own_state()
def describe(
    name: str, config: PretrainedConfig, tokenizer: Any, architecture: str, dtype: str, about: Mapping[str, Any]
) -> Description:
    """What the file says of a model.

    Args:
        name: of the model, in messages; dtype: one of `DTYPES`; about: more metadata, `VERSION` among it.

    Raises:
        InputError: the file cannot say something that the model computes, or how its tokenizer splits text.
    """
    vocabulary = describe_tokenizer(tokenizer, architecture, config.vocab_size)
    said, factors, notes = _keys(config, architecture)
    tensors = {
        stored: (place, tuple(tensor.shape))
        for stored, (place, tensor) in layout.places(architecture, config).items()
        if not (stored == "output.weight" and config.tie_word_embeddings)
    }
    kinds = {stored: _kind(shape, dtype) for stored, (_, shape) in tensors.items()}
    kinds |= dict.fromkeys(factors, "F32")
    metadata = {
        "general.architecture": architecture,
        "general.type": "model",
        **_named(about, vocabulary.metadata),
        "general.file_type": _file_type(dtype),
        **({"general.quantization_version": 2} if dtype == "q8_0" else {}),
        **{f"{architecture}.{key}": value for key, value in said.items()},
        **vocabulary.metadata,
    }
    found = Description(architecture, metadata, tensors, kinds, factors, (*notes, *vocabulary.notes))
    _check_read_back(name, found, config)
    return dataclasses.replace(found, metadata={**metadata, _BYTES: found.tensor_bytes})


def wrote(file: Path) -> bool:
    """Whether this package wrote the file, and its tensors take the bytes that they took then.

    What another tool makes of it (quantised further, say) keeps the keys and not the bytes.
    """
    try:
        metadata, tensors = read_file(file)
        stored = sum(math.prod(tensor.stored_shape) for tensor in tensors.values())
    except Exception:
        # Whatever it is, this package did not write it.
        return False
    return VERSION in metadata and metadata.get(_BYTES) == stored


@own_state()
@torch.no_grad()
def write_gguf(
    file: Path,
    description: Description,
    model: PreTrainedModel,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Write the model; the file appears whole or not at all.

    Args:
        progress: called with what is done, the tensors written, and their number.

    Raises:
        InputError: the disk is full or fails; a weight is not finite, or too large for the dtype.
    """
    import gguf

    _check_weights(model, description)
    check_room(file, file.parent, description.tensor_bytes + _HEAD_BYTES)
    remove_unfinished(file)
    weights, shapes = model.state_dict(), description.shapes
    with appearing(file) as opened:
        # It writes by the name; by the descriptor, which holds the lock, nothing is written.
        writer = gguf.GGUFWriter(opened.name, description.architecture)
        try:
            for key, value in description.metadata.items():
                _add(writer, key, value)
            for stored, kind in description.kinds.items():
                size = math.prod(_bytes_shape(shapes[stored], kind))
                number = gguf.GGMLQuantizationType[kind]
                writer.add_tensor_info(stored, shapes[stored], np.dtype(np.float32), size, raw_dtype=number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (stored, kind) in enumerate(description.kinds.items()):
                if stored in description.factors:
                    values = torch.tensor(description.factors[stored], dtype=torch.float32, device="cpu")
                else:
                    place = description.tensors[stored][0]
                    weight = weights[place].to("cpu", torch.float32)
                    values = layout.to_file(place, weight, description.architecture, model.config)
                writer.write_tensor_data(_packed(stored, values, kind))
                progress("writing tensors", done + 1, len(description.kinds))
        finally:
            writer.close()
        _check_written(Path(opened.name), description)


def _check_weights(model: PreTrainedModel, description: Description) -> None:
    """InputError unless the model has the weights that were described, all of them plain, and no others."""
    weights, shapes = model.state_dict(), description.shapes
    for stored, (place, _) in description.tensors.items():
        weight = weights.get(place)
        plain = weight is not None and weight.is_floating_point() and weight.element_size() > 1 and not weight.is_meta
        if not plain or weight.shape != shapes[stored]:
            raise InputError(
                f"the weight {place} is missing, quantised or not in memory: give a plain model in full precision, on "
                "one device"
            )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if others := sorted(weights.keys() - {place for place, _ in description.tensors.values()} - tied):
        raise InputError(
            f"the model holds {others[0]}, which its config does not describe: merge adapters into it first"
        )


def _check_written(file: Path, description: Description) -> None:
    """InputError where the file does not say, or has no room for, what it was to hold."""
    import gguf

    metadata, tensors = read_file(file)
    kinds = {name: gguf.GGMLQuantizationType(tensor.kind).name for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if metadata.keys() != description.metadata.keys() or kinds != description.kinds or shapes != description.shapes:
        raise InputError("what was written to the GGUF file is not what was to be written: please report this")


# --- what the file says ----------------------------------------------------------------------------------------------


def _keys(config: Any, architecture: str) -> tuple[dict[str, Any], dict[str, list[float]], list[str]]:
    """Keys of the architecture, tensors that scale rotary frequencies, and what llama.cpp does otherwise."""
    rotary = _rotary(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    said = {key: getattr(config, name) for name, key in layout.SIZES.items()}
    said |= {layout.EPS: float(config.rms_norm_eps), layout.KEY_SIZE: head, layout.VALUE_SIZE: head}
    rope, notes = config.rope_parameters, []
    for part in rope.values() if architecture == "gemma3" else (rope,):
        if (kind := part.get("rope_type", "default")) not in _ROPES:
            raise InputError(f"rotary embeddings of the type {kind} cannot be said in a GGUF file: give another model")
    if architecture == "gemma3":
        said[layout.BASE_IN_WINDOWS] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
        said[layout.WINDOW] = config.sliding_window
        said[layout.WINDOW_PATTERN] = [kind == "sliding_attention" for kind in config.layer_types]
        if config.final_logit_softcapping:
            said[layout.LOGIT_CAP] = float(config.final_logit_softcapping)
    if architecture == "phi3":
        said[layout.WINDOW] = config.sliding_window or 0
        if config.sliding_window and config.sliding_window < config.max_position_embeddings:
            notes.append(
                f"llama.cpp lets every token of a Phi-3 see all before it, and this model the last "
                f"{config.sliding_window}: longer texts are read otherwise"
            )
    rotated = int(head * rope.get("partial_rotary_factor", 1.0))
    said |= {layout.ROTATED: rotated, layout.BASE: float(rope["rope_theta"])}
    scaling, factors = _scaling(rope, config, rotary, rotated)
    return {**said, **scaling}, factors, notes


def _named(about: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, without a name by which llama.cpp would take the tokenizer for another one."""
    called = str(about.get("general.name", "")).lower()
    tokens = vocabulary.get(f"{PREFIX}tokens", ())
    is_phi3 = any(name in called for name in _PHI3_NAMES)
    misleads = is_phi3 and not all(token in tokens for token in _PHI3_TOKENS)
    return {key: value for key, value in about.items() if not (misleads and key == "general.name")}


def _scaling(
    rope: Mapping[str, Any], config: Any, rotary: Any, rotated: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Keys and tensors of scaled rotary embeddings."""
    kind, original = rope.get("rope_type", "default"), rope.get("original_max_position_embeddings")
    original = original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    if kind == "linear":
        return {layout.SCALING: "linear", layout.FACTOR: float(rope["factor"])}, {}
    if kind == "yarn":
        factor = float(rope["factor"])
        said = {layout.SCALING: "yarn", layout.FACTOR: factor, layout.ORIGINAL: original}
        said |= {key: float(rope.get(name) or default) for name, (key, default) in layout.YARN.items()}
        attention = float(rotary.attention_scaling) / layout.yarn_attention(factor)
        # Of the two keys for it, llama.cpp passes over YaRN's own since late 2025.
        return said | ({} if math.isclose(attention, 1, rel_tol=_CLOSE) else {layout.ATTENTION_FACTOR: attention}), {}
    if kind == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated)
        return {layout.ORIGINAL: original}, {layout.FREQUENCIES: (plain / rotary.inv_freq).tolist()}
    if kind == "longrope":
        factors = {layout.LONG: list(rope["long_factor"]), layout.SHORT: list(rope["short_factor"])}
        said = {layout.SCALING: "longrope", layout.ORIGINAL: original}
        return said | {layout.ATTENTION_FACTOR: float(rotary.attention_scaling)}, factors
    return {}, {}


def _rotary(config: PretrainedConfig) -> Any:
    """The module of a config's rotary embeddings, on the CPU."""
    with torch.device("meta"), no_init_weights():
        module: Any = AutoModel.from_config(config).rotary_emb
    with torch.device("cpu"):
        return type(module)(config)


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    """What a tensor is stored as: a row of q8_0 is whole blocks of 32, and one that is not stays in f16."""
    if len(shape) < 2:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % 32 else DTYPES[dtype]


def _file_type(dtype: str) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{DTYPES[dtype]}"])


def _bytes_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    from gguf import GGMLQuantizationType

    return StoredTensor(Path(), shape, GGMLQuantizationType[kind], 0).stored_shape


def _add(writer: Any, key: str, value: Any) -> None:
    if key == "general.architecture":  # the writer has it from its maker
        return
    kinds = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    add = next((add for kind, add in kinds if isinstance(value, kind)), writer.add_array)
    (writer.add_uint64 if key == _BYTES else add)(key, value)


def _packed(stored: str, values: Tensor, kind: str) -> Any:
    """The bytes of a tensor, as numpy has them."""
    import gguf

    array = np.ascontiguousarray(values.numpy())
    if not np.isfinite(array).all():
        raise InputError(f"the weight {stored} holds values that are not finite: no engine can compute with it")
    with np.errstate(over="ignore"):
        packed = gguf.quantize(array, gguf.GGMLQuantizationType[kind])
    largest = float(np.abs(array).max(initial=0.0))
    if kind in ("F16", "Q8_0") and largest > (127 if kind == "Q8_0" else 1) * float(np.finfo(np.float16).max):
        raise InputError(f"the weight {stored} holds {largest:.3g}, which is too large for {kind.lower()}: say bf16")
    return packed


# --- whether it is read as the model ----------------------------------------------------------------------------------


def _check_read_back(name: str, description: Description, config: Any) -> None:
    """InputError where the package's reader would make another model of what the file says."""
    tensors = {stored: StoredTensor(Path(name), shape, 0, 0) for stored, shape in description.shapes.items()}
    header = Header(Path(name), description.metadata, tensors, description.factors)
    try:
        read = config_of(header)
        check_tensors(header, read)
    except InputError as error:
        raise InputError(f"{name} cannot be exported: a GGUF file would not say it all ({error})") from error
    other = _difference(config, read)
    if other is not None:
        raise InputError(
            f"{name} cannot be exported: a GGUF file of {description.architecture} cannot say that its {other}"
        )


def _difference(config: Any, read: Any) -> str | None:
    """What one config computes and the other does not: its name and value."""
    mine, its = config.to_dict(), read.to_dict()
    own = type(config)().to_dict().keys() - PretrainedConfig().to_dict().keys() | {"tie_word_embeddings"}
    for key in sorted(own - _NOT_COMPUTED):
        if not _same(mine.get(key), its.get(key)):
            return f"{key} is {mine.get(key)}"
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if windowed and window and window < context and window != getattr(read, "sliding_window", None):
        return f"sliding_window is {window} of {context} tokens"
    here, there = (_rotary(one) for one in (config, read))
    tables = {key: value for key, value in here.named_buffers() if not key.endswith("original_inv_freq")}
    others = dict(there.named_buffers())
    same = all(key in others and torch.allclose(value, others[key], rtol=_CLOSE) for key, value in tables.items())
    scales = [
        {key: value for key, value in vars(one).items() if key.endswith("attention_scaling")} for one in (here, there)
    ]
    lists = [
        [(one.rope_parameters or {}).get(key) for key in ("long_factor", "short_factor")] for one in (config, read)
    ]
    if same and _same(*scales) and _same(*lists):
        return None
    return f"rope_parameters are {str(config.rope_parameters)[:200]}"


def _same(one: Any, other: Any) -> bool:
    """Whether two values of configs are the same, numbers as near as 32 bits have them."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=_CLOSE)
    return bool(one == other)
