"""What is removed and what heals it, as a file that can be read, kept, compared and applied again.

``plan.json`` holds the spans, the kind of every joint's patch, what chose them and what they were fitted on;
``plan.safetensors`` beside it holds the patches' tensors under ``joint.<start>:<end>.<parameter>``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from linearpatch_kernels.calibration import Span
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.evaluation.torch_state import own_state
from linearpatch_kernels.files import check_file, record, write_whole
from linearpatch_kernels.nn import Patch, build_patch

PLAN_FORMAT = "linearpatch-plan"
PLAN_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Joint:
    """One removed span and the patch that takes its place (None: plain removal)."""

    span: Span
    patch: Patch | None = None
    fit: str = "none"


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """The joints of one pruned model over the dense model's layer numbers, and where they come from.

    Attributes:
        model: fingerprint of the dense model (:func:`linearpatch_kernels.text.fingerprint_model`), "" if not known.
        num_layers: layers of the dense model.
        joints: not overlapping, not touching; kept in the order of the model.
        score: what chose the spans (a name of ``scoring.SCORES``, or ``given``).
        calibration: what the patches were fitted on (text fingerprint, windows, tokens per window, ...); JSON values.
        candidates: the rows of the table that ``--fit auto`` decided on; JSON values.

    Raises:
        InputError: spans that overlap, touch, leave the model or leave no layer.
    """

    num_layers: int
    joints: tuple[Joint, ...]
    model: str = ""
    score: str = "given"
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        checked_spans([joint.span for joint in self.joints], self.num_layers)
        object.__setattr__(self, "joints", tuple(sorted(self.joints, key=lambda joint: joint.span)))

    @property
    def spans(self) -> list[Span]:
        return [joint.span for joint in self.joints]

    @property
    def kept_layers(self) -> list[int]:
        """The dense model's layers that stay, in order."""
        removed = {layer for span in self.spans for layer in range(*span)}
        return [layer for layer in range(self.num_layers) if layer not in removed]

    def joint_positions(self) -> dict[int, Joint]:
        """Layer number in the *shallower* model whose input the joint is -> joint (its depth, if none follows)."""
        kept = self.kept_layers
        return {sum(layer < joint.span.start for layer in kept): joint for joint in self.joints}

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``."""
        return {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "model": self.model,
            "num_layers": self.num_layers,
            "joints": [
                {
                    "span": str(joint.span),
                    "fit": joint.fit,
                    "patch": None if joint.patch is None else joint.patch.description(),
                }
                for joint in self.joints
            ],
            "score": self.score,
            "calibration": dict(self.calibration),
            "candidates": [dict(row) for row in self.candidates],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The content of ``plan.safetensors``."""
        return {
            f"joint.{joint.span}.{name}": tensor.detach().cpu().contiguous()
            for joint in self.joints
            if joint.patch is not None
            for name, tensor in joint.patch.state_dict().items()
        }

    def files(self) -> dict[str, bytes]:
        """File name -> content: what :meth:`save` writes and what a checkpoint carries along."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        return {"plan.json": text.encode(), "plan.safetensors": save(self.tensors(), metadata={"format": "pt"})}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the two files into a directory (made if missing); each appears whole or not at all, the JSON last.

        Raises:
            InputError: a file of one of these names is there that is no plan of ours; the disk is full or fails.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / "plan.json"
        check_file(description, str(description))
        check_file(folder / "plan.safetensors", str(folder / "plan.safetensors"), lambda _: description.exists())
        for name, content in sorted(self.files().items(), reverse=True):
            write_whole(folder / name, content)

    @classmethod
    @own_state()
    def load(cls, directory: str | os.PathLike[str]) -> PrunePlan:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: no plan there, a foreign or broken file, or tensors that do not fit the description.
        """
        folder = Path(directory)
        try:
            about = json.loads(record(folder, "plan.json").read_text(encoding="utf-8"))
            tensors = load_file(record(folder, "plan.safetensors"))
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} holds no plan ({Path(error.filename or 'plan.safetensors').name} is missing): give a "
                "directory that linearpatch prune wrote"
            ) from error
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the plan in {folder} cannot be read ({error}): prune again") from error
        if not isinstance(about, dict) or about.get("format") != PLAN_FORMAT or about.get("version") != PLAN_VERSION:
            raise InputError(f"{folder}/plan.json is not a plan of version {PLAN_VERSION} of this package: prune again")
        try:
            plan = cls(
                num_layers=about["num_layers"],
                joints=tuple(_joint(entry, tensors, folder) for entry in about["joints"]),
                model=about["model"],
                score=about["score"],
                calibration=dict(about["calibration"]),
                candidates=tuple(dict(row) for row in about["candidates"]),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder}/plan.json is not as it was written ({error}): prune again") from error
        if plan.tensors().keys() != tensors.keys():
            raise _mixed(folder)
        return plan


def _mixed(folder: Path) -> InputError:
    return InputError(f"plan.json and plan.safetensors in {folder} do not belong together: prune again")


def _joint(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Joint:
    span = Span.parse(entry["span"])
    if entry["patch"] is None:
        return Joint(span, None, entry["fit"])
    patch = build_patch(entry["patch"])
    prefix = f"joint.{span}."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        patch.load_state_dict(state)
    except RuntimeError as error:
        raise _mixed(folder) from error
    return Joint(span, patch, entry["fit"])


def parse_spans(text: str) -> list[Span]:
    """``"13:19,24:26"`` -> spans; InputError for anything else."""
    return [Span.parse(part) for part in text.split(",")]


def checked_spans(spans: Sequence[Span], num_layers: int) -> list[Span]:
    """The spans in the order of the model, or an InputError that says which does not fit."""
    if not spans:
        raise InputError("no span to remove: give at least one, START:END")
    ordered = sorted(spans)
    for span in ordered:
        if span.length < 1 or span.start < 0 or span.end > num_layers:
            raise InputError(
                f"the span {span} does not fit a model of {num_layers} layers: give 0 <= START < END <= {num_layers}"
            )
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise InputError(f"the spans {before} and {after} overlap: a layer can be removed once")
        if after.start == before.end:
            raise InputError(f"the spans {before} and {after} touch: write {before.start}:{after.end}")
    if sum(span.length for span in ordered) >= num_layers:
        raise InputError(f"all {num_layers} layers would be removed: keep at least one")
    return ordered
