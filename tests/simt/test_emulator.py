"""The emulator itself: every fault that is put in must be seen, and nothing else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simt.emulator import COMPILER, HERE, HOST, SCHEDULES, Emulator, build, compiled, mutated_sources

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# In the order of faults.cpp, with what is said of each.
FAULTS = {
    "none": None,
    "missing_barrier": "race: shared word",
    "divergent_barrier": "others of the block wait at another one",
    "ended_at_barrier": "other threads of the block have ended",
    "out_of_bounds_read": "global memory: out of bounds",
    "out_of_bounds_write": "global memory: out of bounds",
    "out_of_bounds_shared": "out of bounds",
    "unwritten_output": "1 words of out never written",
    "unwritten_shared": "shared memory: word 3 read before it was written",
    "wrong_mask": "threads of its mask never come",
    "mask_without_itself": "a mask without the thread itself",
    "mask_never_comes": "threads of its mask never come",
    "written_twice": "race: out at byte",
    "written_by_two_blocks": "race: out at byte",
    "misaligned": "in not aligned to 16 bytes",
    "written_input": "in is only to be read",
    "read_before_written": "read before it was written",
    "missing_named": "race: shared word",
    "named_never_comes": "some of its threads never come",
    "named_by_others": "a thread that has met others before",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", HERE / "faults.cpp", "-o", target]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.run.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_in_every_schedule(faults: ctypes.CDLL, fault: str, schedule: str) -> None:
    report = faults.run(list(FAULTS).index(fault), SCHEDULES[schedule], 11).decode()
    said = FAULTS[fault]
    if said is None:
        assert report == ""
    else:
        assert said in report


# What is changed in the kernels, and what is said of it. Each is a slip that somebody could make.
MUTATIONS = {
    "no barrier before the middle stage": (
        "patch.cuh",
        "    });\n    row_meets(shape);\n    inner(shape, row, thread);",
        "    });\n    inner(shape, row, thread);",
        "race: shared word",
    ),
    "a barrier only for threads with a row": (
        "patch.cuh",
        "    row_meets(shape);\n    inner(shape, row, thread);\n    if (shape.b) row_meets(shape);\n\n",
        "    if (there) row_meets(shape);\n    inner(shape, row, thread);\n    if (shape.b) row_meets(shape);\n\n",
        "never come",
    ),
    "a vector too far": (
        "patch.cuh",
        "fetch_tile(type, x, tile, element)",
        "fetch_tile(type, x, tile, element + 8)",
        "out of bounds",
    ),
    "rows without a check": (
        "patch.cuh",
        "if (there) store_tile(out, y,",
        "store_tile(out, y,",
        "out of bounds",
    ),
    "an output left out": (
        "patch.cuh",
        "if (there) store_tile(out, y,",
        "if (there && tile.start) store_tile(out, y,",
        "of y never written",
    ),
    "a mask of half a warp": ("patch.cuh", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu", "shuffle"),
    "a row before it has come": (
        "warp_rows.cuh",
        "    wait_for_copies<ahead - 1>();\n",
        "",
        "read before it was written",
    ),
    "a row too early": ("warp_rows.cuh", "<ahead - 1>", "<ahead>", "read before it was written"),
    "two warps that do not wait": (
        "warp_rows.cuh",
        "    some_meet(1 + pair, 64);\n#pragma",
        "#pragma",
        "race: shared word",
    ),
    "a place that is filled too early": (
        "warp_rows.cuh",
        "  some_meet(1 + pair, 64);\n}",
        "}",
        "race: shared word",
    ),
    "one place for two rows": (
        "warp_rows.cuh",
        "places + warp_bytes * warp + 16 * lane;",
        "places + 16 * lane;",
        "race: shared word",
    ),
    "a swizzle that is not one to one": ("stages.cuh", "(i >> above & 3)", "(i >> 3 & 3)", "race: shared word"),
}


def applied(mutation: str, folder: Path) -> Path:
    """A copy of the sources with one mutation, whose emulator is to be built."""
    name, before, after, _ = MUTATIONS[mutation]
    return mutated_sources(folder, "hadamard_patch", name, before, after)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_apply(mutation: str, tmp_path: Path) -> None:
    applied(mutation, tmp_path)


RUN = """
import sys
from pathlib import Path
import torch
import linearpatch_kernels.ops.hadamard_patch
from tests.simt.emulator import Emulator
emulator = Emulator(Path(sys.argv[1]))
operators = torch.ops.linearpatch_simt
said = []
for d in (2048, 576):
    x, v = torch.randn(5, d), torch.randn(d)
    emulator.configure("random", seed=d)
    operators.hadamard_patch(x, v, None, None, None, None)
    operators.add_patch_rms_norm(x, x, v, v, 1e-3, None, None, None, None)
    operators.hadamard_patch(x.bfloat16(), v, None, None, None, None)
    said += emulator.faults()
emulator.configure("random", gpu=(1, 12 * 2048, 0))  # two warps, which have a row each
operators.hadamard_patch(torch.randn(5, 2048).bfloat16(), torch.randn(2048), None, None, None, None)
said += emulator.faults()
emulator.configure("random", gpu=(1, 12 * 8192, 0))  # two rows, which have two warps each
operators.hadamard_patch(torch.randn(5, 8192).bfloat16(), torch.randn(8192), None, None, None, None)
said += emulator.faults()
print(*said, sep="\\n")
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compiled(tmp_path_factory.mktemp("host"), HOST, "-O0")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_the_kernels_is_seen(mutation: str, tmp_path: Path, host: list[Path]) -> None:
    here = applied(mutation, tmp_path)
    library = build(tmp_path, here=here, host=host, optimize="-O0")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, library],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert MUTATIONS[mutation][3] in ran.stdout


def test_wavefronts_are_counted_from_addresses(emulator: Emulator) -> None:
    """A row of 4096 in the kernel of two exchanges: 4 passes of 128 wavefronts, and 128 for the scales."""
    counts = []
    for rows in (2, 4):
        emulator.configure(count_wavefronts=True)
        operands = torch.randn(rows, 4096), torch.randn(4096)
        torch.ops.linearpatch_simt.hadamard_patch(*operands, None, None, None, None)
        counts.append(emulator.seen().wavefronts)
    assert counts[1] - counts[0] == 2 * 640
