"""The CUDA kernels compiled where there is no GPU: machine code by architecture, and how the host would launch them.

What is compiled is kept in the system's folder for temporary files, by the sources' contents; several processes may ask
for the same at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.gpu_model.sass import Program, sass_programs

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = CSRC / "hadamard_patch"
SOURCES = tuple(sorted(path.stem for path in KERNELS.glob("cuda/*.cu")))
PLAN = Path(__file__).with_name("plan.cpp")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v")
TENSORS = ("x", "residual", "y", "normed", "scale", "weight", "grad", "dx", "scale_sums", "signs")


def nvcc() -> str | None:
    """CUDA's compiler, if there is one, and a compiler for the host's part."""
    places = [shutil.which("nvcc"), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"]
    found = next((place for place in places if place and Path(place).exists()), None)
    return found if shutil.which(os.environ.get("CXX", "g++")) else None


@cache
def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump: the toolkit's, or the one that triton brings."""
    if found := shutil.which(name):
        return found
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        place = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        return str(place) if place.exists() else None
    return None


@cache
def orders_with_programs() -> frozenset[int]:
    """The m for which orders.h has a program that multiplies by H_m."""
    return frozenset(map(int, re.findall(r"struct Order<(\d+), false>", (KERNELS / "orders.h").read_text())))


@dataclass(frozen=True)
class Cubin:
    """One source for one architecture, and what ptxas said of it."""

    path: Path
    said: str

    @property
    def registers(self) -> dict[str, int]:
        """A thread's, by kernel."""
        found = re.findall(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", self.said, re.S)
        return {name: int(number) for name, number in found}

    @property
    def spills(self) -> dict[str, int]:
        """Bytes of stack, and of what is stored and loaded there, by kernel."""
        sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        pattern = r"Function properties for (\S+)\s+" + sizes
        return {name: sum(map(int, numbers)) for name, *numbers in re.findall(pattern, self.said)}

    def code(self) -> str:
        return _said_by("nvdisasm", str(self.path))


@cache
def _folder() -> Path:
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc and C++ compiler")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    known = hashlib.sha256(" ".join([said, *FLAGS]).encode())
    paths = [path for folder in (CSRC / "common", KERNELS) for path in folder.rglob("*")]
    for path in sorted(path for path in paths if path.suffix in (".cu", ".cuh", ".h")):
        known.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"linearpatch-cubins-{os.getuid()}" / known.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    with target.with_suffix(target.suffix + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled(source: str, arch: int) -> Cubin:
    """`source` (the stem of a .cu file) for ``sm_<arch>``.

    Raises:
        FileNotFoundError: there is no nvcc.
        RuntimeError: it does not compile; what was said.
    """
    target = _folder() / f"{source}.{arch}.cubin"
    with _alone(target):
        said = target.with_suffix(".txt")
        if not said.exists():
            command = [nvcc(), *FLAGS, f"-arch=sm_{arch}", "-cubin", KERNELS / "cuda" / f"{source}.cu", "-o", target]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                raise RuntimeError(ran.stderr)
            said.write_text(ran.stderr)
        return Cubin(target, said.read_text())


def compile_all(archs: Sequence[int], sources: Sequence[str] = SOURCES) -> dict[tuple[str, int], Cubin]:
    cases = [(source, arch) for arch in archs for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(lambda case: compiled(*case), cases), strict=True))


@cache
def programs(source: str, arch: int) -> dict[str, Program]:
    """Every kernel of a source, by its mangled name."""
    return sass_programs(compiled(source, arch).code())


def _said_by(name: str, *arguments: str) -> str:
    program = tool(name)
    if program is None:
        raise FileNotFoundError(f"no {name}: it comes with CUDA and with triton")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: Path) -> dict[str, dict[str, int]]:
    """What ``cuobjdump -res-usage`` says of each function: REG, STACK, SHARED, LOCAL."""
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in re.findall(r"Function (\S+?):\s*\n\s*(.*)", _said_by("cuobjdump", "-res-usage", str(cubin)))
    }


def disassemble(cubin: bytes) -> tuple[dict[str, Program], dict[str, dict[str, int]]]:
    """The functions of a cubin, and their `resource_usage`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return sass_programs(_said_by("nvdisasm", file.name)), resource_usage(Path(file.name))


# --- how the host would launch a kernel ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """``parameter`` is the kernel's only one; ``rows`` are those that it speaks of."""

    fixed: bool
    warp_rows: bool
    order: int
    log2_inner: int
    blocks: int
    diagonal_blocks: int
    threads: int
    shared_bytes: int
    rows_together: int
    rows: int
    parameter: bytes

    @property
    def source(self) -> str:
        if self.warp_rows:
            return "warp_rows"
        return "staged" if not self.fixed else "powers" if self.order == 1 else "factors"


def launch_plan(
    kernel: str, *, order: int, inner: int, blocks: int, has_program: bool, dtype: int, rows: int,
    turns: int, device: tuple[int, int, int],
) -> Plan:  # fmt: skip
    """By calls.h, for a call of ``rows`` rows; its parameter has every block take ``turns`` turns of its loop.

    Args:
        dtype: 0 float32, 1 float16, 2 bfloat16.
        turns: whatever ``rows`` would give.
        device: multiprocessors, and bytes of shared memory that a block and that a multiprocessor may have.

    Raises:
        ValueError: there is no kernel for this.
    """
    program = _folder() / f"plan-{hashlib.sha256(PLAN.read_bytes()).hexdigest()[:16]}"
    with _alone(program):
        if not program.exists():
            made = program.with_suffix(".new")
            command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-w", PLAN, "-I", PLAN.parents[1], "-o", made]
            subprocess.run(command, check=True)
            made.rename(program)
    arguments = [kernel, order, inner, blocks, int(has_program), dtype, rows, turns, *device]
    ran = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ValueError(f"{kernel}: no CUDA kernel for a row of {order} x {inner}")
    first, parameter = ran.stdout.split("\n")[:2]
    fixed, warp_rows, *numbers = (int(number) for number in first.split())
    return Plan(bool(fixed), bool(warp_rows), *numbers, parameter=bytes.fromhex(parameter))
