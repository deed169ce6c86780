"""A model and its tokenizer from a directory, the hub or a GGUF file, or one line that says why not."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import reading, said
from linearpatch_kernels.modeling.families import (
    PATCHED_PREFIX,
    auto_class,
    depth_of,
    family_of,
    hidden_size,
    num_layers,
    text_config,
)
from linearpatch_kernels.modeling.gguf import GGUFFile
from linearpatch_kernels.modeling.origin import CARD, Origin, origin_of_directory, origin_of_gguf
from linearpatch_kernels.modeling.patched import twin_of
from linearpatch_kernels.modeling.saving import no_progress_bar
from linearpatch_kernels.modeling.weights import (
    MERGE_ADAPTER,
    Shapes,
    check_directory,
    check_weights,
    refuse_dropped,
    refuse_missing,
)
from linearpatch_kernels.text import cache_dir
from linearpatch_kernels.torch_state import own_state

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""How accelerate shares a model out: what fits best; the same to every device; one device after the other."""

# The terms of a model, in its directory or repository.
_TERMS = ("*licen?e*", "*notice*", "*copying*", "*copyright*", "*use_policy*")
# What belongs to every model made of one: its terms, and what other tools read its tokenizer, its templates and its
# settings from, and what makes of images and sounds what it takes.
_COMPANIONS = (
    *_TERMS,
    "*.model",
    "*.model.v?*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_COMPANION_BYTES = 64 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


class Source(Protocol):
    """A model and what comes with it, still to be loaded (`ModelSource`) or given loaded (`LoadedModel`)."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def is_quantised(self) -> bool: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def companions(self) -> dict[str, bytes]: ...

    @property
    def origin(self) -> Origin: ...

    def load(self) -> PreTrainedModel: ...


class ModelSource:
    """A model that was looked at, its weights not yet loaded: for what must be known, or refused, before that.

    Args:
        source: a checkpoint directory, a ``.gguf`` file, or a hub id (``owner/name``).
        dtype: of the weights; None is the checkpoint's own.
        device: None or ``"auto"`` is the accelerator if there is one, else the CPU.
        device_map: instead of a device: ``"auto"``, ``"balanced"``, ``"sequential"``, or module -> device, ``"cpu"`` or
            ``"disk"`` (the weights then stay in the checkpoint's files, and are read for every call).
        trust_remote_code: run the code that a checkpoint brings (a patched checkpoint of ours needs none here).
        mention: called with a line before a GGUF file is converted.

    A quantised checkpoint loads where its library is installed; it answers and measures, but cannot be cut or trained.

    Raises:
        InputError: not a model, an unsupported family, damaged or incomplete files, an adapter, sizes or weights that
            do not go together, no such device. What is read later raises later: a hub that cannot be reached, a
            tokenizer that is missing or belongs to another model.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, str | int | torch.device] | None = None,
        trust_remote_code: bool = False,
        mention: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = str(source)
        self._dtype, self._trust = dtype, trust_remote_code
        self._device = _device(device) if device_map is None else None
        self._spread = {} if device_map is None else _spread(device_map)
        self._directory: Path | None = None
        self._gguf: GGUFFile | None = None
        self._shapes: Shapes = {}
        with reading(self.name, "give a model directory, a .gguf file, or a hub id (owner/name)"):
            path = Path(source).expanduser()
            if path.is_file():
                self._gguf = GGUFFile(path, mention)
            # An empty name is that of the working directory to pathlib, and of nothing to a person.
            elif path.is_dir() and self.name != "":
                self._directory = path
                self._shapes = check_directory(path)
            else:
                _check_hub_id(self.name)

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has."""
        layers = None if self._gguf is None else self._gguf.layers
        return depth_of(self.config) if layers is None else layers

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return int(text_config(self.config).hidden_size)

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are kept quantised: such a model can be measured, and neither cut nor trained.

        Those of a GGUF file are not: they are converted.
        """
        return self._gguf is None and getattr(self.config, "quantization_config", None) is not None

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """The model's; a GGUF file is converted for it, and a hub asked."""
        with _told_of(self._title):
            if self._gguf is not None:
                self._shapes = check_directory(self._gguf.converted)
            elif self._directory is None and find_adapter_config_file(self.name) is not None:
                raise InputError(f"{self.name} holds an adapter: {MERGE_ADAPTER}")
            model_type = PretrainedConfig.get_config_dict(self._place)[0].get("model_type")
            if str(model_type).startswith(PATCHED_PREFIX):
                twin_of(family_of(model_type))
            config = AutoConfig.from_pretrained(self._place, trust_remote_code=self._trust)
            family_of(config)
            check_weights(self._title, config, self._shapes)
        return config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        rows = text_config(self.config).vocab_size
        with _told_of(self._title, "has no tokenizer that can be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(self._place, trust_remote_code=self._trust)
            _check_tokenizer(tokenizer, self.name, rows)
        return tokenizer

    @own_state()
    def load(self) -> PreTrainedModel:
        """The model, in evaluation mode."""
        with _told_of(self._title), no_progress_bar():
            model, info = auto_class(self.config).from_pretrained(
                self._place,
                config=copy.deepcopy(self.config),
                dtype=self._dtype or "auto",
                trust_remote_code=self._trust,
                use_safetensors=True,
                output_loading_info=True,
                **self._spread,
            )
            # Of a hub's files nothing was known before.
            refuse_dropped(self._title, info["unexpected_keys"], depth_of(self.config))
            refuse_missing(self._title, info["missing_keys"])
            return (model if self._device is None else model.to(self._device)).eval()

    @functools.cached_property
    def companions(self) -> dict[str, bytes]:
        """Relative path -> content of the files that belong to every model made of this one and that saving a model
        does not write: its licence and notices, the files that other tools read its tokenizer from (`tokenizer.model`),
        chat templates, generation settings. With ``trust_remote_code`` also the code that it brings.

        At most 64 MB a file; no weights. None for a GGUF file. Those of a hub's model are fetched if they can be; a hub
        that cannot be reached, or a file that cannot be read, is no error.
        """
        if self._gguf is not None:
            return {}
        return _companions_in(self._files, code=self._trust)

    @functools.cached_property
    def origin(self) -> Origin:
        """What the model's card says of it, or the metadata of a GGUF file. Nothing known is no error."""
        if self._gguf is not None:
            # It was read before; whoever asks now may have worked for hours.
            with contextlib.suppress(InputError):
                return origin_of_gguf(self._gguf.metadata)
            return Origin()
        return origin_of_directory(self._files, "" if self._directory is not None else self.name)

    @functools.cached_property
    def _files(self) -> Path | None:
        """Where the files beside the weights lie; those of a hub's model are fetched."""
        return self._directory or _snapshot(self.name)

    @property
    def _place(self) -> str:
        return str(self._gguf.converted if self._gguf is not None else self._directory or self.name)

    @property
    def _title(self) -> str:
        """What a message is about: of a GGUF file its conversion, which may be what is wrong."""
        return self.name if self._gguf is None else f"{self._gguf.converted} (converted from {self.name})"


class LoadedModel:
    """A model that is given loaded, with its tokenizer. It is used as it is, where it is, and nothing in it changes.

    What was loaded from a directory or a hub says so (``name_or_path``): its companions are looked for there.

    Args:
        model: a causal LM of a supported family.
        tokenizer: the model's.
        trust_remote_code: of the companions, take the code along.

    Raises:
        InputError: not such a model, no tokenizer, or one of another model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, trust_remote_code: bool = False) -> None:
        kind = type(model).__name__
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"a {kind} is no model of Transformers: merge or unload the wrapper first")
        head = family_of(model).causal_lm_class
        if not isinstance(model, head):
            raise InputError(f"a {kind} gives no logits over tokens: give the {head.__name__}")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            missing = "is missing" if tokenizer is None else f"is a {type(tokenizer).__name__}"
            raise InputError(f"`tokenizer` {missing}: give the model's tokenizer with the {kind}")
        self.name = model.name_or_path or kind
        self.config: PretrainedConfig = model.config
        self.tokenizer = tokenizer
        self._model, self._trust = model, trust_remote_code
        _check_tokenizer(tokenizer, self.name, text_config(self.config).vocab_size)

    @property
    def num_layers(self) -> int:
        """How many decoder layers the model has."""
        return num_layers(self._model)

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return hidden_size(self._model)

    @property
    def is_quantised(self) -> bool:
        """As of `ModelSource`."""
        return getattr(self.config, "quantization_config", None) is not None

    def load(self) -> PreTrainedModel:
        """The model itself."""
        return self._model

    @functools.cached_property
    def companions(self) -> dict[str, bytes]:
        """As of `ModelSource`."""
        return _companions_in(self._files, code=self._trust)

    @functools.cached_property
    def origin(self) -> Origin:
        """As of `ModelSource`."""
        return origin_of_directory(self._files, self._model.name_or_path if self._of_hub else "")

    @functools.cached_property
    def _files(self) -> Path | None:
        """The directory that the model was loaded from, if it is there."""
        place = self._model.name_or_path
        if place and Path(place).is_dir():
            return Path(place)
        return _snapshot(place) if self._of_hub else None

    @property
    def _of_hub(self) -> bool:
        """A hub's model knows its commit: no other path that is gone is taken for the name of one."""
        place = self._model.name_or_path
        known = getattr(self.config, "_commit_hash", None) is not None
        return bool(place) and not Path(place).is_dir() and known


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


@contextlib.contextmanager
def _told_of(source: str, what: str = "cannot be loaded") -> Iterator[None]:
    """What Transformers has to say of a model, as one line: it fails in as many ways as there are models."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source} {what}: {said(error)}") from error


def _snapshot(name: str) -> Path | None:
    """The directory of a hub's model on this disk, with what accompanies a model, if the hub can be reached for it."""
    for local in (False, True):
        with contextlib.suppress(Exception):
            return Path(snapshot_download(name, allow_patterns=[*_patterns(), CARD], local_files_only=local))
    return None


def _check_tokenizer(tokenizer: Any, name: str, rows: int) -> None:
    """InputError where a tokenizer has more tokens than its model has embeddings."""
    # Added tokens are not counted: Gemma 3 has one more of them than rows, for images.
    tokens = int(tokenizer.vocab_size)
    if tokens > rows:
        raise InputError(
            f"the tokenizer of {name} has {tokens} tokens and the model {rows} embeddings: it belongs to another model"
        )


def _companions_in(folder: Path | None, *, code: bool) -> dict[str, bytes]:
    """Relative path -> content; nothing where there is no folder."""
    found: dict[str, bytes] = {}
    if folder is None:
        return found
    for file in _companion_files(folder, code=code):
        with contextlib.suppress(OSError):
            if file.is_file() and file.stat().st_size <= _COMPANION_BYTES:
                found[file.relative_to(folder).as_posix()] = file.read_bytes()
    return found


def _companion_files(folder: Path, *, code: bool) -> list[Path]:
    files: list[Path] = []
    with contextlib.suppress(OSError):
        files += [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    patterns = _patterns() + ["*.py"] * code
    without = _WEIGHTS if code else (*_WEIGHTS, ".py")
    return [
        file
        for file in sorted(files)
        if file.suffix.lower() not in without
        and any(fnmatch.fnmatchcase(file.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    ]


def terms_among(names: Iterable[str]) -> list[str]:
    """The licences, notices and policies among files of these names."""
    patterns = _patterns(_TERMS)
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _patterns(of: Iterable[str] = _COMPANIONS) -> list[str]:
    """`_COMPANIONS`, or others, for names in letters of any case."""
    return ["".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in pattern) for pattern in of]
