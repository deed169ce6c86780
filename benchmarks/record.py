"""What a command measured, kept as a result that `publish` reads: every study's ``--json FILE``."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.speed.hardware import describe

ROOT = Path(__file__).resolve().parents[1]
Rows = tuple[Sequence[str], Sequence[Sequence[str]]]


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="the tables as a result, for `python -m benchmarks publish`")


def record(path: Path, tables: Mapping[str, Rows], **more: object) -> None:
    """Write columns and rows by the table's name, with the command that runs, the checkout's commit and the machine."""
    content = {
        "command": command(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "versions": {"torch": torch.__version__},
        **more,
        "tables": {name: {"columns": columns, "rows": rows} for name, (columns, rows) in tables.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command() -> str:
    """As it can be typed again, without where its result went."""
    words = sys.argv[1:]
    for option in ("--json", "--result"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    module = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join(["python", *started, *words])


def commit() -> str:
    """Of the checkout, with "-dirty" where it has changes."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
