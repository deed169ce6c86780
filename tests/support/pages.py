"""The code of a page, run as its reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt  # comes with rich

ROOT = Path(__file__).parents[2]


def python_of(page: str) -> str:
    """The one block of Python of a page of docs/."""
    return block_of(ROOT / "docs" / page, "python")


def block_of(page: Path, language: str) -> str:
    """The page's one block of code in a language."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    (block,) = [token.content for token in tokens if token.type == "fence" and token.info == language]
    return block


def run_program(file: Path, *arguments: object, **environment: str) -> str:
    """What ``python FILE ...`` prints on standard output."""
    done = subprocess.run(
        [sys.executable, str(file), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "300", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
