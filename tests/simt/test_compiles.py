"""The CUDA kernels compiled for several generations of GPUs: what nvcc and ptxas see and the emulator cannot."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import linearpatch_kernels
from linearpatch_kernels.backend import compiled_for_gpus
from tools.gpu_model.build import Cubin, compile_all, nvcc, tool

ARCHITECTURES = (75, 80, 90, 100, 120)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(nvcc() is None, reason="no nvcc"),
]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Cubin]:
    return compile_all(ARCHITECTURES)


# Bytes that a thread of a kernel stores and loads for want of registers, at most. Gradients on sm_75: none of the
# default ones. A warp's rows of 5120, of which a thread has 160 values: six or seven words go to local memory and back,
# and on an H100 it is 1.5 times as fast as the kernel without (docs/results/gpu.md). The norm at 8192 on sm_100
# lacks a few registers.
SPILLS = {
    r"patch_gradientsINS0_6StagedILi36E": {75: 40},
    r"patch_warp_rows.*Li20ELi1E": {80: 60, 90: 76, 100: 80, 120: 64},
    r"patch_warp_rows.*BFloat16ELi16ELi2ELb1E": {100: 28},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(compiled: dict[tuple[str, int], Cubin], architecture: int) -> None:
    cubins = [cubin for (_, number), cubin in compiled.items() if number == architecture]
    spills = {name: size for cubin in cubins for name, size in cubin.spills.items()}
    assert len(spills) == 88
    allowed = {pattern: sizes[architecture] for pattern, sizes in SPILLS.items() if architecture in sizes}
    for name, size in spills.items():
        assert size <= max((most for pattern, most in allowed.items() if re.search(pattern, name)), default=0), name
    assert not any("warning" in cubin.said for cubin in cubins)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_move_in_vectors_of_16_bytes(compiled: dict[tuple[str, int], Cubin], architecture: int) -> None:
    """All of global memory in the kernels for one width; every store where the scales may be read one by one."""
    if tool("nvdisasm") is None:
        pytest.skip("no nvdisasm: it comes with CUDA and with triton")
    everywhere = r"LDG|LDGSTS|STG"
    for source, kinds in (
        ("powers", everywhere),
        ("factors", everywhere),
        ("warp_rows", everywhere),
        ("staged", "STG"),
    ):
        if source == "warp_rows" and architecture < 80:
            continue  # has no products, so the kernels end before they do anything
        accesses = re.findall(rf"\b((?:{kinds})\.[\w.]+)", compiled[source, architecture].code())
        assert len(accesses) > 100
        assert all(".128" in access for access in accesses), {*accesses}


def test_the_extension_holds_every_kernel_for_each_architecture() -> None:
    """Whatever it was built for; ``TORCH_CUDA_ARCH_LIST`` says."""
    if not compiled_for_gpus("cuda", "hadamard_patch"):
        pytest.skip("the extension was built without nvcc")
    if (lister := tool("cuobjdump")) is None:
        pytest.skip("no cuobjdump: it comes with CUDA and with triton")
    extension = Path(linearpatch_kernels.__file__).with_name("_C.abi3.so")
    listed = subprocess.run([lister, "--list-elf", extension], capture_output=True, text=True, check=True).stdout
    cubins = Counter(re.findall(r"(sm_\w+)\.cubin", listed))
    sources = [*Path(__file__).parents[2].glob("csrc/*/cuda/*.cu")]
    assert cubins
    assert set(cubins.values()) == {len(sources)}
