"""tools/matrix.py and what lets a CUDA build of torch run without NVIDIA's libraries."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree as Xml
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("matrix")


def compiled(target: Path, source: str, *options: str | Path) -> None:
    (target.parent / "source.c").write_text(source)
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{target.name}",
        target.parent / "source.c",
        "-o",
        target,
        *options,
    ]
    subprocess.run(command, check=True)


@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "readelf", "nm"))), reason="needs gcc and binutils")
def test_a_library_that_is_missing_is_replaced_by_one_that_fails(matrix: ModuleType, tmp_path: Path) -> None:
    """Symbols with a version and without one, and a library that is there."""
    torch, stubs = tmp_path / "torch", tmp_path / "stubs"
    (torch / "lib").mkdir(parents=True)
    script = tmp_path / "versions.map"
    script.write_text("libcuthing.so.7 { global: cuThing; };\nlibcuthing.so.8 { global: cuThing2; };\n")
    thing, plain, here = tmp_path / "libcuthing.so.8", tmp_path / "libnvplain.so.1", torch / "lib" / "libtorch_own.so"
    compiled(
        thing, "int cuThing(int x) { return x; } int cuThing2(void) { return 0; }", f"-Wl,--version-script,{script}"
    )
    compiled(plain, "int nvPlain(void) { return 0; }")
    compiled(here, "int cuHere(void) { return 4; }")
    compiled(
        torch / "lib" / "libtorch_x.so",
        "int cuThing(int); int cuThing2(void); int nvPlain(void); int cuHere(void);"
        "int all(void) { return cuThing(1) * 1000000 + cuThing2() * 10000 + nvPlain() * 100 + cuHere(); }",
        *(thing, plain, here),
    )
    thing.unlink()
    plain.unlink()
    assert matrix.write_stubs(torch, stubs) == [thing.name, plain.name]
    assert sorted(file.name for file in stubs.iterdir()) == [thing.name, plain.name]
    answer = subprocess.run(
        [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(torch / 'lib' / 'libtorch_x.so')!r}).all())"],
        env={"LD_LIBRARY_PATH": f"{stubs}:{torch / 'lib'}", "LD_BIND_NOW": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.strip() == "35353504"


def test_outcomes_are_counted_and_reasons_kept(matrix: ModuleType) -> None:
    report = """<testsuites><testsuite time="2.6">
      <testcase classname="tests.a" name="good"/>
      <testcase classname="tests.a" name="bad"><failure message="x"/></testcase>
      <testcase classname="tests.b" name="broken"><error message="x"/></testcase>
      <testcase classname="tests.b" name="left"><skipped message="no GPU"/></testcase>
      <testcase classname="tests.b" name="left, too"><skipped message="no GPU"/></testcase>
    </testsuite></testsuites>"""
    assert matrix.counted([Xml.fromstring(report)] * 2) == {
        "passed": 2,
        "failed": 4,
        "skipped": 4,
        "failures": ["tests.a::bad", "tests.a::bad", "tests.b::broken", "tests.b::broken"],
        "skips": {"no GPU": 4},
        "seconds": 5,
    }


def test_every_test_is_in_one_part(matrix: ModuleType) -> None:
    paths = [ROOT / path for part in matrix.parts().values() for path in part]
    found = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    assert sorted(found) == sorted((ROOT / "tests").rglob("test_*.py"))


def test_the_corners_are_within_what_pyproject_claims(matrix: ModuleType) -> None:
    """And its lowest versions are tried."""
    claimed = dict(one.split(">=") for one in matrix.requirements() if ">=" in one and "[" not in one)
    assert {"torch", "transformers"} <= claimed.keys()
    for name in ("torch", "transformers"):
        tried = [
            pin.removeprefix(f"{name}==") for corner in matrix.CORNERS for pin in corner.pins if f"{name}==" in pin
        ]
        lowest = min(tried, key=lambda version: [int(part) for part in version.split(".")])
        assert lowest.split(".")[:2] == claimed[name].split(".")[:2]
    assert matrix.CORNERS[0].pins[0].startswith(f"torch=={claimed['torch']}")


def test_a_folder_of_somebody_else_is_left_alone(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARPATCH_MATRIX", str(tmp_path))
    corner = matrix.CORNERS[0]
    corner.place.mkdir()
    (corner.place / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not an environment of the matrix"):
        matrix.prepare(corner)
    assert (corner.place / "thesis.txt").read_text() == "mine"
