"""The pages of docs/reference that commands write from the help texts and the docstrings."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import linearpatch_kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["cli_reference", "python_reference", "choices_reference"])
def test_the_page_is_what_the_command_writes(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    command = importlib.import_module(tool)
    assert command.PAGE.read_text(encoding="utf-8") == command.page(), f"python tools/{tool}.py writes it anew"


def test_docstrings_become_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    command = importlib.import_module("python_reference")

    def example(x: int, *, told: object = print) -> int:
        """Of ``x @ H`` and :func:`~a.b.calibrate`, a * b::

            example(1)

        Args:
            x: one,
                and more.
            first, second: two.

        Returns:
            A number, on
            two lines.
        """
        return x

    assert command.entry("example", example).split("\n\n") == [
        "## `example`",
        "```python\nexample(x: int, *, told: object = print) -> int\n```",
        "Of `x @ H` and `calibrate`, a \\* b:",
        "```python\nexample(1)\n```",
        "**Args**",
        "- `x`: one, and more.\n- `first`, `second`: two.",
        "**Returns**",
        "A number, on\ntwo lines.",
    ]


def test_every_public_name_has_an_entry() -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert [name for name in linearpatch_kernels.__all__ if f"\n## `{name}`\n" not in page] == []
