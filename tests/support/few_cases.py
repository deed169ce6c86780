"""A case that takes no time, for the runner's own test."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.speed.registry import Case, Goal, Peer, Run, register


def times_three(x: torch.Tensor) -> Run:
    return partial(torch.mul, x, 3.0)


def thrice(x: torch.Tensor) -> Run:
    return lambda: x + x + x


def twice(x: torch.Tensor) -> Run:
    return lambda: x + x


def breaks(x: torch.Tensor) -> Run:
    raise OSError("no such instruction")


register(
    Case(
        group="tiny",
        name="three times x",
        operands=partial(torch.randn, 64),
        ours=times_three,
        peers=(
            Peer("sum", thrice),
            Peer("copy", lambda x: x.clone, floor=True, same_result=False),
            Peer("not there", thrice, package="no-such-package[cpu]", module="no_such_module"),
            Peer("wrong", twice),
            Peer("broken", breaks),
            Peer("compiled", thrice, slow_to_build=True),
        ),
        goals=(Goal(("sum", "not there"), 1e-6, 1e9), Goal(("copy",), 1e9)),
        quick=True,
        threads=(1,),
        about={"width": 64, "order": 1, "dtype": "fp32"},
    )
)
register(
    Case(
        "tiny", "not in --quick", partial(torch.randn, 64), ours=times_three, peers=(Peer("sum", thrice),), threads=(1,)
    )
)
