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
from linearpatch_kernels.healing.choice import Healed, heal_cut, ways_of
from linearpatch_kernels.healing.cost import cost_of_healing
from linearpatch_kernels.healing.refit import RefitRow, Step
from linearpatch_kernels.healing.ways import AUTO, HEALS
from linearpatch_kernels.modeling.halves import kinds_of_halves
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.fits import AUTO as FIT_AUTO
from linearpatch_kernels.pruning.fits import fits_of
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.recipes.inputs import Windows
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.settings import PruneSettings

_CURE = "it is made again"
_FORMAT = "linearpatch-refit-2"


@dataclasses.dataclass(frozen=True)
class Healing:
    """What a run heals by.

    Attributes:
        way: of `HEALS`, or ``auto``; fit: of `FITS`, or ``auto``; ``"none"`` where no patch is to be made.
    """

    way: str
    fit: str

    @property
    def refits(self) -> bool:
        """Whether weights may be fitted again, which takes windows to choose on."""
        return self.way == AUTO or HEALS[self.way].refitted


def asked(settings: PruneSettings) -> Healing:
    """What the settings come to where one of `heal` and `fit` is named, both, or none.

    Raises:
        InputError: names that are not known, or that contradict each other.
    """
    way, fit = settings.heal, settings.fit
    if way is None:
        # A plan holds no weights, and a fit that is named is a patch.
        way = AUTO if fit is None and not settings.plan_only else "none" if fit == "none" else "patch"
    elif way != AUTO:
        HEALS.named(way, also=[AUTO])
        if HEALS[way].patched and fit == "none":
            raise InputError(f"`heal` {way} puts a patch at the joint and `fit` none is none: name another fit")
        if not HEALS[way].patched and fit not in (None, "none"):
            raise InputError(f"`heal` {way} puts no patch at the joint: leave `fit` out, or name another way")
    fit = (fit or FIT_AUTO) if way == AUTO or HEALS[way].patched else "none"
    fits_of(fit, structured=settings.structured)
    healing = Healing(way, fit)
    if settings.plan_only and healing.refits:
        raise InputError(f"`plan_only` writes no weights and `heal` {way} may change some: leave one out")
    return healing


def possible(healing: Healing, model: PreTrainedModel, log: Log) -> Healing:
    """What of it can be done to the model, whose weights can be fitted again where its layers show what they are.

    Raises:
        InputError: nothing else was asked for.
    """
    if not healing.refits:
        return healing
    try:
        kinds_of_halves(model)
    except InputError as error:
        if healing.way != AUTO:
            raise InputError(f"{error}: give `heal` patch or none") from error
        log.note(f"{error}: `heal` auto stands for patch here")
        return Healing("patch", healing.fit)
    return healing


def heal(
    dense: PreTrainedModel,
    plan: PrunePlan,
    windows: Windows,
    healing: Healing,
    *,
    unfinished: Unfinished,
    processes: Processes,
    log: Log,
) -> Healed:
    """The plan carried out and healed by a way (or by the one that ``auto`` takes)."""
    if not healing.refits:
        # A plan without patches is plain removal, whatever was asked for.
        patched = any(joint.patch is not None for joint in plan.joints)
        return Healed(apply_plan(dense, plan), plan, HEALS["patch" if patched else "none"])
    assert windows.heldout is not None
    work = RefitWork(unfinished, _identity(plan, windows), log, writes=processes.first)
    run = Run(processes=processes, progress=log.progress)
    with log.stage("heal"), unfinished.forgotten_if_refused():
        ways = ways_of(healing.way, plan)
        if not work.weights:
            # Where an earlier run has told it, trials of what is done would cost more than they tell.
            cost = cost_of_healing(dense, plan, ways, windows.fit, windows.heldout, run=run)
            log.mention(f"healing by {', '.join(way.name for way in ways)}: {cost}")
        healed = heal_cut(
            dense,
            plan,
            windows.fit,
            windows.heldout,
            heal=healing.way,
            done=work.weights,
            keep=work.keep,
            noted=log.note,
            run=run,
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
