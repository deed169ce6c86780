"""The page of a GPU day, from the file of its calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.speed.table import markdown

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
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return [markdown(head, cells), ""]


def _ratio(line: dict[str, Any] | None, over: str = "copy") -> str | None:
    if line is None or not {"ours", over} <= line["times"].keys():
        return None
    return f"{line['times'][over]['us'] / line['times']['ours']['us']:.2f}"


def page(measured: Mapping[str, Any]) -> str:
    """Of a file that `tools.gpu_day.publish` wrote."""
    calls, note = measured["calls"], measured["note"]
    last = calls[-1]
    commits = "; ".join(f"commit {call['commit']}" for call in calls)
    device, torch = last["device"] or "no GPU: a dry run, whose times mean nothing", last["torch"]
    text = [
        "# On a GPU",
        "",
        f"Measured on {device} with torch {torch}, in {len(calls)} calls of `tools/gpu_day/run.sh`"
        f" ({commits}). {note}".rstrip(),
        "",
        "`python -m benchmarks publish` wrote this page. Times are microseconds of a call, the median of CUDA graph"
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
