"""The day's times as lines to read: ``python -m tools.gpu_day.table FILE...``. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def lines_of(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The JSON objects among what the steps printed; a run that was cut off may have left half of one."""
    for file in files:
        if not file.exists():
            continue
        for line in file.read_text(errors="replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found


def told(line: dict[str, Any]) -> str | None:
    times = line.get("times")
    if times is None:
        if line.get("step") == "model":
            return " ".join(f"{name} {value}" for name, value in line.items() if name != "step")
        return None
    if line.get("op") == "decode" and line.get("step") == "time":
        over = " ".join(f"{name} {us}" for name, us in line["over_empty_us"].items())
        empty = f"us over an empty kernel ({times['empty']['us']})"
        return f"{line['backend']:6} decode {line['rows']} x {line['d']}: {empty}: {over}"
    shape = f"{line.get('rows', '')} x {line.get('d', '')}"
    operator = line.get("op", line.get("step"))
    head = f"{line.get('backend', ''):6} {operator:10} {shape:>14} {line.get('dtype', ''):8}"
    all_of_them = " | ".join(f"{name} {one['us']}{'' if one['captured'] else '*'}" for name, one in times.items())
    ratio = ""
    if "ours" in times and "copy" in times:
        ratio = f" copy/ours {times['copy']['us'] / times['ours']['us']:.3f}"
    missing = "".join(f"; {name}: {why[:80]}" for name, why in line.get("missing", {}).items())
    return f"{head} error {line.get('error', '-')}{ratio} | {all_of_them} | host {line.get('host_us', {})}{missing}"


if __name__ == "__main__":
    for one in lines_of(map(Path, sys.argv[1:])):
        if (text := told(one)) is not None:
            print(text)
