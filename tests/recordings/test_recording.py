"""Nothing that tiny models give has changed since `recording.json` was written by ``python -m tests.recordings.make``.

Bits depend on the processor and its libraries (oneDNN, MKL, the vector instructions that torch finds). So they are
compared only where `make.machine` says what it said at the recording: the same torch and Transformers, and a probe, a
chain of products, factorisations and our own kernels, that rounds alike. Elsewhere the figures are compared, to
`RELATIVE` or `ABSOLUTE`, whichever is larger. (With torch's, MKL's and oneDNN's plainest instructions nearly all bits
were others, and no figure was 1e-4 off.)
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from tests.recordings import make

RELATIVE, ABSOLUTE = 1e-3, 1e-3


def differences(recorded: make.Content, found: make.Content) -> list[str]:
    """What differs, a line each."""
    same_machine = recorded["machine"] == found["machine"]
    cases, others = recorded["cases"], found["cases"]
    lines = [f"{case}: only {'recorded' if case in cases else 'made'}" for case in sorted(cases.keys() ^ others.keys())]
    for case in sorted(cases.keys() & others.keys()):
        for kind in ("bits", "figures"):
            before, now = cases[case][kind], others[case][kind]
            lines += [f"{case}, {kind} of {name}: only once" for name in sorted(before.keys() ^ now.keys())]
            lines += [
                f"{case}, {kind} of {name}: {before[name]} recorded, {now[name]} found"
                for name in sorted(before.keys() & now.keys())
                if before[name] != now[name] and (same_machine or not _alike(before[name], now[name]))
            ]
    return lines


def _alike(one: Any, other: Any) -> bool:
    """Whether two entries may come from two machines: bits may always differ."""
    return isinstance(one, str) or math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


@pytest.fixture(scope="module")
def recorded() -> make.Content:
    content: make.Content = json.loads(make.FILE.read_text(encoding="utf-8"))
    return content


def test_everything_is_as_recorded(recorded: make.Content) -> None:
    # As JSON has it.
    assert differences(recorded, json.loads(json.dumps(make.record()))) == []


def test_an_interrupted_training_ends_with_the_same_bits(recorded: make.Content) -> None:
    assert recorded["cases"]["distill straight"] == recorded["cases"]["distill interrupted"]


def test_the_machine_is_told_by_its_rounding() -> None:
    assert make.probe() == make.probe()


@pytest.mark.parametrize(
    ("machine", "kind", "change", "shows"),
    [
        ("this", "bits", lambda digest: digest[::-1], True),
        ("this", "figures", lambda figure: figure * (1 + 1e-12), True),
        ("another", "bits", lambda digest: digest[::-1], False),
        ("another", "figures", lambda figure: figure + 0.5 * ABSOLUTE, False),
        ("another", "figures", lambda figure: figure + 3 * RELATIVE * max(1, figure), True),
    ],
)
def test_what_shows(recorded: make.Content, machine: str, kind: str, change: Any, shows: bool) -> None:
    found = copy.deepcopy(recorded)
    if machine == "another":
        found["machine"]["probe"] = "another"
    entries = found["cases"]["prune low-rank"][kind]
    name = list(entries)[-1]
    entries[name] = change(entries[name])
    assert bool(differences(recorded, found)) == shows


def test_a_case_that_is_missing_shows(recorded: make.Content) -> None:
    found = copy.deepcopy(recorded)
    del found["cases"]["sweep"]
    assert differences(recorded, found) == ["sweep: only recorded"]
