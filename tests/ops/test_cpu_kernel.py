"""The compiled CPU kernels: every instruction set against float64, the same bits on any threads, NaNs, sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.hadamard import paley_factor
from linearpatch_kernels.ops.backends import backends
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
from tests.support.cpu_cases import DTYPES, LISTED, SMALL, WIDE

OPS = torch.ops.linearpatch
ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KERNELS = CSRC / "hadamard_patch"
UNITS = ("avx2", "avx512", "scalar", "units")
NATIVE = Path(__file__).parent / "native"

built = pytest.mark.skipif(backends()["cpu"] is not True, reason=f"no compiled kernels: {backends()['cpu']}")
compiler = shutil.which(os.environ.get("CXX", "g++"))
compiles = pytest.mark.skipif(compiler is None, reason="no C++ compiler")


@cache
def instruction_sets() -> list[str]:
    """What this machine has, by asking the kernels for one that no machine has."""
    refusal = run_cases("none", 1).stderr
    return re.findall(r"\w+", refusal.rpartition("what this machine has: ")[2].splitlines()[0])


def run_cases(isa: str, count: int, seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.cpu_cases", str(seed), str(count)],
        cwd=ROOT,
        env={**os.environ, "LINEARPATCH_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@built
def test_an_instruction_set_that_is_not_there_is_refused_in_one_line() -> None:
    refused = run_cases("avx9", 1)
    assert refused.returncode == 1
    assert "LINEARPATCH_CPU_ISA=avx9 is none of what this machine has:" in refused.stderr
    assert "scalar" in instruction_sets()


@built
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize(
    "count", [150, pytest.param(3400, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["few", "many"]
)
def test_random_calls_against_float64(isa: str, count: int) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this machine has no {isa}")
    checked = run_cases(isa, count, seed=count)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.startswith(f"{count} cases")


@pytest.mark.parametrize("m", [12, 20, 28, 36])
@pytest.mark.parametrize("transposed", [False, True])
def test_programs_multiply_by_the_matrix(m: int, transposed: bool) -> None:
    """orders.h against `hadamard.py`: the C++ compares them too, and would quietly take the slower way."""
    text = (KERNELS / "orders.h").read_text()
    bodies = {
        (int(order), which == "true"): (base, body)
        for order, which, base, body in re.findall(
            r"struct Order<(\d+), (true|false)>(?: : Order<\1, (true|false)>)? \{(.*?)\};\n\n?(?=template|\Z)",
            text,
            re.S,
        )
    }
    base, body = bodies[m, transposed]
    if base:
        _, body = bodies[m, base == "true"]
    values = list(torch.eye(m, dtype=torch.float64))
    for a, b, kind in re.findall(r"\{(\d+), (\d+), (\w+)\}", body):
        left, right = values[int(a)], values[int(b)]
        values.append(
            {
                "sum": left + right,
                "difference": left - right,
                "negated_sum": -left - right,
                "plus_half": left + right / 2,
                "minus_half": left - right / 2,
            }[kind]
        )
    outputs = re.findall(r"\d+", body.partition("outputs[] = ")[2])
    h = paley_factor(m)[0].double()
    assert torch.stack([values[int(number)] for number in outputs]).equal(h.T if transposed else h)


@pytest.mark.slow
def test_programs_are_what_their_generator_writes() -> None:
    written = subprocess.run([sys.executable, KERNELS / "factor_orders.py"], capture_output=True, text=True, check=True)
    assert written.stdout == (KERNELS / "orders.h").read_text()


@built
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 300, 768).to(dtype)
    scale, pre, post, weight = torch.randn(4, 768)
    down, up = torch.randn(768, 8), torch.randn(8, 768)

    def everything() -> list[Tensor]:
        return [
            OPS.hadamard_patch(x, scale, pre, None, None, None),
            OPS.hadamard_patch(x, scale, None, post, down, up),
            *OPS.hadamard_patch_backward(grad, x, scale, pre, post, None, None, 0b1111),
            *OPS.hadamard_patch_backward(grad, x, scale, None, None, down, up, 0b11),
            *OPS.add_patch_rms_norm(x, grad, scale, weight, 1e-6, None, None, None, None),
        ]

    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything())
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(one.equal(two) for one, two in zip(results[0], other, strict=True))


@built
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["x", "scale", "pre_scale", "post_scale", "down", "up"])
def test_a_nan_of_any_payload_stays_one(dtype: torch.dtype, where: str) -> None:
    """All bits set: what rounds such a NaN to 16 bits by an addition makes a zero of it."""
    every = {name: torch.randn(64) for name in ("scale", "pre_scale", "post_scale")}
    every |= {"down": torch.randn(64, 2), "up": torch.randn(2, 64)}
    x = torch.randn(3, 64).to(dtype)
    tensor = x if where == "x" else every[where]
    bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    bits.view(-1)[tensor.shape[-1] + 1 if where == "x" else 5] = -1
    y = hadamard_patch(x, **every)
    reference = OPS.hadamard_patch_reference(x, *every.values())
    assert y.isnan().equal(reference.isnan())
    assert y.isnan().any()


@built
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("d", [4, 48, 64, 576, 960, 4096])
def test_what_is_not_finite_spoils_its_row_and_no_other(d: int, value: float) -> None:
    x, scale = torch.randn(5, d), torch.rand(d) + 0.5
    clean = hadamard_patch(x, scale)
    x[2, d // 3] = value
    y = hadamard_patch(x, scale)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].equal(clean[[0, 1, 3, 4]])


@built
def test_large_and_small_numbers_do_not_overflow_on_the_way() -> None:
    for magnitude in (1e-30, 1e30):
        x, scale = torch.randn(4, 4096) * magnitude, torch.rand(4096) + 0.5
        exact = OPS.hadamard_patch_reference(x.double(), scale.double(), *[None] * 4)
        assert (hadamard_patch(x, scale) - exact).abs().max() <= 1e-6 * exact.abs().max()


@built
@pytest.mark.parametrize("shift", [0, 1, 7, 64])
def test_out_may_overlap_x(shift: int) -> None:
    memory = torch.randn(8 * 64 + 64)
    x, out = memory[: 8 * 64].view(8, 64), memory[shift : shift + 8 * 64].view(8, 64)
    expected = hadamard_patch(x.clone(), torch.arange(64.0))
    assert hadamard_patch(x, torch.arange(64.0), out=out).equal(expected)


@built
def test_out_must_have_a_place_for_every_element() -> None:
    with pytest.raises(InputError, match="a place of its own"):
        hadamard_patch(torch.randn(3, 64), torch.randn(64), out=torch.empty(64).expand(3, 64))


@built
def test_a_width_is_asked_for_once() -> None:
    d = 47 * 16  # no other test's
    asked = []
    with torch.library._scoped_library("linearpatch", "IMPL") as library:

        def paley_matrix(width: int) -> Tensor:
            asked.append(width)
            return paley_factor(width)[0]

        library.impl("paley_matrix", paley_matrix, "CompositeExplicitAutograd", allow_override=True)
        for _ in range(3):
            hadamard_patch(torch.randn(2, d), torch.randn(d))
    assert asked in ([d], [])


@built
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_aot_inductor_package_of_a_patched_block_loads_and_runs(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(192, 192)
            self.scale = torch.nn.Parameter(torch.randn(192))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.silu(self.linear(hadamard_patch(x, self.scale)))

    block, x = Block().eval(), torch.randn(4, 192)
    with torch.no_grad():
        exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for rows in (2, 9):
            x = torch.randn(rows, 192)
            torch.testing.assert_close(loaded(x), block(x))


@compiles
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_units_under_sanitizers(tmp_path: Path) -> None:
    """tests/ops/native/patch_grid.cpp, which knows nothing of torch, over every width, for every instruction set."""
    sources = [
        *(KERNELS / "cpu" / f"{unit}.cpp" for unit in UNITS),
        KERNELS / "width.cpp",
        CSRC / "common" / "cpu" / "isa.cpp",
        NATIVE / "patch_grid.cpp",
    ]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    building = [
        subprocess.Popen([compiler, "-std=c++20", "-O1", *sanitize, "-c", source, "-o", tmp_path / f"{source.stem}.o"])
        for source in sources
    ]
    assert [process.wait() for process in building] == [0] * len(sources)
    grid = tmp_path / "grid"
    subprocess.run([compiler, *sanitize, *tmp_path.glob("*.o"), "-o", grid], check=True)
    widths = [str(d) for d in [*SMALL, *LISTED, *WIDE]]
    orders = subprocess.run(
        [sys.executable, NATIVE / "write_orders.py", *widths],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    ).stdout
    for isa in instruction_sets() if backends()["cpu"] is True else ["scalar"]:
        ran = subprocess.run([grid], input=orders, env={**os.environ, "LINEARPATCH_CPU_ISA": isa}, capture_output=True)
        assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()
        assert ran.stdout.decode() == f"{len(widths)} widths, 0 failures\n"
