"""A model and its tokenizer from a directory, the hub or a GGUF file, or one line that says why not."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.torch_state import own_state
from linearpatch_kernels.modeling.families import family_of, num_layers, rebuild
from linearpatch_kernels.modeling.saving import check_output, is_ours, no_progress_bar, save_checkpoint
from linearpatch_kernels.text import cache_dir

# Architecture names inside GGUF files (mistral is written as llama).
_GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
_GGUF_MAGIC = b"GGUF"
DEVICE_MAPS = ("auto", "balanced", "sequential")
"""How accelerate shares a model out: what fits best; the same to every device; one device after the other."""

_FINGERPRINT_BYTES = 1 << 20


class ModelSource:
    """A model that was looked at, its weights not yet loaded: for what must be known, or refused, before that.

    Args:
        source: a checkpoint directory, a ``.gguf`` file, or a hub id (``owner/name``).
        dtype: of the weights; None is the checkpoint's own.
        device: None or ``"auto"`` is the accelerator if there is one, else the CPU.
        device_map: instead of a device: ``"auto"``, ``"balanced"``, ``"sequential"``, or module -> device, ``"cpu"`` or
            ``"disk"`` (the weights then stay in the checkpoint's files, and are read for every call).
        trust_remote_code: run the code that a checkpoint brings (a patched checkpoint of ours needs none here).

    Raises:
        InputError: not a model, an unsupported family, damaged or incomplete files, no such device. What is read later
            raises later: a hub that cannot be reached, a tokenizer that is missing or belongs to another model.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, str | int | torch.device] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = str(source)
        self._dtype, self._trust = dtype, trust_remote_code
        self._device = _device(device) if device_map is None else None
        self._spread = {} if device_map is None else _spread(device_map)
        path = Path(source).expanduser()
        self._gguf = _GGUF(path) if path.is_file() else None
        # An empty name is that of the working directory to pathlib, and of nothing to a person.
        local = path.is_dir() and self.name != ""
        if local:
            _check_directory(path)
        elif self._gguf is None:
            _check_hub_id(self.name)
        self._found = str(path) if local else self.name

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has."""
        layers = None if self._gguf is None else self._gguf.layers
        return int(self.config.num_hidden_layers) if layers is None else layers

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return int(self.config.hidden_size)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The model's; a GGUF file is converted for it, and a hub asked."""
        with _told_of(self.name):
            config = AutoConfig.from_pretrained(self._place, trust_remote_code=self._trust)
        family_of(config)
        return config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        rows = self.config.vocab_size
        tokenizer = _load_tokenizer(self.name, self._place, trust_remote_code=self._trust)
        # Added tokens are not counted: Gemma 3 has one more of them than rows, for images.
        if tokenizer.vocab_size > rows:
            raise InputError(
                f"the tokenizer of {self.name} has {tokenizer.vocab_size} tokens and the model {rows} embeddings: it "
                "belongs to another model"
            )
        return tokenizer

    @own_state()
    def load(self) -> PreTrainedModel:
        """The model, in evaluation mode."""
        options = {"trust_remote_code": self._trust, "use_safetensors": True}
        model = _load_weights(self.name, self._place, self.config, self._dtype, self._spread, **options)
        return (model if self._device is None else model.to(self._device)).eval()

    @property
    def _place(self) -> str:
        return self._found if self._gguf is None else str(self._gguf.converted())


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode, and its tokenizer.

    A GGUF file is dequantised to float32 once and kept as a checkpoint under `text.cache_dir`.

    A model that is larger than any one device can be spread with ``device_map`` (by accelerate): it answers, measures
    and calibrates like any other, but cannot be cut or trained.

    Args:
        source, dtype, device, device_map, trust_remote_code: as `ModelSource`.

    Raises:
        InputError: not a model, an unsupported family, damaged or incomplete files, a tokenizer that is missing or
            belongs to another model, a hub that cannot be reached.
    """
    found = ModelSource(source, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code)
    tokenizer = found.tokenizer
    return found.load(), tokenizer


def _spread(device_map: str | Mapping[str, str | int | torch.device]) -> dict[str, Any]:
    """What `from_pretrained` is told; what does not fit the devices and the memory stays on the disk."""
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise InputError(f"no device map is called {device_map!r}: choose one of {', '.join(DEVICE_MAPS)}")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(
            "spreading a model over devices needs accelerate, which is not installed: "
            "pip install 'linearpatch-kernels[train]'"
        )
    return {"device_map": device_map, "offload_folder": str(cache_dir() / "offload")}


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        # torch.device takes every name that could be one; a tensor shows whether the device is there.
        torch.zeros(1, dtype=torch.float32, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device {device!r} here: give cpu, cuda, cuda:1, ...") from error
    return torch.device(device)


def _check_hub_id(source: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or source.endswith(".gguf"):
        raise InputError(f"{source!r} does not exist: give a model directory, a .gguf file, or a hub id (owner/name)")


def _check_directory(path: Path) -> None:
    """Whether a directory holds a model of a supported family with sound weights."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a model: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}/config.json cannot be read ({error}): copy the model again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}/config.json is not a model's: it names no model_type")
    family_of(str(config["model_type"]))
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except FileNotFoundError as error:
            raise InputError(f"{path} is incomplete: {file.name} is missing") from error
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is damaged or cut short ({error}): copy the model again") from error


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if not index.exists():
        raise InputError(f"{path} has no safetensors weights (model.safetensors, or shards with an index)")
    try:
        return [path / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({error}): copy the model again") from error


@contextlib.contextmanager
def _told_of(source: str) -> Iterator[None]:
    """What Transformers has to say of a model, as one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{source} cannot be loaded: {_first_line(error)}") from error


def _load_weights(
    source: str,
    place: str,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    spread: Mapping[str, Any],
    **options: Any,
) -> PreTrainedModel:
    with _told_of(source), no_progress_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            place, config=copy.deepcopy(config), dtype=dtype or "auto", output_loading_info=True, **spread, **options
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{source} is incomplete: {len(missing)} weights are missing, {missing[0]} for one")
    layers = num_layers(model)
    beyond = [
        key for key in info["unexpected_keys"] if any(int(n) >= layers for n in re.findall(r"layers\.(\d+)\.", key))
    ]
    if beyond:
        raise InputError(
            f"{source} has weights of more layers than the {layers} of its config: restore its config.json"
        )
    return model


def _load_tokenizer(source: str, place: str, **options: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        # Tokenizer files fail in as many ways as there are formats; whatever it was, this is not a tokenizer.
        raise InputError(f"{source} has no tokenizer that can be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# --- GGUF ------------------------------------------------------------------------------------------------------------


class _GGUF:
    """A GGUF file, and the checkpoint that it was or will be converted to.

    Attributes:
        layers: how many the header names; None where the file has been converted, and the checkpoint's config tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        stat = path.stat()
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as file:
            head = file.read(_FINGERPRINT_BYTES)
            digest.update(head)
            file.seek(max(0, stat.st_size - _FINGERPRINT_BYTES))
            digest.update(file.read())
        if head[:4] != _GGUF_MAGIC:
            raise InputError(f"{path} is not a GGUF file: give a model directory, a .gguf file, or a hub id")
        self._checkpoint = cache_dir() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"
        self.layers: int | None = None
        if not is_ours(self._checkpoint):
            self.layers, self._size = _checked_gguf(path)

    def converted(self) -> Path:
        """The checkpoint."""
        if not is_ours(self._checkpoint):
            try:
                check_output(self._checkpoint, self._size, overwrite=True)
            except InputError as error:
                raise InputError(f"{error} (LINEARPATCH_CACHE names the place for converted models)") from error
            _convert_gguf(self.path, self._checkpoint)
        return self._checkpoint


def _checked_gguf(path: Path) -> tuple[int, int]:
    """The number of layers, and the bytes of the file's tensors in float32; raises `InputError` unless the file is
    whole and can be converted."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or cut short: download it again") from error
    if architecture not in _GGUF_ARCHITECTURES:
        raise InputError(
            f"{path} holds a model of architecture {architecture!r}, which is not supported: use one of "
            + ", ".join(_GGUF_ARCHITECTURES)
        )
    layers = reader.fields.get(f"{architecture}.block_count")
    if layers is None:
        raise InputError(f"{path} does not say how many layers it has: download it again")
    return int(layers.contents()), sum(4 * int(tensor.n_elements) for tensor in reader.tensors)


def _convert_gguf(path: Path, converted: Path) -> None:
    # The conversion's progress bar minds no setting: it may stay on a terminal, and nowhere else.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    source, place, gguf_file = str(path), str(path.parent), {"gguf_file": path.name}
    with quiet:
        with _told_of(source):
            config = AutoConfig.from_pretrained(place, **gguf_file)
        family_of(config)
        model = _load_weights(source, place, config, torch.float32, {}, **gguf_file)
    tokenizer = _load_tokenizer(source, place, **gguf_file)
    # The weights are plain tensors now; what still calls them quantised would keep them from being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    plain = rebuild(model, type(model), model.config, range(num_layers(model)))
    save_checkpoint(plain, tokenizer, converted, overwrite=True)
