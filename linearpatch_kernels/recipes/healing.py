"""The healing stage of `prune`: the way that was asked for, gone on with after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import Entries, read_seal, reading, write_sealed
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing.choice import Healed, heal_cut
from linearpatch_kernels.healing.refit import RefitRow, Step
from linearpatch_kernels.healing.ways import AUTO, HEALS
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.recipes.inputs import Windows
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.recipes.resuming import Unfinished

_CURE = "it is made again"
_FORMAT = "linearpatch-refit-1"


def needs_heldout(heal: str) -> bool:
    """Whether a way needs windows to choose on."""
    return heal == AUTO or HEALS.named(heal, also=[AUTO]).refitted


def fit_for(heal: str, fit: str) -> str:
    """The fit to make a plan with: ways without a patch need none."""
    return fit if heal == AUTO or HEALS[heal].patched else "none"


def heal(
    dense: PreTrainedModel,
    plan: PrunePlan,
    windows: Windows,
    way: str,
    *,
    unfinished: Unfinished,
    processes: Processes,
    log: Log,
) -> Healed:
    """The plan carried out and healed by a way (or by the one that ``auto`` takes)."""
    if not needs_heldout(way):
        # A plan without patches is plain removal, whatever was asked for.
        patched = any(joint.patch is not None for joint in plan.joints)
        return Healed(apply_plan(dense, plan), plan, HEALS["patch" if patched else "none"])
    assert windows.heldout is not None
    work = RefitWork(unfinished, _identity(plan, windows), log, writes=processes.first)
    with log.stage("heal"), unfinished.forgotten_if_refused():
        healed = heal_cut(
            dense,
            plan,
            windows.fit,
            windows.heldout,
            heal=way,
            done=work.weights,
            keep=work.keep,
            noted=log.note,
            run=Run(processes=processes, progress=log.progress),
        )
    return dataclasses.replace(healed, rows=work.rows.get(healed.heal.name, ()))


def told(healed: Healed) -> dict[str, Any]:
    """For ``summary.json``: the way, what the refit's fits came to, and what ``auto`` measured."""
    found: dict[str, Any] = {"heal": healed.heal.name}
    if healed.rows:
        found["refit"] = [dataclasses.asdict(row) for row in healed.rows]
    if healed.found:
        found["heal_candidates"] = {name: quality.to_dict() for name, quality in healed.found.items()}
    return found


def refit_in_words(rows: Sequence[RefitRow]) -> list[str]:
    """What the fits of a refit changed, and what they left alone and why, for a report."""
    changed = [row for row in rows if row.projections]
    left = dict.fromkeys(row.why for row in rows if row.why)
    layers = ", ".join(map(str, dict.fromkeys(row.layer for row in changed)))
    told = f"Fitted {sum(len(row.projections) for row in changed)} projections of the layers {layers} again."
    return [*[told] * bool(changed), *(f"Left alone: {why}." for why in left)]


def _identity(plan: PrunePlan, windows: Windows) -> str:
    """Of model, cut, patches and text, in hex digits."""
    state = hashlib.sha256(json.dumps([plan.to_json(), windows.about], sort_keys=True).encode())
    for name, tensor in sorted(plan.tensors().items()):
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


class RefitWork:
    """Weights and rows of the steps that are done, by way; in a file beside the output after every step."""

    def __init__(self, unfinished: Unfinished, identity: str, log: Log, *, writes: bool) -> None:
        """``writes``: whether this process writes the file; its siblings read it."""
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.rows: dict[str, list[RefitRow]] = {}
        self._unfinished, self._identity, self._writes = unfinished, identity, writes
        earlier = unfinished.earlier(self._load, log)
        if earlier is not None:
            self.weights, self.rows = earlier
            log.mention("going on from a refit that did not finish")

    def keep(self, way: str, _: Step, weights: Mapping[str, Tensor], rows: Sequence[RefitRow]) -> None:
        self.weights.setdefault(way, {}).update(weights)
        # A step that changed no weight leaves no trace among them and is taken again after a kill: once in the rows.
        told = {(row.layer, row.part) for row in rows}
        others = [row for row in self.rows.get(way, []) if (row.layer, row.part) not in told]
        self.rows[way] = [*others, *rows]
        if self._writes:
            self._unfinished.keep(self._save)

    def _save(self, file: Path) -> None:
        tensors = {f"{way}/{name}": one for way, weights in self.weights.items() for name, one in weights.items()}
        rows = {way: [dataclasses.asdict(row) for row in fresh] for way, fresh in self.rows.items()}
        write_sealed(file, tensors, {"format": _FORMAT, "identity": self._identity, "rows": rows})

    def _load(self, file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[RefitRow]]]:
        with reading(file, _CURE):
            about = read_seal(file, _CURE)[0]
            if about.get("format") != _FORMAT or about.get("identity") != self._identity:
                raise InputError(f"{file} is of another run: {_CURE}")
            weights: dict[str, dict[str, Tensor]] = {}
            for place, tensor in load_file(file).items():
                way, _, name = place.partition("/")
                weights.setdefault(way, {})[name] = tensor
            ways = Entries(about).entries("rows")
            return weights, {way: [_row(one) for one in ways.rows(way)] for way in ways.names}


def _row(content: Mapping[str, Any]) -> RefitRow:
    return RefitRow(**{**content, "projections": tuple(content["projections"])})
