"""examples/cpp: the operators, and a block that AOTInductor compiled, in processes without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearpatch_kernels import backend
from tests.support.pages import ROOT, block_of

HERE = Path("examples/cpp")
SHARED_OBJECT = ROOT / "linearpatch_kernels/_C.abi3.so"
WIDTH = 192
NO_MATRIX = "linearpatch::paley_matrix(192) must be int8 [m, m] with an m that divides it"
compiler = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.available("cpu").ok, reason="the extension is not built"),
    pytest.mark.skipif(not (compiler and shutil.which("make")), reason="no C++ compiler, or no make"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The README's lines in a copy of the folder: the folder, and what they print."""
    folder = tmp_path_factory.mktemp("cpp") / "cpp"
    shutil.copytree(ROOT / HERE, folder, ignore=shutil.ignore_patterns("build"))
    finished = subprocess.run(
        ["bash", "-euc", block_of(ROOT / HERE / "README.md", "sh")],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "LINEARPATCH_BACKEND": ""},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "build", finished.stdout


@pytest.fixture
def build(made: tuple[Path, str]) -> Path:
    return made[0]


def run(build: Path, program: str, *arguments: Path) -> tuple[int, str]:
    """How a program ended, and all that it said; without what a Python environment could lend it."""
    finished = subprocess.run(
        [build / program, SHARED_OBJECT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"OMP_NUM_THREADS": "1"},
    )
    return finished.returncode, finished.stdout + finished.stderr


def changed(build: Path, tmp_path: Path, name: str, **tensors: Tensor) -> Path:
    """A file that `export.py` wrote, with other tensors."""
    torch.save({**torch.load(build / name), **tensors}, tmp_path / name)
    return tmp_path / name


def test_the_readme_runs_and_all_agree(made: tuple[Path, str]) -> None:
    said = re.findall(r"^([\w, ]+): differs from Python's by (\S+), allowed (\S+)$", made[1], re.MULTILINE)
    of_operators = ["hadamard_patch", "add_patch_rms_norm, normed", "add_patch_rms_norm, stream"]
    assert [what for what, _, _ in said] == [*of_operators, *of_operators, "block"]
    assert all(float(difference) <= float(allowed) for _, difference, allowed in said)


def test_there_is_no_python_in_the_process(build: Path) -> None:
    for file in (build / "call_operators", build / "run_package", SHARED_OBJECT):
        needed = subprocess.run(["ldd", file], capture_output=True, text=True, check=True, timeout=60).stdout
        assert "libtorch_cpu" in needed
        assert not re.search(r"libpython|libtorch_python", needed)


def test_a_result_that_differs_is_noticed(build: Path, tmp_path: Path) -> None:
    other = torch.load(build / "operators.pt")["normed"] + 1e-3
    code, said = run(build, "call_operators", changed(build, tmp_path, "operators.pt", normed=other))
    assert code == 1
    assert re.search(r"normed: differs .* TOO MUCH", said)
    other = torch.load(build / "block.pt")["result"] + 1e-3
    code, said = run(build, "run_package", build / "block.pt2", changed(build, tmp_path, "block.pt", result=other))
    assert code == 1
    assert re.search(r"block: differs .* TOO MUCH", said)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": torch.ones(64)}, "scale is not in the form that the kernel takes: Float [64]"),
        ({"x": torch.ones(2, 0)}, "x is not in the form that the kernel takes: Float [2, 0]"),
        ({"residual": torch.ones(2, 5, 64)}, "residual is not in the form that the kernel takes: Float [2, 5, 64]"),
        ({"matrix": torch.ones(5, 5, dtype=torch.int8)}, NO_MATRIX),
        ({"x": torch.ones(2, 5, WIDTH).double()}, "Could not find schema for linearpatch::hadamard_patch_reference"),
    ],
    ids=["scale", "no width", "residual", "matrix", "float64"],
)
def test_what_an_operator_refuses_it_says(build: Path, tmp_path: Path, wrong: dict[str, Tensor], message: str) -> None:
    code, said = run(build, "call_operators", changed(build, tmp_path, "operators.pt", **wrong))
    assert (code, said.splitlines()[-1].startswith("error: ")) == (2, True)
    assert message in said


def test_the_block_calls_the_operator_and_hands_on_what_it_says(build: Path, tmp_path: Path) -> None:
    """An operator's message comes only from the operator: AOTInductor has not put code of its own in its place."""
    wrong = changed(build, tmp_path, "block.pt", matrix=torch.ones(5, 5, dtype=torch.int8))
    code, said = run(build, "run_package", build / "block.pt2", wrong)
    assert code == 2
    assert f"error: {NO_MATRIX}" in said


def test_the_block_refuses_another_width(build: Path, tmp_path: Path) -> None:
    wrong = changed(build, tmp_path, "block.pt", hidden=torch.ones(1, 7, WIDTH - 2))
    code, said = run(build, "run_package", build / "block.pt2", wrong)
    assert code == 2
    assert "expected: 192, but got: 190" in said


def test_files_that_are_not_there(build: Path, tmp_path: Path) -> None:
    assert run(build, "call_operators", tmp_path / "none.pt")[1] == f"error: cannot read {tmp_path / 'none.pt'}\n"
    finished = subprocess.run(
        [build / "call_operators", tmp_path / "none.so", build / "operators.pt"], capture_output=True, text=True
    )
    assert finished.returncode == 2
    assert "none.so: cannot open shared object file" in finished.stderr
