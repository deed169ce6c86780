"""What a recipe gives back, and what it writes beside a model: summary, report, the verdict on the result."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels import __version__
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.agreement import Quality, told_if_worse
from linearpatch_kernels.evaluation.notes import left_out
from linearpatch_kernels.files import RECORDS, json_text, read_json, record
from linearpatch_kernels.modeling.families import auto_class, family_of
from linearpatch_kernels.modeling.loading import Source, terms_among
from linearpatch_kernels.modeling.origin import CARD
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.report.card import model_card


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


def told_of_base(name: str, source: Source) -> dict[str, Any]:
    """For ``summary.json``: what the result was made of, and what that says of its origin and its terms.

    Args:
        name: what a report calls it; where it is known on the hub, its name there takes the place.
    """
    origin = source.origin
    told = {"name": origin.repository or name} | origin.to_dict()
    terms = terms_among(source.companions)
    return {"base": told | ({"terms": terms} if terms else {})}


def told_before(directory: Path) -> dict[str, Any]:
    """What the summary of a result that is gone on from says of how it was made: its base, its text, its healing.

    Those of earlier versions say less; one that cannot be read says nothing, and changes nothing else.
    """
    told: Mapping[str, Any] = {}
    with contextlib.suppress(InputError):
        told = read_json(record(directory, "summary.json"), "")
    kinds = {"base": dict, "text": dict, "heal": str}
    return {name: told[name] for name, kind in kinds.items() if isinstance(told.get(name), kind)}


def told_of_result(model: PreTrainedModel, row: str, windows: Judged) -> dict[str, Any]:
    """For ``summary.json``: which row of the comparison the result is, what loads it, and what it was measured on."""
    return {
        "result": {
            "row": row,
            "measured_on": judged_on(windows),
            # A patched model of what reads more than text is the whole model, too.
            "loader": auto_class(family_of(model).config_class()).__name__,
            "patched": bool(patches(model)),
            "version": __version__,
        }
    }


def recorded(
    plan: Mapping[str, bytes], summary: Mapping[str, Any], report: Mapping[str, bytes]
) -> dict[str, bytes | str]:
    """What an output carries beside a model: plan, summary and report, in a directory that no engine looks into."""
    files: dict[str, bytes | str] = {**plan, "summary.json": json_text(summary)}
    files |= {f"report/{name}": content for name, content in report.items()}
    return {f"{RECORDS}/{name}": content for name, content in files.items()}


def card(summary: Mapping[str, Any], log: Log) -> dict[str, bytes | str]:
    """The model card of a result with this summary, by its file's name."""
    written: dict[str, bytes | str] = {}
    with left_out("the model card", log.note):
        written[CARD] = model_card(summary)
    return written
