"""The losses' Triton kernels: run by the interpreter, compiled ahead of time for every architecture."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from linearpatch_kernels import backend
from linearpatch_kernels.ops.topk_kl import cuda, gpu, reference
from linearpatch_kernels.ops.topk_kl import triton as kernels
from tests.ops.test_hadamard_patch_triton import INTERPRETED, ROOT, interpreted
from tools.gpu_model.build import disassemble
from tools.gpu_model.model import ARCHITECTURES, losses_row
from tools.gpu_model.triton_launches import LOSSES, driver_of, loss_launch


def cases(seed: int, count: int) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-m", "tests.support.topk_kl_triton_cases", str(seed), str(count)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **INTERPRETED},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{count} cases" in result.stdout


@interpreted
def test_interpreted_against_float64() -> None:
    cases(0, 5)


@interpreted
@pytest.mark.slow
def test_interpreted_against_float64_in_many_cases() -> None:
    cases(1, 20)


@pytest.mark.parametrize("width", [1, 16, 33, 100, 576, 896, 1000, 3072, 4096, 5120, 7168, 16384])
@pytest.mark.parametrize("lanes", [32, 64])
def test_a_row_is_held_whole_by_few_enough_numbers_a_thread(width: int, lanes: int) -> None:
    layout = kernels.layout_of(width, 100, lanes)
    assert layout is not None
    assert layout.chunk * (layout.chunks - 1) < width <= layout.chunk * layout.chunks
    assert layout.chunk * layout.chunks <= max(2 * width, 16)
    assert layout.warps * lanes <= 1024
    assert layout.slots * layout.chunk * layout.chunks / (layout.warps * lanes) <= 64


def test_wider_rows_are_left_to_the_reference() -> None:
    assert kernels.layout_of(16385, 100) is None


def test_ids_on_a_gpu_are_looked_at_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")  # whose numbers cannot be had
    reference.check_ids(ids, 10)
    monkeypatch.setattr(reference, "CHECKED_EVERYWHERE", True)
    with pytest.raises(RuntimeError, match="meta"):
        reference.check_ids(ids, 10)


def compiles(kernel: str, arch: str, dtype: str, d: int, slots: int) -> None:
    with driver_of(arch):
        compiled = loss_launch(kernel, d, dtype, slots).compiled()
    assert compiled.asm["hsaco" if arch.startswith("gfx") else "cubin"][:4] == b"\x7fELF"
    assert compiled.metadata.shared <= 65536
    if arch.startswith("gfx"):
        return
    functions, resources = disassemble(compiled.asm["cubin"])
    (name,) = functions
    opcodes = {instruction.opcode.split(".")[0] for instruction in functions[name].instructions}
    assert not opcodes & {"ATOM", "ATOMG", "RED", "REDG"}
    assert resources[name]["LOCAL"] == resources[name]["STACK"] == 0, (kernel, d, dtype)


@pytest.mark.parametrize("kernel", ["linear_topk_kl_forward_backward", "topk_kl_combine_rows"])
def test_compiles_ahead_of_time_without_atomics_or_spills(kernel: str) -> None:
    compiles(kernel, "sm_90", "bfloat16", 576, 100)


def test_the_static_model_has_the_slots_bound_by_memory() -> None:
    """Modelled; rows are read in vectors of 16 bytes, and nothing else takes longer than reading them."""
    row = losses_row("linear_topk_kl_forward_backward", "sm_90", "bfloat16", 4096)
    assert row.ldg128 * 8 * 32 * row.warps >= row.rows * 4096
    assert row.spills == 0
    assert row.dram_fraction is not None
    assert row.dram_fraction >= 1.0


def test_who_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's kernels before Triton's, and neither on the CPU unless it is asked for."""
    monkeypatch.setattr(backend, "FORCED", None)
    hidden = torch.randn(2, 16)
    assert gpu.kernels_for(hidden) is None
    monkeypatch.setattr(gpu, "triton_serves", lambda device: device == "cpu")
    assert gpu.kernels_for(hidden) is kernels
    monkeypatch.setattr(gpu, "compiled_for_gpus", lambda device, operator: operator == "topk_kl_slots")
    assert gpu.kernels_for(hidden) is cuda.COMPILED
    assert gpu.kernels_for(torch.randn(2, 12)) is kernels
    assert gpu.kernels_for(torch.randn(2, 16384)) is kernels
    assert gpu.kernels_for(torch.randn(2, 16392)) is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch: str) -> None:
    for kernel in LOSSES:
        compiles(kernel, arch, "bfloat16", 576, 100)
    for d, dtype, slots in ((4096, "float16", 50), (3072, "float32", 512)):
        compiles("linear_topk_kl_forward_backward", arch, dtype, d, slots)
