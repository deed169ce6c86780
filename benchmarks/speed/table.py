"""The JSON of a run as tables and a plot: ``python -m benchmarks.speed.table FILE...`` prints those of earlier runs.

A ratio is the median over the rounds of two times that were taken in the same round: how many times as fast as a rival
we are, or, marked "its time", how many times as long as a bound we take.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = ("case", "ours", "against", "its time", "ratio", "2 threads", "solid → aim", "reached")
# Orders m of d = m 2^k that the plot joins by a line of their own.
LINES = (1, 12, 20, 28, 36)


@dataclass(frozen=True)
class Measured:
    """One case on one number of threads; ``ours`` and each of ``peers`` hold the seconds of a call in every round."""

    group: str
    case: str
    threads: int
    ours: Sequence[float]
    peers: Mapping[str, Sequence[float]]
    floors: frozenset[str]
    skipped: Mapping[str, str]
    goals: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]

    def fastest(self, names: Iterable[str]) -> str | None:
        """Of those peers that ran."""
        return min(
            (name for name in names if name in self.peers),
            key=lambda name: statistics.median(self.peers[name]),
            default=None,
        )

    def ratio(self, name: str) -> float:
        """How many times as long the peer takes, or, where it is a floor, ours."""
        pairs = zip(self.ours, self.peers[name], strict=True)
        return statistics.median(mine / its if name in self.floors else its / mine for mine, its in pairs)


def read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """Machine and cases of one run's JSON."""
    report = json.loads(path.read_text(encoding="utf-8"))
    measured = []
    for entry in report["benchmarks"]:
        extra = entry["extra_info"]
        measured.append(
            Measured(
                group=entry["group"],
                case=extra["case"],
                threads=extra["threads"],
                ours=[seconds / extra["calls"] for seconds in entry["stats"]["data"]],
                peers=extra["peers"],
                floors=frozenset(extra["floors"]),
                skipped=extra["skipped"],
                goals=extra["goals"],
                about=extra["about"],
            )
        )
    machine = {**report["machine_info"], "commit": report["commit_info"]["id"], "dirty": report["commit_info"]["dirty"]}
    return machine, measured


def machine_line(machine: Mapping[str, Any]) -> str:
    caches = ", ".join(f"{level} {size // 1024} KB" for level, size in machine["caches"].items())
    kernel = machine["kernel instruction set"] or "none: plain PyTorch"
    commit = machine["commit"][:10] + (" with changes" if machine["dirty"] else "")
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {caches}, {machine['memory'] / 2**30:.0f} GiB; torch "
        f"{machine['torch']}, our kernels {kernel}, commit {commit}\nflags: {' '.join(machine['flags'])}"
    )


def tables(measured: Sequence[Measured]) -> str:
    """Markdown, one table a group: times on the fewest threads that a case ran on, both ratios."""
    return "".join(f"\n### {group}\n\n{markdown(HEADER, rows)}\n" for group, rows in groups(measured).items())


def groups(measured: Sequence[Measured]) -> dict[str, list[tuple[str, ...]]]:
    """The rows of each group's table."""
    return {
        group: [row for case in _by_case(measured, group) for row in _rows(case)]
        for group in dict.fromkeys(one.group for one in measured)
    }


def _by_case(measured: Sequence[Measured], group: str) -> list[list[Measured]]:
    cases: dict[str, list[Measured]] = {}
    for one in sorted((one for one in measured if one.group == group), key=lambda one: one.threads):
        cases.setdefault(one.case, []).append(one)
    return list(cases.values())


def _rows(runs: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A row for each peer, those left out too, and one for each goal against the fastest of several."""
    headline, *others = runs
    rows = []
    goals = {tuple(goal["against"]): goal for goal in headline.goals}
    for name in [*headline.peers, *headline.skipped]:
        rows.append(_row(headline, others, (name,), goals.pop((name,), None)))
    rows.extend(_row(headline, others, names, goal) for names, goal in goals.items())
    title, ours = headline.case, _time(statistics.median(headline.ours))
    return [((title, ours) if i == 0 else ("", "")) + row for i, row in enumerate(rows)]


def _row(
    headline: Measured, others: Sequence[Measured], names: tuple[str, ...], goal: Mapping[str, Any] | None
) -> tuple[str, ...]:
    label = names[0] if len(names) == 1 else f"the faster of {', '.join(names)}"
    name = headline.fastest(names)
    asked = "" if goal is None else " → ".join(_figure(goal[key]) for key in ("solid", "aim") if goal[key] is not None)
    if name is None:
        return label, "; ".join({headline.skipped[name] for name in names}), "", "", asked, ""
    floor = name in headline.floors
    ratio = headline.ratio(name)
    threaded = [_ratio(other.ratio(best), floor) for other in others if (best := other.fastest(names))]
    reached = "" if goal is None else _reached(ratio, goal, floor)
    return (
        label,
        _time(statistics.median(headline.peers[name])),
        _ratio(ratio, floor),
        *(threaded or [""]),
        asked,
        reached,
    )


def _reached(ratio: float, goal: Mapping[str, Any], floor: bool) -> str:
    for key in ("aim", "solid"):
        if goal[key] is not None and (ratio <= goal[key] if floor else ratio >= goal[key]):
            return key
    return "missed"


def _ratio(ratio: float, floor: bool) -> str:
    return f"{_figure(ratio)}x its time" if floor else f"{_figure(ratio)}x"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def plot(measured: Sequence[Measured], machine: Mapping[str, Any], path: Path) -> bool:
    """Ratio to the dense product against the width, by order m and dtype; False if the run has no such cases."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for one in measured:
        if one.about and one.threads == 1 and (best := one.fastest(one.peers)):
            order = one.about["order"]
            name = f"m = {order}" if order in LINES else "other m"
            lines.setdefault((name, one.about["dtype"]), []).append((one.about["width"], one.ratio(best)))
    if not lines:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {name: f"C{i}" for i, name in enumerate(sorted({name for name, _ in lines}, key=lambda n: (len(n), n)))}
    for (name, dtype), points in sorted(lines.items(), key=lambda line: list(colours).index(line[0][0])):
        wide = dtype == "fp32"
        style: Any = {
            "linestyle": "-" if wide and name != "other m" else "",
            "marker": "o" if wide else "x",
            "markersize": 4,
        }
        axes.plot(*zip(*sorted(points), strict=True), color=colours[name], label=f"{name}, {dtype}", **style)
    axes.set(xscale="log", yscale="log", xlabel="width d = m 2^k", ylabel="times as fast as the dense product")
    powers = [2**k for k in range(9, 15)]
    axes.set_xticks(powers, [str(power) for power in powers])
    axes.set_xticks([], minor=True)
    axes.set_yticks(ticks := [5, 10, 20, 50, 100, 200, 500], [f"{tick}x" for tick in ticks])
    axes.grid(alpha=0.3)
    axes.set_title(f"hadamard_patch over the dense product, one thread, N = 128\n{machine['cpu']}", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    for file in sys.argv[1:]:
        machine, measured = read(Path(file))
        print(machine_line(machine))
        print(tables(measured))


if __name__ == "__main__":
    main()
