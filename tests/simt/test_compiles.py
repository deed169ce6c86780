"""The CUDA kernels compiled for several generations of GPUs: what nvcc and ptxas see and the emulator cannot."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulator import KERNELS

NVCC = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if Path(p).exists()), None)
ARCHITECTURES = (80, 90, 100, 120)
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(NVCC is None, reason="no nvcc"),
]


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one that triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        place = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        return str(place) if place.exists() else None
    return None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, str]]:
    """By source and architecture: the cubin, and what ptxas said."""
    folder = tmp_path_factory.mktemp("cubins")

    def one(case: tuple[Path, int]) -> tuple[Path, str]:
        source, architecture = case
        target = folder / f"{source.stem}.{architecture}.cubin"
        command = [NVCC, *FLAGS, f"-arch=sm_{architecture}", "-cubin", source, "-o", target]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return target, ran.stderr

    cases = [(source, architecture) for source in sorted(KERNELS.glob("*.cu")) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(one, cases))
    return {(source.stem, architecture): result for (source, architecture), result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(compiled: dict[tuple[str, int], tuple[Path, str]], architecture: int) -> None:
    said = "".join(text for (_, number), (_, text) in compiled.items() if number == architecture)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= 25
    assert set(spills) == {("0", "0", "0")}
    assert "warning" not in said


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_move_in_vectors_of_16_bytes(compiled: dict[tuple[str, int], tuple[Path, str]], architecture: int) -> None:
    """All of global memory in the kernels for one power of two; every store where the scales may be read one by one."""
    if (tool := disassembler()) is None:
        pytest.skip("no nvdisasm: it comes with CUDA and with triton")
    for source, kinds in (("cuda_fixed", r"LDG|STG"), ("cuda_staged", r"STG")):
        cubin, _ = compiled[source, architecture]
        text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
        accesses = re.findall(rf"\b((?:{kinds})\.[\w.]+)", text)
        assert len(accesses) > 100
        assert all(".128" in access for access in accesses), set(accesses)
