"""``python -m benchmarks`` measures every registered case beside its peers: a JSON, a plot, and tables.

``python -m benchmarks publish`` writes the pages of the documentation from ``benchmarks/results`` instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.publish import __main__ as publish

PLACE = Path(".benchmarks")


def measure() -> int:
    import pytest  # to publish needs none of these

    from benchmarks.record import record
    from benchmarks.speed import table

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the cases that matter most, in about a minute")
    parser.add_argument("-k", metavar="EXPR", help="only the cases that pytest's -k selects, such as 'dense and bf16'")
    parser.add_argument("--json", type=Path, default=PLACE / "speed.json", help="every round; default: %(default)s")
    parser.add_argument("--result", type=Path, help="the tables, for `publish`")
    parser.add_argument("--plot", type=Path, default=PLACE / "ratios.png", help="default: %(default)s")
    parser.add_argument("--cases", action="append", metavar="MODULE", help="instead of those of the registry")
    options = parser.parse_args()

    options.json.parent.mkdir(parents=True, exist_ok=True)
    speed = str(Path(__file__).with_name("speed") / "run.py")
    arguments = [speed, "-q", "--benchmark-quiet", f"--benchmark-json={options.json}", "-p", "no:cacheprovider"]
    arguments += ["--quick"] * options.quick + [f"--cases={module}" for module in options.cases or ()]
    arguments += ["-k", options.k] if options.k else []
    status = pytest.main(arguments)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return status
    machine, measured = table.read(options.json)
    print("\n" + table.machine_line(machine))
    print(table.tables(measured))
    print(f"every round of every case: {options.json}")
    if options.result:
        record(options.result, {group: (table.HEADER, rows) for group, rows in table.groups(measured).items()})
    if table.plot(measured, machine, options.plot):
        print(f"ratio against the width: {options.plot}")
    return status


if __name__ == "__main__":
    sys.exit(publish.main(sys.argv[2:]) if sys.argv[1:2] == ["publish"] else measure())
