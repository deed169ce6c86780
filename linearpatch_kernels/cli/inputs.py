"""What a command works on: the model, the texts, and their windows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearpatch_kernels.cli.console import check_json, problems
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import lies_in

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from linearpatch_kernels.modeling.loading import ModelSource

EVALUATION_WINDOWS = 16
"""How many windows the figures of a report are measured on."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Disjoint windows of text for fitting, for choosing between fits, and for the report (None: the text is used
    up)."""

    fit: Tensor
    heldout: Tensor | None
    evaluation: Tensor | None
    about: dict[str, Any]
    evaluation_source: str


def find_model(
    source: str, dtype: str, device: str | None, trust_remote_code: bool, device_map: str | None = None
) -> ModelSource:
    """MODEL with its config and tokenizer at hand, for all that can be refused before its weights are loaded."""
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from linearpatch_kernels.demo_data import demo_model_path
    from linearpatch_kernels.modeling.loading import ModelSource

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise InputError(f"--dtype {dtype} is not known: choose one of {', '.join(dtypes)}")
    return ModelSource(
        demo_model_path() if source == "demo" else source,
        dtype=dtypes[dtype],
        device=device or "auto",
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


def check_can_be_cut(model: ModelSource) -> None:
    """InputError for a model that can only be measured; ask it before the calibration."""
    if model.is_quantised:
        raise InputError(
            f"{model.name} is quantised and cannot be cut: give the full-precision model, and quantise the result"
        )


def on_disk(model: str | None) -> str | None:
    """MODEL as a path that may be there; 'demo' is none, whatever lies under that name."""
    return None if model == "demo" else model


@dataclasses.dataclass(frozen=True)
class Texts:
    """The text to calibrate on, the report's own text (None: what is left of the first), and a name for each."""

    calibration: str | list[str]
    report: str | list[str] | None
    source: str
    report_source: str


def read_texts(text: Path | None, heldout_text: Path | None) -> Texts:
    """The texts that the flags name; without ``--text`` the demo's."""
    from linearpatch_kernels.demo_data import demo_text
    from linearpatch_kernels.text import read_text

    if text is not None:
        texts = Texts(read_text(text), None, in_words(text.name), f"unused parts of {in_words(text.name)}")
    else:
        texts = Texts(demo_text("calibration"), demo_text("heldout"), "BoolQ passages", "LAMBADA passages")
    if heldout_text is None:
        return texts
    return dataclasses.replace(texts, report=read_text(heldout_text), report_source=in_words(heldout_text.name))


def heldout_windows(samples: int) -> int:
    """How many windows ``auto`` chooses on."""
    return max(4, samples // 8)


def make_windows(
    model: ModelSource | PreTrainedModel,
    tokenizer: Any,
    texts: Texts,
    *,
    samples: int,
    heldout: int,
    length: int,
    report: int = EVALUATION_WINDOWS,
) -> Windows:
    """The windows of a run; the text must have ``samples + heldout``, what it has beyond goes to the ``report``.

    InputError where the text is too short, or where the model lacks one of its tokens or so many positions.
    """
    import torch

    from linearpatch_kernels.fingerprints import fingerprint_text, fingerprint_tokenizer, fingerprint_windows
    from linearpatch_kernels.forward import check_windows
    from linearpatch_kernels.text import split_windows, token_windows

    needed = samples + heldout
    extra = 0 if texts.report is not None else report
    try:
        windows = token_windows(tokenizer, texts.calibration, length=length, count=needed + extra)
    except InputError:
        # Too short for the report's share: what was asked for comes first.
        windows = token_windows(tokenizer, texts.calibration, length=length, count=needed)
        if extra:
            windows = token_windows(tokenizer, texts.calibration, length=length)
            extra = min(extra, len(windows) - needed)
    shares = split_windows(windows, {"fit": samples, "heldout": heldout, "evaluation": extra})
    evaluation: Tensor | None = shares["evaluation"]
    if texts.report is not None:
        evaluation = token_windows(tokenizer, texts.report, length=length, count=report)
    elif extra < report:
        problems.print(f"note: the text leaves {extra} windows of {report} for the report's figures")
    for share in (windows, evaluation):
        if share is not None and len(share):
            check_windows(model, share)
    about = {
        "source": texts.source,
        "text": fingerprint_text(texts.calibration),
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
    )


def windows_up_to(tokenizer: Any, content: str | list[str], length: int, count: int) -> Tensor:
    """``count`` windows spread over the text, or all where it has fewer (or ``count`` is 0)."""
    from linearpatch_kernels.text import token_windows

    if count:
        with contextlib.suppress(InputError):
            return token_windows(tokenizer, content, length=length, count=count)
    return token_windows(tokenizer, content, length=length)


def title_of(model: str) -> str:
    return "SmolLM2-135M-Instruct" if model == "demo" else in_words(Path(model).name or model)


def in_words(name: str) -> str:
    """A name as it can be written in a report: what is not UTF-8 in the name of a file becomes question marks."""
    return name.encode("utf-8", "replace").decode()


def num_layers_of(model: PreTrainedModel) -> int:
    from linearpatch_kernels.modeling.families import num_layers

    return num_layers(model)


def check_places(output: Path, json_file: Path | None, reads: Sequence[Path | str | None]) -> None:
    """Whether an output and its figures can go where they were sent; call it first.

    Args:
        reads: what the run reads, None for what it does not.
    """
    from linearpatch_kernels.modeling.saving import check_output
    from linearpatch_kernels.text import cache_dir

    check_json(json_file, made_from=reads, output=output)
    if lies_in(output, cache_dir()):
        raise InputError(f"{output} is in the cache, which is not yours to keep things in: give another directory")
    check_output(output, overwrite=True, made_from=reads)


def forget(unfinished: Path) -> None:
    """Remove what an unfinished run would have gone on from; that it cannot be removed costs no result."""
    with contextlib.suppress(OSError):
        unfinished.unlink(missing_ok=True)
