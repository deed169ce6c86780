"""The Triton kernels: run by the interpreter, compiled ahead of time for every architecture, chosen by device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton
from packaging.version import Version

from linearpatch_kernels import backend
from linearpatch_kernels.ops.hadamard_patch import triton as kernels
from tests.support.cpu_cases import LISTED
from tools.gpu_model.model import ARCHITECTURES, KERNELS, compile_triton

ROOT = Path(backend.__file__).parent.parent
INTERPRETED = {"TRITON_INTERPRET": "1", "LINEARPATCH_BACKEND": "triton"}
interpreted = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="Triton 3.6's interpreter takes the int of an array of one number, which numpy refuses from 2.4 on",
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in INTERPRETED} | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-P", *command], env=variables, cwd=ROOT, capture_output=True, text=True, check=False
    )


def cases(seed: int, count: int) -> None:
    result = run("-m", "tests.support.triton_cases", str(seed), str(count), **INTERPRETED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} cases" in result.stdout


@interpreted
def test_interpreted_against_float64() -> None:
    cases(0, 3)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_interpreted_against_float64_at_every_listed_width(seed: int) -> None:
    """The three seeds give every width every dtype."""
    cases(seed, len(LISTED) + 20)


ALIASES = """
import json, torch
from linearpatch_kernels.hadamard import hadamard_matrix
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from linearpatch_kernels.ops.hadamard_patch import triton as kernels
launches, launch = [], kernels._launch
kernels._launch = lambda *arguments, **options: (launches.append(1), launch(*arguments, **options))
h = hadamard_matrix(64, dtype=torch.float32)
said = []
out = torch.randn(5, 64)
for aliased in (out[2], out.view(torch.float16)[1, 64:], out[2, 3:4].expand(64)):
    for name in ("scale", "pre_scale"):
        others = {"scale": torch.randn(64), name: aliased}
        try:
            hadamard_patch(torch.randn(5, 64), out=out, **others)
        except ValueError as error:
            said.append(str(error) == f"out must share no memory with {name}: give a tensor of its own, or x")
try:
    hadamard_patch(torch.randn(5, 64), torch.randn(64), out=out[:1].expand(5, 64))
except ValueError as error:
    said.append(str(error) == "out must have a place of its own for every element")
said.append(not launches)
for shift in (0, 3, 64):
    memory, scale = torch.randn(5 * 64 + shift), torch.randn(64)
    x, out = memory[: 5 * 64].view(5, 64), memory[shift:].view(5, 64)
    true = ((x @ h) * scale) @ h.T
    hadamard_patch(x, scale, out=out)
    said.append((out - true).abs().max().item() < 1e-4)
said.append(len(launches) == 3)
print(json.dumps(said))
"""


@interpreted
def test_out_shares_memory_with_x_alone() -> None:
    result = run("-c", ALIASES, **INTERPRETED)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True] * 12


NON_FINITE = """
import json, torch
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
said = []
for d in (64, 96, 300):
    for bad in (float("nan"), float("inf")):
        x = torch.randn(5, d)
        x[1, 5] = bad
        y = hadamard_patch(x, torch.randn(d))
        said.append(not y[1, :20].isfinite().any().item() and y[[0, 2, 3, 4]].isfinite().all().item())
print(json.dumps(said))
"""


@interpreted
def test_non_finite_stays_in_its_row() -> None:
    result = run("-c", NON_FINITE, **INTERPRETED)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True] * 6


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_index_bit_is_in_one_group_there_and_in_one_back(itemsize: int, lanes: int) -> None:
    for d in [*LISTED, 64, 128, 256, 300]:
        layout = kernels.layout_of(d, lanes)
        assert layout is not None, d
        assert layout.blocks * layout.m << layout.k == d
        assert layout.m <= layout.tile * layout.tiles < layout.m + layout.tile
        for groups in layout.groups(itemsize):
            bits = [low + i for low, count in zip(groups[::2], groups[1::2], strict=True) for i in range(count)]
            assert sorted(bits) == list(range(layout.k)), (d, groups)


@pytest.mark.parametrize("d", [0, 1, 7, 12, 32, 65536, 4 * 331])
def test_other_widths_are_left_to_the_reference(d: int) -> None:
    assert kernels.layout_of(d) is None


def test_who_triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FORCED", None)
    assert not backend.triton_serves("cuda")  # an installed Triton is not enough: there is no driver here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backend.triton_serves("cuda")
    assert not backend.triton_serves("cpu")
    assert not backend.triton_serves("meta")
    monkeypatch.setattr(backend, "FORCED", "reference")
    assert not backend.triton_serves("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_forcing_triton_without_a_driver_says_why_not() -> None:
    result = run("-c", "import linearpatch_kernels.backend", LINEARPATCH_BACKEND="triton")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError: LINEARPATCH_BACKEND=triton is not available: torch finds no GPU driver" in last


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_75", "sm_86", "sm_89"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_every_architecture(kernel: str, arch: str) -> None:
    for d, dtype in ((512, "float32"), (576, "bfloat16"), (2048, "float16"), (3072, "float32")):
        compiled, layout = compile_triton(kernel, arch, dtype, d)
        assert compiled.asm["hsaco" if arch.startswith("gfx") else "cubin"][:4] == b"\x7fELF"
        # What the smallest of them gives a block: 64 KB on gfx942 and sm_75.
        assert compiled.metadata.shared <= 65536, (d, layout)
