"""What a recipe works on: the model, the texts and their windows; and whether its output may go where it is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearpatch_kernels.demo_data import MIX_SHARES, demo_mix, demo_model_path, demo_text
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import lies_in
from linearpatch_kernels.fingerprints import fingerprint_text, fingerprint_tokenizer, fingerprint_windows
from linearpatch_kernels.forward import check_windows
from linearpatch_kernels.modeling.cut import check_weights
from linearpatch_kernels.modeling.loading import LoadedModel, ModelSource, Source
from linearpatch_kernels.modeling.saving import check_output
from linearpatch_kernels.modeling.writing import written_documents
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.settings import BOOLQ, MIX, SELF
from linearpatch_kernels.text import (
    cache_dir,
    mixed_windows,
    read_text,
    split_windows,
    token_windows,
    without_shared_runs,
)

ModelName = str | os.PathLike[str]
"""A model directory, a ``.gguf`` file, a hub id, or ``demo``."""

GivenModel: TypeAlias = ModelName | PreTrainedModel
"""A model by its name, or loaded."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several texts, by name, and what their shares are in proportion to."""

    texts: Mapping[str, str | list[str]]
    weights: Mapping[str, float]


Content = str | list[str] | Mixture
"""One text, documents, or several of either in shares."""

# A document that is tokenised again may have fewer tokens than were written.
_OWN_TEXT_MORE = 0.1

EVALUATION_WINDOWS = 16
"""How many windows the figures of a report are measured on."""

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loading(Protocol):
    """The settings that say how a model is loaded."""

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> str | None: ...

    @property
    def trust_remote_code(self) -> bool: ...


def find_model(
    model: GivenModel,
    settings: Loading,
    log: Log,
    *,
    tokenizer: Any = None,
    processes: Processes | None = None,
    device_map: str | None = None,
) -> Source:
    """MODEL with its config and tokenizer at hand, for all that can be refused before its weights are loaded.

    Args:
        log: told before a GGUF file is converted.
        tokenizer: of a model that is given loaded.
        processes: what a launcher started: it decides the device, unless the settings do.
    """
    if isinstance(model, nn.Module):
        for name in ("dtype", "device"):
            if getattr(settings, name) not in (None, "auto"):
                raise InputError(f"`{name}` says how a model is to be loaded, and this one is loaded: leave it out")
        return LoadedModel(model, tokenizer, trust_remote_code=settings.trust_remote_code)
    if tokenizer is not None:
        raise InputError(f"`tokenizer` goes with a loaded model, and {os.fspath(model)} has its own: leave it out")
    if settings.dtype not in _DTYPES:
        raise InputError(f"`dtype` {settings.dtype} is not known: choose one of {', '.join(_DTYPES)}")
    launched = None if processes is None else processes.device
    return ModelSource(
        demo_model_path() if model == "demo" else model,
        dtype=_DTYPES[settings.dtype],
        device=settings.device or (str(launched) if launched is not None else "auto"),
        device_map=device_map,
        trust_remote_code=settings.trust_remote_code,
        mention=log.mention,
    )


def check_can_be_cut(model: Source) -> None:
    """InputError for a model that can only be measured; ask it before the calibration."""
    if isinstance(model, LoadedModel):
        check_weights(model.load())
    if model.is_quantised:
        raise InputError(
            f"{model.name} is quantised and cannot be cut: give the full-precision model, and quantise the result"
        )


def check_output_place(output: Path, model: GivenModel, *reads: ModelName | None) -> None:
    """Whether an output can take its place; call it first.

    Args:
        reads: what the run reads beside the model, None for what it does not.
    """
    if lies_in(output, cache_dir()):
        raise InputError(f"{output} is in the cache, which is not yours to keep things in: give another directory")
    check_output(output, overwrite=True, made_from=[on_disk(model), *reads])


def on_disk(model: GivenModel | None) -> ModelName | None:
    """MODEL, or what it was loaded from, as a path that may be there; ``demo`` is none, whatever lies under that
    name."""
    if isinstance(model, nn.Module):
        return getattr(model, "name_or_path", None)
    return None if model == "demo" else model


def title_of(model: GivenModel) -> str:
    """What a report calls the model."""
    if isinstance(model, PreTrainedModel):
        return in_words(Path(model.name_or_path).name or type(model).__name__)
    return "SmolLM2-135M-Instruct" if model == "demo" else in_words(Path(model).name or os.fspath(model))


def in_words(name: str) -> str:
    """A name as it can be written in a report: what is not UTF-8 in the name of a file becomes question marks."""
    return name.encode("utf-8", "replace").decode()


@dataclasses.dataclass(frozen=True)
class Texts:
    """The text to calibrate on, the report's own text (None: what is left of the first), and a name for each.

    Attributes:
        own: what of the first the dense model is to write (`with_own_text`), the name of a part or of the whole; "":
            nothing.
    """

    calibration: Content
    report: str | list[str] | None
    source: str
    report_source: str
    own: str = ""

    def own_share(self) -> float:
        """Of the windows, how many the model is to write."""
        return self.shares().get(self.own, 1.0)

    def shares(self) -> dict[str, float]:
        """Of the windows to calibrate on, what share each of several texts is to give; nothing where there is one."""
        if not isinstance(self.calibration, Mixture):
            return {}
        weights = self.calibration.weights
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def with_own(self, documents: list[str]) -> Texts:
        """With what the model wrote."""
        content: Content = documents
        if isinstance(self.calibration, Mixture):
            content = dataclasses.replace(self.calibration, texts={**self.calibration.texts, self.own: documents})
        return dataclasses.replace(self, calibration=content, own="")


def with_own_text(
    texts: Texts,
    model: Source | PreTrainedModel,
    tokenizer: Any,
    windows: int,
    length: int,
    processes: Processes,
    log: Log,
) -> Texts:
    """The texts, with what the model writes where one of them is its own.

    Args:
        model: is loaded for it, where it is not yet.
        windows: how many of all texts together will be taken; length: their tokens.
    """
    if not texts.own:
        return texts
    tokens = math.ceil(windows * texts.own_share() * length * (1 + _OWN_TEXT_MORE)) + length
    loaded = model if isinstance(model, PreTrainedModel) else model.load()
    documents = written_documents(loaded, tokenizer, tokens, length, processes=processes, progress=log.progress)
    return texts.with_own(documents)


def read_texts(text: Sequence[Path] | None = None, heldout_text: Path | None = None) -> Texts:
    """The texts in these files or presets, in equal shares, by default those of `MIX`.

    Where files are among them, or nothing but what the model writes, the report is about what the run leaves of all
    texts.
    """
    given = [str(one) for one in text] if text else [MIX]
    repeated = [name for name, times in Counter(given).items() if times > 1]
    if repeated:
        raise InputError(f"`text` {repeated[0]} is given twice: name each text once")
    for name in given:
        if name.startswith("preset:") and name not in _PRESETS:
            raise InputError(f"`text` {name} is no preset: give {' or '.join(_PRESETS)}, {SELF}, or a file")
    report: str | list[str] | None = None
    if heldout_text is not None:
        report = read_text(heldout_text)
    elif set(given) & _PRESETS.keys() and set(given) <= {*_PRESETS, SELF}:
        report = demo_text("heldout")
    parts = {_title(name, given): _content(name, report) for name in given}
    source = ", ".join(parts)
    report_source = f"unused parts of {source}" if report is None else "LAMBADA passages"
    if heldout_text is not None:
        report_source = in_words(heldout_text.name)
    return Texts(_together(parts), report, source, report_source, OWN_TEXT if SELF in given else "")


OWN_TEXT = "text of the model's own"


def _mix(report: str | list[str] | None) -> Mixture:
    # LAMBADA stays a text of another kind, whatever this run reports on.
    kept_back = report if isinstance(report, list) else [*demo_text("heldout"), *([report] if report else [])]
    kinds = {kind: without_shared_runs(documents, kept_back) for kind, documents in demo_mix().items()}
    return Mixture(kinds, {kind: MIX_SHARES[kind] for kind in kinds})


_PRESETS: Mapping[str, tuple[str, Callable[[str | list[str] | None], Content]]] = {
    MIX: ("many kinds of text", _mix),
    BOOLQ: ("BoolQ passages", lambda _: demo_text("calibration")),
}


def _title(name: str, given: Sequence[str]) -> str:
    """What a report calls one of the texts given: the name of a file, its whole path where two have the same name."""
    if name in _PRESETS or name == SELF:
        return OWN_TEXT if name == SELF else _PRESETS[name][0]
    short = Path(name).name
    return in_words(short if [Path(one).name for one in given].count(short) == 1 else name)


def _content(name: str, report: str | list[str] | None) -> Content:
    if name == SELF:
        return []
    return _PRESETS[name][1](report) if name in _PRESETS else read_text(name)


def _together(parts: Mapping[str, Content]) -> Content:
    """All of them in equal shares; one alone as it is."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    texts: dict[str, str | list[str]] = {}
    weights: dict[str, float] = {}
    for name, content in parts.items():
        if isinstance(content, Mixture):
            total = sum(content.weights.values())
            texts |= content.texts
            weights |= {kind: weight / total for kind, weight in content.weights.items()}
        else:
            texts[name], weights[name] = content, 1.0
    return Mixture(texts, weights)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Disjoint windows of text for fitting, for choosing between fits, and for the report (None: the text is used
    up).

    Attributes:
        shares: of several texts in those that are not the report's.
    """

    fit: Tensor
    heldout: Tensor | None
    evaluation: Tensor | None
    about: dict[str, Any]
    evaluation_source: str
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For ``summary.json``: what the model was calibrated on."""
        named = {name: self.about[name] for name in ("source", "samples", "heldout", "length")}
        return {"text": named | ({"shares": dict(self.shares)} if self.shares else {})}


def heldout_windows(samples: int) -> int:
    """How many windows ``auto`` chooses on."""
    return max(4, samples // 8)


class Sampling(Protocol):
    """The settings that say how much text is taken."""

    @property
    def samples(self) -> int: ...

    @property
    def length(self) -> int: ...


def make_windows(
    model: Source | PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    settings: Sampling,
    log: Log,
    *,
    heldout: int,
    report: int = EVALUATION_WINDOWS,
    processes: Processes | None = None,
) -> Windows:
    """The windows of a run; the text must have ``samples + heldout``, what it has beyond goes to the ``report``.

    InputError where the text is too short, or where the model lacks one of its tokens or so many positions.
    """
    samples, length = settings.samples, settings.length
    needed = samples + heldout
    extra = 0 if texts.report is not None else report
    texts = with_own_text(texts, model, tokenizer, needed + extra, length, processes or Processes(), log)
    try:
        windows = _windows(tokenizer, texts.calibration, length, needed + extra)
    except InputError:
        # Too short for the report's share: what was asked for comes first.
        windows = _windows(tokenizer, texts.calibration, length, needed)
        if extra:
            windows = _windows(tokenizer, texts.calibration, length)
            extra = min(extra, len(windows) - needed)
    shares = split_windows(windows, {"fit": samples, "heldout": heldout, "evaluation": extra})
    evaluation: Tensor | None = shares["evaluation"]
    if texts.report is not None:
        evaluation = token_windows(tokenizer, texts.report, length=length, count=report)
    elif extra < report:
        log.aside(f"the text leaves {extra} windows of {report} for the report's figures")
    for share in (windows, evaluation):
        if share is not None and len(share):
            check_windows(model, share)
    about = {
        "source": texts.source,
        "text": fingerprint_text(_documents(texts.calibration)),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "samples": samples,
        "heldout": heldout,
        "length": length,
        # Which windows those are depends on how many the report takes of the same text.
        "windows": fingerprint_windows(torch.cat([shares["fit"], shares["heldout"]])),
    }
    held = shares["heldout"] if heldout else None
    return Windows(
        shares["fit"],
        held,
        evaluation if evaluation is not None and len(evaluation) else None,
        about,
        texts.report_source,
        texts.shares(),
    )


def windows_up_to(tokenizer: Any, content: Content, length: int, count: int) -> Tensor:
    """``count`` windows spread over the text, or all where it has fewer (or ``count`` is 0)."""
    if count:
        with contextlib.suppress(InputError):
            return _windows(tokenizer, content, length, count)
    return _windows(tokenizer, content, length)


def _windows(tokenizer: Any, content: Content, length: int, count: int | None = None) -> Tensor:
    if isinstance(content, Mixture):
        return mixed_windows(tokenizer, content.texts, length=length, count=count, weights=content.weights)
    return token_windows(tokenizer, content, length=length, count=count)


def _documents(content: Content) -> str | list[str]:
    if not isinstance(content, Mixture):
        return content
    return [part for text in content.texts.values() for part in ([text] if isinstance(text, str) else text)]


def names_in(given: str | Sequence[str]) -> list[str]:
    """``"a, b"`` or ``["a", "b"]`` -> ``["a", "b"]``, each once."""
    parts = given.split(",") if isinstance(given, str) else given
    return list(dict.fromkeys(part.strip() for part in parts))
