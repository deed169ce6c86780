"""What healing is said to take before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from linearpatch_kernels.healing import cost, least_squares
from linearpatch_kernels.healing.choice import Healed, Healer
from linearpatch_kernels.healing.cost import Cost, cost_of_healing, memory_of_refit
from linearpatch_kernels.healing.settings import RefitSettings
from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.span import Span
from tests.support.sink import token_windows
from tests.support.tiny import tiny_model

FIT, HELD = token_windows(24, 40, 0), token_windows(6, 40, 1)
PLAN = PrunePlan(6, (Joint(Span(2, 4), None),))


def test_the_time_is_a_constant_and_a_part_that_grows_with_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which a way takes 5 seconds and 2 for every window, and a comparison 11 for one."""
    clock = [0.0]
    monkeypatch.setattr(cost, "now", lambda: clock[0])

    def by(self: Any, way: Any, plan: Any) -> Healed:
        clock[0] += 5 + 2 * sum(map(len, self._windows))
        return Healed(dense, plan, way)

    def compare(*_: Any, **__: Any) -> None:
        clock[0] += 11

    monkeypatch.setattr(Healer, "by", by)
    monkeypatch.setattr(cost, "compare_quality", compare)
    dense = tiny_model("llama")
    assert cost_of_healing(dense, PLAN, [HEALS["refit"]], FIT, HELD).seconds == pytest.approx(5 + 2 * 30)
    both = [HEALS["none"], HEALS["refit"]]
    assert cost_of_healing(dense, PLAN, both, FIT, HELD).seconds == pytest.approx(2 * (5 + 2 * 30) + 6 * 11)


def test_where_solving_takes_most_of_the_time_one_trial_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which solving takes 100 seconds, and every window 2."""
    clock, trials = [0.0], []
    for module in (cost, least_squares):
        monkeypatch.setattr(module, "now", lambda: clock[0])

    def by(self: Any, way: Any, plan: Any) -> Healed:
        trials.append(sum(map(len, self._windows)))
        clock[0] += 2 * trials[-1]
        with least_squares.solving():
            clock[0] += 100
        return Healed(dense, plan, way)

    monkeypatch.setattr(Healer, "by", by)
    dense = tiny_model("llama")
    assert cost_of_healing(dense, PLAN, [HEALS["refit"]], FIT, HELD).seconds == pytest.approx(100 + 2 * 30)
    assert trials == [6]


def test_a_refit_is_told_without_being_made() -> None:
    dense = tiny_model("llama")
    before = {name: one.clone() for name, one in dense.named_parameters()}
    told = cost_of_healing(dense, PLAN, [HEALS["refit"]], FIT, HELD)
    assert told.seconds > 0
    assert told.bytes == memory_of_refit(dense, 30, 40, neurons=4096)
    own = cost_of_healing(dense, PLAN, [HEALS["refit"]], FIT, HELD, settings=RefitSettings(neurons=0))
    assert own.bytes == memory_of_refit(dense, 30, 40, neurons=0) < told.bytes
    assert all(one.equal(before[name]) for name, one in dense.named_parameters())
    assert cost_of_healing(dense, PLAN, [HEALS["none"]], FIT, HELD).bytes == 0


def test_the_streams_are_the_part_that_grows() -> None:
    dense = tiny_model("llama")
    # Beyond the windows of one block: three streams, 40 tokens, width 48, float32.
    # And where neurons of removed layers are ranked, what is left on every fourth window.
    for neurons, streams in ((0, 300), (4096, 325)):
        more, less = (memory_of_refit(dense, windows, 40, neurons) for windows in (400, 300))
        assert more - less == streams * 40 * 48 * 4


@pytest.mark.parametrize(
    ("bytes_", "seconds", "words"),
    [
        (420_000_000, 75.4, "0.4 GB of memory beside the models, and 75 seconds"),
        (12_300_000_000, 400, "12.3 GB of memory beside the models, and 7 minutes"),
    ],
)
def test_in_words(bytes_: int, seconds: float, words: str) -> None:
    assert str(Cost(bytes_, seconds)) == words
