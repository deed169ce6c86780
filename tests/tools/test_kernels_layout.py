"""tools/kernels_layout.py: the package ``kernels`` of Hugging Face loads the operators from a directory."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import ROOT, block_of
from tools.kernels_layout import VARIANT, operators_modules, write_modules

# Where the package kernels is: not in the environment, because Transformers uses it wherever it is.
KERNELS = os.environ.get("HF_KERNELS")
compiler = shutil.which(os.environ.get("CXX", "g++"))

PROGRAM = """
import json, sys
from pathlib import Path

import torch
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm

torch.manual_seed(0)
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
told = {"alone": not any(name.partition(".")[0] == "linearpatch_kernels" for name in sys.modules)}

import linearpatch_kernels as lp

(loaded,) = get_loaded_kernels()
metadata = loaded.metadata
told["id"], told["module"] = metadata.id, kernel.__name__
told["cpu"] = kernel.backends()["cpu"]
variant = Path(kernel.__file__).parent
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
namespaces = [getattr(torch.ops, name) for name in (metadata.id, "linearpatch")]

d = 192
x, residual, scale, gain = torch.randn(3, 5, d), torch.randn(3, 5, d), torch.rand(d), torch.rand(d)
others = {"pre_scale": torch.rand(d), "post_scale": torch.rand(d), "down": torch.randn(d, 3), "up": torch.randn(3, d)}


def results(of):
    given = x.clone().requires_grad_()
    patched = of.hadamard_patch(given, scale, **others)
    (gradient,) = torch.autograd.grad(patched.square().sum(), given)
    compiled = torch.compile(lambda x: of.hadamard_patch(x, scale) * 2, fullgraph=True, backend="aot_eager")(x)
    loss = of.topk_kl_loss(x[:, 0], torch.full((3, 2), 0.5), torch.tensor([[0, 1]] * 3))
    low = of.hadamard_patch(x.bfloat16(), scale), of.hadamard_patch(x.double(), scale)
    return patched, gradient, compiled, loss, *low, *of.add_patch_rms_norm(x, residual, scale, gain, 1e-6, **others)


told["same"] = [torch.equal(one, other) for one, other in zip(results(kernel), results(lp), strict=True)]
told["not trivial"] = not torch.equal(results(lp)[0], x)
# The operators of both are there, and the kernels of one are not the other's.
told["apart"] = namespaces[0].hadamard_patch.default is not namespaces[1].hadamard_patch.default
told["compiled"] = [space.hadamard_patch.default.has_kernel_for_dispatch_key("CPU") for space in namespaces]
try:
    kernel.hadamard_patch(x, torch.ones(64))
except kernel.InputError as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""

ABI = """
import json, sys
from kernel_abi_check import ObjectFile

print(json.dumps([str(one) for one in ObjectFile(sys.argv[1]).check_python_abi("3.9")]))
"""


def absolute_imports(folder: Path) -> list[str]:
    """What the files of a folder import that is neither torch nor of Python nor their own."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
    return sorted(found - set(sys.stdlib_module_names) - {"torch"})


def test_the_modules_import_nothing_but_torch_and_each_other(tmp_path: Path) -> None:
    """Triton's module is imported where Triton is."""
    files = operators_modules()
    assert {Path("ops/hadamard_patch/operator.py"), Path("hadamard.py"), Path("_ops.py")} <= set(files)
    assert not any("modeling" in file.parts for file in files)
    write_modules(tmp_path, files, "ops_of_a_test")
    assert absolute_imports(tmp_path) == ["triton"]
    strings = "".join(file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.py"))
    assert not re.search(r"(import_module\(|= )f?\"linearpatch_kernels\.", strings)


def run(program: str, place: Path) -> Any:
    """What a program prints, in a process that has the package kernels, too."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{KERNELS}", "HF_HUB_OFFLINE": "1", "LINEARPATCH_BACKEND": ""},
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's lines write."""
    if KERNELS is None:
        pytest.skip("HF_KERNELS does not say where the package kernels is: make slow installs it")
    if compiler is None:
        pytest.skip("no C++ compiler")
    place = tmp_path_factory.mktemp("layout")
    lines = re.sub(r"\bDIR\b", str(place), block_of(ROOT / "docs/add/engine.md", "sh"))
    finished = subprocess.run(
        ["bash", "-euc", lines],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(KERNELS),
            "HF_HUB_OFFLINE": "1",
            "LINEARPATCH_BACKEND": "",
        },
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    _, function, symbols = finished.stdout.splitlines()
    assert function.startswith("<function hadamard_patch at ")
    assert symbols.startswith("[")  # which there are, goes by the compiler and the C library
    return place


@pytest.mark.slow
def test_kernels_loads_it_beside_the_package(layout: Path) -> None:
    told = run(PROGRAM, layout)
    assert told["same"] == [True] * 8
    assert told["not trivial"]
    assert told["alone"]
    assert told["apart"]
    assert told["compiled"] == [True, True]
    assert told["cpu"] is True
    assert told["id"] == told["module"]
    assert re.fullmatch(r"_linearpatch_kernels_cpu_[0-9a-f]{8}", told["id"])
    assert told["refused"] == "scale must be floating [192] as x's last dimension, not torch.float32 [64]"


@pytest.mark.slow
def test_its_shared_object_keeps_to_pythons_stable_abi(layout: Path) -> None:
    assert run(ABI, layout / "build" / VARIANT / "_C.abi3.so") == []


@pytest.mark.slow
def test_a_layout_that_is_there_is_not_written_over(layout: Path) -> None:
    again = subprocess.run(
        [sys.executable, "tools/kernels_layout.py", layout], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert again.returncode == 1
    assert f"{VARIANT} is there already: remove it" in again.stderr
