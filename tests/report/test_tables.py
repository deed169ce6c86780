"""A table on a page and on a terminal, and the figures in its cells."""

from __future__ import annotations

import math

import pytest

from linearpatch_kernels.cli.console import print_table
from linearpatch_kernels.report.tables import Table, number, percent

ROWS = [["dense", "1.5", "a | b"], ["cut", "12", "c"]]


def test_on_a_page() -> None:
    table = Table(["model", "loss", "text"], ROWS, "Left out", align="lrl")
    assert table.markdown().splitlines() == [
        "| model | loss | text |",
        "| --- | ---: | --- |",
        "| dense | 1.5 | a \\| b |",
        "| cut | 12 | c |",
    ]
    assert Table(["model", "loss", "text"], ROWS).markdown().splitlines()[1] == "| --- | ---: | ---: |"
    assert Table(["model"], []).markdown() == ""


def test_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Table(["model", "loss", "text"], ROWS, "A title", align="lrl"))
    title, head, _, dense, cut = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert title == "A title"
    assert dense.index("1.5") + 3 == cut.index("12") + 2, "figures end in one column"
    assert dense.index("a | b") == cut.rindex("c") == head.index("text"), "words begin in one"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (33.1234, "33.12"),
        (0.5, "0.5"),
        (999.96, "1000"),
        (12345.6, "12,346"),
        (3.2e8, "3.2e+08"),
        (math.inf, "inf"),
        (None, ""),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.7511, 1, "75.1 %"),
        (0.7511, 0, "75 %"),
        (-0.5, 1, "-50.0 %"),
        (None, 1, ""),
        (math.nan, 0, ""),
        (math.inf, 1, ""),
    ],
)
def test_shares(share: float | None, digits: int, text: str) -> None:
    assert percent(share, digits) == text
