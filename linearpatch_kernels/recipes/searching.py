"""What `prune` removes: what was named, or what a search finds, which goes on after a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from linearpatch_kernels.calibration import calibrate
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import Entries, read_seal, reading, write_sealed
from linearpatch_kernels.fingerprints import fingerprint_model
from linearpatch_kernels.forward import Run
from linearpatch_kernels.healing.search import Search
from linearpatch_kernels.modeling.patterns import Pattern, pattern_of
from linearpatch_kernels.processes import Processes
from linearpatch_kernels.pruning.plan import checked_spans, parse_spans
from linearpatch_kernels.pruning.scores import SCORES, check_drop, likely_spans, short_list
from linearpatch_kernels.pruning.target import Target, layers_to_reach
from linearpatch_kernels.recipes.inputs import Windows
from linearpatch_kernels.recipes.log import Log
from linearpatch_kernels.recipes.resuming import Unfinished
from linearpatch_kernels.settings import PruneSettings
from linearpatch_kernels.span import Span

_CURE = "the search is made again"
_FORMAT = "linearpatch-search-1"


@dataclasses.dataclass(frozen=True)
class Removal:
    """What is to be removed: these spans; or layers of the score's choice, ``drop`` of them or what a target asks;
    ``keep_pattern``: only what leaves the kinds of layers as they repeat."""

    score: str
    spans: Sequence[Span] = ()
    drop: int | None = None
    target: Target | None = None
    keep_pattern: bool = False

    @classmethod
    def of(cls, settings: PruneSettings) -> Removal:
        """What the settings ask for; InputError for what makes no sense for any model."""
        SCORES.named(settings.score)
        if sum(one is not None for one in (settings.drop, settings.spans, settings.target)) != 1:
            raise InputError("say what to remove: one of `drop` N, `spans` START:END and `target` RATIO")
        if settings.target is not None:
            return cls(settings.score, target=Target.parse(settings.target), keep_pattern=settings.keep_pattern)
        if settings.spans is None:
            return cls(settings.score, drop=settings.drop, keep_pattern=settings.keep_pattern)
        given = settings.spans
        wanted = parse_spans(given) if isinstance(given, str) else [Span(*span) for span in given]
        # Whatever the model's depth, these must not touch.
        checked = checked_spans(wanted, max((span.end for span in wanted), default=0) + 1)
        return cls("given", checked, keep_pattern=settings.keep_pattern)

    @property
    def searches(self) -> bool:
        """Whether cuts are refitted to find it."""
        within = self.target is not None and self.target.of == "ppl"
        return not self.spans and (within or bool(SCORES[self.score].refits))

    @property
    def runs_the_model(self) -> bool:
        """Whether it takes windows to choose on."""
        return self.searches or (not self.spans and SCORES[self.score].runs_the_model)

    def check(self, layers: int) -> None:
        """InputError for what a model of so many layers has not."""
        if self.spans:
            checked_spans(self.spans, layers)
        elif self.drop is not None:
            check_drop(self.drop, layers)

    def counted(self, model: PreTrainedModel) -> Removal:
        """With the number of layers that a target of weights comes to, or the next one that keeps the pattern.

        Raises:
            InputError: more layers than can go, or what is removed cannot keep the pattern.
        """
        pattern = pattern_of(model) if self.keep_pattern else None
        if pattern is not None:
            self._check_keeps(pattern)
        if self.target is None or self.target.of == "ppl":
            return self
        drop = layers_to_reach(self.target, model)
        if pattern is not None:
            drop = next((count for count in pattern.lengths if count >= drop), drop)
        return dataclasses.replace(self, drop=drop, target=None)

    def _check_keeps(self, pattern: Pattern) -> None:
        if self.spans:
            pattern.check_kept(self.spans)
        elif self.drop is not None:
            pattern.spans(self.drop)
        if pattern.period != 1 and not self.spans:
            within = self.target is not None and self.target.of == "ppl"
            if within or SCORES[self.score].refits == "layers":
                what = f"`target` {self.target}" if within else f"`score` {self.score}"
                raise InputError(
                    f"{what} tries cuts without which the kinds of layers do not stay {pattern}: give `drop` and "
                    "another score, or leave `keep_pattern` out"
                )


def found_by_search(
    dense: PreTrainedModel,
    windows: Windows,
    removal: Removal,
    batch_size: int,
    *,
    unfinished: Unfinished,
    processes: Processes,
    log: Log,
) -> Removal:
    """Spans of a score that refits the model, or how many layers any other may remove within a target."""
    assert windows.heldout is not None
    run = Run(batch_size, processes, log.progress)
    with log.stage("search"), unfinished.forgotten_if_refused():
        trials = _Trials(unfinished, _identity(dense, windows, removal), log, writes=processes.first)
        made = Search(dense, windows.fit, windows.heldout, known=trials.losses, keep=trials.keep, run=run)
        refits, drop, most = SCORES[removal.score].refits, removal.drop, None
        if removal.target is not None:
            most = made.dense_loss() + math.log(removal.target.ratio)
        if refits == "layers":
            return dataclasses.replace(removal, spans=made.layers(drop, most=most))
        statistics = calibrate(dense, made.windows.split(run.batch_size), ranks=processes, progress=run.progress)
        if drop is None:
            assert most is not None
            drop = made.depth(most, lambda count: likely_spans(statistics, count, removal.score))
        if refits == "spans":
            pattern = pattern_of(dense) if removal.keep_pattern else None
            return dataclasses.replace(removal, spans=made.spans(short_list(statistics, drop, removal.score, pattern)))
        return dataclasses.replace(removal, drop=drop, target=None)


def _identity(dense: PreTrainedModel, windows: Windows, removal: Removal) -> str:
    """Of model, text and search, in hex digits."""
    target = None if removal.target is None else dataclasses.asdict(removal.target)
    told = [fingerprint_model(dense), windows.about, removal.score, removal.drop, target, removal.keep_pattern]
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
