"""The blocks of the pages, and the pages with their blocks in place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.publish import gpu
from benchmarks.publish.results import RESULTS, Table, load
from benchmarks.speed.table import markdown

ROOT = RESULTS.parents[1]
GPU = "gpu-nvidia-h100-80gb-hbm3"
MARKS = re.compile(r"(<!-- published: (\S+) -->\n).*?(<!-- to here -->)", re.DOTALL)


def shown(table: Table, commit: str) -> str:
    """In Markdown; a column says the commit of rows where not all have the same."""
    count = len(table.columns)
    if all(len(row) == count for row in table.rows):
        return markdown(table.columns, table.rows)
    rows = [(*row[:count], row[count] if len(row) > count else commit) for row in table.rows]
    return markdown((*table.columns, "commit"), rows)


def block(name: str) -> str:
    """What stands between the marks of that name.

    Raises:
        FileNotFoundError: there is no such result.
    """
    if name in BLOCKS:
        return BLOCKS[name]()
    file, _, table = name.partition("#")
    result = load(file)
    figures = fenced(result.printed) if result.printed else shown(result.table(table), result.commit)
    return f"{figures}\n\n{result.origin()}"


def fenced(lines: Iterable[str]) -> str:
    return "\n".join(["```", *lines, "```"])


def published(text: str) -> str:
    """A page with its blocks made anew.

    Raises:
        ValueError: a block has no end.
    """
    if len(MARKS.findall(text)) != text.count("<!-- published: "):
        raise ValueError("a block of the page does not end with <!-- to here -->")
    return MARKS.sub(lambda found: f"{found[1]}{block(found[2])}\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every page that has blocks, or is one, as it should be."""
    marked = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in marked}
    made = {page: published(text) for page, text in texts.items() if MARKS.search(text)}
    return made | {ROOT / "docs" / "results" / "gpu.md": gpu.page(measured(GPU))}


def measured(name: str) -> dict[str, Any]:
    """A result that has a form of its own."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


# --- blocks with a form of their own ---------------------------------------------------------------------------------


def matrix() -> str:
    """``tools/matrix.py``'s corners, as far as they ran."""
    heads = ("Python", "torch", "Triton", "transformers", "numpy", "passed", "failed", "skipped", "commit")
    rows = [
        (
            *(corner["versions"][name.lower()] for name in heads[:5]),
            *(f"{corner[name]:,}" for name in heads[5:8]),
            short(corner["commit"]),
        )
        for corner in measured("matrix")["corners"]
    ]
    return markdown(heads, rows)


def short(commit: str) -> str:
    """As ``git describe --dirty`` says it, seven digits of it."""
    number, dash, dirty = commit.partition("-")
    return f"{number[:7]}{dash}{dirty}"


def what_heals() -> str:
    """Of the distillation study's tables: perplexities by depth, without the agreements."""
    methods = {
        "plain removal": "dropped",
        "LinearPatch": "linearpatch",
        "fitted, untrained": "fitted",
        "trained, the authors' loop": "authors",
        "trained, ours": "ours, dense + norms",
    }
    rows, commits = [], []
    for layers in (3, 6, 9):
        result = load(f"distillation-{layers}-layers")
        commits.append(f"{layers} layers: {result.commit}")
        rows.append((f"{layers} of 30", *(best(result.table(), method) for method in methods.values())))
    dense = best(load("distillation-6-layers").table(), "dense")
    return (
        f"{markdown(('layers gone', *methods), rows)}\n\n*The dense model: {dense}. Commits of {'; '.join(commits)}.*"
    )


def best(table: Table, method: str) -> str:
    """Perplexities "BoolQ / LAMBADA" of a method, at its learning rate of the least perplexity on BoolQ."""
    texts = [table.columns.index(name) for name in ("BoolQ passages", "LAMBADA passages")]
    found = [
        [row[at].partition(" / ")[0] for at in texts]
        for row in table.rows
        if row[table.columns.index("method")] == method
    ]
    return " / ".join(min(found, key=lambda pair: float(pair[0])))


def demo_quality() -> str:
    """Of the demo's output, the table of the quality."""
    result = load("demo")
    begin = next(i for i, line in enumerate(result.printed) if line.startswith("Quality"))
    end = next(i for i in range(begin, len(result.printed)) if not result.printed[i])
    return f"{fenced(result.printed[begin:end])}\n\n{result.origin()}"


def speeds() -> str:
    """The operator beside the dense product and a copy on a CPU, and beside a copy on a GPU."""
    cpu = load("cpu-hadamard-patch")
    row, table = "512 x 4096 fp32", cpu.table()
    dense = table.cell(row, "against the dense product").removesuffix("x")
    copy = table.cell(row, "over `copy_`").removesuffix("x its time")
    calls = measured(GPU)["calls"]
    widths = (2048, 4096, 8192)
    patch, norm = (" / ".join(gpu_ratio(calls, op, d) for d in widths) for op in ("patch", "norm"))
    return "\n".join(
        [
            f"- **CPU**: {dense} times as fast as the dense product, {copy} times a copy's time ({row}, one thread;",
            f"  `{cpu.command}`, commit {cpu.commit}; {cpu.machine}):",
            "  [tables](docs/results/cpu.md).",
            f"- **GPU**: {calls[-1]['device']}, 16384 rows in bfloat16: the patch has {patch} of a copy's speed",
            f"  at d = {' / '.join(map(str, widths))}, with sum and norm {norm} (`tools/gpu_day/run.sh`,",
            f"  commit {calls[-1]['commit']}): [tables](docs/results/gpu.md).",
        ]
    )


def gpu_ratio(calls: list[dict[str, Any]], op: str, d: int) -> str:
    """Of a copy's time over ours in CUDA, bfloat16, 16384 rows; it must be of the last call, which the line names."""
    wanted: Mapping[str, object] = {"backend": "cuda", "op": op, "rows": 16384, "d": d, "dtype": "bfloat16"}
    (case,) = (line for line in calls[-1]["times"] if all(line.get(key) == value for key, value in wanted.items()))
    return f"{case['times']['copy']['us'] / case['times']['ours']['us']:.2f}"


BLOCKS: dict[str, Callable[[], str]] = {
    "matrix": matrix,
    "what-heals": what_heals,
    "demo-quality": demo_quality,
    "speeds": speeds,
}
