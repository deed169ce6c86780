"""What is removed and what heals it, as a file that can be read, kept, compared and applied again.

``plan.json`` holds the spans, the kinds of every joint's patches, what chose them and what they were fitted on;
``plan.safetensors`` beside it holds the patches' tensors under ``joint.<start>:<end>.<number>.<parameter>``
(docs/reference/checkpoint-format.md, also for version 1, which had no number).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import Entries, check_file, finite, read_json, reading, record, said, write_whole
from linearpatch_kernels.nn import Patch, PatchChain, build_chain
from linearpatch_kernels.span import MOST_LAYERS, Span
from linearpatch_kernels.torch_state import own_state

PLAN_FORMAT = "linearpatch-plan"
PLAN_VERSION = 2


@dataclasses.dataclass(frozen=True, init=False)
class Joint:
    """One removed span and the patches that take its place, as one module (None: plain removal).

    ``patch`` is given as one patch, as several in their order, or as a chain of them.
    """

    span: Span
    patch: PatchChain | None
    fit: str

    def __init__(self, span: Span, patch: Patch | Iterable[Patch] | None = None, fit: str = "none") -> None:
        object.__setattr__(self, "span", span)
        object.__setattr__(self, "patch", None if patch is None else PatchChain.of(patch))
        object.__setattr__(self, "fit", fit)


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """The joints of one pruned model over the dense model's layer numbers, and where they come from.

    Attributes:
        model: of the dense model (:func:`linearpatch_kernels.fingerprints.fingerprint_model`), "" if not known.
        num_layers: layers of the dense model.
        joints: not overlapping, not touching; kept in the order of the model.
        score: what chose the spans (a name of ``scores.SCORES``, or ``given``).
        calibration: what the patches were fitted on (text fingerprint, windows, tokens per window, ...); JSON values.
        candidates: the rows of the table that the fit ``auto`` decided on; JSON values.
        refitted: the layers, of those that stay, whose weights a refit may have changed; the plan holds none of them.

    Raises:
        InputError: spans that overlap, touch, leave the model or leave no layer.
    """

    num_layers: int
    joints: tuple[Joint, ...]
    model: str = ""
    score: str = "given"
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    refitted: Sequence[int] = ()

    def __post_init__(self) -> None:
        checked_spans([joint.span for joint in self.joints], self.num_layers)
        if any(not 0 <= layer < len(self.kept_layers) for layer in self.refitted):
            raise InputError(f"{list(self.refitted)} are no layers of the {len(self.kept_layers)} that stay")
        object.__setattr__(self, "joints", tuple(sorted(self.joints, key=lambda joint: joint.span)))

    @property
    def spans(self) -> list[Span]:
        return [joint.span for joint in self.joints]

    @property
    def kept_layers(self) -> list[int]:
        """The dense model's layers that stay, in order."""
        removed = {layer for span in self.spans for layer in range(*span)}
        return [layer for layer in range(self.num_layers) if layer not in removed]

    @property
    def first_change(self) -> int:
        """The first layer of the shallower model whose input or weights differ from the dense model's."""
        return min([self.spans[0].start, *self.refitted])

    @property
    def provenance(self) -> dict[str, Any]:
        """What the config of the pruned model remembers of this cut; JSON values."""
        return {"num_layers": self.num_layers, "spans": [str(span) for span in self.spans]}

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
                    "patches": [] if joint.patch is None else joint.patch.description(),
                }
                for joint in self.joints
            ],
            "score": self.score,
            "calibration": dict(self.calibration),
            "candidates": [dict(row) for row in self.candidates],
            **({"refitted": list(self.refitted)} if self.refitted else {}),
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
        """File name -> content: what :meth:`save` writes. A checkpoint carries them in a folder of their own."""
        text = json.dumps(finite(self.to_json()), indent=2, allow_nan=False) + "\n"
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
        description, patches = record(folder, "plan.json"), record(folder, "plan.safetensors")
        for file in (description, patches):
            if not file.exists():
                raise InputError(
                    f"{folder} holds no plan ({file.name} is missing): give a directory that linearpatch prune wrote"
                )
        about = read_json(description, _CURE)
        if about.get("format") != PLAN_FORMAT or about.get("version") not in (1, PLAN_VERSION):
            raise InputError(
                f"{description} is not a plan of version {PLAN_VERSION} or earlier of this package: prune again"
            )
        with reading(patches, _CURE), safe_open(patches, "pt") as file:
            # A file is no mapping, and must be asked for its keys.
            there = {_present_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with reading(description, _CURE):
            joints = _told_joints(about)
            told = {name: shape for joint in joints for name, shape in joint.shapes.items()}
        # Before anything of the told sizes is made.
        if told != there:
            raise InputError(f"plan.json and plan.safetensors in {folder} do not belong together: prune again")
        with reading(patches, _CURE):
            tensors = {_present_name(name): tensor for name, tensor in load_file(patches).items()}
        with reading(description, _CURE):
            return cls._from(Entries(about), tuple(joint.built(tensors) for joint in joints))

    @classmethod
    def _from(cls, about: Entries, joints: tuple[Joint, ...]) -> PrunePlan:
        rows = about.rows("candidates")
        try:
            return cls(
                num_layers=about.whole("num_layers", 1, MOST_LAYERS),
                joints=joints,
                model=about.text("model"),
                score=about.text("score"),
                calibration=about.table("calibration"),
                candidates=tuple(dict(row) for row in rows),
                # Earlier plans do not tell: there was no refit.
                refitted=tuple(about.listed("refitted").wholes()) if "refitted" in about.names else (),
            )
        except InputError as error:  # in the words for a person who chose the spans
            raise ValueError(str(error)) from error


_CURE = "prune again"


@dataclasses.dataclass(frozen=True)
class _ToldJoint:
    """A joint as ``plan.json`` tells it: nothing of its patches' size is made yet."""

    span: Span
    fit: str
    patches: list[Any]

    @property
    def _prefix(self) -> str:
        return f"joint.{self.span}."

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file of tensors -> shape."""
        if not self.patches:
            return {}
        try:
            with torch.device("meta"):
                state = build_chain(self.patches).state_dict()
        except InputError as error:
            raise ValueError(said(error)) from error
        return {f"{self._prefix}{name}": tuple(tensor.shape) for name, tensor in state.items()}

    def built(self, tensors: Mapping[str, Tensor]) -> Joint:
        if not self.patches:
            return Joint(self.span, None, self.fit)
        chain = build_chain(self.patches)
        start = self._prefix
        chain.load_state_dict(
            {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
        )
        return Joint(self.span, chain, self.fit)


def _told_joints(about: Mapping[str, Any]) -> list[_ToldJoint]:
    joints = [
        _ToldJoint(_span(one.text("span")), one.text("fit"), _told_patches(one, about["version"]))
        for one in Entries(about).each("joints")
    ]
    widths = {patch.get("dim") for joint in joints for patch in joint.patches if isinstance(patch, Mapping)}
    if len(widths) > 1:
        raise ValueError(f"its patches are of different widths ({', '.join(map(str, widths))})")
    return joints


def _told_patches(joint: Entries, version: int) -> list[Any]:
    if version == PLAN_VERSION:
        return joint.rows("patches")
    patch = joint.maybe_table("patch")
    return [] if patch is None else [patch]


def _present_name(name: str) -> str:
    """What a tensor is called now: version 1 had no number of the patch, since a joint had one."""
    return re.sub(r"^(joint\.\d+:\d+)\.(?!\d)", r"\1.0.", name)


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except InputError as error:
        raise ValueError(f"{text[:40]!r} is no span") from error


def parse_spans(text: str) -> list[Span]:
    """``"13:19,24:26"`` -> spans; InputError for anything else."""
    return [Span.parse(part) for part in text.split(",")]


def checked_spans(spans: Sequence[Span], num_layers: int) -> list[Span]:
    """The spans in the order of the model, or an InputError that says which does not fit."""
    if not spans:
        raise InputError("no span to remove: give at least one, START:END")
    if num_layers > MOST_LAYERS:
        raise InputError(f"no model has {num_layers} layers: give at most {MOST_LAYERS}")
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
