"""The search of `prune` for the layers to remove, gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from linearpatch_kernels.calibration import calibrate
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import Entries, read_seal, reading, write_sealed
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing.search import Search
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.scores import SCORES, short_list
from linearpatch_kernels.recipes.inputs import Windows
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.settings import PruneSettings
from linearpatch_kernels.span import Span

_CURE = "the search is made again"
_FORMAT = "linearpatch-search-1"


def search(
    dense: PreTrainedModel,
    windows: Windows,
    settings: PruneSettings,
    *,
    unfinished: Unfinished,
    processes: Processes,
    log: Log,
) -> list[Span]:
    """The spans to remove by a score that refits the model."""
    assert windows.heldout is not None
    assert settings.drop is not None
    run = Run(settings.batch_size, processes, log.progress)
    with log.stage("search"), unfinished.forgotten_if_refused():
        trials = _Trials(unfinished, _identity(dense, windows, settings), log, writes=processes.first)
        made = Search(dense, windows.fit, windows.heldout, known=trials.losses, keep=trials.keep, run=run)
        if SCORES[settings.score].refits == "layers":
            return made.layers(settings.drop)
        statistics = calibrate(dense, made.windows.split(run.batch_size), ranks=processes, progress=run.progress)
        return made.spans(short_list(statistics, settings.drop, settings.score))


def _identity(dense: PreTrainedModel, windows: Windows, settings: PruneSettings) -> str:
    """Of model, text and search, in hex digits."""
    told = [fingerprint_model(dense), windows.about, settings.score, settings.drop]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class _Trials:
    """The losses of the cuts that were tried; in a file beside the output after every one."""

    def __init__(self, unfinished: Unfinished, identity: str, log: Log, *, writes: bool) -> None:
        """``writes``: whether this process writes the file; its siblings read it."""
        self._unfinished, self._identity, self._writes = unfinished, identity, writes
        self.losses: Mapping[str, float] = unfinished.earlier(self._load, log) or {}
        if self.losses:
            log.mention("going on from a search that did not finish")
        self._made = dict(self.losses)

    def keep(self, cut: str, loss: float) -> None:
        self._made[cut] = loss
        if self._writes:
            self._unfinished.keep(self._save)

    def _save(self, file: Path) -> None:
        # JSON has no infinity: a cut without finite logits is tried again.
        finite = {cut: loss for cut, loss in self._made.items() if loss < float("inf")}
        write_sealed(file, {}, {"format": _FORMAT, "identity": self._identity, "losses": finite})

    def _load(self, file: Path) -> dict[str, float]:
        with reading(file, _CURE):
            about = read_seal(file, _CURE)[0]
            if about.get("format") != _FORMAT or about.get("identity") != self._identity:
                raise InputError(f"{file} is of another run: {_CURE}")
            losses = Entries(about).entries("losses")
            return {cut: losses.real(cut) for cut in losses.names}
