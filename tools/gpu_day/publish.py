"""The files of a GPU day -> ``benchmarks/results/gpu-DEVICE.json`` and its page, ``docs/results/gpu.md``.

``python -m tools.gpu_day.publish DIRECTORY... [--commit REVISION] [--note TEXT] [--add]``. Several directories are
calls on one kind of machine, the later ones of newer code; with ``--add`` those that the JSON holds already come before
them. Of a case that was measured twice, the last figures are shown, and the first ones beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.publish.gpu import COUNTERS, page
from tools.gpu_day.table import lines_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results" / "gpu.md"


def collected(directory: Path, commit: str) -> dict[str, Any]:
    """One call of `run.sh`, as it lies in its files; what is not there was not run."""
    lines = list(lines_of(sorted(directory.glob("*.txt"))))
    by_step: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line.get("step", ""), []).append(line)
    hello = by_step.get("hello", [{}])[0]
    device = by_step.get("device", [{}])[0].get("properties", "")
    name = re.search(r"name='([^']+)'", device)
    summaries = _said(directory / "sanitizer.txt", r"=+ (ERROR SUMMARY|RACECHECK SUMMARY|Internal).*|^=== .*")
    return {
        "device": name[1] if name else None,
        "properties": device,
        "commit": commit,
        "date": _said(directory / "machine.txt", r"^\w{3} \w{3} .*20\d\d$|^\w{3} \w{3} .* 20\d\d .*")[:1],
        "torch": hello.get("torch"),
        "cuda": hello.get("cuda"),
        "phases": list(lines_of([directory / "phases.jsonl"])),
        "machine_code": by_step.get("machine code", [{}])[0].get("files"),
        "checked": by_step.get("checked", []),
        "wrong": by_step.get("wrong", []),
        "times": [*by_step.get("ceilings", []), *by_step.get("time", [])],
        "model": by_step.get("model", []),
        "failed": by_step.get("failed", []) + by_step.get("not captured", []) + by_step.get("no cache", []),
        "sanitizer": summaries,
        "counters": counters(directory / "ncu.txt"),
        # What the call printed last, where the file of its times did not come back.
        "printed": _said(directory / "printed.txt", r".*\|.*|.* over an empty kernel .*"),
        "tests": _said(directory / "build.txt", r"^\d+ (passed|failed).*|^=+ .*(passed|failed).*"),
    }


def _said(file: Path, pattern: str) -> list[str]:
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return [line.strip() for line in lines if re.match(pattern, line)]


def counters(file: Path) -> list[dict[str, str]]:
    """What ncu counted of each launch."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    head, _, *rows = csv.reader(lines[begin:])
    launches = []
    for row in rows:
        if len(row) == len(head):
            of = dict(zip(head, row, strict=True))
            counted = {name: of[metric] for metric, name in COUNTERS.items() if metric in of}
            counted["us"] = f"{float(counted['us'].replace(',', '')) / 1e3:.1f}"
            launches.append({"kernel": of["Kernel Name"], **counted})
    return launches


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, help="what `run.sh` left in $OUT, the first call first")
    parser.add_argument("--commit", action="append", default=[], help="of each directory, in their order")
    parser.add_argument("--note", default="", help="for the page's first paragraph; with --add, that of before")
    parser.add_argument("--add", action="store_true", help="keep the calls that were published before")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    missing = [str(one) for one in options.directories if not (one / "phases.jsonl").exists()]
    if missing or len(options.commit) not in (0, len(options.directories)):
        print(f"no phases.jsonl in {missing}" if missing else "give --commit once for each directory", file=sys.stderr)
        return 2
    commits = options.commit or ["unknown"] * len(options.directories)
    calls = [collected(place, commit) for place, commit in zip(options.directories, commits, strict=True)]
    slug = re.sub(r"[^a-z0-9]+", "-", (calls[-1]["device"] or "dry").lower()).strip("-")
    result = options.results / f"gpu-{slug}.json"
    note = options.note
    if options.add and result.exists():
        before = json.loads(result.read_text())
        calls, note = [*before["calls"], *calls], note or before["note"]
    measured = {"note": note, "calls": calls}
    for file, content in ((result, json.dumps(measured, indent=1) + "\n"), (options.page, page(measured))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
