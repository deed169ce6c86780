"""What a recipe gives back, and what it writes beside a model: summary, report, the verdict on the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PretrainedConfig

from linearpatch_kernels.evaluation.agreement import Quality, told_if_worse
from linearpatch_kernels.files import RECORDS, json_text
from linearpatch_kernels.modeling.families import auto_class
from linearpatch_kernels.recipes.log import Log

DENSE, DROPPED = "dense", "dropped (no patch)"
"""Rows of every comparison: the model as it was, and as many of its layers plainly removed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a recipe did.

    Attributes:
        output: where it is written.
        written: whether this process wrote it: of several, the first one does.
        summary: what ``summary.json`` says.
        quality: model -> quality on held-out text; quality_text: which text that was.
        seconds: stage -> seconds.
        verdict: a sentence for each model that the result is worse than.
    """

    output: Path
    written: bool = True
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quality: Mapping[str, Quality] = dataclasses.field(default_factory=dict)
    quality_text: str = ""
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    verdict: tuple[str, ...] = ()


class Judged(Protocol):
    """The windows of a report, and whose they are."""

    @property
    def evaluation(self) -> Tensor | None: ...

    @property
    def evaluation_source(self) -> str: ...


def judged_on(windows: Judged) -> str:
    """The windows of a report in words; nothing where there are none."""
    if windows.evaluation is None:
        return ""
    return f"{len(windows.evaluation)} windows of {windows.evaluation_source}"


def verdict_on(
    found: Mapping[str, Quality], row: str, against: Mapping[str, str], windows: Judged, log: Log
) -> list[str]:
    """That the result in ``row`` is worse than another row, if it is, and on which windows.

    Args:
        against: the other rows -> what they are called in a sentence.
    """
    if windows.evaluation is None:
        log.note("no text is left to compare the result with plain removal on: give more text, or `heldout_text`")
        return []
    text = judged_on(windows)
    return [line for other, than in against.items() for line in told_if_worse(found, row, other, text, than=than)]


def usage(directory: str, config: PretrainedConfig, *, patched: bool) -> str:
    """Python that loads a result of a model with this config."""
    place = json.dumps(directory, ensure_ascii=False)  # Python's string, too, whatever is in the name
    head = auto_class(config).__name__
    registers = "import linearpatch_kernels.modeling  # registers the patched classes\n" if patched else ""
    return (
        f"from transformers import {head}, AutoTokenizer\n"
        f"{registers}"
        f"model = {head}.from_pretrained({place})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})"
    )


def recorded(
    plan: Mapping[str, bytes], summary: Mapping[str, Any], report: Mapping[str, bytes]
) -> dict[str, bytes | str]:
    """What an output carries beside a model: plan, summary and report, in a directory that no engine looks into."""
    files: dict[str, bytes | str] = {**plan, "summary.json": json_text(summary)}
    files |= {f"report/{name}": content for name, content in report.items()}
    return {f"{RECORDS}/{name}": content for name, content in files.items()}
