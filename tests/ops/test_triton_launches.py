"""Triton's kernels as the host code launches them: how often they are compiled, and to what, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
import torch

from linearpatch_kernels.ops.topk_kl import triton as kernels
from tests.ops.test_hadamard_patch_triton import ROOT
from tools.gpu_model.triton_launches import (
    DTYPES,
    NORMALIZATIONS,
    WIDTHS,
    Launch,
    Loss,
    compile_all,
    driver_of,
    patch_launches,
    vocabulary_launches,
)


def keys(made: Iterable[Launch]) -> list[str]:
    with driver_of("sm_90"):
        return [launch.key() for launch in made]


@pytest.mark.parametrize("d", [64, 300])
def test_the_number_of_rows_compiles_no_patch_anew(d: int) -> None:
    first = keys(patch_launches(d, torch.bfloat16, rows=2))
    assert len(first) >= 6
    for rows in (1, 3, 16, 17, 32):
        assert keys(patch_launches(d, torch.bfloat16, rows=rows)) == first, rows


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_number_of_rows_compiles_no_loss_anew(normalization: str) -> None:
    first = keys(Loss(64, torch.bfloat16, normalization).all_launches())
    assert len(first) >= 8
    for rows in (1, 3, 16, 17, 32):
        assert keys(Loss(64, torch.bfloat16, normalization, rows=rows).all_launches()) == first, rows


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_number_of_slots_compiles_no_loss_anew(normalization: str) -> None:
    """Of those for which a program looks at the same number of slots at a time."""
    first = keys(Loss(64, torch.bfloat16, normalization, slots=9).all_launches())
    for slots in (15, 16):
        assert keys(Loss(64, torch.bfloat16, normalization, slots=slots).all_launches()) == first, slots


def test_the_vocabulary_compiles_no_linear_loss_over_slots_anew() -> None:
    def made(vocabulary: int) -> list[str]:
        every = Loss(64, torch.bfloat16, vocabulary=vocabulary).all_launches()
        return keys(launch for launch in every if launch.kernel is not kernels.vocabulary_gradient_kernel)

    assert made(200) == made(201) == made(208)


def assert_no_spills(arch: str, made: Iterable[Launch]) -> None:
    kernels = list(compile_all(arch, made))
    assert kernels
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_kernels_compile_ahead_of_time_without_spills() -> None:
    """Where most models are; the other widths, dtypes and architectures are slow."""
    made = chain(
        patch_launches(4096, torch.bfloat16),
        Loss(576, torch.bfloat16).all_launches(),
        vocabulary_launches(torch.float32),
    )
    assert_no_spills("sm_90", made)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("d", WIDTHS)
def test_kernels_of_a_width_compile_ahead_of_time_without_spills(d: int, arch: str) -> None:
    assert_no_spills(
        arch, (launch for dtype in DTYPES for launch in (*patch_launches(d, dtype), *Loss(d, dtype).all_launches()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_over_a_vocabulary_compile_ahead_of_time_without_spills(arch: str) -> None:
    assert_no_spills(arch, (launch for dtype in DTYPES for launch in vocabulary_launches(dtype)))


OTHER_TRITONS = [Path(place) for place in os.environ.get("TRITON_VENVS", "").split()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not OTHER_TRITONS, reason="TRITON_VENVS names no directories with other versions of Triton in them")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("place", OTHER_TRITONS, ids=lambda place: place.name)
def test_another_triton_compiles_every_kernel_without_spills(place: Path, arch: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "tools.gpu_model.triton_launches",
            "--arch",
            arch,
            "--dtype",
            "bfloat16",
            "float32",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(place)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr + "".join(
        line for line in result.stdout.splitlines(keepends=True) if '"stack": 0' not in line
    )
    (version,) = (found.name.split("-")[1].removesuffix(".dist") for found in place.glob("triton-*.dist-info"))
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["triton"] == version
    assert said["kernels"] > 100
