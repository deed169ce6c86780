"""pytest-benchmark for `speed`: which cases, how long, and the machine in the JSON."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speed import hardware
from benchmarks.speed.registry import CASE_MODULES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the cases that matter most, with fewer rounds")
    parser.addoption("--cases", action="append", metavar="MODULE", help=f"default: {' '.join(CASE_MODULES)}")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return hardware.describe()
