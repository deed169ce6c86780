"""``linearpatch doctor`` from outside."""

from __future__ import annotations

import json

import torch

from linearpatch_kernels.modeling.families import STOCK_FAMILIES
from linearpatch_kernels.ops.backends import BACKENDS
from tests.support.command import Run


def test_doctor_names_what_is_there_and_what_is_not(run: Run) -> None:
    done = run("doctor", "--json", "-")
    assert done.status == 0
    summary = json.loads(done.stdout)
    assert set(summary) == {"machine", "backends", "families", "scores", "fits", "ways to heal", "packages", "demo"}
    assert summary["packages"]["torch"] == torch.__version__
    assert summary["backends"]["reference"] == "yes"
    helped = " ".join(run("doctor", "--help").stdout.split())
    for name, record in [*STOCK_FAMILIES.items(), *BACKENDS.items()]:
        assert f"{name} ({record.about})" in helped
    plain = run("doctor")
    assert plain.stderr == ""
    for section in summary.values():
        assert all(name in plain.stdout for name in section)
