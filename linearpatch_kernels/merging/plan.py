"""The merges of a run, in order, as a file: to read, to apply again, and to go on from after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import (
    Entries,
    finite,
    is_sealed,
    read_json,
    read_seal,
    reading,
    write_sealed,
    write_whole,
)
from linearpatch_kernels.merging.merge import Merge, merge_layers
from linearpatch_kernels.modeling.families import num_layers
from linearpatch_kernels.span import MOST_LAYERS, Span
from linearpatch_kernels.torch_state import own_state

MERGE_FILE = "merge.json"
_FORMAT = "linearpatch-merge"
_VERSION = 1
# More neurons than any layer has.
_MOST_UNITS = 1 << 31


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Merges, each over the layer numbers that the ones before it leave.

    Attributes:
        num_layers: layers of the model that the first merge is applied to.
        merges: in order; records: what chose each of them (scores, losses), JSON values.
        model: fingerprint of that model; settings, calibration: how and on what it was made; JSON values.
    """

    num_layers: int
    merges: tuple[Merge, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()
    model: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers are left after all merges."""
        return self.num_layers - sum(merge.span.length - 1 for merge in self.merges)

    @property
    def tree(self) -> list[Any]:
        """Per layer of the result the layers it stands for: ``[0, 1, [2, [3, 4]], 5]``."""
        nodes: list[Any] = list(range(self.num_layers))
        for merge in self.merges:
            nodes[merge.span.start : merge.span.end] = [nodes[merge.span.start : merge.span.end]]
        return nodes

    def extended(self, merge: Merge, record: Mapping[str, Any]) -> MergePlan:
        """The plan with one more merge."""
        return dataclasses.replace(self, merges=(*self.merges, merge), records=(*self.records, record))

    def belongs_to(self, other: MergePlan) -> bool:
        """Whether both come from the same model, settings and text: then one can go on from the other."""
        return dataclasses.replace(self, merges=(), records=()) == dataclasses.replace(other, merges=(), records=())

    def to_json(self) -> dict[str, Any]:
        """The content of ``merge.json``."""
        merges = [
            {
                "span": str(merge.span),
                "shares": list(merge.shares),
                "rule": merge.rule,
                "record": dict(record),
                "units": {half: [list(layer) for layer in given] for half, given in merge.units.items()},
            }
            for merge, record in zip(self.merges, self.records, strict=True)
        ]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model,
            "num_layers": self.num_layers,
            "tree": self.tree,
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "merges": merges,
        }

    def files(self) -> dict[str, bytes]:
        """File name -> content, for a checkpoint to carry along."""
        return {MERGE_FILE: (json.dumps(finite(self.to_json()), allow_nan=False) + "\n").encode()}

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all."""
        write_whole(Path(file), self.files()[MERGE_FILE])

    def keep(self, file: str | os.PathLike[str]) -> None:
        """Write what a killed run goes on from: sealed, since it decides a model that nobody compares with anything."""
        write_sealed(Path(file), {}, {"plan": self.to_json()})

    @classmethod
    def resume(cls, file: str | os.PathLike[str], cure: str) -> MergePlan:
        """Read what :meth:`keep` wrote; InputError, with what to do (``cure``), where a bit of it is another."""
        about, _ = read_seal(Path(file), cure)
        with reading(file, cure):
            return cls.from_json(Entries(about).table("plan"), file)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> MergePlan:
        """Read what :meth:`save` or :meth:`keep` wrote. InputError for none, a foreign file and a broken one."""
        if not Path(file).exists():
            raise InputError(f"there is no plan of merges at {file}")
        if is_sealed(Path(file)):
            return cls.resume(file, "merge again")
        return cls.from_json(read_json(file, "it is not a plan of merges that can be read, so merge again"), file)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], file: str | os.PathLike[str]) -> MergePlan:
        """What :meth:`to_json` gave, from a file that is named where it is something else (`InputError`)."""
        if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            raise InputError(f"{file} is not a plan of merges of version {_VERSION} of this package: merge again")
        with reading(file, "it is not as it was written, so merge again"):
            about = Entries(dict(content))
            plan = cls(
                num_layers=about.whole("num_layers", 1, MOST_LAYERS),
                model=about.text("model"),
                settings=about.table("settings"),
                calibration=about.table("calibration"),
            )
            for told in about.each("merges"):
                plan = plan.extended(_merge(told, plan.layers), told.table("record"))
            return plan


@own_state()
def apply_merges(model: PreTrainedModel, plan: MergePlan) -> PreTrainedModel:
    """The model after all merges of the plan; ``model`` is not changed.

    Raises:
        InputError: a plan for another depth or shape, layers that cannot be merged.
    """
    if num_layers(model) != plan.num_layers:
        raise InputError(f"the merges are of a model of {plan.num_layers} layers and this one has {num_layers(model)}")
    for merge in plan.merges:
        model = merge_layers(model, merge)
    return model


def leaves(node: Any) -> list[int]:
    """The layers of the first model under a node of a merge tree, in order: ``[2, [3, 4]]`` -> ``[2, 3, 4]``."""
    return [leaf for child in node for leaf in leaves(child)] if isinstance(node, list) else [node]


def _merge(told: Entries, layers: int) -> Merge:
    """A merge of a model with so many layers; ValueError for anything else."""
    halves = told.entries("units")
    units = {half: _units(halves.listed(half)) for half in halves.names}
    shares = tuple(told.listed("shares").reals())
    try:
        merge = Merge(Span.parse(told.text("span")), shares, units, told.text("rule"))
    except InputError as error:
        raise ValueError(str(error)) from error
    if merge.span.end > layers or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"a merge of {merge.span} at {shares} of {layers} layers")
    return merge


def _units(layers: Entries) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layers.listed(layer).wholes(most=_MOST_UNITS)) for layer in layers.names)
