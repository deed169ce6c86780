"""The files of a GPU day -> ``benchmarks/results/gpu-DEVICE.json`` and ``docs/results/gpu.md``.

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu_day.table import lines_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results" / "gpu.md"
STALL = "smsp__average_warps_issue_stalled_"
COUNTERS = {
    "gpu__time_duration.sum": "us",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue active %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active %",
    "launch__registers_per_thread": "registers",
    f"{STALL}long_scoreboard_per_issue_active.ratio": "long scoreboard",
    f"{STALL}short_scoreboard_per_issue_active.ratio": "short scoreboard",
    f"{STALL}barrier_per_issue_active.ratio": "barrier",
    f"{STALL}wait_per_issue_active.ratio": "wait",
    f"{STALL}no_instruction_per_issue_active.ratio": "no instruction",
}


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


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("step", "backend", "op", "rows", "d", "vocabulary", "dtype"))


def merged(calls: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Every case once, in the first call's order: its last figures, and its first where it has others."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for call in calls:
        for line in call["times"]:
            cases.setdefault(_key(line), []).append(line)
    return [(found[-1], found[0] if len(found) > 1 else None) for found in cases.values()]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows), ""]


def _ratio(line: dict[str, Any] | None, over: str = "copy") -> str | None:
    if line is None or not {"ours", over} <= line["times"].keys():
        return None
    return f"{line['times'][over]['us'] / line['times']['ours']['us']:.2f}"


def page(calls: Sequence[dict[str, Any]], note: str) -> str:
    last = calls[-1]
    commits = "; ".join(f"commit {call['commit']}" for call in calls)
    device, torch = last["device"] or "no GPU: a dry run, whose times mean nothing", last["torch"]
    text = [
        "# On a GPU",
        "",
        f"Measured on {device} with torch {torch}, in {len(calls)} calls of `tools/gpu_day/run.sh`"
        f" ({commits}). {note}".rstrip(),
        "",
        "`python -m tools.gpu_day.publish` wrote this page. Times are microseconds of a call, the median of CUDA graph"
        " replays in turns; the operands of bandwidth cases are several times L2. A ratio above 1 says that ours is"
        " faster. Where a case was measured in an earlier call too, its ratio then stands in brackets.",
        "",
    ]
    cases = merged(calls)
    text += _section("Beside a copy of the same bytes", cases, ("patch", "norm", "backward"), _bandwidth)
    text += _section("A decoding step, over an empty kernel", cases, ("decode",), _decoding)
    for call in calls:
        if call["printed"]:
            text += [f"## As commit {call['commit']} printed it", "", "```", *call["printed"], "```", ""]
    text += _section("The distillation losses", cases, ("loss, topk", "loss, full", "loss, tail"), _losses)
    text += _models(calls)
    text += _correctness(calls)
    if counted := next((call["counters"] for call in reversed(calls) if call["counters"]), None):
        head = ["kernel", *COUNTERS.values()]
        text += ["## What the counters say (ncu, warps stalled for each issue)", ""]
        text += table(head, ([f"`{_short(one['kernel'])}`", *(one.get(name) for name in head[1:])] for one in counted))
    return "\n".join(text).rstrip() + "\n"


def _short(kernel: str) -> str:
    return re.sub(r"^void |\(.*\)$|Known<(\w+)>", lambda found: found[1] or "", kernel)


Case = tuple[dict[str, Any], dict[str, Any] | None]


def _section(
    title: str, cases: Sequence[Case], ops: Sequence[str], told: Callable[[list[Case]], list[str]]
) -> list[str]:
    chosen = [case for case in cases if case[0].get("op") in ops]
    return [f"## {title}", "", *told(chosen)] if chosen else []


def _bandwidth(cases: list[Case]) -> list[str]:
    rows = []
    for now, before in cases:
        times, earlier = now["times"], _ratio(before)
        ratio = _ratio(now)
        rows.append(
            (
                now["backend"], now["op"], f"{now['rows']} x {now['d']}", now["dtype"], times["ours"]["us"],
                f"{now['bytes'] / times['ours']['us'] / 1e6:.2f}", f"{ratio} ({earlier})" if earlier else ratio,
                _ratio(now, "mm"), _ratio(now, "compile"), now.get("error"), now["host_us"].get("ours"),
            )
        )  # fmt: skip
    head = "backend", "operator", "rows x d", "dtype", "us", "TB/s", "copy / ours", "mm / ours", "torch.compile / ours"
    return table((*head, "error", "host us"), rows)


def _decoding(cases: list[Case]) -> list[str]:
    rows = []
    for now, before in cases:
        over, earlier = now["over_empty_us"], before["over_empty_us"] if before else {}
        cells = [f"{over[name]}" + (f" ({earlier[name]})" if name in earlier else "") for name in ("ours", "norm")]
        rows.append((now["backend"], now["rows"], now["d"], *cells, over["copy"], over["mm"]))
    return table(("backend", "rows", "d", "patch, us", "add_patch_rms_norm, us", "copy, us", "mm, us"), rows)


def _losses(cases: list[Case]) -> list[str]:
    rows = []
    for now, before in cases:
        times = now["times"]
        ours = f"{times['ours']['us']:.0f}" + (f" ({before['times']['ours']['us']:.0f})" if before else "")
        others = ", ".join(f"{name} {one['us']:.0f}" for name, one in times.items() if name != "ours")
        size = f"{now['rows']} x {now['d']} of {now['vocabulary']}"
        rows.append((now["op"], size, ours, others, now.get("error"), now["host_us"].get("ours")))
    return table(("loss and dhidden", "size", "us", "others, us", "error", "host us"), rows)


def _models(calls: Sequence[dict[str, Any]]) -> list[str]:
    lines = next((call["model"] for call in reversed(calls) if call["model"]), [])
    if not lines:
        return []
    text = ["## A random model of an 8B Llama's shape, 5 of 32 layers removed", ""]
    timed = [line for line in lines if "times" in line]
    if timed:
        names = list(dict.fromkeys(name for line in timed for name in line["times"]))
        rows = [
            (line["op"], *(f"{line['times'][n]['us'] / 1e3:.2f}" if n in line["times"] else "" for n in names))
            for line in timed
        ]
        text += table((f"ms, prompt of {timed[0]['prompt']}", *names), rows)
    whole = [line for line in lines if "peak_gb" in line]
    return text + table(
        ("step", "tokens", "seconds", "peak GB"), ((x["op"], x["tokens"], x["seconds"], x["peak_gb"]) for x in whole)
    )


def _correctness(calls: Sequence[dict[str, Any]]) -> list[str]:
    text = ["## Right?", ""]
    for call in calls:
        for backend in dict.fromkeys(one["backend"] for one in call["checked"]):
            found = [one for one in call["checked"] if one["backend"] == backend]
            tried, of, wrong = (
                [sum(one[name][i] for one in found) for i in range(len(found[0][name]))]
                for name in ("calls", "of", "wrong")
            )
            text += [
                f"- Commit {call['commit']}, {backend}: {tried[0]} of {of[0]} patch cases (widths x dtypes, random"
                f" layouts), {tried[1]} row counts, {tried[2]} of {of[2]} calls of the losses against float64;"
                f" wrong: {', '.join(map(str, wrong))}."
            ]
        text += [f"- Commit {call['commit']}: {line.strip('= ')}" for line in call["sanitizer"]]
        text += [f"- Commit {call['commit']}: the tests: {line.strip('= ')}" for line in call["tests"]]
    return [*text, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, help="what `run.sh` left in $OUT, the first call first")
    parser.add_argument("--commit", action="append", default=[], help="of each directory, in their order")
    parser.add_argument("--note", default="", help="a sentence for the page's first paragraph")
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
    if options.add and result.exists():
        calls = [*json.loads(result.read_text())["calls"], *calls]
    for file, content in (
        (result, json.dumps({"calls": calls}, indent=1) + "\n"),
        (options.page, page(calls, options.note)),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
